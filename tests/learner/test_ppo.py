"""The loop of PPO: by hand with a learner that records, and for real with one that learns, all in one process."""

import asyncio
import contextlib
import math
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch

from actors.config import MissingEos, RolloutConfig
from actors.prompts import PromptStream
from actors.rollout import rollout
from actors.trajectory import Completion, SampleKey, Trajectory
from learner.config import ImportanceConfig, KLConfig, NetworkConfig, OptimizerConfig, PPOConfig, PretrainingConfig
from learner.data.buffer import Buffer
from learner.data.ledger import Ledger, audit
from learner.ppo import Parts, ppo
from learner.weights.checkpoint import Checkpoints
from learner.worker.ppo_steps import Evaluation
from learner.worker.skipped_steps import NonFiniteSteps
from reward_server.sources import FunctionSource
from tests.fakes import prompts
from tests.hf_generator import HfGenerator, SourceScorer
from tests.tiny_batches import example

# --- by hand: golden numbers of two responses, of 5 and of 3 tokens

LOGPROBS = [(-1.2, -0.7, -2.3, -0.4, -0.9), (-0.5, -1.5, -0.8)]
REFERENCE = [(-1.0, -0.9, -2.0, -0.6, -1.1), (-0.6, -1.1, -1.0)]
VALUES = [(0.1, 0.25, -0.05, 0.4, 0.6), (0.3, -0.2, 0.1)]
SCORES = (0.85, -1.0)
KL = (0.1, -0.1)  # nats of each response


def trajectories(shift: float = 0.0, version: int = 0) -> list[Trajectory]:
    """The two responses, as a sampler saw them whose log-probs were `shift` lower."""
    return [
        Trajectory(
            key=SampleKey(prompt_id=f"p{row}", epoch=0, k=0, attempt=0),
            prompt=(),
            completion=Completion(
                query_ids=(5, 6),
                response_ids=(7,) * len(logprobs),
                logprobs=tuple(value - shift for value in logprobs),
                versions=(version,) * len(logprobs),
                ended=True,
                text="",
            ),
            score=score,
            parts={},
        )
        for row, (logprobs, score) in enumerate(zip(LOGPROBS, SCORES, strict=True))
    ]


@dataclass
class RecordingLearner:
    """Answers with the golden numbers, and keeps what it is to learn: (targets, minibatches, text, constants)."""

    evaluated: list[list[list[int]]] = field(default_factory=list)
    updates: list[Any] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    saved: list[tuple[int, float]] = field(default_factory=list)
    pause_s: float = 0.0

    async def evaluate(self, batch, minibatches, max_tokens, temperature):
        self.events.append("evaluate")
        self.evaluated.append(minibatches)
        padded = {
            name: torch.tensor([[*row, *[99.0] * (5 - len(row))] for row in rows])  # garbage in the padding
            for name, rows in (("logprobs", LOGPROBS), ("ref_logprobs", REFERENCE), ("values", VALUES))
        }
        return Evaluation(**padded, entropies=torch.ones(2, 5))

    async def update(self, batch, targets, minibatches, pretraining, step):
        self.events.append("update")
        self.updates.append((targets, minibatches, pretraining, step))
        names = ("loss/policy", "loss/value", "ratio/mean", "policy/clip_fraction", "policy/approx_kl")
        return [
            dict.fromkeys((*names, "value/clip_fraction"), 4.0) | {"tokens": 4.0, "value_tokens": 4.0}
            for _ in minibatches
        ]


