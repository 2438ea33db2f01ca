"""What a stage was made of and how far it is: new, begun or complete, in RUN/stages/<stage>.json.

So `--resume` skips what is complete and goes on with what is not, and neither mixes two configurations nor two data
files in one model: a stage goes on only with what it was begun with.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cluster.config.load import ConfigError
from cluster.rundir.lineage import digest, done
from reward_server.preferences.records import write_whole

Start = Literal["new", "resume", "restart"]
Progress = Literal["new", "begun", "complete"]
_CONTENT = "sha256:"
# What may change while a stage goes on: how long PPO is, how often it is saved, deadlines, the budget of a pass.
_FREE = {"iterations", "checkpoint_every", "checkpoints_kept", "rollout_deadline_s", "max_tokens_per_microbatch"}


class ResumeRefused(ConfigError):
    """A stage cannot be begun, or gone on with, as it was asked for; the text says why and what can be done."""


@dataclass(kw_only=True)
class StageRecord:
    """The record of one stage of one run directory."""

    run_dir: Path
    name: str
    """of the stage"""
    start: Start
    """what to do with a stage that is there"""
    made_of: Callable[[], dict[str, Any]]
    """what its results depend on, see `made_of`; asked when it begins, and of one that has begun"""
    results: tuple[Path, ...]
    """what it writes; the first is the result proper"""
    traces: tuple[Path, ...] = ()
    """what only this stage leaves behind on the way; removed when it starts over"""
    reach: Mapping[str, float] = field(default_factory=dict)
    """figures that it must have been finished with at least to be complete, such as the iterations"""
    round_of: Path | None = None
    """the run that this run directory is a round of: what its lineage has, as it was made, is never repeated"""

    @property
    def file(self) -> Path:
        """RUN/stages/<stage>.json"""
        return self.run_dir / "stages" / f"{self.name}.json"

    @property
    def progress(self) -> Progress:
        """How far the stage is. Raises ResumeRefused when it may neither begin nor go on."""
        if self.round_of and all(done(self.round_of, path) for path in self.results):
            return "complete"
        known = self.file.is_file()
        if self.start == "restart" or not (known or any(path.exists() for path in self.traces)):
            return "new"
        found = self._found
        whole = found["complete"] and self.results[0].exists()
        progress: Progress = "complete" if whole else "begun"
        remedy = "--restart starts it over and replaces it, and --run DIR works in another directory"
        if self.start == "new":
            going_on = "leaves it as it is" if whole else "goes on with it"
            raise ResumeRefused(
                f"{self.run_dir} holds a stage {self.name!r} that is {progress}. Remedy: --resume {going_on}, {remedy}"
            )
        if not known:
            raise ResumeRefused(f"{self.traces[0]} is there, but {self.file}, which says of what, is not: {remedy}")
        if differences := list(_differences(found["made_of"], self.made_of())):
            told = "; ".join(differences[:8]) + (f"; and {len(differences) - 8} more" if len(differences) > 8 else "")
            raise ResumeRefused(
                f"the stage {self.name!r} of {self.run_dir} was made of something else: {told}. Remedy: give what it "
                f"was made of, or {remedy}"
            )
        enough = all(found.get("figures", {}).get(name, 0) >= least for name, least in self.reach.items())
        return progress if enough else "begun"

    def begin(self) -> bool:
        """Note that the work begins, or goes on; from now on the stage is not complete. Whether it starts (over)."""
        if fresh := self.progress == "new":
            self._remove_traces()
        self._write(complete=False, figures={})
        return fresh

    def finish(self, figures: Mapping[str, Any]) -> None:
        """Note that everything the stage writes is there. What cannot become longer needs its traces no more."""
        self._write(complete=True, figures=figures)
        if not self.reach:
            self._remove_traces()

    def _remove_traces(self) -> None:
        for trace in self.traces:
            shutil.rmtree(trace) if trace.is_dir() else trace.unlink(missing_ok=True)

    @property
    def _found(self) -> dict[str, Any]:
        if not self.file.is_file():
            return {"made_of": {}, "complete": False}
        try:
            found = json.loads(self.file.read_text(encoding="utf-8"))
            return {**found, "made_of": dict(found["made_of"]), "complete": found["complete"] is True}
        except (ValueError, LookupError, TypeError) as error:
            raise ResumeRefused(
                f"{self.file} is damaged ({error}), so nobody knows what the stage {self.name!r} was made of. Remedy: "
                "put an intact copy there, or --restart starts the stage over"
            ) from error

    def _write(self, **state: Any) -> None:
        self.file.parent.mkdir(exist_ok=True)
        write_whole(self.file, json.dumps({"made_of": self.made_of(), **state}, indent=1) + "\n")


def clear(run_dir: Path, start: Start) -> None:
    """Before a command that goes through all stages: refuse those that are there, or with "restart" forget them."""
    records = sorted((run_dir / "stages").glob("*.json"))
    if start == "new" and records:
        raise ResumeRefused(
            f"{run_dir} holds a run already ({', '.join(record.stem for record in records)}). Remedy: --resume goes on "
            "with it, --restart starts it over and replaces it, and --run DIR works in another directory"
        )
    if start == "restart":
        for folder in ("stages", "checkpoints"):
            shutil.rmtree(run_dir / folder, ignore_errors=True)
        for ledger in run_dir.glob("ledger-*.jsonl"):
            ledger.unlink()


def made_of(settings: Mapping[str, Any], contents: Mapping[str, str | Path]) -> dict[str, Any]:
    """What a stage is made of: settings by dotted key, the contents of files and folders by hash (or a hub id)."""
    found = dict(flat(settings))
    for key, source in contents.items():
        path = Path(source)
        found[key] = _CONTENT + digest(path) if path.exists() else str(source)
    return found


def flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested tables by dotted key."""
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterable[str]:
    for key in (key for key in dict.fromkeys([*then, *now]) if key.rpartition(".")[2] not in _FREE):
        before, after = (json.loads(json.dumps(one.get(key))) for one in (then, now))
        if _real(before) != _real(after):
            contents = all(str(value).startswith(_CONTENT) for value in (before, after))
            yield f"{key} has other content now" if contents else f"{key} was {_short(before)}, is {_short(after)}"


def _real(value: Any) -> Any:
    """A value with the files that texts in it name: earlier versions kept paths as they were given."""
    if isinstance(value, list | dict):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: _real(part) for key, part in pairs}
    return os.path.realpath(value) if isinstance(value, str) and os.path.exists(value) else value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
