"""Many ranks as one: what they return is added up, and two real ranks take the very steps that one takes."""

import asyncio
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from learner.config import NetworkConfig, OptimizerConfig
from learner.data.batch import collate, minibatches
from learner.maths.losses import add_sums
from learner.weights.checkpoint import NotSaved
from learner.worker.group import LearnerGroup, RanksDiffer
from learner.worker.ppo_steps import Evaluation, PPOStep, Targets
from tests.ranks import InProcess, processes
from tests.tiny_batches import example, tokens, trajectory

ADAM = OptimizerConfig(lr=1e-2)
FULL = NetworkConfig(dtype="float32")
STEP = PPOStep(
    clip=0.2,
    value_clip=0.2,
    pretraining_coef=2.0,
    temperature=1.0,
    max_tokens=24,
    pretraining_max_tokens=24,
    pretraining_normaliser="tokens",
    policy_lr=1e-2,
    critic_lr=1e-2,
)
BOUND = 2e-5
"""Of a weight's difference after steps of 1e-2: sums in another order, through Adam's division."""


def close(numbers):
    return pytest.approx(numbers, rel=1e-4, abs=1e-6)


# --- two fakes: sums


@dataclass
class FakeRank:
    """Answers with numbers made of its own."""

    share: float
    calls: list[tuple] = field(default_factory=list)

    async def language_model_loss(self, *args):
        self.calls.append(args)
        return {"nll": self.share}

    async def language_model_step(self, *args):
        return {"nll": 2 * self.share, "grad_norm": 0.5}

    async def ranking_step(self, *args):
        return {"loss": self.share} if self.share < 1 else {"loss": self.share, "pairs": 6.0}

    async def last_values(self, name, sequences, max_tokens):
        return torch.tensor([self.share, 0.0]) if self.share < 1 else torch.tensor([0.0, self.share])

    async def evaluate(self, *args):
        return Evaluation(**{name: torch.full((2, 3), self.share) for name in Evaluation.__dataclass_fields__})

    async def update(self, *args):
        return [{"loss/policy": self.share}, {"loss/policy": 10 * self.share, "tokens": 4.0}]

    async def load(self, *args):
        return 1000

    async def probe_logprobs(self, sequences):
        return [[self.share]]


@pytest.fixture
def fakes():
    return LearnerGroup([FakeRank(0.25), FakeRank(3.0)])


def call(coroutine):
    return asyncio.run(coroutine)


def test_losses_of_the_ranks_are_added_and_divided_by_the_targets_of_all(fakes):
    examples = [example(7, 3), example(9, 5)]  # 4 + 4 targets
    assert call(fakes.language_model_loss("policy", examples, 64)) == pytest.approx(3.25 / 8)
    assert call(fakes.language_model_step("policy", examples, 64, 1e-3)) == pytest.approx(
        {"loss": 6.5 / 8, "grad_norm": 1.0}
    )
    assert all(rank.calls == [("policy", examples, 64)] for rank in fakes.ranks)  # everybody gets everything


def test_values_of_the_ranks_fill_one_array(fakes):
    assert call(fakes.last_values("reward", [(1,), (2,)], 64)).tolist() == [0.25, 3.0]


def test_an_evaluation_is_added_up_field_by_field(fakes):
    found = call(fakes.evaluate("batch", [[0, 1]], 64, 1.0))
    for name in Evaluation.__dataclass_fields__:
        assert torch.equal(getattr(found, name), torch.full((2, 3), 3.25)), name


def test_an_update_is_added_up_minibatch_by_minibatch(fakes):
    sums = call(fakes.update("batch", "targets", [[0], [1]], [[], []], STEP))
    assert sums == [{"loss/policy": 3.25}, {"loss/policy": 32.5, "tokens": 8.0}]


def test_what_is_the_same_on_every_rank_is_not_added(fakes):
    assert call(fakes.load("policy", "policy", Path("x"), FULL)) == 1000
    assert call(fakes.probe_logprobs([(1, 2)])) == [[0.25]]


def test_a_sum_that_only_one_rank_has_is_kept(fakes):
    assert call(fakes.ranking_step("reward", [], [], [], "pairs", 64, 1e-3)) == {"loss": 3.25, "pairs": 6.0}
    assert add_sums([{}, {"a": 1.0}, {"b": 2.0, "a": 3.0}]) == {"a": 4.0, "b": 2.0}
    assert add_sums([{"ratio/max": 1.5}, {}, {"ratio/max": 1.25}]) == {"ratio/max": 1.5}


