"""What a run left behind, read back from the plain files of its directory.

A report must be possible of a run that was killed, that did one step only, or that an older version made. So
a missing file is an empty part, a row that cannot be read is told and left out, and nothing but a directory
without any of the files is an error. Texts come from models and strangers: control characters become visible.
"""

import json
import math
import re
import statistics
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reward_server.redaction import visible

Series = dict[int, float]
"""value by step, in the order of steps"""

_FILES = ("config.toml", "environment.json", "metrics.jsonl", "phases.jsonl", "summary.json", "evaluations")
_VADER = "simulated:vader"
_ON_THE_WAY = re.compile(r"-\d{6}$")  # ppo-000010: after iteration 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A held-out prompt and one model's response to it."""

    id: str
    """of the prompt"""
    prompt: tuple[tuple[str, str], ...]
    """(role, text) of each message"""
    response: str
    """the response"""
    ended: bool
    """it ended by itself; False: it was cut at the longest length allowed"""
    gold: float | None
    """verdict of the labeler"""
    score: float | None
    """verdict of the reward model"""
    kl: float | None = None
    """to the SFT model, nats"""
    use_case: str | None = None
    """of the prompt"""
    tokens: tuple[tuple[str, float], ...] = ()
    """(text, log-prob minus that of the SFT model, nats) of each token of the response, where that was recorded"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What a figure was before and after training, where both are known."""

    before: float
    """of the SFT model"""
    after: float
    """of the trained model"""
    interval: tuple[float, float] | None = None
    """95 % confidence interval of the difference over held-out prompts, paired by prompt"""
    count: int = 0
    """held-out prompts behind the interval"""

    @property
    def difference(self) -> float:
        """After minus before."""
        return self.after - self.before


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Everything a report shows, apart from the models."""

    path: Path
    """the run directory"""
    config: dict[str, Any]
    """the resolved configuration"""
    config_text: str
    """the same as it stands in config.toml"""
    environment: dict[str, Any]
    """versions, machine, command, date"""
    summary: dict[str, Any]
    """final figures, as documented in cluster/report/report.html"""
    metrics: dict[str, dict[str, Series]]
    """by stage and metric; a step that was logged twice, as after a resume, counts as it was logged last"""
    phases: tuple[tuple[str, str, float], ...]
    """(stage, name, seconds), in the order in which they ended"""
    evaluations: dict[str, tuple[Sample, ...]]
    """held-out samples by label (sft, ppo, ..), sorted by id; of what was measured on the way the curves tell"""
    calibration: dict[str, Any]
    """of the reward model"""
    unreadable: tuple[str, ...]
    """files and rows that were left out, and why"""

    @property
    def arms(self) -> tuple[str, ...]:
        """Stages that are PPO runs, the one called ppo first."""
        found = {*self.metrics, *self.evaluations, *_table(self.summary, "ppo")}
        arms = (stage for stage in found if stage == "ppo" or stage.startswith("ppo-"))
        return tuple(sorted(stage for stage in arms if not stage.endswith("-start")))

    @property
    def labeler(self) -> str:
        """The words that have to stand wherever a verdict is shown."""
        if caption := self.summary.get("labeler"):
            return visible(str(caption))
        name = _table(self.config, "labeler").get("name")
        if name is None:
            return "labeler (not recorded)"
        return visible(f"simulated labeler ({'VADER' if name == _VADER else name})")

    @property
    def rankings(self) -> str:
        """Who ranked what the reward model learnt from and is measured on: people, or the simulated labeler."""
        found = self.summary.get("rankings")
        return visible(str(found)) if found else self.labeler

    def change(self, arm: str, quantity: str) -> Change | None:
        """How PPO changed "gold", "score" or "pretraining_loss": by the samples, else by the summary."""
        pairs = self._pairs(arm, quantity)
        if not pairs:
            table = self.figures("ppo", arm)
            before, after = number(table.get(f"{quantity}_before")), number(table.get(f"{quantity}_after"))
            return None if before is None or after is None else Change(before=before, after=after)
        before, after = (statistics.fmean(column) for column in zip(*pairs, strict=True))
        if len(pairs) < 2:
            return Change(before=before, after=after)
        error = statistics.stdev(later - earlier for earlier, later in pairs) / math.sqrt(len(pairs))
        interval = (after - before - 1.96 * error, after - before + 1.96 * error)
        return Change(before=before, after=after, interval=interval, count=len(pairs))

    def _pairs(self, arm: str, quantity: str) -> list[tuple[float, float]]:
        if quantity not in ("gold", "score"):
            return []
        start = self.evaluations.get(f"{arm}-start", self.evaluations.get("sft", ()))
        earlier = {sample.id: getattr(sample, quantity) for sample in start}
        later = {sample.id: getattr(sample, quantity) for sample in self.evaluations.get(arm, ())}
        return [
            (earlier[key], later[key])
            for key in earlier.keys() & later.keys()
            if earlier[key] is not None and later[key] is not None
        ]

    def series(self, stage: str, metric: str) -> Series:
        """One curve; empty when the run has not logged it."""
        return self.metrics.get(stage, {}).get(metric, {})

    def figures(self, *keys: str) -> dict[str, Any]:
        """A table of the summary; empty when there is none."""
        table = self.summary
        for key in keys:
            table = _table(table, key)
        return table


def read_run(path: Path) -> Run:
    """Read a run directory. Raises ValueError when it is none."""
    if not any((path / name).exists() for name in _FILES):
        kind = "holds no run" if path.is_dir() else "does not exist"
        raise ValueError(f"{path} {kind}: expected a directory with at least one of {', '.join(_FILES)}")
    unreadable: list[str] = []
    config, config_text = {}, _text(path / "config.toml", unreadable)
    try:
        config = tomllib.loads(config_text)
    except tomllib.TOMLDecodeError as error:
        unreadable.append(f"config.toml: {error}")
    files = [file for file in sorted((path / "evaluations").glob("*.jsonl")) if not _ON_THE_WAY.search(file.stem)]
    evaluations = {visible(file.stem): _samples(file, unreadable) for file in files}
    return Run(
        path=path,
        config=config,
        config_text=config_text,
        environment=_object(path / "environment.json", unreadable),
        summary=_object(path / "summary.json", unreadable),
        metrics=_metrics(path / "metrics.jsonl", unreadable),
        phases=tuple(_phases(path / "phases.jsonl", unreadable)),
        evaluations={label: samples for label, samples in evaluations.items() if samples},
        calibration=_object(path / "reward" / "calibration.json", unreadable),
        unreadable=tuple(unreadable),
    )


def number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def _table(parent: dict[str, Any], key: str) -> dict[str, Any]:
    value = parent.get(key)
    return value if isinstance(value, dict) else {}


def _text(path: Path, unreadable: list[str]) -> str:
    if not path.is_file():
        return ""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        unreadable.append(f"{path.name}: {error}")
        return ""


def _object(path: Path, unreadable: list[str]) -> dict[str, Any]:
    text = _text(path, unreadable)
    try:
        value = json.loads(text or "{}")
    except ValueError as error:
        unreadable.append(f"{path.name}: {error}")
        return {}
    return value if isinstance(value, dict) else {}


def _rows(path: Path, unreadable: list[str]) -> Iterator[dict[str, Any]]:
    # not splitlines(): a sample may hold a character such as U+2028, which JSON does not escape
    for line_number, line in enumerate(path.read_bytes().split(b"\n") if path.is_file() else (), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            yield row
        else:
            unreadable.append(f"{path.name}:{line_number}: not a JSON object")


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file that can be read; one that is half written cannot, as yet."""
    return _rows(file, [])


