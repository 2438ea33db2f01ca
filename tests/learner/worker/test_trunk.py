"""Layers that nothing trains are computed once for all networks that have them, and no bit tells."""

from itertools import chain

import pytest
import torch

from learner.config import NetworkConfig, OptimizerConfig
from learner.data.batch import collate, minibatches
from learner.worker import trunk
from learner.worker.networks import load_network
from learner.worker.ppo_steps import PPOStep, Targets
from learner.worker.trunk import SharedTrunks, Trunk, shared_trunks
from tests.tiny_batches import example, tokens, trajectory
from tests.tiny_models import FAMILIES, tiny_causal_lm, tiny_reward_model

ADAM = OptimizerConfig(lr=1e-2)
LORA = NetworkConfig(dtype="float32", lora_rank=4, last_layers=1)
STEP = PPOStep(
    clip=0.2,
    value_clip=0.2,
    pretraining_coef=1.0,
    temperature=1.0,
    max_tokens=20,
    pretraining_max_tokens=64,
    pretraining_normaliser="tokens",
    policy_lr=1e-2,
    critic_lr=1e-2,
)
SEQUENCES = [torch.tensor(tokens(length, length)) for length in (41, 7, 7, 20)]  # beyond the sliding windows of 16


def read(network):
    """What a network says of the sequences, and the gradient of it."""
    ids, lengths, places = torch.cat(SEQUENCES), [len(s) for s in SEQUENCES], torch.arange(70)
    value = hasattr(network, "gain")
    answer = network(ids, lengths, places) if value else network(ids, lengths, places, ids[places + 1])[0]
    if answer.requires_grad:
        network.zero_grad()
        (answer * torch.linspace(-1, 1, 70)).sum().backward()
    return [answer.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    ("family", "config"),
    [(family, {"lora_rank": 2}) for family in (*FAMILIES, "opt", "stablelm")]
    + [
        (family, more)
        for family in ("llama", "gpt2")
        for more in ({"gradient_checkpointing": True}, {"dtype": "bfloat16"})
    ],
    ids=str,
)
def test_every_family_says_and_learns_bitwise_the_same_above_a_shared_trunk(tmp_path, family, config):
    tiny_causal_lm(tmp_path, family=family, layers=4)
    settings = NetworkConfig.model_validate({"dtype": "float32", "last_layers": 2, **config})
    critic = load_network("new_value", tmp_path, settings)
    networks = {"policy": load_network("policy", tmp_path, settings), "critic": critic}
    networks["reference"] = load_network("policy", tmp_path, settings).requires_grad_(False)
    alone = {name: read(network) for name, network in networks.items()}
    shared = SharedTrunks({name: network.model for name, network in networks.items()})
    assert {name: (first, found.depth) for name, (first, found) in shared.trunks.items()} == dict.fromkeys(
        networks, ("policy", 2)
    )
    calls = counted(networks, layer=1)
    for _ in range(2):
        for name, network in networks.items():
            with shared.given(name, SEQUENCES):
                found = read(network)
            assert len(found) == len(alone[name])
            assert all(map(torch.equal, found, alone[name]))
    assert calls == ["policy"]
    assert all(map(torch.equal, read(networks["policy"]), alone["policy"]))  # the layers are back in their places
    assert calls == ["policy"] * 2


def counted(networks, layer=0):
    """Grows by a network's name whenever its layer is computed."""
    calls = []
    for name, network in networks.items():
        of_layer = Trunk(network.model)._layers[layer]
        of_layer.register_forward_hook(lambda *_, name=name: calls.append(name))
    return calls


# --- who shares


def owners(networks):
    return {name: first for name, (first, _) in shared_trunks({n: net.model for n, net in networks.items()}).items()}


def test_a_trunk_is_shared_where_weights_and_settings_are_bitwise_the_same(tmp_path):
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        tiny_reward_model(tmp_path / name, seed=seed)
    policy = load_network("policy", tmp_path / "one" / "base", LORA)
    loaded = {name: load_network("value", tmp_path / name, LORA) for name in ("same", "other")}
    assert owners({"policy": policy} | loaded) == {"policy": "policy", "same": "policy", "other": "other"}
    with torch.no_grad():
        weight = next(loaded["same"].model.model.layers[0].parameters()).view(-1)
        weight[7] = weight[7].nextafter(torch.tensor(9.0))
    assert owners({"policy": policy, "critic": loaded["same"]}) == {"policy": "policy", "critic": "critic"}
    again = load_network("value", tmp_path / "same", LORA)
    again.model.config.rms_norm_eps *= 2
    assert owners({"policy": policy, "critic": again}) == {"policy": "policy", "critic": "critic"}
    half = load_network("value", tmp_path / "same", LORA.model_copy(update={"dtype": "bfloat16"}))
    assert owners({"policy": policy, "critic": half}) == {"policy": "policy", "critic": "critic"}


def test_layers_that_are_fused_otherwise_are_not_the_same(folders):
    plain, again, fused = (
        Trunk(load_network("policy", folders / "policy", LORA.model_copy(update={"compile": on})).model)
        for on in (False, False, True)
    )
    assert plain.same_as(again)
    assert not plain.same_as(fused)


