"""The size of a model before it is loaded: exact parameter counts from torch's meta device, keys and values a token."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config.schema import Config
from reward_server.config import UNTRUSTED, LoadingConfig
from reward_server.pretrained import open_with

_FIELDS = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "tie_word_embeddings"),
)
# As in config.json on the hub; GPT-3 from Brown et al. 2020, table 2.1, but for 16 heads, as 24 do not divide 2048.
SIZES: dict[str, dict[str, Any]] = {
    name: dict(zip(_FIELDS, numbers, strict=True))
    for name, *numbers in (
        ("smollm2-135m", "llama", 49_152, 576, 1536, 30, 9, 3, 8192, True),
        ("qwen2.5-0.5b", "qwen2", 151_936, 896, 4864, 24, 14, 2, 32_768, True),
        ("llama-3.2-1b", "llama", 128_256, 2048, 8192, 16, 32, 8, 131_072, True),
        ("llama-3.1-8b", "llama", 128_256, 4096, 14_336, 32, 32, 8, 131_072, False),
        ("llama-3.1-70b", "llama", 128_256, 8192, 28_672, 80, 64, 8, 131_072, False),
        ("qwen2.5-7b", "qwen2", 152_064, 3584, 18_944, 28, 28, 4, 131_072, False),
        ("gpt3-1.3b", "gpt2", 50_257, 2048, 8192, 24, 16, 16, 2048, True),
        ("gpt3-6.7b", "gpt2", 50_257, 4096, 16_384, 32, 32, 32, 2048, True),
        ("gpt3-175b", "gpt2", 50_257, 12_288, 49_152, 96, 96, 96, 2048, True),
    )
}
"""Sizes that can be named where no config.json is at hand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What memory and time depend on. Counts are of parameters unless said otherwise."""

    name: str
    """folder, hub id or named size"""
    parameters: int = 0
    """of the language model, tied weights once"""
    head: int = 0
    """in an output head of its own; 0 where it is tied to the embeddings"""
    layer: int = 0
    """in one transformer layer"""
    adapter_width: int = 0
    """inputs plus outputs of all linear maps of one layer: a LoRA rank costs that many parameters a layer"""
    layers: int = 0
    """transformer layers"""
    hidden: int = 0
    """width of the residual stream"""
    inner: int = 0
    """width inside the feed-forward block"""
    heads: int = 0
    """attention heads"""
    kv_heads: int = 0
    """heads of keys and values"""
    head_dim: int = 0
    """width of a head"""
    vocabulary: int = 0
    """rows of the output head"""
    positions: int = 0
    """longest sequence"""

    @property
    def value_parameters(self) -> int:
        """Of a reward model or critic of this shape: a scalar head in place of the output head."""
        return self.parameters - self.head + self.hidden

    @property
    def output(self) -> int:
        """In the output head, its own or the embeddings' once more."""
        return self.vocabulary * self.hidden

    @property
    def body(self) -> int:
        """That compute for every token: without the head, and without embeddings, which are looked up."""
        return self.parameters - self.head - self.output

    @property
    def kv_elements(self) -> int:
        """Cached numbers a token: 2 * layers * kv_heads * head_dim."""
        return 2 * self.layers * self.kv_heads * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """The shapes of a run's models."""

    policy: Shape
    """base, SFT model, policy and reference"""
    reward: Shape
    """reward model and critic"""


def models_of(config: Config, run_dir: Path, serves: bool = False) -> Models:
    """Shapes of the configured or the run's own folders; where those are not here, of the sizes in `plan`.

    `serves`: a reward model is all that is needed, and none where no part of the score is one. Raises ValueError.
    """
    models, plan = config.models, config.plan
    sft, reward = (run_dir / name if (run_dir / name / "config.json").is_file() else None for name in ("sft", "reward"))
    rewards = [one for one in (models.reward, reward, plan.reward_model) if one]
    if serves:
        parts = [part.target for part in config.scoring.parts if part.kind == "model"]
        scorer = _first_known(models, *parts, *rewards, plan.model) if parts else Shape(name="none")
        return Models(policy=scorer, reward=scorer)
    policy = _first_known(models, models.sft, sft, models.base, config.reward.normalise, plan.model)
    return Models(policy=policy, reward=_first_known(models, *rewards) if rewards else policy)


def _first_known(loading: LoadingConfig, *sources: Any) -> Shape:
    """The shape of the first source that has one. Raises ValueError for none."""
    sizes, errors = ", ".join(SIZES), list[str]()
    for source in filter(None, sources):
        try:
            return shape_of(source, loading)
        except ValueError as error:
            errors.append(str(error))
    none = f"the size of the model is not known: set models.base to a folder, or plan.model to one of {sizes}"
    raise ValueError(errors[0] if errors else none)


def shape_of(source: str | Path | Mapping[str, Any], loading: LoadingConfig = UNTRUSTED) -> Shape:
    """The shape of a Hugging Face folder or hub id in the cache, a named size, or the fields of a config.json.

    Raises ValueError for what is none of these. Nothing is downloaded.
    """
    from transformers import AutoConfig

    fields, name = (source, "model") if isinstance(source, Mapping) else (None, str(source))
    if fields is None and not (Path(name) / "config.json").is_file():
        fields = SIZES.get(name.rpartition("/")[2].lower())
    try:
        config = (
            AutoConfig.for_model(**fields) if fields else open_with(AutoConfig, name, loading, local_files_only=True)
        )
        return _counted(config, name, loading)
    except (OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"the size of {source} is not known: it is no folder with a config.json, not in the local Hugging Face "
            f"cache, and no size known by name. Set plan.model to one of {', '.join(SIZES)}, or to the fields of a "
            f"config.json with a model_type ({error})"
        ) from error


def _counted(config: Any, name: str, loading: LoadingConfig) -> Shape:
    """Build the network without memory for its weights, and count them."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=loading.trust_remote_code)
    model.tie_weights()
    text = config.get_text_config()
    heads, hidden = text.num_attention_heads, text.hidden_size
    first = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))[0]
    head = model.get_output_embeddings()
    tied = head is None or head.weight is model.get_input_embeddings().weight

    def numbers(module: Any) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    return Shape(
        name=name,
        parameters=numbers(model),
        head=0 if tied else numbers(head),
        layer=numbers(first),
        adapter_width=sum(sum(m.weight.shape) for m in first.modules() if isinstance(m, torch.nn.Linear | Conv1D)),
        layers=text.num_hidden_layers,
        hidden=hidden,
        inner=getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * hidden,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or hidden // heads,
        vocabulary=text.vocab_size,
        positions=text.max_position_embeddings,
    )
