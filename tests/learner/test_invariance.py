"""A step does not depend on how the work is cut: ranks, micro-batches, ZeRO stage, offload, recomputed activations.

Every loss of the three loops is held against plain PyTorch: the whole batch at once through the Hugging Face model,
losses written out again here, no DeepSpeed. The optimizer makes gradients visible in the weights: with eps = 1 and the
learning rate 1, Adam's first step is g / (|g| + 1).
"""

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from actors.transfer import GlooGroup, TransferError, checksum
from learner.config import NetworkConfig, OptimizerConfig, PublishConfig
from learner.data.batch import Batch, collate
from learner.worker.group import LearnerGroup
from learner.worker.networks import load_network, merged_weights
from learner.worker.ppo_steps import Evaluation, PPOStep, Targets
from tests.ranks import InProcess, processes
from tests.tiny_batches import example, tokens, trajectory
from tests.tiny_models import tiny_causal_lm, tiny_reward_model

BOUND = 2e-5
"""Of a weight after a step, in float32; the largest weight moves by 0.1 and more."""
HALF_BOUND = 0.03
"""The same where weights and activations are bfloat16, whose numbers near 1 are 0.008 apart."""
GAMMA = 3.0
TEMPERATURE = 0.7


@dataclass(frozen=True, kw_only=True)
class Cut:
    """One way to cut the work."""

    ranks: int
    stage: int
    budget: int
    recompute: bool = False
    offload: bool = False
    dtype: str = "float32"

    @property
    def network(self) -> NetworkConfig:
        return NetworkConfig.model_validate({"dtype": self.dtype, "gradient_checkpointing": self.recompute})

    @property
    def optimizer(self) -> OptimizerConfig:
        return OptimizerConfig.model_validate(
            {
                "lr": 1.0,
                "eps": 1.0,
                "zero_stage": self.stage,
                "offload_optimizer": "cpu" if self.offload else None,
                "offload_param": "cpu" if self.offload and self.stage == 3 else None,
            }
        )


# 14 tokens are less than the longest sequence: every one stands alone. 1000 are all of them at once.
CUTS = [
    Cut(ranks=ranks, stage=stage, budget=budget, recompute=recompute)
    for ranks in (1, 2)
    for stage, budget, recompute in (
        (0, 14, False),
        (0, 1000, True),
        (1, 1000, False),
        (1, 40, True),
        (2, 14, False),
        (2, 1000, True),
        (3, 1000, False),
        (3, 14, True),
    )
]
OFFLOADED = [Cut(ranks=ranks, stage=stage, budget=14, offload=True) for ranks in (1, 2) for stage in (1, 2, 3)]
HALF = [
    Cut(ranks=2, stage=stage, budget=14, dtype="bfloat16", offload=offload)
    for stage, offload in ((1, False), (1, True), (2, False), (2, True), (3, False), (3, True))
]


