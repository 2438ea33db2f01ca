"""The one door for the folders of models: the weights, config and tokenizer of each come through here.

What a folder lacks would be random and what it has too much of would be dropped, both without a word: they are refused
by name. transformers is imported where it is used: who checks small files only does not wait for it.
"""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from reward_server.config import UNTRUSTED, LoadingConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Kind = Literal["policy", "value", "raw_value", "new_value"]
"""A language model; a reward model, with its normalisation or as it is; a language model that gets a scalar head."""
_LANGUAGE_MODELS = ("policy", "new_value")
ADAPTER = (
    "holds an adapter (adapter_config.json), which learner and sampler would not both apply: merge it into its base "
    "(merge_and_unload in peft), and name a folder with the whole model and no adapter"
)
_HEAD = "score.weight"
_SHOWN = 4  # names of tensors in an error


class NoDecoder(ValueError):
    """A folder of a model that has no linear head `score` over a decoder, such as an encoder with a classifier."""


def open_with(auto: Any, path: str | Path, loading: LoadingConfig = UNTRUSTED, **settings: Any) -> Any:
    """`auto.from_pretrained(path)`; code that the folder brings is run as `loading` says: no terminal is asked."""
    try:
        return auto.from_pretrained(str(path), trust_remote_code=loading.trust_remote_code, **settings)
    except ValueError as error:
        if loading.trust_remote_code or "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{path} needs Python code of its own, which would have all your rights and is not run unless asked: read "
            "it and set models.trust_remote_code, or name a model that transformers knows"
        ) from error


def load_weights(
    path: str | Path,
    kind: Kind,
    dtype: "torch.dtype | None" = None,
    loading: LoadingConfig = UNTRUSTED,
    headers_only: bool = False,
) -> "PreTrainedModel":
    """Load a folder's weights, in eval mode, on the CPU; a reward model with its head as `score`, a linear layer.

    `headers_only`: names and shapes alone, on the meta device, of what is on this machine. Raises ValueError unless
    folder and model have the same tensors: with "new_value", but for the heads.
    """
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.utils.peft_utils import find_adapter_config_file

    if find_adapter_config_file(str(path), local_files_only=headers_only):
        raise ValueError(f"{path} {ADAPTER}")
    config = open_with(AutoConfig, path, loading, local_files_only=headers_only)
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"{path} holds quantised weights (quantization_config in its config.json), which cannot be trained: name "
            "the model that it was made of, or dequantise it and save it as bfloat16"
        )
    # Gemma 2 caps its attention's logits, which torch's fused attention leaves out without a word.
    attention = "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None
    auto: Any = AutoModelForCausalLM if kind == "policy" else AutoModelForSequenceClassification
    with _quiet():  # its report is ours to raise
        model, report = open_with(
            *(auto, path, loading),
            dtype=dtype or "auto",
            device_map="meta" if headers_only else None,
            local_files_only=headers_only,
            attn_implementation=attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **({} if kind == "policy" else {"num_labels": 1}),
        )
    head = getattr(model, "score", None)
    if kind != "policy" and not (isinstance(head, nn.Linear) and head.bias is None):
        raise NoDecoder(
            f"{path} is a {type(model).__name__}, which has no linear head 'score' over a decoder; use a "
            "causal language model such as Llama, Qwen or GPT-2"
        )
    if kind == "new_value":  # what it starts from is a whole language model
        load_weights(path, "policy", loading=loading, headers_only=True)
    if wrong := list(_wrong(kind, config.architectures or (), report)):
        what = "language model" if kind in _LANGUAGE_MODELS else "reward model"
        remedy = "Name another folder, or save the model again with the tensors of its architecture (save_pretrained)"
        raise ValueError(f"{path} is not a {what}: {'; '.join(wrong)}. {remedy}")
    return model.eval()


def check_weights(path: str | Path, kind: Kind, loading: LoadingConfig = UNTRUSTED) -> "PreTrainedModel | None":
    """What `load_weights` would raise, from the names and shapes in the files alone; the model without its numbers.

    None for a hub id that is not in the local cache: it is looked at when it is loaded.
    """
    try:
        return load_weights(path, kind, loading=loading, headers_only=True)
    except OSError as error:
        if is_hub_id(path):
            return None
        raise ValueError(f"{path} cannot be read as a model ({error})") from error


def is_hub_id(path: str | Path) -> bool:
    """Whether a name that is no folder here can be one of the Hugging Face hub."""
    return not Path(path).exists() and str(path).count("/") == 1 and not str(path).startswith((".", "/", "~"))


def _wrong(kind: Kind, architectures: Iterable[str], report: dict[str, Any]) -> Iterator[str]:
    """In which ways folder and model differ."""
    given = [name for name in architectures if name.endswith("ForSequenceClassification")]
    if given and kind in _LANGUAGE_MODELS:
        yield f"its config.json says {given[0]}"
    if missing := report["missing_keys"] - ({_HEAD} if kind == "new_value" else set()):
        yield f"its weights lack {_some(missing)}, which would be random"
    if kind != "new_value" and report["unexpected_keys"]:
        yield f"its weights have {_some(report['unexpected_keys'])}, which would be dropped"
    shapes = {name: (list(theirs), list(ours)) for name, theirs, ours in report["mismatched_keys"]}
    if labels := shapes.pop(_HEAD, None):
        yield f"its head has {labels[0][0]} labels, and a score is one number"
    if shapes:
        yield "by its config.json " + _some(f"{n} is {ours}, not {theirs}" for n, (theirs, ours) in shapes.items())


def _some(names: Iterable[str]) -> str:
    found = sorted(names)
    return ", ".join(found[:_SHOWN]) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers without warnings and progress bars."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
