"""The size of a model before it is loaded: exact parameter counts from torch's meta device, keys and values a token."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

_LLAMA3 = {"model_type": "llama", "vocab_size": 128_256, "num_key_value_heads": 8, "max_position_embeddings": 131_072}
_GPT3 = {"model_type": "gpt2", "vocab_size": 50_257, "n_positions": 2048}
SIZES: dict[str, dict[str, Any]] = {
    # config.json of the models on the hub; those of GPT-3 from Brown et al. 2020, table 2.1 (InstructGPT's sizes),
    # where the heads of the 1.3 B are 16, as its 24 do not divide 2048.
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        **_LLAMA3,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        **_LLAMA3,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama-3.1-70b": {
        **_LLAMA3,
        "hidden_size": 8192,
        "intermediate_size": 28_672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131_072,
    },
    "gpt3-1.3b": {**_GPT3, "n_embd": 2048, "n_layer": 24, "n_head": 16},
    "gpt3-6.7b": {**_GPT3, "n_embd": 4096, "n_layer": 32, "n_head": 32},
    "gpt3-175b": {**_GPT3, "n_embd": 12_288, "n_layer": 96, "n_head": 96},
}
"""Sizes that can be named where no config.json is at hand."""


class UnknownShape(ValueError):
    """Nothing says how large the model is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What memory and time depend on. Counts are of parameters unless said otherwise."""

    name: str
    """folder, hub id or named size"""
    parameters: int
    """of the language model, tied weights once"""
    head: int
    """in an output head of its own; 0 where it is tied to the embeddings"""
    layer: int
    """in one transformer layer"""
    adapter_width: int
    """inputs plus outputs of all linear maps of one layer: a LoRA rank costs that many parameters a layer"""
    layers: int
    """transformer layers"""
    hidden: int
    """width of the residual stream"""
    inner: int
    """width inside the feed-forward block"""
    gated: bool
    """the feed-forward block multiplies two inner products (SwiGLU)"""
    heads: int
    """attention heads"""
    kv_heads: int
    """heads of keys and values"""
    head_dim: int
    """width of a head"""
    vocabulary: int
    """rows of the output head"""
    positions: int
    """longest sequence"""

    @property
    def value_parameters(self) -> int:
        """Of a reward model or critic of this shape: a scalar head in place of the output head."""
        return self.parameters - self.head + self.hidden

    @property
    def output(self) -> int:
        """In the output head, its own or the embeddings' once more: what computes at positions that are asked for."""
        return self.vocabulary * self.hidden

    @property
    def body(self) -> int:
        """That compute for every token: without the head, and without embeddings, which are looked up."""
        return self.parameters - self.head - self.output

    @property
    def kv_elements(self) -> int:
        """Cached numbers a token: 2 * layers * kv_heads * head_dim."""
        return 2 * self.layers * self.kv_heads * self.head_dim


NO_MODEL = Shape(
    name="none",
    **dict.fromkeys(
        ("parameters", "head", "layer", "adapter_width", "layers", "hidden", "inner", "heads", "kv_heads"), 0
    ),
    gated=False,
    head_dim=0,
    vocabulary=0,
    positions=0,
)
"""Where no model is needed."""


def shape_of(source: str | Path | Mapping[str, Any], name: str | None = None) -> Shape:
    """The shape of a Hugging Face folder or hub id in the cache, a named size, or the fields of a config.json.

    Raises UnknownShape for what is none of these. Nothing is downloaded.
    """
    if not isinstance(source, Mapping):
        text = str(source)
        named = SIZES.get(text.rpartition("/")[2].lower())
        if named is None or (Path(source) / "config.json").is_file():
            return _measured(_config(text), name or text)
        source, name = named, name or text
    fields = dict(source)
    kind = fields.pop("model_type", None)
    if not isinstance(kind, str):
        raise UnknownShape(f"the shape {fields} has no model_type: give one, such as 'llama', as in a config.json")
    try:
        return _measured(AutoConfig.for_model(kind, **fields), name or kind)
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise UnknownShape(f"transformers makes no language model of {dict(source)}: {error}") from error


def _config(path: str) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UnknownShape(
            f"the size of {path} is not known: it is no folder with a config.json, not in the local Hugging Face "
            "cache, and no size known by name. Set plan.model to the fields of a config.json, or to one of "
            f"{', '.join(SIZES)}"
        ) from error


def _measured(config: PretrainedConfig, name: str) -> Shape:
    return _counted(config.to_json_string(use_diff=False), type(config), name)


@lru_cache(maxsize=32)
def _counted(fields: str, kind: type[PretrainedConfig], name: str) -> Shape:
    """Build the network without memory for its weights, and count them; `fields`: a config.json."""
    config = kind(**json.loads(fields))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    text: Any = config.get_text_config()
    layers = int(text.num_hidden_layers)
    first: nn.Module = next(module for module in model.modules() if isinstance(module, nn.ModuleList))[0]
    maps = [module for module in first.modules() if isinstance(module, nn.Linear | Conv1D)]
    language_model: Any = model
    head, embeddings = language_model.get_output_embeddings(), language_model.get_input_embeddings()
    tied = head is None or head.weight is embeddings.weight
    heads = int(text.num_attention_heads)
    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * int(text.hidden_size)
    return Shape(
        name=name,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        head=0 if tied or head is None else sum(parameter.numel() for parameter in head.parameters()),
        layer=sum(parameter.numel() for parameter in first.parameters()),
        adapter_width=sum(sum(one.weight.shape) for one in maps),
        layers=layers,
        hidden=int(text.hidden_size),
        inner=int(inner),
        gated=any("gate" in module_name for module_name, _ in first.named_modules()),
        heads=heads,
        kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(text, "head_dim", None) or int(text.hidden_size) // heads),
        vocabulary=int(text.vocab_size),
        positions=int(text.max_position_embeddings),
    )
