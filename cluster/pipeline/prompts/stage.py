"""Step 0: the sets of prompts that the other steps read, made of one file of raw prompts."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from cluster.pipeline.prompts.curation import BAD, REASONS, Curated, Dropped, curate
from cluster.pipeline.prompts.raw import KINDS, RawPrompt, read_raw
from cluster.pipeline.stage import MadeOf, Stage
from reward_server.preferences.records import json_lines
from reward_server.redaction import visible

_FILES = (
    "demonstrations",
    "demonstration_prompts",
    "preference_prompts",
    "prompts",
    "prompts_valid",
    "prompts_heldout",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSets:
    """What is to be written, and what of it is told."""

    files: dict[str, list[RawPrompt]]
    """kept prompts by the name of their file"""
    dropped: list[Dropped]
    """all others, and bad rows, in the order of the file"""


class Prompts(Stage):
    """Drops repeats, bounds each user's prompts and splits by user; writes the prompt files of RUN/data."""

    name = "prompts"
    purpose = "Step 0: make the sets of prompts, split by user, of one file of raw prompts."
    files = (
        "Reads data.prompts_raw. Writes demonstrations, demonstration_prompts, preference_prompts, prompts, "
        "prompts_valid and prompts_heldout .jsonl into RUN/data, where the other steps find them; RUN/prompts.json "
        "has the counts, RUN/data/prompts-dropped.jsonl what was dropped and why."
    )
    example = "rayward prompts --run runs/mine --data.prompts_raw raw.jsonl"
    sections = ("data", "prompts", "tracking")
    reads = ("data.prompts_raw",)
    results = ("prompts.json", "data/prompts-dropped.jsonl")

    def made_of(self) -> MadeOf:
        return {"prompts": self.job.config.prompts.model_dump(mode="json")}, self.job.files("prompts_raw")

    def check(self) -> PromptSets:
        """Read, drop and split. Raises ValueError, also for files in RUN/data that are not this command's."""
        job, record = self.job, self.record
        there = [path for name in _FILES if (path := self._file(name)).exists()]
        if there and record and record.progress == "new" and job.start != "restart":
            raise ValueError(
                f"{there[0]} is there already, and `rayward prompts` has not made it: --restart replaces it, --run DIR "
                "works in another directory"
            )
        bad: list[Dropped] = []
        raw = read_raw(
            job.file("prompts_raw"),
            job.max_bad_rows,
            job.config.prompts,
            lambda line, why: bad.append(Dropped(line=line, reason=BAD, prompt=None, detail=why)),
        )
        return prompt_sets(curate(raw, job.config.prompts), bad)

    async def run(self, processes: Any, inputs: PromptSets) -> Mapping[str, Any]:
        job, source = self.job, self.job.file("prompts_raw")
        self._file("prompts").parent.mkdir(exist_ok=True)
        with job.tracker.phase(f"prompts: sets of {source}", self.name):
            for name, prompts in inputs.files.items():
                if prompts:
                    job.write(self._file(name), json_lines(_row(name, prompt) for prompt in prompts))
                    job.made("data", self._file(name), source)
                else:  # of other shares
                    self._file(name).unlink(missing_ok=True)
            dropped = [
                {"at": f"{source}:{one.line}", "reason": one.reason, "detail": one.detail}
                | ({"id": one.prompt.id} if one.prompt else {})
                for one in inputs.dropped
            ]
            job.write(job.run_dir / "data" / "prompts-dropped.jsonl", json_lines(dropped))
            found = counts(inputs)
            told = {"file": str(source), "settings": job.config.prompts.model_dump(mode="json"), **found}
            job.write(job.run_dir / "prompts.json", json.dumps(told, indent=2, ensure_ascii=False) + "\n")
        for table in tables(found):
            job.tracker.console.show(table)
        return {"kept": found["kept"]}

    def _file(self, name: str) -> Path:
        return self.job.run_dir / "data" / f"{name}.jsonl"


def prompt_sets(curated: Curated, bad: Iterable[Dropped] = ()) -> PromptSets:
    """The files; prompts for demonstrations are parted into those with a reply and those to be answered by people."""
    files = {name: curated.sets.get(name, []) for name in _FILES}
    for_sft = files["demonstrations"]
    files["demonstrations"] = [prompt for prompt in for_sft if prompt.reference is not None]
    files["demonstration_prompts"] = [prompt for prompt in for_sft if prompt.reference is None]
    return PromptSets(files=files, dropped=sorted([*curated.dropped, *bad], key=lambda one: one.line))


def counts(sets: PromptSets) -> dict[str, Any]:
    """What prompts.json tells: read = kept + dropped, bad rows included; each by file, reason, kind and use case."""
    kept = [prompt for prompts in sets.files.values() for prompt in prompts]
    gone = [one.prompt for one in sets.dropped if one.prompt]
    cases = sorted({prompt.use_case for prompt in [*kept, *gone] if prompt.use_case})
    return {
        "read": len(kept) + len(sets.dropped),
        "kept": len(kept),
        "dropped": {reason: sum(one.reason == reason for one in sets.dropped) for reason in REASONS},
        "files": {name: _count(prompts) for name, prompts in sets.files.items()},
        "use_cases": {
            case: {name: sum(one.use_case == case for one in prompts) for name, prompts in sets.files.items()}
            | {"dropped": sum(one.use_case == case for one in gone)}
            for case in cases
        },
    }


def _count(prompts: Sequence[RawPrompt]) -> dict[str, Any]:
    kinds = Counter(prompt.kind for prompt in prompts)
    users = len({prompt.owner for prompt in prompts})
    return {"prompts": len(prompts), "users": users, "kinds": {kind: kinds[kind] for kind in KINDS}}


def tables(found: Mapping[str, Any]) -> list[Table]:
    """The counts for a terminal: by file and reason, and by use case where rows have one."""
    by_file = Table("file", "prompts", "users", *KINDS, box=None, header_style="dim")
    for name, one in found["files"].items():
        figures = (one["prompts"], one["users"], *(one["kinds"][kind] for kind in KINDS))
        by_file.add_row(name, *map(str, figures))
    for reason, count in found["dropped"].items():
        by_file.add_row(f"dropped: {reason}", str(count), style="dim")
    by_file.add_row("read", str(found["read"]), style="bold")
    if not found["use_cases"]:
        return [by_file]
    columns = (*found["files"], "dropped")
    by_case = Table(box=None, header_style="dim")
    for column in ("use case", *columns):
        by_case.add_column(column.replace("_", "\n"), overflow="fold")
    for case, row in found["use_cases"].items():
        by_case.add_row(Text(visible(case)), *(str(row[column]) for column in columns))
    return [by_file, by_case]


def _row(name: str, prompt: RawPrompt) -> dict[str, Any]:
    reply = "response" if name == "demonstrations" else "reference"
    row = {
        "id": prompt.id,
        "prompt": [message.model_dump() for message in prompt.messages],
        reply: prompt.reference,
        "user": prompt.user,
        "use_case": prompt.use_case,
        "kind": prompt.kind,
        "group": prompt.group,
    }
    return {key: value for key, value in row.items() if value is not None}
