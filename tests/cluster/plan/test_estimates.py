"""The formulas by hand, and beside what torch keeps."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.plan.estimates import (
    Bytes,
    Training,
    activation_bytes,
    decode_seconds,
    forward_seconds,
    kv_bytes,
    logits_bytes,
    network_memory,
    ring_seconds,
    trained_parameters,
    training_seconds,
    transfer_seconds,
)
from cluster.plan.shapes import shape_of
from learner.config import NetworkConfig
from learner.maths.logprobs import token_logprobs
from learner.worker.networks import load_network
from tests.tiny_models import tiny_causal_lm, tiny_reward_model

SEVEN_B = Training(
    name="policy",
    parameters=7_500_000_000,
    trained=7_500_000_000,
    weight_bytes=2,
    stage=0,
    ranks=64,
    ema=False,
    norms=False,
    offload_optimizer=False,
    offload_weights=False,
)


def device(**changes: Any) -> float:
    found = network_memory(replace(SEVEN_B, **changes))
    return sum(size.device for name, size in found.items() if name != "copies in a step") / 1e9


def test_sharding_is_that_of_the_zero_paper_with_gradients_in_float32():
    # Rajbhandari et al. 2020, figure 1: 7.5 B parameters, 64 ranks, K = 12; gradients of 2 bytes there, of 4 here.
    assert device() == pytest.approx(7.5 * (2 + 4 + 12))
    assert device(stage=1) == pytest.approx(7.5 * (2 + 4 + 2 + 12 / 64))  # gradients of the last pass in bfloat16
    assert device(stage=2) == pytest.approx(7.5 * (2 + 16 / 64))
    assert device(stage=3) == pytest.approx(7.5 * 18 / 64 + 2)  # and a billion gathered parameters
    assert device(ema=True) - device() == pytest.approx(30)
    assert device(stage=1, ema=True) - device(stage=1) == pytest.approx(30 / 64)


def test_what_is_offloaded_is_in_main_memory():
    found = network_memory(replace(SEVEN_B, stage=3, ema=True, offload_optimizer=True, offload_weights=True))
    assert found["optimizer"] == Bytes(host=7.5e9 * 12 / 64)
    assert found["weights"] == Bytes(host=7.5e9 * 2 / 64)
    assert found["gathered weights"] == Bytes(device=2e9)
    assert found["moving average"].device == found["gradients"].device == 0


def test_a_network_that_is_only_read_has_weights_alone():
    assert network_memory(replace(SEVEN_B, trained=0)) == {"weights": Bytes(device=15e9)}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["policy", "value"])
@pytest.mark.parametrize(("lora", "last"), [(0, 0), (4, 0), (0, 1), (4, 1)])
def test_trained_parameters_are_those_of_the_network(tmp_path: Path, family: str, kind, lora: int, last: int):
    make = tiny_causal_lm if kind == "policy" else tiny_reward_model
    make(tmp_path, family=family)
    network = load_network(kind, tmp_path, NetworkConfig(dtype="float32", lora_rank=lora, last_layers=last))
    counts = [sum(p.numel() for p in network.parameters() if p.requires_grad or every) for every in (True, False)]
    assert trained_parameters(shape_of(tmp_path), kind == "value", lora, last) == tuple(counts)


def kept(work) -> int:
    """Bytes that a forward pass keeps for its backward pass, each storage once, parameters left out."""
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter) and not (tensor._base is not None and tensor._base.is_leaf):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = work()
    total = sum(storages.values())
    del result
    return total


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_torch_keeps_within_a_tenth(tmp_path: Path, family: str, dtype, checkpointing: bool):
    tiny_causal_lm(tmp_path, family=family, hidden=64, layers=4)
    network = load_network("policy", tmp_path, NetworkConfig(dtype=dtype, gradient_checkpointing=checkpointing))
    ids = torch.randint(3, 300, (4, 128))

    def forward():
        return network.model.base_model(input_ids=ids, use_cache=False).last_hidden_state

    shape = shape_of(tmp_path)
    wide = 4 if dtype == "float32" else 2
    estimate = activation_bytes(shape, ids.numel(), wide, checkpointing, shape.layers)
    if checkpointing:  # what one layer recomputes is not there yet
        one, none = (activation_bytes(shape, ids.numel(), wide, False, layers) for layers in (1, 0))
        estimate -= one - none
    assert kept(forward) == pytest.approx(estimate, rel=0.1), family


def test_logits_of_a_chunk_are_forward_and_backward_of_the_log_probs():
    shape = shape_of("smollm2-135m")
    assert logits_bytes(shape, 1024, 2, head_trained=False) == 1024 * 49_152 * 10
    assert logits_bytes(shape, 1024, 2, head_trained=True) == 1024 * 49_152 * 10 + 49_152 * 576 * 6
    hidden = torch.randn(64, 8, requires_grad=True)
    saved = kept(lambda: token_logprobs(hidden, torch.randn(1000, 8), None, torch.zeros(64).long(), 1.0, 16))
    assert saved < 64 * 1000 * 4 / 4  # nothing of [64, 1000] is kept between the passes


def test_keys_and_values_of_published_models():
    # Llama 3.1: 32 layers x 8 heads x 128 x 2 (keys and values) x 2 bytes = 128 KiB a token; 70B: 320 KiB
    assert kv_bytes(shape_of("llama-3.1-8b"), 2) == 128 * 1024
    assert kv_bytes(shape_of("llama-3.1-70b"), 2) == 320 * 1024


def test_decoding_reads_the_weights_until_it_computes_longer():
    shape = shape_of("llama-3.1-8b")
    alone = decode_seconds(shape, 2, 1, 0, 989e12, 3.35e12)
    assert alone == pytest.approx(2 * shape.parameters / 3.35e12)
    assert decode_seconds(shape, 2, 200, 0, 989e12, 3.35e12) == pytest.approx(alone)
    crossover = 2 * 989e12 / (2 * 3.35e12)  # 295 sequences on an H100
    assert decode_seconds(shape, 2, 2 * crossover, 0, 989e12, 3.35e12) == pytest.approx(2 * alone)
    assert decode_seconds(shape, 2, 1, 1000, 989e12, 3.35e12) > alone


def test_passes_are_two_and_six_operations_a_parameter_and_token():
    assert forward_seconds(1e9, 1000, 1e12) == pytest.approx(2.0)
    assert training_seconds(1e9, 1e9, 1000, 1e12) == pytest.approx(6.0)
    assert training_seconds(1e9, 1e6, 1000, 1e12) == pytest.approx(4.002)  # LoRA
    assert training_seconds(1e8, 1e8, 1000, 1e12) == pytest.approx(0.6)  # the last tenth of the layers
    assert transfer_seconds(16e9, 12.5e9) == pytest.approx(1.28)
    assert ring_seconds(10e9, 2, 10e9) == pytest.approx(1.0)
    assert ring_seconds(10e9, 1, 10e9) == 0.0
