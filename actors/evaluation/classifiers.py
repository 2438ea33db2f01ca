"""Classifiers of toxicity: one from the package index, a Hugging Face folder, or a function of the user's own."""

import math
from pathlib import Path
from typing import Any

from actors.evaluation.toxicity import Classifier
from reward_server.config import UNTRUSTED, LoadingConfig
from reward_server.functions import call_function, load_function
from reward_server.pretrained import open_with

OFFLINE = "alt-profanity-check"
_TOXIC = ("toxic", "toxicity")
_MAX_TOKENS = 512


def load_classifier(
    name: str = OFFLINE, label: str | int | None = None, loading: LoadingConfig = UNTRUSTED
) -> Classifier:
    """The classifier that a name stands for: `alt-profanity-check`, "module:function", or a folder or hub id.

    `label` chooses among those of a folder: its name or number. Raises ValueError where the name stands for none.
    """
    if name == OFFLINE:
        return Profanity()
    if ":" in name and not Path(name).exists():
        return FunctionClassifier(name)
    return FolderClassifier(name, label, loading)


class Profanity:
    """A linear model over words, trained on comments that people called toxic; needs neither network nor folder."""

    name = OFFLINE

    def __init__(self) -> None:
        """Raises ValueError where the package is not installed."""
        try:
            from profanity_check import predict_prob
        except ImportError as error:
            raise ValueError(
                f"{OFFLINE} is not installed ({error}): pip install 'rayward[eval]', or name another classifier"
            ) from error
        self._predict: Any = predict_prob

    def scores(self, texts: list[str]) -> list[float]:
        return [float(one) for one in self._predict(texts)]


class FunctionClassifier:
    """A function (texts) -> numbers of 0 to 1, one for each."""

    def __init__(self, name: str) -> None:
        """Raises ValueError where "module:function" names none."""
        self.name = name
        self._function = load_function(name)

    def scores(self, texts: list[str]) -> list[float]:
        """Raises UserFunctionError where the function fails, and ValueError where a number is not a probability."""
        found = call_function(self.name, self._function, len(texts), texts)
        if wrong := [one for one in found if not 0 <= one <= 1]:
            raise ValueError(f"{self.name} returned {wrong[0]:g}, and a toxicity is a number of 0 to 1; scale it")
        return found


class FolderClassifier:
    """A sequence classifier of transformers: the probability of its label "toxic" or "toxicity", or the one asked for.

    The sigmoid of that label's logit where labels are independent (problem_type "multi_label_classification") or there
    is only one, else its softmax.
    """

    def __init__(self, path: str, label: str | int | None = None, loading: LoadingConfig = UNTRUSTED) -> None:
        """Raises ValueError for a folder that holds no whole classifier, or not that label."""
        self._model, self._tokenizer = _open(path, loading)
        config = self._model.config
        self._label = _label(path, config.id2label, label)
        self._independent = config.num_labels == 1 or config.problem_type == "multi_label_classification"
        self.name = f"{path} ({config.id2label[self._label]})"

    def scores(self, texts: list[str]) -> list[float]:
        """Texts of more than 512 tokens (or the model's own limit) are cut."""
        import torch

        most = min(_MAX_TOKENS, self._tokenizer.model_max_length)
        with torch.inference_mode():
            batch = self._tokenizer(texts, padding=True, truncation=True, max_length=most, return_tensors="pt")
            logits = self._model(**batch).logits.float()
            p = logits.sigmoid() if self._independent else logits.softmax(-1)
        found = p[:, self._label].tolist()
        if not all(map(math.isfinite, found)):
            raise ValueError(f"{self.name} gave {found}, no finite numbers; name another classifier")
        return found


class PairClassifier:
    """A classifier of one label that reads a prompt and a response as a pair: a reward model that is an encoder."""

    def __init__(self, path: str, loading: LoadingConfig = UNTRUSTED) -> None:
        """Raises ValueError for a folder that holds no whole classifier, or one of several labels."""
        self._model, self._tokenizer = _open(path, loading)
        if (labels := self._model.config.num_labels) != 1:
            raise ValueError(f"{path} has {labels} labels, and a score is one number")
        limits = self._tokenizer.model_max_length, getattr(self._model.config, "max_position_embeddings", None)
        self._most = min(limit for limit in limits if limit)

    def score(self, prompt: str, response: str) -> float | None:
        """The label's logit, higher is better; None where the pair has more tokens than the model reads."""
        import torch

        pair = self._tokenizer(prompt, response, return_tensors="pt")
        if pair["input_ids"].shape[1] > self._most:
            return None
        with torch.inference_mode():
            found = float(self._model(**pair).logits.float())
        if not math.isfinite(found):
            raise ValueError(f"{self._model.name_or_path} gave {found}, no finite number; name another judge")
        return found


def _open(path: str, loading: LoadingConfig) -> tuple[Any, Any]:
    """(model, tokenizer)"""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        model, report = open_with(AutoModelForSequenceClassification, path, loading, output_loading_info=True)
        tokenizer = open_with(AutoTokenizer, path, loading)
    except OSError as error:
        raise ValueError(f"{path} is no classifier of transformers ({error}); name a folder that is") from error
    if missing := report["missing_keys"]:
        raise ValueError(f"{path} is no classifier: its weights lack {sorted(missing)[:4]}, which would be random")
    return model.eval(), tokenizer


def _label(path: str, names: dict[int, str], label: str | int | None) -> int:
    if isinstance(label, int) and label in names:
        return label
    wanted = _TOXIC if label is None else (str(label).lower(),)
    if found := [index for index, name in names.items() if name.lower() in wanted]:
        return found[0]
    if label is None and len(names) == 1:
        return 0
    what = "none that is called toxic or toxicity" if label is None else f"no label {label!r}"
    raise ValueError(f"{path} has {what}: choose one of its labels {names} by name or number")