def read_metrics(path: Path) -> dict[str, dict[str, Series]]:
    """The metrics of a run directory, by stage and name; rows that cannot be read, as yet, are left out."""
    return _metrics(path / "metrics.jsonl", [])


def _metrics(path: Path, unreadable: list[str]) -> dict[str, dict[str, Series]]:
    found: dict[str, dict[str, Series]] = {}
    for row in _rows(path, unreadable):
        step = row.get("step")
        if not isinstance(step, int):
            continue
        stage = found.setdefault(visible(str(row.get("stage"))), {})
        for name, value in row.items():
            if "/" in name and (figure := number(value)) is not None:
                stage.setdefault(name, {})[step] = figure
    return {stage: {name: dict(sorted(one.items())) for name, one in series.items()} for stage, series in found.items()}


def _phases(path: Path, unreadable: list[str]) -> Iterator[tuple[str, str, float]]:
    for row in _rows(path, unreadable):
        if (seconds := number(row.get("seconds"))) is not None:
            yield visible(str(row.get("stage", ""))), visible(str(row.get("phase", ""))), seconds


def _samples(path: Path, unreadable: list[str]) -> tuple[Sample, ...]:
    samples = [
        Sample(
            id=visible(str(row["id"])),
            prompt=_messages(row.get("prompt")),
            response=visible(str(row.get("response", ""))),
            ended=row.get("ended") is not False,
            gold=number(row.get("gold")),
            score=number(row.get("score")),
            kl=number(row.get("kl")),
            use_case=visible(str(row["use_case"])) if row.get("use_case") else None,
            tokens=_tokens(row),
        )
        for row in _rows(path, unreadable)
        if "id" in row
    ]
    return tuple(sorted(samples, key=lambda sample: sample.id))


def _tokens(row: dict[str, Any]) -> tuple[tuple[str, float], ...]:
    """The tokens of a response with the KL of each; none unless they make up the response."""
    found = row.get("tokens")
    pairs = [pair for pair in found if isinstance(pair, list) and len(pair) == 2] if isinstance(found, list) else []
    tokens = [(str(text), kl) for text, value in pairs if (kl := number(value)) is not None]
    whole = "".join(text for text, _ in tokens) == str(row.get("response", ""))
    return tuple((visible(text), kl) for text, kl in tokens) if whole else ()


def _messages(prompt: Any) -> tuple[tuple[str, str], ...]:
    if isinstance(prompt, str):
        return (("user", visible(prompt)),)
    turns = [turn for turn in prompt if isinstance(turn, dict)] if isinstance(prompt, list) else []
    return tuple((visible(str(turn.get("role", ""))), visible(str(turn.get("content", "")))) for turn in turns)