def test_ranks_that_do_not_return_the_same_minibatches_are_an_error(fakes):
    async def shorter(*args):
        return [{"loss/policy": 1.0}]

    fakes.ranks[1].update = shorter
    with pytest.raises(ValueError, match="zip"):
        call(fakes.update("batch", "targets", [[0], [1]], [[], []], STEP))


def ends_of(monkeypatch, **ends):
    """Two ranks whose `unload` ends as these say."""
    monkeypatch.setattr("learner.worker.group._LEARN_S", 0.05)

    class Rank:
        def __init__(self, end):
            self.end = end

        async def unload(self):
            if self.end == "hangs":
                await asyncio.sleep(60)
            if isinstance(self.end, Exception):
                raise self.end
            return 1000

    return LearnerGroup([Rank(end) for end in ends.values()])


def test_an_error_that_all_ranks_agree_on_is_raised_as_it_is(monkeypatch):
    with pytest.raises(ValueError, match=r"^another layout$"):
        call(ends_of(monkeypatch, a=ValueError("another layout"), b=ValueError("another layout")).unload())


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("done", "done"),
        ("hangs", "TimeoutError: it waits for the others"),
        (RuntimeError("Connection closed by peer"), "RuntimeError: Connection closed by peer"),
    ],
)
def test_an_error_of_one_rank_alone_ends_the_call_for_all_with_the_ends_of_both(monkeypatch, other, said):
    error = MemoryError("no room")
    for ends in ({"a": error, "b": other}, {"a": other, "b": error}):
        with pytest.raises(RanksDiffer) as raised:
            call(ends_of(monkeypatch, **ends).unload())
        words = [said if end is other else "MemoryError: no room" for end in ends.values()]
        assert str(raised.value).endswith(f"ranks of the learner: rank 0: {words[0]}; rank 1: {words[1]}")


# --- two processes: the same steps


@pytest.fixture(scope="module")
def two():
    group, ranks = processes(2)
    yield group
    for process in ranks:
        process.close()


@pytest.fixture
def one_and_two(worker, two):
    yield {"one": LearnerGroup([InProcess(worker)]), "two": two}
    call(two.unload())


def saved(group: LearnerGroup, name: str, path: Path, ema: bool = False) -> dict[str, torch.Tensor]:
    call(group.save(name, path, ema))
    return load_file(path / "model.safetensors")


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> None:
    """Within BOUND, and moved from the start by far more than that."""
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert (two[name] - weight).abs().max() <= BOUND, name
    assert max((weight - start[name]).abs().max() for name, weight in one.items()) > 100 * BOUND


def assert_ranks_agree(group: LearnerGroup) -> None:
    first, second = (dict(weights) for weights in call(group._every("weights")))
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_a_step_of_sft_is_that_of_one_rank(one_and_two, folders, tmp_path, clip):
    examples = [example(9, 4, 1), example(17, 1, 2), example(5, 3, 3)]
    optimizer = OptimizerConfig(lr=1e-2, clip_grad_norm=clip)
    found, weights = {}, {}
    for name, group in one_and_two.items():
        call(group.load("policy", "policy", folders / "policy", FULL, optimizer))
        first = call(group.language_model_step("policy", examples, 24, 1e-2))
        found[name] = (*first.values(), call(group.language_model_loss("policy", examples, 24)))
        weights[name] = saved(group, "policy", tmp_path / name)
    assert found["two"] == close(found["one"])
    assert found["one"][2] < found["one"][1]  # (gradient norm, loss, loss after)
    assert_same(weights["one"], weights["two"], load_file(folders / "policy" / "model.safetensors"))
    assert_ranks_agree(one_and_two["two"])


def test_a_ranking_step_is_that_of_one_rank(one_and_two, folders, tmp_path):
    groups = [[tokens(5 + (k + g) % 4, 10 * g + k) for k in range(4)] for g in range(3)]
    ranks = [[0, 1, 2, 3], [1, 0, 0, 2], [0, 0, 0, 0]]
    found, values, weights = {}, {}, {}
    for name, group in one_and_two.items():
        call(group.load("reward", "value", folders / "reward", FULL, ADAM))
        found[name] = call(group.ranking_step("reward", groups, ranks, [1.0] * 3, "pairs", 40, 1e-2))
        values[name] = call(group.last_values("reward", [s for g in groups for s in g], 40))
        weights[name] = saved(group, "reward", tmp_path / name)
    assert found["two"] == close(found["one"])
    assert found["one"]["pairs"] == 11
    torch.testing.assert_close(values["two"], values["one"], rtol=0, atol=1e-3)
    assert_same(weights["one"], weights["two"], load_file(folders / "reward" / "model.safetensors"))


