"""Several sequences in one row are read as each is alone, or the model is padded and says so."""

import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from reward_server.packing import hidden_states, pack, packs
from tests.tiny_models import FAMILIES, tiny_causal_lm

LENGTHS = [41, 7, 7, 20, 1]
IDS = torch.randint(3, 320, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))


def loaded(path: Path, dtype: torch.dtype, attention: str | None = None) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attention).eval()


def alone(model: PreTrainedModel) -> torch.Tensor:
    rows = [model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0] for ids in IDS.split(LENGTHS)]
    return torch.cat(rows)


@pytest.mark.parametrize("family", [*FAMILIES, "opt", "phi3", "olmo2", "bloom", "stablelm"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
def test_states_and_gradients_are_those_of_each_sequence_alone(tmp_path, family, dtype, bound):
    """States are about 3 at most. Lengths reach beyond the sliding windows of 16, and two are neighbours and equal."""
    tiny_causal_lm(tmp_path, family=family)
    model, plain = pack(loaded(tmp_path, dtype)), loaded(tmp_path, dtype, "eager")
    assert packs(model) == (family not in ("bloom", "stablelm"))
    found, expected = hidden_states(model, IDS, LENGTHS), alone(plain)
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)
    if dtype == torch.float32:
        weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
        for states in (found, expected):
            (states * weight).sum().backward()
        for (name, got), want in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert (got.grad is None) == (want.grad is None), name
            if got.grad is not None:
                torch.testing.assert_close(got.grad, want.grad, rtol=1e-3, atol=2e-3, msg=name)


def test_the_choice_is_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for family, words in ("llama", "reads packed sequences: sdpa_by_sequence"), ("stablelm", "batches are padded"):
        tiny_causal_lm(tmp_path / family, family=family)
        pack(loaded(tmp_path / family, torch.float32))
        assert words in caplog.records[-1].getMessage()


def test_a_packed_model_reads_an_ordinary_batch_as_before(tmp_path):
    tiny_causal_lm(tmp_path)
    model, plain = pack(loaded(tmp_path, torch.float32)), loaded(tmp_path, torch.float32, "eager")
    ids = IDS[:40].view(4, 10)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=0, atol=1e-4)


def test_a_model_without_flash_attention_is_packed_on_a_gpu_too(tmp_path, monkeypatch: pytest.MonkeyPatch):
    tiny_causal_lm(tmp_path)
    model = loaded(tmp_path, torch.bfloat16)
    monkeypatch.setattr(type(model), "_supports_flash_attn", False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("reward_server.packing.is_flash_attn_2_available", lambda: True)
    assert pack(model).config._attn_implementation == "sdpa_by_sequence"
