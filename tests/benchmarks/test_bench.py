"""The benchmark's runner on rows of numbers: turns, refusal on a busy machine, failures; and that the page is true."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import bench, page, parts, sides
from benchmarks.padding import log_normal, spent, table
from benchmarks.rows import ROWS, Row

ROOT = Path(__file__).parents[2]
WHERE = {
    "date": "2026-11-29",
    "commit": "abc",
    "machine": {"processor": "CPU", "cores": 2, "memory_gib": 24.0},
    "versions": {"torch": "2.13.0"},
}


def row(name: str, *sides: str, goal: float | None = 1.0) -> Row:
    ratio = lambda found: (found[sides[0]]["n"], found[sides[-1]]["n"])  # noqa: E731
    return Row(name=name, value="v", denominator="d", goal=goal, sides=sides, ratio=ratio, limit="l")


def test_sides_take_turns_and_are_measured_once_a_repeat():
    calls: list[str] = []

    def side(name: str) -> dict[str, float]:
        calls.append(name)
        return {"n": float(len(calls))}

    rows = [row("one", "a", "b"), row("two", "c", "a")]
    found = list(bench.repeat(rows, side, 2, quiet=lambda: calls.append("quiet")))
    a_turn = ["quiet", "a", "quiet", "b", "quiet", "c", "quiet"]
    assert calls == 2 * a_turn
    assert found == [{"one": (2.0, 4.0), "two": (6.0, 2.0)}, {"one": (9.0, 11.0), "two": (13.0, 9.0)}]


def test_a_side_that_fails_costs_its_rows_alone():
    calls: list[str] = []

    def side(name: str) -> dict[str, float]:
        calls.append(name)
        if name == "b":
            raise bench.NotMeasured("no network")
        return {"n": 3.0}

    found = list(bench.repeat([row("one", "a", "b"), row("two", "a")], side, 2, quiet=lambda: None))
    assert found == [{"one": "no network", "two": (3.0, 3.0)}] * 2
    assert calls == ["a", "b", "a"]


def test_a_busy_machine_is_refused_with_the_name():
    seconds = iter(range(100))

    def look() -> bench.Times:
        now = next(seconds)
        return {7: ("compiler", 1000.0 * now), 8: ("idle", 3.0)} | ({9: ("new", 50.0)} if now % 2 else {})

    with pytest.raises(bench.NotMeasured, match=r"other processes use this machine: compiler \(process 7, .*Remedy"):
        bench.await_quiet(0.0, look, seconds=0.01)
    bench.await_quiet(0.0, lambda: {8: ("idle", 3.0)}, seconds=0.01)


def test_the_runners_own_children_do_not_count():
    with subprocess.Popen(["sleep", "30"]) as child:
        seen = bench.times()
        child.kill()
    assert seen
    assert child.pid not in seen


def test_figures_are_the_last_line_and_a_failure_is_told_with_the_end_of_the_output():
    code = "import sys; print('words'); print('{\"n\": 2.5}'); print('bye'); sys.exit(int(sys.argv[1]))"
    assert bench.figures([sys.executable, "-c", code, "0"]) == {"n": 2.5}
    with pytest.raises(bench.NotMeasured, match=r"(?s) failed \(3\):.*words"):
        bench.figures([sys.executable, "-c", code, "3"])


def test_every_row_has_sides_that_can_be_measured():
    assert len({row.name for row in ROWS}) == len(ROWS)
    for one in ROWS:
        assert set(one.sides) <= {*sides.SIDES, "trl"}, one.name


def test_the_page_has_every_row_with_its_goal_and_result():
    results = json.loads(bench.RESULTS.read_text()) if bench.RESULTS.exists() else {}
    _, mark, below = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8").partition(page.MARK)
    assert mark
    assert below.strip() == page.text(ROWS, results).strip()


def test_results_are_rendered(tmp_path: Path):
    rows = [row("slow", "a", goal=0.5), row("other", "a", goal=None), row("missing", "a")]
    results = {name: bench.record([(1.0, 4.0), (1.0, 2.0), (3.0, 4.0)], WHERE) for name in ("slow", "other")}
    (tmp_path / "performance.md").write_text(f"words\n{page.MARK}old")
    page.write(tmp_path, rows, results)
    text = (tmp_path / "performance.md").read_text()
    assert text.startswith(f"words\n{page.MARK}")
    assert "old" not in text
    assert "slow 0.50 (0.25 to 0.75 in 3), other 0.50 (0.25 to 0.75 in 3)](performance.png)" in text
    assert "| `slow` | 0.50 (0.25 to 0.75 in 3) | 0.5 | v: 1 | d: 4 | l |" in text
    assert "| `other` | 0.50 (0.25 to 0.75 in 3) | reported |" in text
    assert "| `missing` |  | 1 |" in text
    assert "Measured on 2026-11-29, CPU, 2 cores, 24 GiB, commit abc, torch 2.13.0: slow, other." in text
    assert (tmp_path / "performance.png").read_bytes().startswith(b"\x89PNG")


def test_padding_is_counted():
    assert spent([3, 5], 10, 1, padded=True) == 10
    assert spent([3, 5], 10, 2) == 10
    lengths = log_normal(64, 512, 0.7)
    assert sum(lengths) <= spent(lengths, 8192, 4) < 1.05 * sum(lengths)
    assert {ranks for _, ranks, *_ in table()} == {1, 2, 4, 8, 16, 64}
    assert all(useful >= 0.97 * most for _, _, useful, most, _ in table())


def test_fake_engines_sample_through_the_control_plane():
    assert 0 < parts.control_plane(2, seconds=0.2)["samples_s"] <= 2000
