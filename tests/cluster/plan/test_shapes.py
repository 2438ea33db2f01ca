"""Counts from the meta device beside those of models that were built, and beside published ones."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.plan.shapes import SIZES, shape_of
from reward_server.model import new_reward_model
from tests.tiny_models import tiny_causal_lm


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_counts_are_those_of_the_built_model(tmp_path: Path, family: str, tied: bool):
    model = tiny_causal_lm(tmp_path, tied=tied, family=family)
    shape = shape_of(tmp_path)
    assert shape.parameters == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tmp_path).parameters())
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    reward = new_reward_model(tmp_path, torch.float32, 0)
    assert shape.value_parameters == sum(p.numel() for p in reward.parameters())
    assert (shape.layers, shape.hidden, shape.heads, shape.vocabulary, shape.positions) == (2, 32, 4, 320, 256)
    assert shape.kv_heads == (2 if family == "llama" else 4)
    assert shape.kv_elements == 2 * 2 * shape.kv_heads * 8
    assert shape.inner == (64 if family == "llama" else 128)


@pytest.mark.parametrize(
    ("name", "published"),  # of the model cards
    [("llama-3.1-8b", 8_030_261_248), ("llama-3.1-70b", 70_553_706_496), ("qwen2.5-7b", 7_615_616_512)],
)
def test_named_sizes_are_the_published_ones(name: str, published: int):
    assert shape_of(name).parameters == published
    assert replace(shape_of(f"someone/{name.upper()}"), name=name) == shape_of(name)


def test_every_named_size_has_a_shape_and_takes_no_memory():
    for name in SIZES:
        assert shape_of(name).parameters > 1e8


def test_fields_of_a_config_are_a_shape():
    fields = {"model_type": "llama", "vocab_size": 100, "hidden_size": 8, "intermediate_size": 16}
    shape = shape_of({**fields, "num_hidden_layers": 1, "num_attention_heads": 2, "tie_word_embeddings": True})
    assert shape.parameters == 100 * 8 + (4 * 8 * 8 + 3 * 8 * 16 + 2 * 8) + 8
    assert shape.adapter_width == 4 * 16 + 3 * 24


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("no/such-model", r"the size of no/such-model is not known.*one of smollm2-135m.*fields of a config.json"),
        ({"hidden_size": 8}, "model_type"),
        ({"model_type": "blama"}, "blama.* is not known"),
    ],
)
def test_what_has_no_shape_says_what_to_give(source, said: str):
    with pytest.raises(match=said):
        shape_of(source)