def ppo_inputs(group: LearnerGroup, folders: Path, episodes: int, size: int, texts: int, stage: int = 1):
    """Networks loaded, and what an update needs; advantages and returns are made up."""
    optimizer = ADAM.model_copy(update={"zero_stage": stage})
    call(group.load("policy", "policy", folders / "policy", FULL, optimizer, 0.5))
    call(group.load("reference", "policy", folders / "policy", FULL, optimizer, frozen=True))
    call(group.load("critic", "value", folders / "reward", FULL, optimizer))
    batch = collate([trajectory(4 + i % 3, 3 + i % 4, i, score=float(i % 2)) for i in range(episodes)], pad_id=0)
    parts = minibatches(episodes, size, seed=0)
    old = call(group.evaluate(batch, parts, STEP.max_tokens, 1.0))
    noise = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(0))
    targets = Targets(
        evaluation=old, advantages=noise * batch.mask, returns=(old.values + 0.3) * batch.mask, weights=None
    )
    return batch, parts, targets, [[example(12, 1, 50 + 10 * i + j) for j in range(texts)] for i in range(len(parts))]


# 8 episodes: both ranks work all the time. 2 of 1: a rank always has nothing to do for policy, text and critic.
@pytest.mark.parametrize(("episodes", "size", "texts"), [(8, 4, 2), (2, 1, 1), (2, 1, 2)])
def test_ppo_steps_are_those_of_one_rank(one_and_two, folders, tmp_path, episodes, size, texts):
    old, sums, weights = {}, {}, {}
    for name, group in one_and_two.items():
        batch, parts, targets, text = ppo_inputs(group, folders, episodes, size, texts)
        old[name] = targets.evaluation
        alone = call(group.response_logprobs("policy", batch, STEP.max_tokens, 1.0))
        torch.testing.assert_close(alone, old[name].logprobs, rtol=1e-4, atol=1e-5)
        sums[name] = call(group.update(batch, targets, parts, text, STEP))
        weights[name] = {
            "policy": saved(group, "policy", tmp_path / f"{name}-policy"),
            "ema": saved(group, "policy", tmp_path / f"{name}-ema", ema=True),
            "critic": saved(group, "critic", tmp_path / f"{name}-critic"),
        }
    for field_name in Evaluation.__dataclass_fields__:
        one, two = (getattr(old[name], field_name) for name in ("one", "two"))
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5, msg=field_name)
    for one, two in zip(sums["one"], sums["two"], strict=True):
        timeless = [{k: v for k, v in s.items() if not k.startswith("time/")} for s in (one, two)]
        assert timeless[1] == pytest.approx(timeless[0], rel=1e-3, abs=1e-4)
        assert {"grad_norm/policy", "grad_norm/pretraining", "grad_norm/value", "tokens"} <= one.keys()
    for kind, folder in (("policy", "policy"), ("ema", "policy"), ("critic", "reward")):
        start = load_file(folders / folder / "model.safetensors")
        assert_same(weights["one"][kind], weights["two"][kind], start)
    assert_ranks_agree(one_and_two["two"])


@pytest.mark.parametrize(("dtype", "stage", "rel"), [("float32", 1, 1e-4), ("float32", 0, 1e-4), ("bfloat16", 1, 2e-2)])
def test_a_rank_without_a_sequence_takes_part_in_the_step(one_and_two, folders, dtype, stage, rel):
    found = {}
    for name, group in one_and_two.items():
        optimizer = OptimizerConfig(lr=1e-2, zero_stage=stage)
        call(group.load("policy", "policy", folders / "policy", NetworkConfig(dtype=dtype), optimizer, 0.5))
        found[name] = [
            number
            for _ in range(2)
            for number in call(group.language_model_step("policy", [example(9, 4)], 64, 1e-2)).values()
        ]
    assert found["two"] == pytest.approx(found["one"], rel=rel)
    assert found["one"][3] < found["one"][1]
    assert_ranks_agree(one_and_two["two"])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_is_not_finite_on_one_rank_skips_the_step_on_both(one_and_two, folders, stage):
    group = one_and_two["two"]
    batch, parts, targets, text = ppo_inputs(group, folders, episodes=4, size=2, texts=1, stage=stage)
    targets.advantages[parts[0][0], 0] = float("nan")  # of the first minibatch, and one rank's
    policy, critic = (call(group._every("state_of", name)) for name in ("policy", "critic"))
    first, second = call(group.update(batch, targets, parts[:1] * 2, text, STEP))
    assert first["skipped/policy"] == second["skipped/policy"] == 1.0
    assert {"nonfinite/policy/loss/policy", "time/policy", "grad_norm/value"} <= first.keys()
    assert not {"tokens", "loss/policy", "skipped/value"} & first.keys()
    assert_equal(policy, call(group._every("state_of", "policy")))
    with pytest.raises(AssertionError):
        assert_equal(critic, call(group._every("state_of", "critic")))  # the critic's own gradient was fine


