import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.tracking import console as module
from cluster.tracking.console import Console, duration


class ClosedPipe(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_phases_are_nested_and_timed():
    stream = io.StringIO()
    with Console(stream=stream) as console, console.phase("outer"), console.phase("inner"):
        console.line("working")
    lines = stream.getvalue().splitlines()
    assert [line.rsplit(" in ")[0] for line in lines] == [
        "outer ...",
        "  inner ...",
        "    working",
        "  inner done",
        "outer done",
    ]


def test_what_a_terminal_would_obey_is_shown(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "canary-0123456789abcdef")
    stream = io.StringIO()
    with Console(stream=stream) as console, console.phase("a\x1b[2J"):
        console.line("gone\rdone \u202e canary-0123456789abcdef")
        console.error("\x07 canary-0123456789abcdef")
    written = stream.getvalue()
    assert "gone\\rdone \\u202e [HF_TOKEN]\n" in written
    assert "error: \\x07 [HF_TOKEN]\n" in written
    assert written.startswith("a\\x1b[2J ...\n")


def test_a_phase_that_raises_is_shown_as_failed():
    stream = io.StringIO()
    with pytest.raises(ZeroDivisionError), Console(stream=stream) as console, console.phase("sums"):
        raise ZeroDivisionError
    assert "sums failed after 0.0 s" in stream.getvalue()


def test_the_headlines_of_an_iteration_are_one_short_line():
    stream = io.StringIO()
    with Console(stream=stream) as console:
        console.metrics(
            "ppo",
            3,
            {
                "grad_norm/policy": 1.0,
                "time/iteration": 9.04,
                "score/mean": 0.844,
                "kl/mean": 5.25,
                "gold/mean": 0.4,
                "response/length": 18.23,
            },
        )
        console.metrics("ppo", 4, {"grad_norm/policy": 1.0})
    words = " ".join(stream.getvalue().split())
    assert words == "ppo 3 score 0.84 gold (simulated) 0.40 KL 5.25 length 18.2 seconds 9.0"


def test_without_a_terminal_long_work_says_now_and_then_how_far_it_is(monkeypatch: pytest.MonkeyPatch):
    clock = iter([0.0, 10.0, 31.0, 31.0, 40.0, 70.0, 70.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    console = Console(stream=stream)
    for step, value in enumerate([3.0, 2.5, 2.0, 1.5]):
        console.metrics("sft", step, {"progress/total": 9.0, "sft/loss": value})
    assert stream.getvalue().splitlines() == ["sft 1/9 loss 2.500", "sft 3/9 loss 1.500"]


def test_on_a_terminal_a_bar_appears_and_goes():
    stream = io.StringIO()
    with Console(stream=stream, live=True) as console, console.progress("sample", 3) as advance:
        advance(2, note="tokens")
        (task,) = console._progress.tasks
        assert (task.completed, task.total, task.fields["note"]) == (2, 3, "2/3 tokens")
    assert console._progress.tasks == []
    assert "sample" in stream.getvalue()


NOISY = """
import logging, os, sys, warnings
from pathlib import Path
from cluster.tracking.console import Console

with Console(Path(sys.argv[1])) as console:
    print("printed", os.environ["HF_TOKEN"])
    os.write(2, b"from C\\n")
    os.system("echo from a child")
    logging.getLogger("vllm").warning("chatter")
    logging.getLogger("vllm").error("engine died\\nwith details")
    logging.getLogger("actors.rollout").warning("skipped a row")
    warnings.warn("deprecated")
    console.line("progress")
print("after")
"""


def test_everything_else_goes_to_the_log_and_errors_are_shown(tmp_path: Path):
    ran = subprocess.run(
        [sys.executable, "-c", NOISY, str(tmp_path)],
        env={**os.environ, "HF_TOKEN": "canary-0123456789abcdef"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert ran.stdout.splitlines() == ["warning: skipped a row", "progress", "after"]
    assert ran.stderr.splitlines() == ["error: vllm: engine died"]
    log = (tmp_path / "driver.log").read_text()
    for text in (
        "printed [HF_TOKEN]",
        "from C",
        "from a child",
        "chatter",
        "with details",
        "skipped a row",
        "deprecated",
    ):
        assert text in log


def test_logging_is_as_before_afterwards(tmp_path: Path):
    root = logging.getLogger()
    before = root.level, list(root.handlers)
    with Console(tmp_path, stream=sys.stdout):
        assert (root.level, list(root.handlers)) != before
    assert (root.level, list(root.handlers)) == before


def test_text_is_printed_as_it_is():
    stream = io.StringIO()
    long = "[bold]no markup[/bold] :smile: " + "x" * 300
    Console(stream=stream).line(long)
    assert stream.getvalue() == long + "\n"


def test_a_terminal_that_has_gone_away_does_not_stop_the_run():
    with Console(stream=ClosedPipe()) as console, console.phase("work"):
        console.line("unheard")
        console.error("unheard")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.44, "3.4 s"), (59.9, "59.9 s"), (125.4, "2 min 05 s"), (3599, "59 min 59 s"), (3960, "1 h 06 min")],
)
def test_durations_are_readable(seconds: float, text: str):
    assert duration(seconds) == text
