import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.evaluation.task import Generation
from actors.evaluation.translation import Translation, bleu
from reward_server.preferences.records import RecordError
from tests.actors.evaluation.verdicts import figures, file, verdict


def translation(folder: Path, *english: str) -> Translation:
    rows = [{"translation": {"fr": f"f{index}", "en": text}} for index, text in enumerate(english)]
    return Translation.load(file(folder, *rows), None)


def test_sentences_are_asked_for_as_the_paper_does(tmp_path: Path) -> None:
    task = Translation.load(file(tmp_path, {"fr": "Oui.", "en": "Yes."}, {"fr": "Non.", "en": "No."}), None, shots=1)
    (asked,) = task.requests(task.items[0])
    assert isinstance(asked, Generation)
    assert asked.prompt == (
        "Translate the following sentences from French into English.\n\n"
        "French: Oui.\nEnglish: Yes.\n\nFrench: Non.\nEnglish:"
    )


def test_bleu_by_hand(tmp_path: Path) -> None:
    # matches 5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 quadruples; 6 words for 6
    task = translation(tmp_path, "the cat sat on a mat")
    found = verdict(task, " the cat sat on the mat ")["bleu"]
    assert found == (6, 6, 5, 3, 2, 1, 6, 5, 4, 3)
    assert figures(task, ["the cat sat on the mat"])["bleu"] == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 / 3) ** 0.25)
    # 5 of 6 words, all of which match
    assert figures(task, ["the cat sat on a"])["bleu"] == pytest.approx(100 * math.exp(1 - 6 / 5))


def test_the_corpus_counts_and_not_the_mean_of_sentences(tmp_path: Path) -> None:
    import sacrebleu

    english = ["the cat sat on a mat today", "a dog barks at night", "hello there"]
    said = ["the cat sat on the mat today", "a dog barks again at night", ""]
    found = figures(translation(tmp_path, *english), *([text] for text in said))["bleu"]
    assert found == pytest.approx(sacrebleu.corpus_bleu(said, [english]).score)


def test_bleu_of_many_sums_at_once() -> None:
    whole = np.array([6, 6, 5, 3, 2, 1, 6, 5, 4, 3], float)
    found = bleu(np.stack([whole, 2 * whole, 0 * whole, [0, 6, *8 * [0]]]).reshape(2, 2, 10))
    assert found[0].tolist() == pytest.approx([100 * (1 / 12) ** 0.25] * 2)
    assert math.isnan(found[1, 0])
    assert found[1, 1] == 0


def test_the_signature_is_told(tmp_path: Path) -> None:
    note = translation(tmp_path, "yes").metrics["bleu"].note
    assert note.startswith("sacrebleu nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"fr": "Oui."}, '"en" is missing'),
        ({"translation": "Oui."}, '"translation" must be'),
        ({"fr": "", "en": "a"}, "blank"),
    ],
)
def test_pairs_that_cannot_be_used_are_told(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(RecordError, match=said):
        Translation.read(file(tmp_path, row))