def call(coroutine):
    return asyncio.run(coroutine)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied policy most of whose matrices ZeRO 3 shards (those of 10,000 numbers and more), and a reward model."""
    root = tmp_path_factory.mktemp("invariance")
    tiny_causal_lm(root / "policy", hidden=72, tied=False)
    tiny_causal_lm(root / "tied", hidden=72)
    tiny_reward_model(root / "reward")
    _policy["model"] = causal(root / "policy").eval()
    return root


@pytest.fixture(scope="module")
def two() -> Iterator[LearnerGroup]:
    group, ranks = processes(2)
    yield group
    for process in ranks:
        process.close()


@pytest.fixture
def group_of(worker, two) -> Iterator[Callable[[int], LearnerGroup]]:
    yield lambda ranks: two if ranks == 2 else LearnerGroup([InProcess(worker)])
    call(two.unload())


# --- plain PyTorch


def causal(path: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(path)


def right_padded(sequences) -> Tensor:
    return nn.utils.rnn.pad_sequence([torch.tensor(s) for s in sequences], batch_first=True)


def text_loss(model: nn.Module, examples, by: str = "tokens") -> Tensor:
    """Cross entropy of the targets: a mean over tokens, or over sequences of their sums."""
    labels = [[i if m else -100 for i, m in zip(e.ids, e.loss_mask, strict=True)] for e in examples]
    targets = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in labels], batch_first=True, padding_value=-100)
    logits = model(right_padded([e.ids for e in examples])).logits
    total = functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), reduction="sum")
    return total / (sum(sum(e.loss_mask) for e in examples) if by == "tokens" else len(examples))


def policy_loss(model: nn.Module, batch: Batch, targets: Targets) -> Tensor:
    logprobs = (model(batch.ids).logits / TEMPERATURE).log_softmax(-1)
    new = logprobs.gather(1, batch.positions[..., None].expand(-1, -1, logprobs.shape[-1]))
    new = new.gather(2, batch.response_ids[..., None])[..., 0]
    ratio = (new - targets.evaluation.logprobs).exp()
    surrogate = torch.minimum(targets.advantages * ratio, targets.advantages * ratio.clip(0.8, 1.2))
    assert targets.weights is not None
    return -(targets.weights * surrogate)[batch.mask].mean()


def value_loss(model: nn.Module, batch: Batch, targets: Targets) -> Tensor:
    hidden = model.get_submodule("model")(input_ids=batch.ids).last_hidden_state
    values = functional.linear(hidden, model.get_parameter("score.weight"))[..., 0].gather(1, batch.positions)
    old = targets.evaluation.values
    near = torch.maximum(torch.minimum(values, old + 0.2), old - 0.2)
    worse = torch.maximum((values - targets.returns) ** 2, (near - targets.returns) ** 2)
    return 0.5 * worse[batch.mask].mean()


def ranking_loss(model: nn.Module, groups, ranks) -> Tensor:
    losses = []
    for sequences, order in zip(groups, ranks, strict=True):
        scores = [model(torch.tensor([ids])).logits[0, 0] for ids in sequences]
        pairs = [
            -functional.logsigmoid(scores[i] - scores[j])
            for i in range(len(order))
            for j in range(len(order))
            if order[i] < order[j]
        ]
        if pairs:
            losses.append(torch.stack(pairs).mean())
    return torch.stack(losses).mean()


def norm_of(model: nn.Module, loss: Tensor) -> float:
    """Norm of a loss's gradient, which is added to that of the others."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.stack([g.norm() for g in gradients if g is not None]).norm().item()


def stepped(model: nn.Module, *losses: Tensor) -> dict[str, Tensor]:
    """Weights after Adam's step on the sum of the losses."""
    model.zero_grad()
    torch.stack(losses).sum().backward()
    return {
        name: (p - (p.grad / (p.grad.abs() + 1) if p.grad is not None else 0)).detach()
        for name, p in model.named_parameters()
    }


# --- comparing


def saved(group: LearnerGroup, name: str, path: Path, ema: bool = False) -> dict[str, Tensor]:
    call(group.save(name, path, ema))
    return load_file(path / "model.safetensors")


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], start: Path, bound: float = BOUND) -> None:
    assert got.keys() == want.keys()
    gaps = {name: (got[name].float() - want[name]).abs().max().item() for name in want}
    assert max(gaps.values()) <= bound, max(gaps.items(), key=lambda item: item[1])
    moved = max((want[n] - w).abs().max().item() for n, w in load_file(start / "model.safetensors").items())
    assert moved > 3 * bound, "the step is too small to tell"


def ppo_inputs(episodes: int = 5) -> tuple[Batch, Targets]:
    """Responses of several lengths; every number that a step learns from is made up, and far enough to be clipped."""
    batch = collate([trajectory(3 + i % 3, 2 + (3 * i) % 7, i, score=0.0) for i in range(episodes)], pad_id=0)
    generator = torch.Generator().manual_seed(0)

    def noise(scale: float, mean: float = 0.0) -> Tensor:
        return (mean + scale * torch.randn(batch.mask.shape, generator=generator)) * batch.mask

    model = causal_logprobs(batch)
    evaluation = Evaluation(
        logprobs=model + noise(0.3), ref_logprobs=noise(1.0), values=noise(0.3), entropies=noise(1.0)
    )
    return batch, Targets(
        evaluation=evaluation, advantages=noise(1.0), returns=noise(1.0), weights=noise(0.1, 1.0).abs()
    )


