"""One rank of the learner on tiny real models under DeepSpeed, held against plain PyTorch."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from learner.config import NetworkConfig, OptimizerConfig
from learner.data.batch import collate, minibatches
from learner.maths.losses import kwise_loss
from learner.worker.ppo_steps import PPOStep, Targets
from learner.worker.supervised import backward_language_model
from reward_server.model import raw_values
from tests.tiny_batches import example, trajectory
from tests.tiny_models import FAMILIES, tiny_causal_lm

ADAM = OptimizerConfig(lr=1e-2)
LORA = NetworkConfig(dtype="float32", lora_rank=4, last_layers=1)
FULL = NetworkConfig(dtype="float32")
STEP = PPOStep(
    clip=0.2,
    value_clip=0.2,
    pretraining_coef=1.0,
    temperature=1.0,
    max_tokens=64,
    pretraining_max_tokens=64,
    pretraining_normaliser="tokens",
    policy_lr=1e-3,
    critic_lr=1e-3,
)


def plain_nll(model, examples):
    """(sum of negative log-likelihood, targets), one sequence at a time and without padding."""
    total, count = torch.zeros(()), 0
    for e in examples:
        ids = torch.tensor([e.ids])
        logprobs = model(ids).logits[0, :-1].float().log_softmax(-1)
        for j in range(1, len(e.ids)):
            if e.loss_mask[j]:
                total, count = total - logprobs[j - 1, e.ids[j]], count + 1
    return total, count


def test_the_language_model_loss_is_that_of_unpadded_sequences(worker, folders):
    worker.load("policy", "policy", folders / "policy", FULL)
    examples = [example(9, 4, 1), example(17, 1, 2), example(5, 3, 3), example(8, 7, 4)]  # the last: an EOS alone
    total, _ = plain_nll(AutoModelForCausalLM.from_pretrained(folders / "policy"), examples)
    assert worker.language_model_loss("policy", examples, 24)["nll"] == pytest.approx(total.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("max_tokens", [8, 1000])
def test_gradients_of_many_microbatches_are_counted_once_each(worker, folders, dtype, max_tokens):
    worker.load("policy", "policy", folders / "policy", NetworkConfig(dtype=dtype), ADAM)
    examples = [example(7, 3, seed) for seed in range(4)]
    backward_language_model(worker.networks, "policy", examples, max_tokens, 1.0 / 16)
    engine = worker.networks.engine("policy")
    model = AutoModelForCausalLM.from_pretrained(folders / "policy", dtype=getattr(torch, dtype))
    total, count = plain_nll(model, examples)
    assert count == 16
    (total / count).backward()
    expected = torch.stack([p.grad.float().norm() for p in model.parameters() if p.grad is not None]).norm().item()
    assert engine.norm(engine.gradients()) == pytest.approx(expected, rel=1e-4 if dtype == "float32" else 2e-2)


def test_one_step_of_sft_is_one_step_of_adam_on_the_token_mean(worker, folders):
    worker.load("policy", "policy", folders / "policy", FULL, ADAM)
    examples = [example(9, 4, 1), example(17, 1, 2)]
    model = AutoModelForCausalLM.from_pretrained(folders / "policy")
    total, count = plain_nll(model, examples)
    adam = torch.optim.Adam(model.parameters(), lr=5e-3, betas=(0.9, 0.95), eps=1e-5)
    (total / count).backward()
    adam.step()
    result = worker.language_model_step("policy", examples, 24, lr=5e-3)
    assert result["nll"] == pytest.approx(total.item(), rel=1e-5)
    for (name, got), (_, want) in zip(worker.weights(), model.named_parameters(), strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=1e-4, atol=1e-6, msg=name)


def test_a_ranking_step_has_the_gradient_of_the_kwise_loss(worker, folders):
    worker.load("reward", "value", folders / "reward", FULL, ADAM)
    worker.normalise("reward", 1.0, 0.0)
    groups = [[example(6 + k, 1, 10 * g + k).ids for k in range(4)] for g in range(3)]
    ranks = [[0, 1, 2, 3], [1, 0, 0, 2], [0, 0, 0, 0]]
    model = AutoModelForSequenceClassification.from_pretrained(folders / "reward", num_labels=1)
    alone = [(torch.tensor(ids), [len(ids)], torch.tensor([len(ids) - 1])) for group in groups for ids in group]
    raw = torch.cat([raw_values(model, *sequence) for sequence in alone])
    order = torch.tensor([r for row in ranks for r in row])
    loss, prompts, _ = kwise_loss(raw, torch.arange(3).repeat_interleave(4), order, "pairs")
    assert prompts == 2  # the third prompt is all ties
    (loss / prompts).backward()
    expected = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
    sums = worker.ranking_step("reward", groups, ranks, [1.0] * len(ranks), "pairs", 30, lr=1e-3)
    assert sums["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert sums["grad_norm"] == pytest.approx(expected, rel=1e-3)
    assert sums["pairs"] == 6 + 5


def test_a_ranking_step_is_the_mean_by_weight_and_a_ranking_of_two_halves_is_one_of_one(worker, folders):
    groups = [[example(6 + k, 1, 10 * g + k).ids for k in range(3)] for g in range(2)]
    first, second, tied = [0, 1, 2], [2, 0, 0], [1, 1, 1]

    def gradient(rows, ranks, weights):
        worker.load("reward", "value", folders / "reward", FULL, ADAM)
        sums = worker.ranking_step("reward", [groups[i] for i in rows], ranks, weights, "pairs", 1000, lr=1e-3)
        return sums["loss"], sums["grad_norm"]

    loss, norm = gradient([0, 1], [first, second], [1.0, 1.0])
    halves = gradient([0, 1, 0], [first, second, first], [0.5, 1.0, 0.5])
    assert halves == pytest.approx((loss, norm), rel=1e-5)
    assert gradient([0, 1], [first, second], [3.0, 3.0]) == pytest.approx((3 * loss, norm), rel=1e-5)
    assert gradient([0, 1, 1], [first, second, tied], [1.0, 1.0, 5.0]) == pytest.approx((loss, norm), rel=1e-5)
    alone = gradient([0], [first], [1.0])
    assert gradient([0, 1], [first, second], [1.0, 1e-9]) == pytest.approx(alone, rel=1e-4)


def test_k_completions_are_k_forwards_however_many_pairs(worker, folders, monkeypatch):
    worker.load("reward", "value", folders / "reward", FULL, ADAM)
    groups = [[example(6 + k, 1, 10 * g + k).ids for k in range(2 + g)] for g in range(4)]  # K = 2, 3, 4, 5
    ranks = [list(range(len(group))) for group in groups]
    call, rows = worker.networks.call, []
    monkeypatch.setattr(
        worker.networks, "call", lambda name, ids, *places: rows.append(len(ids)) or call(name, ids, *places)
    )
    sums = worker.ranking_step("reward", groups, ranks, [1.0] * len(ranks), "pairs", 60, lr=1e-3)
    assert sums["pairs"] == 1 + 3 + 6 + 10
    assert sum(rows) == 2 + 3 + 4 + 5


def load_ppo(worker, folders, network):
    worker.load("policy", "policy", folders / "policy", network, ADAM, ema_decay=0.9)
    worker.load("reference", "policy", folders / "policy", network)
    worker.load("critic", "value", folders / "reward", network, ADAM)


def ppo_inputs(worker, pretraining_coef=1.0):
    batch = collate([trajectory(4 + i % 3, 3 + i % 4, i, score=float(i % 2)) for i in range(8)], pad_id=0)
    parts = minibatches(8, 4, seed=0)
    old = worker.evaluate(batch, parts, STEP.max_tokens, 1.0)
    advantages = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(0)) * batch.mask
    targets = Targets(evaluation=old, advantages=advantages, returns=old.values + 0.1, weights=None)
    return batch, parts, targets, [[example(12, 1, 5)], [example(12, 1, 6)]]


@pytest.mark.parametrize("network", [LORA, FULL])
def test_ppo_starts_at_the_reference_with_ratio_one(worker, folders, network):
    load_ppo(worker, folders, network)
    batch, parts, targets, text = ppo_inputs(worker)
    assert worker.stats() == {"version": 0.0}
    old = targets.evaluation
    torch.testing.assert_close(old.logprobs, old.ref_logprobs, rtol=0, atol=1e-6)
    assert old.logprobs[~batch.mask].abs().max() == 0
    model = AutoModelForCausalLM.from_pretrained(folders / "policy")
    for row in range(len(batch)):
        query, length = int(batch.query_len[row]), int(batch.response_len[row])
        ids = batch.ids[row : row + 1, : query + length]
        logprobs = model(ids).logits[0, query - 1 : -1].log_softmax(-1)
        want = logprobs.gather(1, ids[0, query:, None])[:, 0]
        torch.testing.assert_close(old.logprobs[row, :length], want.detach(), rtol=1e-4, atol=1e-5)
    first = worker.update(batch, targets, parts, text, STEP)[0]
    assert first["ratio/mean"] / first["tokens"] == pytest.approx(1.0, abs=1e-6)
    assert first["policy/clip_fraction"] == 0
    assert worker.stats() == {"version": 1.0}
    worker.unload()
    assert (worker.stats(), worker.version) == ({}, 0)
    assert first["policy/approx_kl"] == pytest.approx(0, abs=1e-10)


def test_the_temperature_divides_the_logits_of_policy_and_reference_before_and_in_the_update(worker, folders):
    load_ppo(worker, folders, FULL)
    batch = collate([trajectory(4, 5, 1, score=0.0), trajectory(6, 3, 2, score=1.0)], pad_id=0)
    old = worker.evaluate(batch, [[0, 1]], STEP.max_tokens, 0.7)
    model = AutoModelForCausalLM.from_pretrained(folders / "policy")
    for row, (query, length) in enumerate(((4, 5), (6, 3))):
        ids = batch.ids[row : row + 1, : query + length]
        logprobs = (model(ids).logits[0, query - 1 : -1] / 0.7).log_softmax(-1)
        want = logprobs.gather(1, ids[0, query:, None])[:, 0].detach()
        for found in (old.logprobs, old.ref_logprobs):
            torch.testing.assert_close(found[row, :length], want, rtol=1e-4, atol=1e-5)
    targets = Targets(evaluation=old, advantages=batch.mask.float(), returns=old.values, weights=None)
    (first,) = worker.update(batch, targets, [[0, 1]], [[]], replace(STEP, temperature=0.7, pretraining_coef=0.0))
    assert first["ratio/max"] == pytest.approx(1.0, abs=1e-6)


def test_the_two_terms_of_ppo_ptx_share_one_step_and_gamma_scales_one(worker, folders):
    norms = {}
    for gamma in (0.0, 1.0, 3.0):
        load_ppo(worker, folders, FULL)
        batch, parts, targets, text = ppo_inputs(worker)
        step = replace(STEP, pretraining_coef=gamma)
        norms[gamma] = worker.update(batch, targets, parts, text, step)[0]
        worker.unload()
    assert "grad_norm/pretraining" not in norms[0.0]
    assert norms[3.0]["grad_norm/pretraining"] == pytest.approx(3 * norms[1.0]["grad_norm/pretraining"], rel=1e-4)
    assert norms[3.0]["grad_norm/policy"] == pytest.approx(norms[0.0]["grad_norm/policy"], rel=1e-5)


def test_the_moving_average_follows_every_step_and_is_saved_as_a_model(worker, folders, tmp_path):
    load_ppo(worker, folders, LORA)
    start = worker.state_of("policy")
    batch, parts, targets, text = ppo_inputs(worker)
    worker.update(batch, targets, parts, text, STEP)
    now = worker.state_of("policy")
    assert not any(torch.equal(now[key], value) for key, value in start.items() if key.startswith("ema/"))
    worker.save("policy", tmp_path / "policy")
    worker.save("policy", tmp_path / "ema", ema=True)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(folders / "policy")
    average = AutoModelForCausalLM.from_pretrained(tmp_path / "ema", dtype=torch.float32)
    logits = {name: model(ids).logits for name, model in (("now", loaded), ("base", base), ("ema", average))}
    probe = worker.probe_logprobs([tuple(ids[0].tolist())])[0]
    want = logits["now"][0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(probe), want.detach(), rtol=1e-4, atol=1e-5)
    drift = (logits["now"] - logits["base"]).abs().max()
    assert 0 < (logits["ema"] - logits["base"]).abs().max() < drift


def test_a_gradient_that_is_not_finite_changes_nothing(worker, folders):
    worker.load("policy", "policy", folders / "policy", FULL, ADAM)
    before = [weight.clone() for _, weight in worker.weights()]
    backward_language_model(worker.networks, "policy", [example(7, 3)], 64, float("nan"))
    assert worker.networks.engine("policy").step(1e-2) is None
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, worker.weights(), strict=True))
    worker.language_model_step("policy", [example(7, 3)], 64, lr=1e-2)
    assert all(weight.isfinite().all() for _, weight in worker.weights())


@pytest.mark.parametrize("network", ["policy", "value"])
def test_a_gradient_that_overflows_where_no_loss_does_is_named(worker, folders, network):
    load_ppo(worker, folders, FULL)
    batch, parts, targets, text = ppo_inputs(worker)
    step = replace(STEP, pretraining_coef=0.0)
    name = "critic" if network == "value" else "policy"
    weight = next(p for p in worker.networks.module(name).parameters() if p.requires_grad)
    weight.register_hook(lambda gradient: gradient * float("inf"))
    first = worker.update(batch, targets, parts, text, step)[0]
    assert [key for key in first if key.startswith("nonfinite")] == [f"nonfinite/{network}/grad_norm/{network}"]
    assert first[f"skipped/{network}"] == 1.0


def test_only_the_named_layers_are_trained(worker, folders):
    worker.load("policy", "policy", folders / "policy", NetworkConfig(dtype="float32", last_layers=1), ADAM)
    before = {name: weight.clone() for name, weight in worker.weights()}
    worker.language_model_step("policy", [example(7, 3)], 64, lr=1e-2)
    changed = {name for name, weight in worker.weights() if not torch.equal(weight, before[name])}
    assert changed
    assert all(".layers.1." in name for name in changed)
    with pytest.raises(ValueError, match="last_layers = 5, but the model has 2"):
        worker.load("other", "policy", folders / "policy", NetworkConfig(last_layers=5))


@pytest.mark.parametrize("network", [FULL, NetworkConfig(dtype="float32", lora_rank=4)], ids=["full", "lora"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama"])
def test_a_reward_model_of_every_family_learns_to_rank_and_is_read_as_a_critic(worker, tmp_path, family, network):
    tiny_causal_lm(tmp_path / "base", family=family, tied=False)
    worker.load("reward", "new_value", tmp_path / "base", network, ADAM)
    groups = [[(5, 60, 7, 2), (5, 60, 9, 11, 2), (5, 60, 2)], [(9, 8, 7), (9, 8, 6, 5, 4)]]
    ranks = [[2, 1, 3], [1, 2]]
    losses = [worker.ranking_step("reward", groups, ranks, [1.0] * 2, "pairs", 40, 1e-2)["loss"] for _ in range(4)]
    assert losses[-1] < 0.7 * losses[0]
    worker.normalise("reward", gain=2.0, bias=0.5)
    sequences = [ids for group in groups for ids in group]
    values = worker.last_values("reward", sequences, 100)
    worker.save("reward", tmp_path / "saved")
    worker.load("critic", "value", tmp_path / "saved", network, ADAM)
    torch.testing.assert_close(worker.last_values("critic", sequences, 100), values, rtol=0, atol=1e-4)
    # At every token, whatever follows: the values of all prefixes are those of the prefixes alone.
    whole = worker.networks.call("critic", [torch.tensor(sequences[1])], torch.arange(5))
    prefixes = [sequences[1][: end + 1] for end in range(5)]
    torch.testing.assert_close(whole.detach(), worker.last_values("critic", prefixes, 100), rtol=0, atol=1e-4)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", attn_implementation="eager")
    assert plain.config.architectures == [type(plain).__name__]
    with torch.no_grad():
        raw = plain(torch.tensor([sequences[1]])).logits[0, 0]
    torch.testing.assert_close(2.0 * raw + 0.5, values[1], rtol=0, atol=1e-4)
