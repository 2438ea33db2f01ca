import asyncio
from pathlib import Path

from benchmarks.label_load import load, lost, measure, served
from reward_server.labeling.people import People


def test_nothing_is_lost_under_load():
    figures = measure(12, seconds=5, pause=0.05, how_many_items=600)
    assert (figures["lost"], figures["altered"], figures["twice"]) == (0, 0, 0)
    assert figures["rankings"] > 12
    assert set(figures["ms"]) == {"next", "draft", "submit"}
    assert figures["all_ms"]["p50"] <= figures["all_ms"]["p99"] < 5000


def test_what_is_lost_is_told(tmp_path: Path):
    _, token = People(tmp_path / "people.json").invite("Anna")
    with served(tmp_path, 50) as (url, _):
        (anna,) = asyncio.run(load(url, [token], 3, 0.01))
    assert lost(tmp_path, [anna])["lost"] == 0
    first, second, *_ = anna.acknowledged
    anna.acknowledged[first] = [9, 9, 9, 9]
    anna.acknowledged["a-missing"] = anna.acknowledged.pop(second)
    found = lost(tmp_path, [anna])
    assert (found["lost"], found["altered"], found["twice"]) == (1, 1, 0)