_policy: dict[str, nn.Module] = {}


def causal_logprobs(batch: Batch) -> Tensor:
    with torch.no_grad():
        logprobs = (_policy["model"](batch.ids).logits / TEMPERATURE).log_softmax(-1)
    places = logprobs.gather(1, batch.positions[..., None].expand(-1, -1, logprobs.shape[-1]))
    return places.gather(2, batch.response_ids[..., None])[..., 0] * batch.mask


TEXTS = [example(12, 1, 50), example(7, 1, 51), example(13, 1, 52)]
DEMONSTRATIONS = [example(9, 4, 1), example(17, 1, 2), example(5, 3, 3), example(11, 8, 4)]
GROUPS = [[tokens(5 + (k + g) % 4, 10 * g + k) for k in range(2 + g)] for g in range(3)]
RANKS = [[0, 1], [1, 0, 0], [2, 0, 1, 1]]


@pytest.fixture(scope="module")
def expected(models) -> dict[str, tuple]:
    """Weights after one step of every loss, and what is reported of it, by plain PyTorch."""
    found: dict[str, tuple] = {}
    for name, episodes, texts, by in (("ppo", 5, TEXTS, "tokens"), ("alone", 1, TEXTS[:1], "sequences")):
        batch, targets = ppo_inputs(episodes)
        model = causal(models / "policy")
        first, second = policy_loss(model, batch, targets), GAMMA * text_loss(model, texts, by)
        norms = norm_of(model, first), norm_of(model, second)
        critic = AutoModelForSequenceClassification.from_pretrained(models / "reward", num_labels=1)
        third = value_loss(critic, batch, targets)
        norms = (*norms, norm_of(critic, third))
        found[name] = stepped(model, first, second), stepped(critic, third), norms
    for name, examples in (("sft", DEMONSTRATIONS), ("sft alone", DEMONSTRATIONS[:1])):
        model = causal(models / "policy")
        loss = text_loss(model, examples)
        norm = norm_of(model, loss)
        found[name] = stepped(model, loss), loss.item(), norm
    reward = AutoModelForSequenceClassification.from_pretrained(models / "reward", num_labels=1)
    loss = ranking_loss(reward, GROUPS, RANKS)
    norm = norm_of(reward, loss)
    found["ranking"] = stepped(reward, loss), norm
    return found


def ppo_step(cut: Cut, texts_by: str) -> PPOStep:
    return PPOStep(
        clip=0.2,
        value_clip=0.2,
        pretraining_coef=GAMMA,
        temperature=TEMPERATURE,
        max_tokens=cut.budget,
        pretraining_max_tokens=30,
        pretraining_normaliser="tokens" if texts_by == "tokens" else "sequences",
        policy_lr=1.0,
        critic_lr=1.0,
    )


# --- every loss, every cut


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_a_step_of_ppo_is_that_of_plain_pytorch(group_of, models, expected, tmp_path, cut):
    check_ppo(group_of(cut.ranks), models, expected, tmp_path, cut, "ppo", 5, TEXTS, "tokens")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_rank_that_has_nothing_takes_part(group_of, models, expected, tmp_path, stage):
    cut = Cut(ranks=2, stage=stage, budget=1000)  # one episode, one text: the other rank idles in every pass
    check_ppo(group_of(2), models, expected, tmp_path, cut, "alone", 1, TEXTS[:1], "sequences")
    weights, loss, norm = expected["sft alone"]
    call(group_of(2).load("sft", "policy", models / "policy", cut.network, cut.optimizer))
    sums = call(group_of(2).language_model_step("sft", DEMONSTRATIONS[:1], 1000, 1.0))
    assert sums == pytest.approx({"loss": loss, "grad_norm": norm}, rel=1e-4)
    assert_close(saved(group_of(2), "sft", tmp_path / "sft"), weights, models / "policy")