def test_networks_trained_from_other_layers_on_share_what_is_below_both(tmp_path):
    tiny_causal_lm(tmp_path, layers=4)
    networks = {
        name: load_network("policy", tmp_path, LORA.model_copy(update={"last_layers": last}))
        for name, last in (("policy", 3), ("critic", 1))
    }
    networks["reference"] = load_network("policy", tmp_path, LORA).requires_grad_(False)
    found = shared_trunks({name: network.model for name, network in networks.items()})
    assert {name: (first, one.depth) for name, (first, one) in found.items()} == dict.fromkeys(networks, ("policy", 1))


@pytest.mark.parametrize("network", [{}, {"lora_rank": 4}], ids=str)
def test_nothing_is_shared_where_the_first_layer_is_trained_or_nothing_is(folders, network):
    settings = NetworkConfig.model_validate({"dtype": "float32", **network})
    policy = load_network("policy", folders / "policy", settings)
    reference = load_network("policy", folders / "policy", settings).requires_grad_(False)
    assert owners({"policy": policy, "reference": reference}) == {}
    assert owners({"reference": reference, "other": reference}) == {}


def test_networks_that_zero_3_shards_share_nothing(worker, folders):
    load(worker, folders, LORA, OptimizerConfig(lr=1e-2, zero_stage=3))
    assert worker.networks.trunks.trunks == {}


def test_a_family_whose_layers_cannot_be_stood_in_for_is_read_as_before_and_says_so(tmp_path, caplog):
    caplog.set_level("INFO")
    tiny_causal_lm(tmp_path, family="bloom", layers=4)  # its layers give a tuple
    policy = load_network("policy", tmp_path, LORA)
    assert owners({"policy": policy}) == {}
    assert "BloomForCausalLM with its first layers' output given" in caplog.records[-1].getMessage()


# --- a rank's iteration


def iteration(worker, epochs):
    """Evaluate and update on eight responses, in micro-batches of two or three; what was said and reported."""
    batch = collate([trajectory(4 + i % 3, 3 + i % 4, i, score=float(i % 2)) for i in range(8)], pad_id=0)
    parts = [minibatches(8, 4, seed) for seed in range(epochs)]
    old = worker.evaluate(batch, parts[0], STEP.max_tokens, 1.0)
    noise = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(0)) * batch.mask
    targets = Targets(evaluation=old, advantages=noise, returns=old.values + noise, weights=None)
    text = [[example(12, 1, 5)]] * (2 * epochs)
    sums = worker.update(batch, targets, list(chain(*parts)), text, STEP)
    return old, [{key: value for key, value in one.items() if not key.startswith("time/")} for one in sums]


def load(worker, folders, network, optimizer=ADAM):
    worker.load("policy", "policy", folders / "policy", network, optimizer, ema_decay=0.9)
    worker.load("reference", "policy", folders / "policy", network)
    worker.load("critic", "value", folders / "reward", network, optimizer)


@pytest.mark.parametrize(
    ("network", "optimizer"),
    [
        ({"lora_rank": 4}, {"zero_stage": 0}),
        ({"lora_rank": 4, "dtype": "bfloat16", "gradient_checkpointing": True}, {"zero_stage": 1}),
        ({}, {"zero_stage": 2, "offload_optimizer": "cpu"}),
    ],
    ids=str,
)
def test_two_iterations_are_bitwise_those_of_networks_that_share_nothing(
    worker, folders, monkeypatch, network, optimizer
):
    network = NetworkConfig.model_validate({"dtype": "float32", "last_layers": 1, **network})
    optimizer = OptimizerConfig.model_validate({"lr": 1e-2, **optimizer})
    found = []
    for shares in (True, False):
        if not shares:
            monkeypatch.setattr(trunk, "shared_trunks", lambda _: {})
        load(worker, folders, network, optimizer)
        assert len(worker.networks.trunks.trunks) == (3 if shares else 0)
        said = [iteration(worker, epochs=2) for _ in range(2)]
        found.append(
            (said, worker.state_of("policy") | {f"critic/{k}": v for k, v in worker.state_of("critic").items()})
        )
        worker.unload()
    (said, state), (said_alone, state_alone) = found
    for (old, sums), (old_alone, sums_alone) in zip(said, said_alone, strict=True):
        assert sums == sums_alone
        for name in ("logprobs", "ref_logprobs", "values", "entropies"):
            assert torch.equal(getattr(old, name), getattr(old_alone, name)), name
    assert state.keys() == state_alone.keys()
    assert all(torch.equal(value, state_alone[name]) for name, value in state.items())


def test_the_layers_below_are_computed_once_a_microbatch_of_the_batch(worker, folders):
    load(worker, folders, LORA)
    shared, networks = worker.networks.trunks, {n: worker.networks.module(n) for n in ("policy", "reference", "critic")}
    calls, last = counted(networks), counted(networks, layer=1)
    iteration(worker, epochs=1)
    text, micro = 2, last.count("reference")
    assert micro >= 4
    assert calls == ["policy"] * (micro + text)
    assert last.count("critic") == 2 * micro
    assert shared._known == {}
    calls.clear()
    iteration(worker, epochs=2)  # the second shuffles anew: its micro-batches are others, and critic follows policy
    assert set(calls) == {"policy"}
    assert shared._known == {}
