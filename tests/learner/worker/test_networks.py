"""Networks are read as their Hugging Face models are, train what they are told to, and are written back plain."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from learner.config import NetworkConfig
from learner.worker.networks import changing_weights, load_network, merged_weights, save_network, weight_shapes
from reward_server.encoding import ChatEncoding
from reward_server.model import (
    Normalisation,
    load_reward_model,
    new_reward_model,
    normalisation,
    raw_values,
    set_normalisation,
)
from reward_server.packing import packs
from tests.tiny_models import FAMILIES, save_reward_model, tiny_causal_lm, tiny_reward_model, tiny_tokenizer

FP32 = NetworkConfig(dtype="float32")
IDS = torch.tensor([[5, 60, 7, 200, 9, 11], [300, 4, 77, 8, 0, 0]])
ROWS, POSITIONS, TARGETS = torch.tensor([0, 0, 1]), torch.tensor([1, 4, 2]), torch.tensor([7, 11, 8])
PACKED, LENGTHS, PLACES = torch.cat([IDS[0], IDS[1, :4]]), [6, 4], torch.tensor([1, 4, 6 + 2])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("networks")
    for family in ("llama", "gpt2"):
        for tied in (True, False):
            tiny_causal_lm(root / f"{family}-{'tied' if tied else 'untied'}", tied=tied, family=family)
        tiny_reward_model(root / f"{family}-reward", family=family)
    return root


def logits(path: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")(IDS).logits


def jitter(module: torch.nn.Module, of: str = "") -> None:
    """Move trained parameters, as training would; LoRA's B would else be 0."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and of in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def reloaded(auto: Any, path: Path) -> Any:
    """(model, what was missing or left over) as anybody would load the folder."""
    return auto.from_pretrained(path, output_loading_info=True)


def folder_keys(path: Path) -> set[str]:
    with safe_open(path / "model.safetensors", "pt") as file:
        return set(file.keys())


# --- reading


