import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from actors.evaluation.classifiers import OFFLINE, FolderClassifier, load_classifier
from reward_server.functions import UserFunctionError
from tests.tiny_models import tiny_tokenizer

TEXTS = ["hello world", "this is bad", "the lazy dog jumps over the quick brown fox"]


def classifier(path: Path, **config: Any) -> BertForSequenceClassification:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForSequenceClassification(
        BertConfig(vocab_size=len(tokenizer), initializer_range=1.0, **sizes, **config)
    )
    model.save_pretrained(path)
    return model.eval()


def logits(model: BertForSequenceClassification) -> torch.Tensor:
    """Of each text by itself, without padding."""
    tokenizer = tiny_tokenizer()
    with torch.inference_mode():
        return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS])


def test_the_label_called_toxic_is_a_softmax_of_several(tmp_path: Path) -> None:
    model = classifier(tmp_path, id2label={0: "neutral", 1: "Toxic"}, label2id={"neutral": 0, "Toxic": 1})
    found = load_classifier(str(tmp_path))
    assert found.name == f"{tmp_path} (Toxic)"
    expected = logits(model).softmax(-1)
    assert found.scores(TEXTS) == pytest.approx(expected[:, 1].tolist(), rel=1e-4)
    assert load_classifier(str(tmp_path), "neutral").scores(TEXTS) == pytest.approx(expected[:, 0].tolist(), rel=1e-4)


def test_independent_labels_and_a_single_one_are_sigmoids(tmp_path: Path) -> None:
    labels = {0: "insult", 1: "toxicity", 2: "threat"}
    model = classifier(tmp_path / "several", id2label=labels, problem_type="multi_label_classification")
    assert load_classifier(str(tmp_path / "several")).scores(TEXTS) == pytest.approx(
        logits(model).sigmoid()[:, 1].tolist(), rel=1e-4
    )
    model = classifier(tmp_path / "one", num_labels=1)
    assert load_classifier(str(tmp_path / "one")).scores(TEXTS) == pytest.approx(
        logits(model).sigmoid()[:, 0].tolist(), rel=1e-4
    )


def test_a_folder_without_the_label_or_without_weights_is_refused(tmp_path: Path) -> None:
    model = classifier(tmp_path, num_labels=2)
    model.bert.save_pretrained(tmp_path / "headless")
    tiny_tokenizer(tmp_path / "headless")
    with pytest.raises(ValueError, match=r"its weights lack .*classifier\.weight.*, which would be random"):
        load_classifier(str(tmp_path / "headless"), 1)
    with pytest.raises(ValueError, match=r"has none that is called toxic or toxicity: choose .*LABEL_0"):
        load_classifier(str(tmp_path))
    with pytest.raises(ValueError, match="has no label 'rude'"):
        load_classifier(str(tmp_path), "rude")
    assert isinstance(load_classifier(str(tmp_path), 1), FolderClassifier)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="is no classifier of transformers"):
        load_classifier(str(tmp_path), 1)


def test_a_function_is_a_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rude_words.py").write_text(
        "def share(texts):\n    return [text.count('bad') / 2 for text in texts]\n\n\ndef none(texts):\n    return []\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "rude_words", raising=False)
    found = load_classifier("rude_words:share")
    assert (found.name, found.scores(["bad", "good"])) == ("rude_words:share", [0.5, 0])
    with pytest.raises(ValueError, match=r"rude_words:share returned 1\.5, and a toxicity is a number of 0 to 1"):
        found.scores(["bad bad bad"])
    with pytest.raises(UserFunctionError, match="returned 0 numbers for 1 responses"):
        load_classifier("rude_words:none").scores(["a"])
    with pytest.raises(ValueError, match="cannot import the module"):
        load_classifier("no_such_module:f")


def test_the_offline_default_tells_abuse_from_a_greeting() -> None:
    pytest.importorskip("profanity_check")
    found = load_classifier()
    kind, rude = found.scores(["Have a nice day", "go to hell, you scum"])
    assert found.name == OFFLINE
    assert 0 <= kind < 0.5 <= rude <= 1


def test_the_offline_default_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "profanity_check", None)
    with pytest.raises(ValueError, match=r"not installed .*pip install 'rayward\[eval\]', or name another classifier"):
        load_classifier()