def assert_equal(one: list[dict[str, torch.Tensor]], two: list[dict[str, torch.Tensor]]) -> None:
    for before, after in zip(one, two, strict=True):
        assert all(torch.equal(value, after[name]) for name, value in before.items())


# --- stop and go on


@pytest.mark.parametrize(
    ("dtype", "stage", "lora"),
    [
        ("float32", 0, 0),
        ("float32", 1, 4),
        ("bfloat16", 1, 0),
        ("float32", 2, 0),
        ("bfloat16", 2, 4),
        ("float32", 3, 0),
        ("bfloat16", 3, 4),
    ],
)
def test_two_steps_then_two_from_the_saved_state_are_four(one_and_two, folders, tmp_path, dtype, stage, lora):
    network = NetworkConfig(dtype=dtype, lora_rank=lora)
    optimizer = OptimizerConfig(lr=1e-2, zero_stage=stage)
    for name, group in one_and_two.items():
        ends = []
        for resumed in (False, True):
            settings = {"ema_decay": 0.5, "residual_dropout": 0.1}
            call(group.load("policy", "policy", folders / "policy", network, optimizer, **settings))
            if resumed:
                call(group.load_state(tmp_path / name, 2))
            for step in range(2 if resumed else 0, 4):
                if step == 2 and not resumed:
                    call(group.save_state(tmp_path / name))
                call(group.language_model_step("policy", [example(9, 4, step), example(6, 3, 10 + step)], 24, 1e-2))
            ends.append(call(group._every("state_of", "policy")))
            call(group.unload())
        assert_equal(*ends)


@pytest.mark.parametrize(
    ("stage", "file"),
    [(0, "rank-1.pt"), (1, "layout.json"), (1, "deepspeed/*zero_pp_rank_1*"), (3, "deepspeed/*zero_pp_rank_1*")],
)
def test_ranks_of_which_one_cannot_save_agree_on_it_and_go_on(one_and_two, folders, tmp_path, stage, file):
    """Else the other one waits for it until the deadline of the whole group."""
    group = one_and_two["two"]
    optimizer = OptimizerConfig(lr=1e-2, zero_stage=stage)
    call(group.load("policy", "policy", folders / "policy", FULL, optimizer))
    call(group._every("fill_disk", file))
    began = time.monotonic()
    reason = r"/full/policy was not written: rank \d of the learner: OSError: \[Errno 28\] No space left .*: '.*policy/"
    reason += re.escape(file)
    with pytest.raises(NotSaved, match=reason.replace(r"\*", ".*")):
        call(group.save_state(tmp_path / "full"))
    call(group._every("fill_disk", ""))
    call(group.language_model_step("policy", [example(9, 4), example(6, 3)], 24, 1e-2))
    call(group.save_state(tmp_path / "whole"))
    call(group.load_state(tmp_path / "whole", 1))
    assert time.monotonic() - began < 20
    assert_ranks_agree(group)


def test_a_model_that_cannot_be_written_fails_on_every_rank(one_and_two, folders, tmp_path):
    group = one_and_two["two"]
    call(group.load("policy", "policy", folders / "policy", FULL, ADAM))
    (tmp_path / "file").touch()
    with pytest.raises(NotSaved, match=r"/policy was not written: rank 0 of the learner: NotADirectoryError: "):
        call(group.save("policy", tmp_path / "file" / "policy"))
    assert_ranks_agree(group)


def test_a_state_of_other_ranks_is_refused(one_and_two, folders, tmp_path):
    one, two = one_and_two["one"], one_and_two["two"]
    call(one.load("policy", "policy", folders / "policy", FULL, ADAM))
    call(one.save_state(tmp_path))
    call(two.load("policy", "policy", folders / "policy", FULL, ADAM))
    with pytest.raises(ValueError, match="saved with ranks = 1, this run has 2"):
        call(two.load_state(tmp_path, 1))
