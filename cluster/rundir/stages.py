"""Stages of a run: new, begun or complete. RUN/stages/<stage>.json says of what each was made.

So `--resume` skips what is complete and goes on with what is not, and neither mixes two configurations nor two data
files in one model: a stage goes on only with what it was begun with.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from cluster.config.load import ConfigError
from cluster.rundir.lineage import digest
from reward_server.preferences.records import write_whole

Start = Literal["new", "resume", "restart"]
Standing = Literal["new", "begun", "complete"]
_CONTENT = "sha256:"


class ResumeRefused(ConfigError):
    """A stage cannot be begun, or gone on with, as it was asked for; the text says why and what can be done."""


class Stage:
    """One stage of one run directory."""

    def __init__(
        self,
        run_dir: Path,
        name: str,
        made_of: Mapping[str, Any],
        start: Start,
        result: Path,
        traces: Sequence[Path] = (),
    ) -> None:
        """`made_of`: see `made_of`; `result`: what it writes last; `traces`: what only this stage leaves behind."""
        self.run_dir = run_dir
        self.name = name
        self.made_of = dict(made_of)
        self.start: Start = start
        self.result = result
        self.traces = traces
        self.record = run_dir / "stages" / f"{name}.json"

    @property
    def standing(self) -> Standing:
        """How far the stage is. Raises ResumeRefused when it may neither begin nor go on."""
        known = self.record.is_file()
        if self.start == "restart" or not (known or any(path.exists() for path in self.traces)):
            return "new"
        found = json.loads(self.record.read_text()) if known else {"made_of": {}, "complete": False}
        standing: Standing = "complete" if found["complete"] and self.result.exists() else "begun"
        remedy = "--restart starts it over and replaces it, and --run DIR works in another directory"
        if self.start == "new":
            going_on = "leaves it as it is" if standing == "complete" else "goes on with it"
            raise ResumeRefused(
                f"{self.run_dir} holds a stage {self.name!r} that is {standing}. Remedy: --resume {going_on}, {remedy}"
            )
        if not known:
            raise ResumeRefused(f"{self.traces[0]} is there, but {self.record}, which says of what, is not: {remedy}")
        if differences := list(_differences(found["made_of"], self.made_of)):
            told = "; ".join(differences[:8]) + (f"; and {len(differences) - 8} more" if len(differences) > 8 else "")
            raise ResumeRefused(
                f"the stage {self.name!r} of {self.run_dir} was made of something else: {told}. Remedy: give what it "
                f"was made of, or {remedy}"
            )
        return standing

    @property
    def complete(self) -> bool:
        """Whether there is nothing left to do."""
        return self.standing == "complete"

    @property
    def figures(self) -> dict[str, Any]:
        """What `finish` was told; empty before."""
        return json.loads(self.record.read_text()).get("figures", {}) if self.record.is_file() else {}

    def begin(self) -> None:
        """Note that the work begins, or goes on; from now on the stage is not complete."""
        self._write(complete=False, figures={})

    def finish(self, **figures: Any) -> None:
        """Note that everything the stage writes is there."""
        self._write(complete=True, figures=figures)

    def _write(self, **state: Any) -> None:
        self.record.parent.mkdir(exist_ok=True)
        write_whole(self.record, json.dumps({"made_of": self.made_of, **state}, indent=1) + "\n")


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
    """What a stage is made of: settings by dotted key, and the content of files and folders (or a hub id)."""
    found = dict(_flat(settings))
    for key, source in contents.items():
        path = Path(source)
        found[key] = _CONTENT + digest(path) if path.exists() else str(source)
    return found


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterable[str]:
    for key in dict.fromkeys([*then, *now]):
        before, after = (json.loads(json.dumps(one.get(key))) for one in (then, now))
        if before != after:
            contents = all(str(value).startswith(_CONTENT) for value in (before, after))
            yield f"{key} has other content now" if contents else f"{key} was {_short(before)}, is {_short(after)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
