import math
import random
import re
from pathlib import Path

import pytest

from actors.evaluation.perplexity import BitsPerByte, windows
from actors.evaluation.task import Likelihood
from reward_server.preferences.records import RecordError
from tests.actors.evaluation.verdicts import figures, file, likely


def test_windows_are_the_text_cut_before_spaces() -> None:
    assert windows("one two three", 8) == ["one two", " three"]
    assert windows("one", 8) == ["one"]
    assert windows("abcdefghij kl", 4) == ["abcd", "efgh", "ij", " kl"]
    assert windows("ééééé", 4) == ["éé", "éé", "é"]
    assert windows("a" + " " * 9 + "b", 4) == ["a   ", " " * 6 + "b"]


def test_windows_add_up_are_short_and_never_blank() -> None:
    draw = random.Random(0)
    for _ in range(500):
        text = "".join(draw.choices("ab é\n日", k=draw.randint(1, 60))).strip() or "a"
        found = windows(text, 8)
        assert "".join(found) == text
        assert all(one.strip() for one in found)
        assert all(len(one.encode()) <= 8 or re.search(r"\s{5}", one) for one in found)


def test_bits_are_added_up_over_bytes(tmp_path: Path) -> None:
    path = file(tmp_path, {"text": "one two three\n"}, {"text": "é"})
    items = BitsPerByte.read(path)
    task = BitsPerByte(items, window_bytes=8)
    assert task.requests(items[0]) == [
        Likelihood(context="", continuation="one two"),
        Likelihood(context="", continuation=" three"),
    ]
    found = figures(task, likely(-8 * math.log(2), -4 * math.log(2)), likely(-3 * math.log(2)))
    assert found == {"bits_per_byte": pytest.approx((8 + 4 + 3) / (13 + 2))}
    assert len(BitsPerByte.load(path, None).requests(items[0])) == 1


def test_rows_without_text_are_told(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=':2: "text" is blank'):
        BitsPerByte.read(file(tmp_path, {"text": "a"}, {"text": " "}))
