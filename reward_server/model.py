"""The reward model: a transformer with a scalar head, in the form of AutoModelForSequenceClassification."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reward_server.config import UNTRUSTED, LoadingConfig
from reward_server.encoding import ChatEncoding
from reward_server.packing import hidden_states
from reward_server.preferences.records import write_whole
from reward_server.pretrained import Kind, check_weights, load_weights

_NORMALISATION_KEY = "rayward_normalisation"


@dataclass(frozen=True, slots=True, kw_only=True)
class Normalisation:
    """The affine map from a raw head output to a score: score = gain * raw + bias."""

    gain: float
    """factor, 1 in InstructGPT; positive"""
    bias: float
    """added after the gain, so that demonstrations score 0 on average"""

    def __post_init__(self) -> None:
        """Raise ValueError unless both numbers are finite and the gain is positive."""
        if not (math.isfinite(self.gain) and math.isfinite(self.bias) and self.gain > 0):
            raise ValueError(f"a normalisation needs a finite gain > 0 and a finite bias, not {self}")

    def __call__(self, raw: float) -> float:
        """Score of a raw head output."""
        return self.gain * raw + self.bias

    @classmethod
    def of(cls, raw: Tensor, unit_variance: bool) -> Self:
        """The one that gives the raw scores [N] of demonstrations mean 0 (InstructGPT, section 3.5).

        With `unit_variance` also a population standard deviation of 1 (lm-human-preferences): gain = 1/sigma, bias =
        -gain * mu; scores that do not vary are only shifted.
        """
        mean, deviation = raw.double().mean().item(), raw.double().std(correction=0).item()
        gain = 1.0 / deviation if unit_variance and deviation > 0 else 1.0
        return cls(gain=gain, bias=-gain * mean)


class ScalarHead(nn.Linear):
    """A linear layer that computes in fp32 whatever its weights are stored in.

    In bf16 a score of 3 has a resolution of 0.016, as large as the margins that a reward model has to tell apart.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[..., d] -> f32 [..., 1]."""
        return nn.functional.linear(input.float(), self.weight.float())


def new_reward_model(
    base_path: str | Path, dtype: torch.dtype | None, seed: int, loading: LoadingConfig = UNTRUSTED
) -> PreTrainedModel:
    """Put a fresh head on a causal language model: weight ~ N(0, 1/(d+1)), no bias (lm-human-preferences).

    In eval mode, so without dropout; with the dedicated PAD of the base model's encoding.
    """
    model = _with_scalar_head(load_weights(base_path, "new_value", dtype, loading))
    pad_id = ChatEncoding.load(base_path, loading).pad_id
    model.config.pad_token_id = pad_id
    model.config.get_text_config().pad_token_id = pad_id
    setattr(model.config, _NORMALISATION_KEY, None)
    weight = model.get_parameter("score.weight")
    with torch.no_grad():
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        weight.copy_(noise / math.sqrt(weight.shape[1] + 1))
    return model


def load_reward_model(path: str | Path, dtype: torch.dtype, loading: LoadingConfig = UNTRUSTED) -> PreTrainedModel:
    """Load a reward model's folder, in eval mode.

    Raises ValueError when it has another head than one scalar, no trained head at all, or no pad_token_id.
    """
    return _with_scalar_head(_readable(load_weights(path, "value", dtype, loading)))


def check_model(path: str | Path, kind: Kind, loading: LoadingConfig = UNTRUSTED) -> None:
    """Raise ValueError for what would stop a model from being used as `kind`; its weights are not read."""
    model = check_weights(path, kind, loading)
    if model is not None and kind in ("value", "raw_value"):
        _readable(model)
    if model is not None and kind == "value":
        normalisation(model)


def set_normalisation(model: PreTrainedModel, normalisation: Normalisation) -> None:
    """Store it in the model's config, and so in every folder that the model is saved to."""
    setattr(model.config, _NORMALISATION_KEY, asdict(normalisation))


def store_normalisation(folder: Path, normalisation: Normalisation) -> None:
    """Store it in the config of a model's folder."""
    file = folder / "config.json"
    fields = {**json.loads(file.read_text(encoding="utf-8")), _NORMALISATION_KEY: asdict(normalisation)}
    write_whole(file, json.dumps(fields, indent=2) + "\n")


def normalisation(model: PreTrainedModel) -> Normalisation:
    """The normalisation in the model's config; raises ValueError when there is none, or it is malformed."""
    stored: Any = getattr(model.config, _NORMALISATION_KEY, None)
    if not (isinstance(stored, dict) and stored.keys() == {"gain", "bias"}):
        raise ValueError(
            f"the reward model {model.config.name_or_path!r} is not normalised: {_NORMALISATION_KEY} in its "
            f"config.json is {stored!r}, not a gain and a bias. `rayward reward --normalise FOLDER` measures them on "
            "demonstrations and writes RUN/reward with them"
        )
    return Normalisation(gain=float(stored["gain"]), bias=float(stored["bias"]))


def raw_values(model: PreTrainedModel, ids: Tensor, lengths: Sequence[int], places: Tensor) -> Tensor:
    """Raw head output, f32 [n], at `places` of ids [N], sequences of `lengths` tokens one after the other."""
    return model.get_submodule("score")(hidden_states(model, ids, lengths)[places]).squeeze(-1)


def _readable(model: PreTrainedModel) -> PreTrainedModel:
    if model.config.get_text_config().pad_token_id is None:
        raise ValueError(
            f"{model.config.name_or_path}/config.json has no pad_token_id, so its score cannot be read in batches; set "
            "it to a token that no text ends with"
        )
    return model


def _with_scalar_head(model: PreTrainedModel) -> PreTrainedModel:
    model.get_submodule("score").__class__ = ScalarHead  # the same parameter and name: folders stay plain Hugging Face
    return model