@pytest.mark.parametrize("name", ["llama-tied", "llama-untied", "gpt2-tied"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_the_models_own_logits(models, name, temperature):
    network = load_network("policy", models / name, FP32)
    logprobs, entropies = network(PACKED, LENGTHS, PLACES, TARGETS, temperature)
    expected = (logits(models / name)[ROWS, POSITIONS] / temperature).log_softmax(-1)
    torch.testing.assert_close(logprobs, expected.gather(1, TARGETS[:, None])[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(entropies, -(expected.exp() * expected).sum(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read_whatever_its_neighbours_and_written_as_it_was(tmp_path, family, tied):
    """The last places are further than a sliding window from the first tokens."""
    model = tiny_causal_lm(tmp_path / "base", tied=tied, family=family, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 320, (1, 41), generator=generator)
    with torch.no_grad():
        expected = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    network = load_network("policy", tmp_path / "base", FP32)
    assert packs(network.model)
    for before, after in ([], []), ([1], [41]), ([41, 23], []), ([], [7, 7, 90]):
        parts = [torch.randint(0, 320, (length,), generator=generator) for length in (*before, *after)]
        parts.insert(len(before), ids[0])
        places = torch.arange(40) + sum(before)
        with torch.no_grad():
            found, _ = network(torch.cat(parts), [len(part) for part in parts], places, ids[0, 1:])
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)
    save_network(network.model, ChatEncoding(tiny_tokenizer()), tmp_path / "saved", merged_weights(network.model))
    assert folder_keys(tmp_path / "saved") == folder_keys(tmp_path / "base")
    again, report = reloaded(AutoModelForCausalLM, tmp_path / "saved")
    assert not report["missing_keys"] | report["unexpected_keys"]
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), network.model.parameters(), strict=True))


def test_a_soft_cap_of_the_logits_is_read_from_the_config(tmp_path):
    tiny_causal_lm(tmp_path, family="gemma2", final_logit_softcapping=0.5)
    network = load_network("policy", tmp_path, FP32)
    logprobs, _ = network(PACKED, LENGTHS, PLACES, TARGETS)
    expected = logits(tmp_path)[ROWS, POSITIONS].log_softmax(-1).gather(1, TARGETS[:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "more"), [("granite", {"logits_scaling": 8.0}), ("cohere", {})])
def test_a_head_that_scales_its_logits_is_refused(tmp_path, family, more, dtype):
    tiny_causal_lm(tmp_path, family=family, **more)
    with pytest.raises(ValueError, match=r"is a \w+ForCausalLM, whose output head cannot be reproduced"):
        load_network("policy", tmp_path, NetworkConfig(dtype=dtype))


def test_the_chunk_of_log_probs_changes_nothing(models):
    found = [
        load_network("policy", models / "llama-tied", NetworkConfig(dtype="float32", logprob_chunk=chunk))(
            PACKED, LENGTHS, PLACES, TARGETS
        )[0]
        for chunk in (1, 2, 1000)
    ]
    torch.testing.assert_close(found[0], found[2], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[1], found[2], rtol=0, atol=1e-6)


def test_values_are_gain_times_raw_plus_bias(models, tmp_path):
    model = load_reward_model(models / "llama-reward", torch.float32)
    set_normalisation(model, Normalisation(gain=2.5, bias=-0.75))
    save_reward_model(model, ChatEncoding.load(models / "llama-reward"), tmp_path)
    values = load_network("value", tmp_path, FP32)(PACKED, LENGTHS, PLACES)
    raw = raw_values(model, PACKED, LENGTHS, PLACES)
    torch.testing.assert_close(values, 2.5 * raw - 0.75)
    assert values.dtype == torch.float32
    assert values.shape == (3,)


def test_a_critic_needs_a_normalised_reward_model(models, tmp_path):
    model = new_reward_model(models / "llama-tied", torch.float32, seed=0)
    save_reward_model(model, ChatEncoding.load(models / "llama-tied"), tmp_path)
    with pytest.raises(ValueError, match="is not normalised"):
        load_network("value", tmp_path, FP32)


def test_a_malformed_normalisation_is_not_taken_for_none(models, tmp_path):
    model = load_reward_model(models / "llama-reward", torch.float32)
    model.config.rayward_normalisation = {"gain": -1.0, "bias": 0.0}
    save_reward_model(model, ChatEncoding.load(models / "llama-reward"), tmp_path)
    with pytest.raises(ValueError, match="gain > 0"):
        load_network("value", tmp_path, FP32)


def test_a_new_reward_model_starts_raw(models):
    network = load_network("new_value", models / "llama-tied", FP32)
    assert (network.gain, network.bias) == (1.0, 0.0)
    raw = raw_values(network.model, PACKED, LENGTHS, PLACES)
    assert torch.equal(network(PACKED, LENGTHS, PLACES), raw)


# --- what is trained


def trained(network: torch.nn.Module) -> set[str]:
    return {name for name, p in network.named_parameters() if p.requires_grad}


def test_every_weight_is_trained_by_default(models):
    network = load_network("policy", models / "llama-tied", FP32)
    assert trained(network) == {name for name, _ in network.named_parameters()}


@pytest.mark.parametrize(("family", "layer"), [("llama", "model.layers.1."), ("gpt2", "transformer.h.1.")])
def test_last_layers_trains_those_only_and_a_scalar_head_always(models, family, layer):
    config = NetworkConfig(dtype="float32", last_layers=1)
    policy = trained(load_network("policy", models / f"{family}-tied", config))
    assert policy
    assert all(layer in name for name in policy)
    inner = layer.split(".", 1)[1]
    critic = trained(load_network("value", models / f"{family}-reward", config))
    assert "model.score.weight" in critic
    assert len(critic) == len(policy) + 1
    assert all(inner in name for name in critic - {"model.score.weight"})


def test_lora_trains_adapters_of_the_chosen_layers_and_a_scalar_head(models):
    config = NetworkConfig(dtype="float32", lora_rank=2, last_layers=1)
    policy = trained(load_network("policy", models / "llama-tied", config))
    assert len(policy) == 7 * 2  # q k v o gate up down, each with A and B
    assert all(".layers.1." in name and ".lora_" in name for name in policy)
    critic = trained(load_network("value", models / "llama-reward", config))
    assert len(critic) == 7 * 2 + 1
    assert "model.score.weight" in critic


def test_more_last_layers_than_there_are_is_an_error(models):
    with pytest.raises(ValueError, match=r"last_layers = 3, but the model has 2 layers: use 0 to 2"):
        load_network("policy", models / "llama-tied", NetworkConfig(last_layers=3))


# --- gradient checkpointing


@pytest.mark.parametrize("config", [{}, {"lora_rank": 4}, {"last_layers": 1}])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2-tied"])
def test_gradient_checkpointing_recomputes_the_same_gradients(models, name, config):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        settings = NetworkConfig(dtype="float32", gradient_checkpointing=checkpointing, **config)
        network = load_network("policy", models / name, settings)
        jitter(network)
        calls = calls_of_the_last_layer(network)
        network(PACKED, LENGTHS, PLACES, TARGETS)[0].sum().backward()
        assert len(calls) == 1 + checkpointing
        gradients.append({n: p.grad for n, p in network.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for parameter, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][parameter], gradient, msg=parameter)


def calls_of_the_last_layer(network: torch.nn.Module) -> list[None]:
    """Grows by an entry whenever a norm of the last layer is computed."""
    calls: list[None] = []
    norm = next(m for n, m in network.named_modules() if n.endswith(("1.input_layernorm", "1.ln_1")))
    norm.register_forward_hook(lambda *_: calls.append(None))
    return calls


@pytest.mark.parametrize("own_layers_drop", [False, True])
def test_dropout_is_off_even_where_checkpointing_needs_the_training_mode(tmp_path, own_layers_drop):
    model = tiny_causal_lm(tmp_path)
    model.config.attention_dropout = 0.5
    if own_layers_drop:  # in what is checkpointed, not in a module of its own
        sizes: dict[str, Any] = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2}
        model = OPTForCausalLM(OPTConfig(vocab_size=512, num_attention_heads=2, dropout=0.5, **sizes))
    model.save_pretrained(tmp_path)
    plain, checkpointed = (
        load_network("policy", tmp_path, NetworkConfig(dtype="float32", gradient_checkpointing=on))
        for on in (False, True)
    )
    first, _ = plain(PACKED, LENGTHS, PLACES, TARGETS)
    again, _ = checkpointed(PACKED, LENGTHS, PLACES, TARGETS)
    torch.testing.assert_close(again, first)


# --- merging and writing


@pytest.mark.parametrize("name", ["llama-tied", "llama-untied", "gpt2-tied", "gpt2-untied"])
def test_merged_lora_is_the_network_with_adapters(models, tmp_path, name):
    network = load_network("policy", models / name, NetworkConfig(dtype="float32", lora_rank=4, lora_alpha=8))
    jitter(network, "lora_B")
    frozen = {n: p.clone() for n, p in network.named_parameters()}
    save_network(network.model, ChatEncoding(tiny_tokenizer()), tmp_path, merged_weights(network.model))
    with torch.no_grad():
        adapted = network.model(IDS).logits
    torch.testing.assert_close(logits(tmp_path), adapted, rtol=1e-4, atol=1e-5)
    assert (adapted - logits(models / name)).abs().max() > 0.1
    assert folder_keys(tmp_path) == folder_keys(models / name)
    assert all(torch.equal(p, frozen[n]) for n, p in network.named_parameters())  # merging left the network alone


def test_a_merged_weight_is_base_plus_scale_times_b_a(models):
    network = load_network(
        "policy", models / "gpt2-tied", NetworkConfig(dtype="float32", lora_rank=2, lora_alpha=6, last_layers=1)
    )
    jitter(network, "lora_B")
    name = "transformer.h.{}.attn.c_attn"
    layer: Any = network.model.get_submodule(name.format(1))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight  # [2, 32], [96, 2]
    expected = layer.base_layer.weight + 3.0 * (b @ a).T  # Conv1D keeps [in, out]
    merged = dict(merged_weights(network.model))
    torch.testing.assert_close(merged[name.format(1) + ".weight"], expected.detach())
    frozen = name.format(0) + ".weight"
    assert torch.equal(merged[frozen], network.model.get_parameter(frozen))


def test_merging_rounds_once_to_bfloat16(models):
    network = load_network("policy", models / "llama-tied", NetworkConfig(lora_rank=4))
    jitter(network, "lora_B")
    layer = network.model.model.layers[0].mlp.up_proj
    a, b = layer.lora_A["default"].weight.float(), layer.lora_B["default"].weight.float()
    exact = layer.base_layer.weight.float() + 8.0 * (b @ a)
    merged = dict(merged_weights(network.model))["model.layers.0.mlp.up_proj.weight"]
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, exact.bfloat16())