def by_hand(shift: float = 0.0, iterations: int = 1, learner: RecordingLearner | None = None, beta=None, **settings):
    """Run the loop on the golden trajectories; (learner, log lines)."""
    config = PPOConfig(
        **{
            "iterations": iterations,
            "prompts_per_batch": 2,
            "minibatch_size": 1,
            "pretraining": PretrainingConfig(coef=0.0),
            "checkpoint_every": 0,
        }
        | settings
    )
    learner, logged = learner or RecordingLearner(), []

    async def run():
        buffer = Buffer(2, 1, config.max_staleness, ledger=Ledger(None))

        async def publish(version):
            learner.events.append(f"publish {version}")
            return {"publish/tensors": 1.0}

        async def save(version, beta):
            learner.events.append(f"save {version}")
            learner.saved.append((version, beta))

        async def measure(version):
            learner.events.append(f"measure {version} at {buffer.version}")
            await asyncio.sleep(learner.pause_s)
            return {"heldout/gold": 0.5} if version == 2 else {}

        async def sample():
            for _ in range(iterations):
                tickets = await buffer.admit(1) + await buffer.admit(1)
                for ticket, trajectory in zip(tickets, trajectories(shift, buffer.version), strict=True):
                    buffer.put(ticket, [trajectory])

        sampling = asyncio.create_task(sample())
        parts = Parts(
            buffer=buffer,
            learner=learner,
            publish=publish,
            pretraining=lambda i, parts: [[example(4, 1)]] * parts,
            observe=lambda batch: {"gold/mean": float(len(batch))},
            measure=measure,
            save=save,
            beta=config.kl.coef if beta is None else beta,
            temperature=1.0,
        )
        await ppo(parts, config, lambda *line: logged.append(line))
        await sampling

    asyncio.run(run())
    return learner, logged


class FailingLearner(RecordingLearner):
    """Skips the policy's steps; the critic's are fine."""

    async def update(self, batch, targets, minibatches, pretraining, step):
        self.events.append("update")
        value = {"value_tokens": 4.0, "loss/value": 4.0, "value/clip_fraction": 4.0}
        return [{**value, "skipped/policy": 1.0, "nonfinite/policy/loss/policy": 1.0} for _ in range(2)]


def test_nothing_is_published_after_too_many_skipped_steps():
    learner = FailingLearner()
    with pytest.raises(NonFiniteSteps, match="ppo, step 2: 3 optimizer steps of the policy network"):
        by_hand(iterations=2, learner=learner)
    assert learner.events == ["evaluate", "update", "publish 1", "measure 1 at 0", "evaluate", "update"]
    _, logged = by_hand(learner=FailingLearner())
    assert logged[0][2]["optimizer/skipped_policy"] == 2.0