def check_ppo(group, models, expected, tmp_path, cut, name, episodes, texts, by):
    policy, critic, norms = expected[name]
    batch, targets = ppo_inputs(episodes)
    call(group.load("policy", "policy", models / "policy", cut.network, cut.optimizer, 0.5))
    call(group.load("critic", "value", models / "reward", cut.network, cut.optimizer))
    (sums,) = call(group.update(batch, targets, [list(range(episodes))], [texts], ppo_step(cut, by)))
    assert [sums[f"grad_norm/{term}"] for term in ("policy", "pretraining", "value")] == pytest.approx(norms, rel=1e-4)
    assert_close(saved(group, "policy", tmp_path / "policy"), policy, models / "policy")
    assert_close(saved(group, "critic", tmp_path / "critic"), critic, models / "reward")
    start = load_file(models / "policy" / "model.safetensors")
    halfway = {key: 0.5 * (value + start[key]) for key, value in policy.items()}
    assert_close(saved(group, "policy", tmp_path / "ema", ema=True), halfway, models / "policy")
    assert_close(saved(group, "policy", tmp_path / "again"), policy, models / "policy")  # reading it changed nothing


@pytest.mark.parametrize("cut", CUTS[:2] + CUTS[4:], ids=str)
def test_steps_of_sft_and_ranking_are_those_of_plain_pytorch(group_of, models, expected, tmp_path, cut):
    group = group_of(cut.ranks)
    call(group.load("sft", "policy", models / "policy", cut.network, cut.optimizer))
    call(group.load("reward", "value", models / "reward", cut.network, cut.optimizer))
    weights, loss, norm = expected["sft"]
    sums = call(group.language_model_step("sft", DEMONSTRATIONS, cut.budget, 1.0))
    assert sums == pytest.approx({"loss": loss, "grad_norm": norm}, rel=1e-4)
    assert_close(saved(group, "sft", tmp_path / "sft"), weights, models / "policy")
    weights, norm = expected["ranking"]
    sums = call(group.ranking_step("reward", GROUPS, RANKS, [1.0] * len(RANKS), "pairs", cut.budget, 1.0))
    assert sums["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert_close(saved(group, "reward", tmp_path / "reward"), weights, models / "reward")


@pytest.mark.parametrize("stage", [1, 2])
def test_two_ranks_that_share_layers_learn_bitwise_what_they_do_without(two, models, stage):
    """Five sequences, of which each stands alone: one rank idles in the last pass."""
    found, optimizer = [], OptimizerConfig(lr=1e-2, zero_stage=stage)
    network = NetworkConfig(dtype="float32", last_layers=1)
    for shared in (True, False):
        call(two.load("policy", "policy", models / "policy", network, optimizer))
        call(two.load("reference", "policy", models / "policy", network))
        call(two.load("critic", "value", models / "reward", network, optimizer))
        call(two._every("share_trunks", shared))
        batch, targets = ppo_inputs()
        rows = [list(range(5))]
        old = call(two.evaluate(batch, rows, 14, TEMPERATURE))
        told = call(two.update(batch, targets, rows, [TEXTS], ppo_step(Cut(ranks=2, stage=stage, budget=14), "tokens")))
        states = [call(two._every("state_of", name)) for name in ("policy", "critic")]
        found.append((old, {k: v for k, v in told[0].items() if not k.startswith("time/")}, states))
        call(two.unload())
    (old, told, states), (old_alone, told_alone, states_alone) = found
    assert told == told_alone
    assert all(torch.equal(getattr(old, name), getattr(old_alone, name)) for name in Evaluation.__dataclass_fields__)
    for rank, alone in zip(chain(*states), chain(*states_alone), strict=True):
        assert all(torch.equal(value, alone[name]) for name, value in rank.items())


def two_plain_steps(model: nn.Module) -> dict[str, Tensor]:
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.5, betas=(0.9, 0.95), eps=1.0)
    for examples in (DEMONSTRATIONS, TEXTS):
        adam.zero_grad()
        text_loss(model, examples).backward()
        adam.step()
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("cut", OFFLOADED + HALF, ids=str)
def test_two_steps_offloaded_or_in_bfloat16(group_of, models, tmp_path, cut):
    group = group_of(cut.ranks)
    call(group.load("sft", "policy", models / "tied", cut.network, cut.optimizer))
    for examples in (DEMONSTRATIONS, TEXTS):  # the second adds to nothing of the first
        call(group.language_model_step("sft", examples, cut.budget, 0.5))
    want = two_plain_steps(causal(models / "tied"))
    assert_close(saved(group, "sft", tmp_path), want, models / "tied", HALF_BOUND if cut.dtype == "bfloat16" else BOUND)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 3), (2, 2), (2, 3)])