def test_a_moving_average_replaces_adapters_and_weights(models):
    network = load_network("policy", models / "llama-tied", NetworkConfig(dtype="float32", lora_rank=2))
    jitter(network, "lora_B")
    name = "model.layers.0.mlp.up_proj"
    layer = network.model.model.layers[0].mlp.up_proj
    adapter = layer.lora_B["default"].weight
    base, full = layer.base_layer.weight, dict(merged_weights(network.model))[f"{name}.weight"]
    averaged = dict(merged_weights(network.model, lambda p: 0.5 * p.detach() if p is adapter else p.detach()))
    torch.testing.assert_close(averaged[f"{name}.weight"], (base + 0.5 * (full - base)).detach())
    other = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(averaged[other], dict(merged_weights(network.model))[other])
    network = load_network("policy", models / "llama-tied", FP32)
    assert not dict(merged_weights(network.model, torch.zeros_like))["model.norm.weight"].any()


def test_shapes_are_those_of_the_merged_weights(models):
    network = load_network("policy", models / "gpt2-tied", NetworkConfig(dtype="bfloat16", lora_rank=2))
    shapes = [(name, t.shape, t.dtype) for name, t in weight_shapes(network.model, lambda p: p.shape)]
    assert shapes == [(name, t.shape, t.dtype) for name, t in merged_weights(network.model)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("trained", "frozen"),
    [
        ({}, set()),
        ({"lora_rank": 2}, {"outside"}),
        ({"last_layers": 1}, {"outside", 0}),
        ({"lora_rank": 2, "last_layers": 1}, {"outside", 0}),
    ],
)
def test_what_training_moves_is_among_the_changing_weights_which_are_whole_layers(models, family, trained, frozen):
    network = load_network("policy", models / f"{family}-untied", NetworkConfig(dtype="float32", **trained))
    before = {name: weight.clone() for name, weight in merged_weights(network.model)}
    jitter(network)
    moved = {name for name, weight in merged_weights(network.model) if not torch.equal(weight, before[name])}
    changing = changing_weights(network.model)
    assert moved <= changing
    numbers = {name: [int(part) for part in name.split(".") if part.isdigit()] for name in before}
    assert changing == {name for name, [*number] in numbers.items() if (number or ["outside"])[0] not in frozen}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tied_weights_are_given_and_written_once(models, tmp_path, family):
    network = load_network("policy", models / f"{family}-tied", NetworkConfig(dtype="float32", lora_rank=2))
    names = [name for name, _ in merged_weights(network.model)]
    assert len(names) == len(set(names))
    assert not any("lm_head" in name or "base_layer" in name for name in names)
    save_network(network.model, ChatEncoding(tiny_tokenizer()), tmp_path, merged_weights(network.model))
    assert not any("lm_head" in name for name in folder_keys(tmp_path))
    loaded, report = reloaded(AutoModelForCausalLM, tmp_path)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_a_written_policy_is_a_plain_folder(models, tmp_path):
    network = load_network("policy", models / "llama-tied", NetworkConfig(dtype="bfloat16"))
    encoding = ChatEncoding.load(models / "llama-tied")
    save_network(network.model, encoding, tmp_path, merged_weights(network.model))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, LlamaForCausalLM)
    assert loaded.dtype == torch.bfloat16
    assert loaded.generation_config.eos_token_id == 2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.chat_template == encoding.tokenizer.chat_template
    again = ChatEncoding.load(tmp_path)
    assert (again.pad_id, again.eos_ids) == (encoding.pad_id, encoding.eos_ids)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("kind", ["policy", "value"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_keeps_the_type_of_its_weights_and_every_bit(models, tmp_path, dtype, kind, rank):
    """A network in another type than its folder: the written one says so, in its config and in its file."""
    name = "llama-tied" if kind == "policy" else "llama-reward"
    config = NetworkConfig(dtype=dtype, lora_rank=rank)
    network = load_network(kind, models / name, config)
    jitter(network)
    encoding = ChatEncoding.load(models / name)
    save_network(network.model, encoding, tmp_path / "first", merged_weights(network.model))
    expected = dict(merged_weights(network.model))
    for path in (tmp_path / "first", tmp_path / "second"):  # the second is written of the first, read as it is
        assert json.loads((path / "config.json").read_text())["dtype"] == dtype
        written = load_file(path / "model.safetensors")
        assert written.keys() == expected.keys()
        assert all(torch.equal(written[key], value) for key, value in expected.items())
        assert {value.dtype for value in written.values()} == {getattr(torch, dtype)}
        again = load_network(kind, path, NetworkConfig(dtype=dtype))
        assert all(torch.equal(value, expected[key]) for key, value in again.model.named_parameters())
        plain = (AutoModelForCausalLM if kind == "policy" else AutoModelForSequenceClassification).from_pretrained(path)
        assert {value.dtype for value in plain.parameters()} == {getattr(torch, dtype)}
        if path.name == "first":
            save_network(again.model, encoding, tmp_path / "second", merged_weights(again.model))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("rank", [0, 4])
def test_a_written_reward_model_is_a_plain_classifier(models, tmp_path, family, rank):
    network = load_network("new_value", models / f"{family}-tied", NetworkConfig(dtype="float32", lora_rank=rank))
    jitter(network)
    set_normalisation(network.model, Normalisation(gain=1.0, bias=0.25))
    save_network(network.model, ChatEncoding.load(models / f"{family}-tied"), tmp_path, merged_weights(network.model))
    loaded, report = reloaded(AutoModelForSequenceClassification, tmp_path)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        plain = loaded.eval()(IDS).logits[:, 0]  # reads the last token before the padding
        raw = network(PACKED, LENGTHS, torch.tensor([5, 9]))
    torch.testing.assert_close(plain, raw, rtol=1e-4, atol=1e-5)
    critic = load_network("value", tmp_path, FP32)
    assert normalisation(critic.model) == Normalisation(gain=1.0, bias=0.25)
    torch.testing.assert_close(critic(PACKED, LENGTHS, torch.tensor([5, 9])), raw + 0.25, rtol=1e-4, atol=1e-5)


def test_bfloat16_networks_answer_in_float32_close_to_the_exact(models):
    exact = load_network("policy", models / "llama-tied", FP32)(PACKED, LENGTHS, PLACES, TARGETS)[0]
    half = load_network("policy", models / "llama-tied", NetworkConfig())
    assert next(half.parameters()).dtype == torch.bfloat16
    found = half(PACKED, LENGTHS, PLACES, TARGETS)[0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0, atol=0.1)
    value = load_network("value", models / "llama-reward", NetworkConfig())(PACKED, LENGTHS, PLACES)
    assert value.dtype == torch.float32