def test_rewards_advantages_and_returns_are_the_golden_ones():
    learner, logged = by_hand()
    ((targets, parts, _, step),) = learner.updates
    whitened = [
        [0.881645, 0.717596, 1.162071, 0.605835, 0.370676],
        [-1.487766, -0.892557, -1.3575, 0.0, 0.0],
    ]
    returns = [[0.745154, 0.767004, 0.814215, 0.8297, 0.846], [-0.90576, -0.9408, -1.004]]
    torch.testing.assert_close(targets.advantages, torch.tensor(whitened), rtol=0, atol=1e-5)
    torch.testing.assert_close(targets.returns[0], torch.tensor(returns[0]), rtol=0, atol=1e-5)
    torch.testing.assert_close(targets.returns[1, :3], torch.tensor(returns[1]), rtol=0, atol=1e-5)
    assert targets.weights is None
    assert sorted(parts) == [[0], [1]]
    assert (step.clip, step.value_clip, step.temperature) == (0.2, 0.2, 1.0)
    ((stage, number, metrics),) = logged
    assert (stage, number) == ("ppo", 1)
    assert metrics["reward/mean"] == pytest.approx((0.848 - 0.998) / 2)  # score - beta * KL of each
    assert metrics["kl/mean"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["kl/std"] == pytest.approx(0.1)
    assert metrics["gold/mean"] == 2.0
    assert metrics["publish/tensors"] == 1.0
    assert metrics["buffer/trained"] == 2.0
    assert metrics["loss/policy"] == 1.0


def test_whitened_rewards_keep_their_mean_and_change_the_returns():
    learner, _ = by_hand(whiten_rewards=True)
    targets = learner.updates[0][0]
    # the last token's return is its reward alone: row 1 1.845637, row 2 -2.142933
    assert targets.returns[0, 4].item() == pytest.approx(1.845637, abs=1e-5)
    assert targets.returns[1, 2].item() == pytest.approx(-2.142933, abs=1e-5)


def test_each_iteration_evaluates_updates_and_publishes_the_next_version():
    learner, logged = by_hand(iterations=3)
    events = [("evaluate", "update", f"publish {i}", f"measure {i} at {i - 1}") for i in (1, 2, 3)]
    assert learner.events == [event for iteration in events for event in iteration]
    assert [(stage, step) for stage, step, _ in logged] == [("ppo", 1), ("ppo", 2), ("ppo", 3)]
    assert [metrics["progress/version"] for *_, metrics in logged] == [1.0, 2.0, 3.0]


def test_new_weights_are_measured_before_more_is_sampled_and_that_is_no_part_of_the_iterations_time():
    learner = RecordingLearner(pause_s=0.5)
    learner, logged = by_hand(iterations=2, learner=learner)
    first, second = (metrics for *_, metrics in logged)
    assert "heldout/gold" not in first
    assert second["heldout/gold"] == 0.5
    assert learner.events[3] == "measure 1 at 0"  # the buffer has not advanced: nobody may sample for the next batch
    for metrics in (first, second):
        laps = sum(metrics[f"time/{name}"] for name in ("rollout", "evaluate", "update", "publish"))
        assert metrics["time/iteration"] == pytest.approx(laps)
        assert laps < learner.pause_s


def test_epochs_split_the_batch_anew_and_are_evaluated_in_the_first_split():
    learner, _ = by_hand(iterations=8, epochs=2)
    for evaluated, (_, parts, _, _) in zip(learner.evaluated, learner.updates, strict=True):
        assert evaluated == parts[:2]
        assert sorted(parts[:2]) == sorted(parts[2:]) == [[0], [1]]
    orders = [parts for _, parts, _, _ in learner.updates]
    assert len({str(order) for order in orders}) > 1
    assert [parts for _, parts, _, _ in by_hand(iterations=8, epochs=2)[0].updates] == orders


def test_the_policys_rate_warms_up_and_the_critics_does_not():
    optimizer = OptimizerConfig(lr=1.0)
    learner, _ = by_hand(iterations=4, warmup_iterations=2, policy_optimizer=optimizer, critic_optimizer=optimizer)
    assert [step.policy_lr for *_, step in learner.updates] == pytest.approx([0.1, 0.55, 1.0, 1.0])
    assert [step.critic_lr for *_, step in learner.updates] == [1.0] * 4


def test_an_adaptive_beta_changes_after_the_iteration_that_measured_the_kl():
    # KL 0 against a target of 6: error -1, held at -.2; 2 episodes of a horizon of 10
    kl = KLConfig(coef=0.5, target=6.0, horizon=10)
    learner, logged = by_hand(iterations=3, kl=kl)
    factor = 1 - 0.2 * 2 / 10
    betas = [0.5, 0.5 * factor, 0.5 * factor**2]
    assert [metrics["kl/coef"] for *_, metrics in logged] == pytest.approx(betas)
    for beta, (targets, *_) in zip(betas, learner.updates, strict=True):
        # the last token's return is its reward: score - beta * (lp - ref)
        assert targets.returns[0, 4].item() == pytest.approx(0.85 - beta * 0.2, abs=1e-6)


def test_without_a_penalty_the_kl_is_still_measured():
    learner, ((_, _, metrics),) = by_hand(kl=KLConfig(coef=0.0))
    assert metrics["kl/coef"] == 0.0
    assert metrics["kl/std"] == pytest.approx(0.1)
    # k2 of the golden numbers is .125, and (.005 + .08 + .02) for the other response
    assert metrics["kl/k2"] == pytest.approx((0.125 + 0.105) / 2)
    assert metrics["kl/k3"] > 0.1
    assert metrics["reward/mean"] == metrics["score/mean"] == pytest.approx((0.85 - 1.0) / 2)
    assert learner.updates[0][0].returns[0, 4].item() == pytest.approx(0.85)  # the score alone


def test_a_checkpoint_follows_every_so_many_iterations_and_the_last_with_the_next_beta():
    kl = KLConfig(coef=0.5, target=6.0, horizon=10)
    learner, _ = by_hand(iterations=5, kl=kl, checkpoint_every=2)
    factor = 1 - 0.2 * 2 / 10
    assert [version for version, _ in learner.saved] == [2, 4, 5]
    assert [beta for _, beta in learner.saved] == pytest.approx([0.5 * factor**n for n in (2, 4, 5)])
    done = [event for event in learner.events if not event.startswith("measure")]
    assert done[:7] == ["evaluate", "update", "publish 1", "evaluate", "update", "publish 2", "save 2"]
    assert by_hand(iterations=2, checkpoint_every=0)[0].saved == []


def test_the_loop_starts_from_the_beta_that_it_is_given():
    _, logged = by_hand(iterations=2, kl=KLConfig(coef=0.5), beta=0.25)
    assert [metrics["kl/coef"] for *_, metrics in logged] == [0.25, 0.25]


def test_a_fixed_beta_stays():
    _, logged = by_hand(iterations=3, kl=KLConfig(coef=0.5))
    assert [metrics["kl/coef"] for *_, metrics in logged] == [0.5] * 3


def test_staleness_brings_importance_weights_up_to_the_cap():
    learner, logged = by_hand(shift=0.5, max_staleness=1, importance=ImportanceConfig(cap=1.5))
    weights = learner.updates[0][0].weights
    assert weights[0].tolist() == pytest.approx([1.5] * 5)  # exp(.5) = 1.65, cut
    assert weights[1].tolist() == pytest.approx([1.5, 1.5, 1.5, 0.0, 0.0])
    learner, logged = by_hand(shift=-0.5, max_staleness=1)
    assert learner.updates[0][0].weights[0].tolist() == pytest.approx([math.exp(-0.5)] * 5)
    assert logged[0][2]["importance/log_ratio_max"] == pytest.approx(0.5)
    masked = ImportanceConfig(method="mask", cap=1.5)
    learner, logged = by_hand(shift=0.5, max_staleness=1, importance=masked)
    assert not learner.updates[0][0].weights.any()
    assert logged[0][2]["importance/clipped_share"] == 1.0


def test_fresh_samples_have_no_weights_but_their_drift_is_reported():
    learner, logged = by_hand(shift=0.25)
    assert learner.updates[0][0].weights is None
    assert logged[0][2]["importance/log_ratio_mean"] == pytest.approx(0.25)


def test_without_a_coefficient_no_pretraining_text_is_asked_for():
    learner, _ = by_hand()
    assert learner.updates[0][2] == [[], []]
    learner, _ = by_hand(pretraining=PretrainingConfig(coef=2.0))
    assert learner.updates[0][2] == [[example(4, 1)]] * 2
    assert learner.updates[0][3].pretraining_coef == 2.0


def test_a_batch_that_does_not_come_stops_the_run_with_what_is_missing():
    async def run():
        buffer = Buffer(2, 1, 0, ledger=Ledger(None))
        await buffer.admit(2)
        config, never = PPOConfig(prompts_per_batch=2, rollout_deadline_s=0.01), cast(Any, None)
        parts = Parts(
            buffer=buffer,
            learner=RecordingLearner(),
            publish=never,
            pretraining=never,
            observe=never,
            measure=never,
            save=never,
            beta=0.0,
            temperature=1.0,
        )
        await ppo(parts, config, never)

    with pytest.raises(TimeoutError, match="batch 0: 2 of its 2 prompts are missing"):
        asyncio.run(run())


# --- for real: sampler, buffer, scores and a DeepSpeed learner

SMALL = {
    "prompts_per_batch": 32,
    "minibatch_size": 16,
    "warmup_iterations": 0,
    "policy_optimizer": OptimizerConfig(lr=1e-2),
    "critic_optimizer": OptimizerConfig(lr=4e-3),
    "pretraining": PretrainingConfig(coef=0.0),
    "network": NetworkConfig(dtype="float32"),
}
ROLLOUT = RolloutConfig(prompts_per_wave=16, max_new_tokens=6, missing_eos=MissingEos(rule="none"))


class Killed(BaseException):
    """The process ends here."""


async def unmeasured(version: int) -> dict[str, float]:
    return {}


def train(worker, learner, folders, run_dir=None, killed_at=None, **settings):
    """Run PPO for the share of letters; (metrics of each iteration, versions published, text asked for).

    With a `run_dir` it writes checkpoints there, and goes on from what it finds there; it is killed while it publishes
    version `killed_at`.
    """
    config = PPOConfig(**SMALL | settings)
    generator = HfGenerator(folders / "policy")
    scorer = SourceScorer(FunctionSource("tests.hf_generator:share_of_letters"))
    worker.unload()
    worker.load("policy", "policy", folders / "policy", config.network, config.policy_optimizer, config.ema_decay)
    worker.load("reference", "policy", folders / "policy", config.network)
    worker.load("critic", "value", folders / "reward", config.network, config.critic_optimizer)
    lines, versions, asked = [], [], []

    async def publish(version):
        generator.receive(worker, version)
        versions.append(version)
        if version == killed_at:
            raise Killed
        return {}

    def text(i, parts):
        asked.append(i)
        return [[example(12, 1, seed=100 * i + part) for _ in range(2)] for part in range(parts)]

    async def run():
        stream, stop = PromptStream(prompts(8), seed=0), asyncio.Event()
        ledger = Ledger(run_dir and run_dir / "ledger.jsonl", stream)
        checkpoints = Checkpoints(run_dir / "checkpoints", 1) if run_dir else None
        found = checkpoints and checkpoints.newest()
        start = found.version if found else 0
        buffer = Buffer(config.prompts_per_batch, 1, config.max_staleness, start, ledger=ledger)
        if found:
            await learner.load_state(found.networks, start)
            generator.receive(worker, start)
            buffer.restore(found.state["buffer"])
        elif run_dir and (run_dir / "ledger.jsonl").exists():
            ledger.resumed(0, kept=())

        async def save(version, beta):
            if checkpoints:
                await checkpoints.write(version, {"beta": beta, "buffer": buffer.snapshot()}, learner.save_state)
                ledger.committed(version)

        sampling = asyncio.create_task(rollout(generator, scorer, stream, buffer, generator.encoding, ROLLOUT, 0, stop))
        beta = found.state["beta"] if found else config.kl.coef
        parts = Parts(
            buffer=buffer,
            learner=learner,
            publish=publish,
            pretraining=text,
            observe=lambda _: {},
            measure=unmeasured,
            save=save,
            beta=beta,
            temperature=1.0,
        )
        await ppo(parts, config, lambda *line: lines.append(line[2]))
        stop.set()
        await sampling

    with contextlib.suppress(Killed):
        asyncio.run(run())
    return lines, versions, asked


NAMES = set(
    """
    score/mean score/std kl/mean kl/std kl/k2 kl/k3 kl/coef reward/mean reward/std response/length response/eos_rate
    loss/policy loss/value loss/pretraining ratio/mean ratio/max ratio/first_minibatch policy/clip_fraction
    policy/approx_kl policy/entropy value/mean value/explained_variance value/clip_fraction grad_norm/policy
    grad_norm/pretraining grad_norm/value staleness/mean staleness/max time/rollout time/evaluate time/update
    time/publish time/iteration buffer/issued buffer/trained progress/version importance/log_ratio_mean
    importance/effective_share
    """.split()  # noqa: SIM905
)


@pytest.mark.parametrize(
    ("network", "iterations"),
    [(NetworkConfig(dtype="float32"), 16), (NetworkConfig(lora_rank=8), 22)],
    ids=["full", "lora"],
)
def test_the_score_rises(worker, learner, folders, network, iterations):
    lines, versions, asked = train(worker, learner, folders, iterations=iterations, network=network, epochs=2)
    scores = [line["score/mean"] for line in lines]
    assert versions == list(range(1, iterations + 1))
    assert asked == []
    assert scores[0] < 0.45  # 26 letters among the characters that random weights write
    assert sum(scores[-3:]) / 3 > scores[0] + 0.2
    assert lines[-1]["kl/mean"] > 0.1 > abs(lines[0]["kl/mean"])
    # the sampler's and the learner's log-probs of a token are the same number, after every publish
    # (bfloat16 rounds an unlikely token by half a nat now and then; with the weights of a version before, the mean of
    # an iteration is above 0.2, and with the right ones it was 0.014 at most)
    gap, bound = ("max", 1e-4) if network.dtype == "float32" else ("mean", 0.05)
    assert max(line[f"importance/log_ratio_{gap}"] for line in lines) < bound
    assert {line["staleness/max"] for line in lines} == {0.0}


def test_with_a_pretraining_mix_every_metric_is_there_and_finite(worker, learner, folders):
    lines, versions, asked = train(worker, learner, folders, iterations=3, pretraining=PretrainingConfig(coef=1.0))
    assert versions == [1, 2, 3]
    assert asked == [0, 1, 2]
    for line in lines:
        assert line.keys() >= NAMES
        assert all(math.isfinite(value) for value in line.values()), line
    assert lines[-1]["buffer/trained"] == 96.0
    assert lines[0]["ratio/first_minibatch"] == pytest.approx(1.0, abs=1e-5)
    assert lines[0]["loss/pretraining"] > 5.0


def test_with_staleness_one_the_sampler_runs_ahead_and_the_score_still_rises(worker, learner, folders):
    lines, versions, _ = train(
        worker,
        learner,
        folders,
        iterations=16,
        epochs=2,
        max_staleness=1,
    )
    scores = [line["score/mean"] for line in lines]
    assert versions == list(range(1, 17))
    assert [line["staleness/max"] for line in lines] == [0.0] + [1.0] * 15
    assert lines[0]["importance/log_ratio_max"] < 1e-4
    assert all(line["importance/log_ratio_mean"] > 1e-3 for line in lines[1:])
    assert sum(scores[-3:]) / 3 > scores[0] + 0.2


def untimed(lines):
    return [{name: value for name, value in line.items() if not name.startswith("time/")} for line in lines]


def test_a_run_that_was_killed_ends_bitwise_as_one_that_was_not(worker, learner, folders, tmp_path):
    settings = {
        "iterations": 6,
        "checkpoint_every": 3,
        "prompts_per_batch": 12,  # an epoch has 8 prompts, so the checkpoint is in the middle of the fifth
        "minibatch_size": 4,
        "epochs": 2,
        "warmup_iterations": 4,
        "kl": KLConfig(coef=0.1, target=1.0, horizon=50),
        "pretraining": PretrainingConfig(coef=1.0),
    }
    whole, _, _ = train(worker, learner, folders, tmp_path / "whole", **settings)
    expected = [worker.state_of(name) for name in ("policy", "critic")]
    first, versions, _ = train(worker, learner, folders, tmp_path / "parts", killed_at=5, **settings)
    assert versions == [1, 2, 3, 4, 5]
    second, versions, asked = train(worker, learner, folders, tmp_path / "parts", **settings)
    assert (versions, asked) == ([4, 5, 6], [3, 4, 5])
    found = [worker.state_of(name) for name in ("policy", "critic")]
    for one, other in zip(expected, found, strict=True):
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            assert torch.equal(tensor, other[name]), name
    assert untimed(first) == untimed(whole[:4])
    assert untimed(second) == untimed(whole[3:])
    again, versions, _ = train(worker, learner, folders, tmp_path / "parts", **settings)  # it is complete
    assert (again, versions) == ([], [])
    counts = audit(tmp_path / "parts" / "ledger.jsonl")
    assert (counts.violations, counts.trained, counts.iterations, counts.twice) == ((), 72, 6, 0)
    assert (counts.resumed, counts.committed) == (2, 6)
    assert counts.tokens == audit(tmp_path / "whole" / "ledger.jsonl").tokens


def test_an_asynchronous_run_that_was_killed_again_and_again_trains_every_sample_once(
    worker, learner, folders, tmp_path
):
    settings = {"iterations": 6, "checkpoint_every": 2, "prompts_per_batch": 8, "minibatch_size": 4, "max_staleness": 2}
    steps = []
    for killed_at in (1, 4, 6, None):
        lines, _, _ = train(worker, learner, folders, tmp_path, killed_at=killed_at, **settings)
        steps.append([line["progress/version"] for line in lines])
    assert steps == [[], [1, 2, 3], [3, 4, 5], [5, 6]]
    counts = audit(tmp_path / "ledger.jsonl")
    assert (counts.violations, counts.trained, counts.twice, counts.resumed) == ((), 48, 0, 3)
    assert counts.issued == 48 + sum(counts.dropped.values()) + counts.outstanding
    assert counts.staleness <= 2
