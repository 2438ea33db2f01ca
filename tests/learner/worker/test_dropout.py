"""Residual dropout on the layers of each architecture: where it acts, when, and that nothing else notices."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from learner.config import NetworkConfig, OptimizerConfig
from learner.worker.dropout import ResidualDropout, add_residual_dropout, training_mode
from tests.tiny_batches import example

SHARE = 0.2
SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED: dict[str, Any] = SMALL | {"num_key_value_heads": 2, "head_dim": 8}
FAMILIES = {
    "llama": (LlamaConfig(**GROUPED), "self_attn", "mlp"),
    "qwen2": (Qwen2Config(**GROUPED), "self_attn", "mlp"),
    "qwen3": (Qwen3Config(**GROUPED), "self_attn", "mlp"),
    "mistral": (MistralConfig(**GROUPED), "self_attn", "mlp"),
    "gemma": (GemmaConfig(**GROUPED), "self_attn", "mlp"),
    "gemma2": (Gemma2Config(**GROUPED), "post_attention_layernorm", "post_feedforward_layernorm"),
    "neox": (GPTNeoXConfig(**SMALL, hidden_dropout=0.5), "attention", "mlp"),
    "gpt2": (GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.5), "attn", "mlp"),
}
IDS = torch.arange(3, 35).view(2, 16)


def model_of(config) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def first_layer(model: PreTrainedModel) -> nn.Module:
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)[0]


def branch_outputs(model: PreTrainedModel, names: tuple[str, str]) -> list[torch.Tensor]:
    """What the two branches of the first layer add to the residual stream."""
    seen: list[Any] = []
    hooks = [
        first_layer(model).get_submodule(name).register_forward_hook(lambda _m, _i, out: seen.append(out))
        for name in names
    ]
    model(IDS)
    for hook in hooks:
        hook.remove()
    return [(out if isinstance(out, torch.Tensor) else out[0]).detach() for out in seen]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fifth_of_both_branches_is_dropped_and_the_rest_scaled(family):
    config, attention_name, mlp_name = FAMILIES[family]
    names = (attention_name, mlp_name)
    model = model_of(config)
    kept_whole, _ = branch_outputs(model, names)
    logits = model(IDS).logits
    add_residual_dropout(model, SHARE)
    assert torch.equal(model(IDS).logits, logits)  # off
    with training_mode(model):
        attention, mlp = branch_outputs(model, names)
    survivors = attention != 0
    # only ours: GPT-2 and NeoX have dropouts of their own, which would scale by 2
    torch.testing.assert_close(attention, torch.where(survivors, kept_whole / (1 - SHARE), 0.0))
    for output in (attention, mlp):
        assert (output == 0).float().mean().item() == pytest.approx(SHARE, abs=0.06)  # of 1024: four deviations
    assert torch.equal(model(IDS).logits, logits)  # off again
    assert not any(module.training for module in model.modules())


def test_passes_differ_and_the_seed_tells_which():
    model = model_of(FAMILIES["llama"][0])
    add_residual_dropout(model, SHARE)
    with training_mode(model):
        torch.manual_seed(1)
        first, second = model(IDS).logits, model(IDS).logits
        torch.manual_seed(1)
        again = model(IDS).logits
    assert not torch.equal(first, second)
    assert torch.equal(first, again)


def test_it_is_switched_off_after_an_error_too():
    model = model_of(FAMILIES["llama"][0])
    add_residual_dropout(model, SHARE)
    with pytest.raises(KeyError), training_mode(model):
        raise KeyError
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
def test_checkpointed_layers_drop_the_same_when_they_are_computed_again(family):
    gradients = []
    for checkpointing in (False, True):
        model = model_of(FAMILIES[family][0])
        add_residual_dropout(model, SHARE)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            for module in model.modules():
                if getattr(module, "gradient_checkpointing", False):
                    module.training = True
        with training_mode(model):
            torch.manual_seed(1)
            model(IDS).logits.square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_it_adds_nothing_to_the_weights():
    model = model_of(FAMILIES["llama"][0])
    before = list(model.state_dict())
    add_residual_dropout(model, SHARE)
    assert list(model.state_dict()) == before
    assert sum(isinstance(module, ResidualDropout) for module in model.modules()) == 2


def test_an_architecture_whose_layers_are_not_known_is_refused():
    config = OPTConfig(vocab_size=50, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4)
    with pytest.raises(ValueError, match=r"in 0 layers of OPTForCausalLM, which has 2; set residual_dropout to 0"):
        add_residual_dropout(model_of(config), SHARE)


def test_training_steps_drop_and_held_out_losses_do_not(worker, folders):
    network, examples = NetworkConfig(dtype="float32"), [example(9, 2, 1), example(17, 2, 2)]
    losses = {}
    for share in (0.0, SHARE):
        worker.load("policy", "policy", folders / "policy", network, OptimizerConfig(lr=1e-9), residual_dropout=share)
        measured = [worker.language_model_loss("policy", examples, 64)["nll"] for _ in range(2)]
        trained = [worker.language_model_step("policy", examples, 64, 1e-9)["nll"] for _ in range(2)]
        losses[share] = measured, trained
        worker.unload()
    (plain, steps), (held_out, dropped) = losses[0.0], losses[SHARE]
    assert plain[0] == plain[1] == held_out[0] == held_out[1]
    assert steps == pytest.approx(plain, rel=1e-5)
    assert min(abs(loss / plain[0] - 1) for loss in dropped) > 1e-4
    assert abs(dropped[0] / dropped[1] - 1) > 1e-4