def test_lora_at_every_stage(group_of, models, tmp_path, ranks, stage):
    cut, network = Cut(ranks=ranks, stage=stage, budget=14), NetworkConfig(dtype="float32", lora_rank=4)
    group = group_of(ranks)
    call(group.load("sft", "policy", models / "policy", network, cut.optimizer))
    for examples in (DEMONSTRATIONS, TEXTS):
        call(group.language_model_step("sft", examples, 14, 0.5))
    torch.manual_seed(0)  # as `load` does, so that the adapters start alike
    plain = load_network("policy", models / "policy", network).model
    two_plain_steps(plain)
    want = {name: weight.clone() for name, weight in merged_weights(plain)}
    assert_close(saved(group, "sft", tmp_path), want, models / "policy")


# --- weights on their way out


def test_a_sharded_policy_is_published_whole(group_of, models):
    group, cut = group_of(2), Cut(ranks=2, stage=3, budget=14)
    call(group.load("policy", "policy", models / "policy", cut.network, cut.optimizer))
    call(group.load("reference", "policy", models / "policy", cut.network, cut.optimizer, frozen=True))
    plain = load_file(models / "policy" / "model.safetensors")
    manifest, received, sums = call(transfer(group, taken=None))
    assert dict(zip(manifest.names, manifest.shapes, strict=True)) == {n: tuple(t.shape) for n, t in plain.items()}
    assert sums == {name: checksum(tensor) for name, tensor in plain.items()}
    assert all(torch.equal(received[name], tensor) for name, tensor in plain.items())
    ids = tokens(9, 7)
    probe = call(group.probe_logprobs([ids]))[0]
    logits = causal(models / "policy")(torch.tensor([ids])).logits[0, :-1]
    want = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(probe), want.detach(), rtol=0, atol=1e-4)
    batch, _ = ppo_inputs()
    reference, policy = (call(group.response_logprobs(name, batch, 14, 1.0)) for name in ("reference", "policy"))
    torch.testing.assert_close(reference, policy, rtol=0, atol=1e-5)
    with pytest.raises(TransferError):
        call(transfer(group, taken=0))  # the receiver leaves, and no rank waits for ever
    assert call(group.probe_logprobs([ids]))[0] == pytest.approx(probe, abs=1e-5)


async def transfer(group: LearnerGroup, taken: int | None):
    """Send to a receiver in a thread, which leaves after `taken` buckets: (manifest, what it got, checksums)."""
    await group.open_sender(PublishConfig(bucket_mb=1, deadline_s=5.0))
    manifest, meeting = await group.transfer_manifest(), await group.listen_transfer(2, 1)
    received: dict[str, Tensor] = {}

    def receive() -> None:
        member = GlooGroup(meeting, 1)
        for bucket in list(manifest.buckets())[:taken]:
            buffer = torch.empty(bucket.size, dtype=torch.uint8)
            member.wait(member.broadcast(buffer), "a bucket")
            received.update(manifest.unpack(bucket, buffer))
        member.close()

    thread = threading.Thread(target=receive, daemon=True)
    thread.start()
    await group.connect_transfer()
    sums = await group.send_weights()
    thread.join(10)
    return manifest, received, sums
