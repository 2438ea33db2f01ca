"""The terminal of a run: few lines, readable ones. What libraries print goes to RUN/logs/driver.log instead.

On a terminal, work that is under way has a spinner or a bar with its time at the bottom of the screen;
anywhere else (a file, a pipe, continuous integration) there are plain lines only.
"""

import contextlib
import faulthandler
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Self, TextIO

from rich.console import Console as Rich
from rich.console import RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TextColumn, TimeElapsedColumn

from reward_server.redaction import LOG_FORMAT, Formatter, shown, write_output_to

LOG_FILE = "driver.log"
# The metrics of a step that are worth a line, in this order: name or end of the name, label, format.
HEADLINES = (
    ("valid_loss", "held-out loss", "6.3f"),
    ("pretraining_valid_loss", "of text", "6.3f"),
    ("accuracy", "pair accuracy", "5.3f"),
    ("prompt_accuracy", "mean of prompts", "5.3f"),
    ("longer_wins", "longer wins", "5.3f"),
    ("score/mean", "score", "6.2f"),
    ("select/score", "score", "6.2f"),
    ("gold/mean", "gold (simulated)", "6.2f"),
    ("heldout/gold", "held-out gold (simulated)", "5.2f"),
    ("kl/mean", "KL", "5.2f"),
    ("response/length", "length", "5.1f"),
    ("time/iteration", "seconds", "5.1f"),
)
PLAIN_PROGRESS_S = 30.0  # without a terminal, long work says this often how far it is
_OURS = ("reward_server", "actors", "learner", "cluster")


class Console:
    """Prints a run's progress. Enter it before noisy libraries are imported."""

    def __init__(self, log_dir: Path | None = None, stream: TextIO | None = None, live: bool | None = None) -> None:
        """Print to `stream`, else the standard output. With a `log_dir`, keep all else off the terminal.

        live: draw spinners and bars; None does so on a terminal.
        """
        self._log_dir = log_dir
        self._stream = stream
        self._live = live
        self._rich = self._errors = _rich(stream, live)
        self._progress = Progress(disable=True)
        self._bars: dict[str, Task] = {}
        self._depth = 0
        self._closing = contextlib.ExitStack()

    def __enter__(self) -> Self:
        stream, errors = self._stream or sys.stdout, self._stream or sys.stderr
        if self._log_dir is not None:
            self._log_dir.mkdir(parents=True, exist_ok=True)
            out, err = self._closing.enter_context(_captured(self._log_dir / LOG_FILE))
            stream, errors = self._stream or out, self._stream or err
            self._closing.enter_context(_logging_to(self._log_dir / LOG_FILE, self._record))
        live = stream.isatty() if self._live is None else self._live
        self._rich, self._errors = _rich(stream, live), _rich(errors, None)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            console=self._rich,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            refresh_per_second=4,
            disable=not live,
        )
        self._closing.enter_context(self._progress)
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()
        self._progress = Progress(disable=True)

    def line(self, text: str = "", style: str | None = None) -> None:
        """Print a line."""
        self._print(self._rich, "  " * self._depth + shown(text), style)

    def show(self, renderable: RenderableType) -> None:
        """Print something of rich's, such as a table."""
        self._print(self._rich, renderable)

    def warning(self, text: str) -> None:
        """Print a line that asks for attention."""
        self.line(f"warning: {text}", "yellow")

    def error(self, text: str) -> None:
        """Print a line that says what went wrong."""
        # A bar is drawn on the standard output, and only what goes the same way is kept clear of it.
        self._print(self._errors if self._progress.disable else self._rich, f"error: {shown(text)}", "bold red")

    def _print(self, rich: Rich, what: RenderableType, style: str | None = None) -> None:
        # A terminal that has gone away is no reason to stop a run.
        with contextlib.suppress(OSError, ValueError):
            rich.print(what, style=style)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show that `name` is under way, and then how long it took. Phases may be nested."""
        started = time.monotonic()
        if self._progress.disable:
            self.line(f"{name} ...")
        task = self._task(name, None)
        self._depth += 1
        verdict, style = "failed after", "red"
        try:
            yield
            verdict, style = "done in", "green"
        finally:
            self._depth -= 1
            self._remove(task)
            self.line(f"{name} {verdict} {duration(time.monotonic() - started)}", style)

    @contextlib.contextmanager
    def progress(self, name: str, total: int) -> Iterator[Callable[..., None]]:
        """Show how much of `total` is done; yields `advance(steps=1, note="")`."""
        done = 0

        def advance(steps: int = 1, note: str = "") -> None:
            nonlocal done
            done += steps
            self._move(name, done, total, note)

        advance(0)
        try:
            yield advance
        finally:
            self._remove(self._bars.pop(name))

    def metrics(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Print the headlines among a step's metrics. `progress/total`, once given, makes a bar."""
        shown = [
            f"{label} {metrics[name]:{form}}"
            for end, label, form in HEADLINES
            for name in metrics
            if name == end or name.endswith("/" + end)
        ]
        bar = self._bars.get(stage)
        if shown:
            self.line("  ".join([f"{stage} {step:>4d}", *shown]))
            if bar:
                bar.fields["reported"] = time.monotonic()  # the line has said how far it is
        if total := int(metrics.get("progress/total", 0) or (bar and bar.total) or 0):
            loss = next((value for name, value in metrics.items() if name.endswith("/loss")), None)
            self._move(stage, step, total, "" if loss is None else f"loss {loss:.3f}")
            if step >= total:
                self._remove(self._bars.pop(stage))

    def _move(self, name: str, done: int, total: int, note: str) -> None:
        if name not in self._bars:
            self._bars[name] = self._task(name, total)
        bar, note = self._bars[name], f"{done}/{total} {note}".rstrip()
        self._progress.update(bar.id, completed=done, total=total, note=note)
        if self._progress.disable and time.monotonic() - bar.fields["reported"] >= PLAIN_PROGRESS_S:
            bar.fields["reported"] = time.monotonic()
            self.line(f"{name} {note}")

    def _task(self, name: str, total: int | None) -> Task:
        self._progress.add_task("  " * self._depth + shown(name), total=total, note="", reported=time.monotonic())
        return self._progress.tasks[-1]

    def _remove(self, task: Task) -> None:
        self._progress.remove_task(task.id)
        self._progress.refresh()  # else the next line is printed above a bar that is gone

    def _record(self, record: logging.LogRecord) -> None:
        """Show what a library logs if it is an error, and our own warnings too."""
        first, *_ = [*record.getMessage().strip().splitlines(), ""]
        if record.levelno >= logging.ERROR:
            self.error(f"{record.name}: {first}")
        elif record.name.split(".")[0] in _OURS:
            self.warning(first)


class _Quiet(Rich):
    """A rich console that falls silent when its reader has gone; rich's own ends the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


def _rich(stream: TextIO | None, live: bool | None) -> Rich:
    """Prints what it is given as it is: long lines are not broken, and nothing in them is markup."""
    return _Quiet(file=stream, highlight=False, markup=False, emoji=False, soft_wrap=True, force_terminal=live or None)


def duration(seconds: float) -> str:
    """Seconds for people: 3.4 s, 2 min 05 s, 1 h 06 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


@contextlib.contextmanager
def _captured(path: Path) -> Iterator[tuple[TextIO, TextIO]]:
    """Send file descriptors 1 and 2, so whatever C code and child processes print, to a file.

    Yields what standard output and error were. A crash of the interpreter still shows where the latter was.
    """
    out, err = (os.fdopen(os.dup(file), "w", buffering=1, encoding="utf-8", errors="replace") for file in (1, 2))
    crashes = faulthandler.is_enabled()
    faulthandler.enable(err)
    before = sys.stdout, sys.stderr
    write_output_to(path)
    try:
        yield out, err
    finally:
        sys.stdout, sys.stderr = before
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        (faulthandler.enable if crashes else faulthandler.disable)()
        for file in (out, err):
            with contextlib.suppress(OSError):  # a pipe whose reader has gone
                file.close()


@contextlib.contextmanager
def _logging_to(path: Path, show: Callable[[logging.LogRecord], None]) -> Iterator[None]:
    """Write what is logged, and Python's warnings, to a file; `show` every record from warnings up."""
    root = logging.getLogger()
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(Formatter(LOG_FORMAT))
    screen = logging.Handler(logging.WARNING)
    screen.emit = lambda record: show(record)
    before = root.level, root.handlers
    root.handlers = [file, screen]
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.handlers = before[1]
        root.setLevel(before[0])
        file.close()
