"""Where everything in a run directory comes from: RUN/lineage.jsonl, a line an artefact, which is never rewritten."""

import hashlib
import importlib.metadata
import json
import logging
import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache, lru_cache
from pathlib import Path
from typing import Literal

from rich.text import Text
from rich.tree import Tree

from cluster.config.schema import Config
from learner.data.journal import append_line
from learner.weights.checkpoint import file_sha256
from reward_server.redaction import visible

FILE = "lineage.jsonl"
CARD = "README.md"
"""What is said of a model in its folder, which is no part of the model: of a folder's own files it is not hashed."""
_DEEPEST = 3  # folders from a run directory down to what is made in it: RUN/round-1/data/comparisons.jsonl
State = Literal["whole", "changed", "missing"]
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """A file or folder that an artefact was made of."""

    path: str
    """relative to the run directory, or absolute outside it; or the hub id of a model"""
    sha256: str | None
    """of its content; None for a hub id"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Artefact:
    """Something that a command has made: a model, a data file, a sheet, rankings."""

    name: str
    """what the file or folder is called, without an ending"""
    kind: str
    """what it is: data, demonstrations, completions, sheet, comparisons, sft, baseline, reward, policy, policy_ema,
    policy_best, evaluation"""
    path: str
    """relative to the run directory"""
    sha256: str
    """of the file; of a folder, over the names and hashes of its files but its card"""
    inputs: tuple[Input, ...]
    """what it was made of"""
    command: str
    """command line that made it"""
    config: str
    """sha256 of the resolved configuration"""
    time: str
    """when, UTC"""
    version: str
    """of this package"""
    commit: str | None
    """git commit of the code, with -dirty where it had changes; None outside a checkout"""
    trust_remote_code: bool = False
    """whether Python code that a model's folder brought along could run"""


def record(
    run_dir: Path, kind: str, path: Path, inputs: Iterable[str | Path], command: str, config: Config
) -> Artefact:
    """Append what was made of what to RUN/lineage.jsonl. Warns of an input that changed since it was made here."""
    known = latest(read_lineage(run_dir))
    used = []
    for source in inputs:
        one = Input(path=_place(run_dir, source), sha256=digest(Path(source)) if os.path.exists(source) else None)
        if one.path in known and known[one.path].sha256 != one.sha256:
            log.warning("%s has changed since `%s` made it", one.path, known[one.path].command)
        used.append(one)
    settings = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    version, commit = code_version()
    artefact = Artefact(
        name=path.stem,
        kind=kind,
        path=_place(run_dir, path),
        sha256=digest(path),
        inputs=tuple(used),
        command=command,
        config=hashlib.sha256(settings.encode()).hexdigest(),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        version=version,
        commit=commit,
        trust_remote_code=config.models.trust_remote_code,
    )
    append_line(run_dir / FILE, asdict(artefact))
    return artefact


def read_lineage(run_dir: Path) -> list[Artefact]:
    """Every record, oldest first; a line that cannot be read is left out with a warning. No file: none.

    A last line without its end is being written, or its writer was killed: half of one is no record yet.
    """
    path = run_dir / FILE
    found = []
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            found.append(Artefact(**{**row, "inputs": tuple(Input(**one) for one in row["inputs"])}))
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                log.warning("%s:%d is not a record: left out", path, number)
    return found


def latest(records: Iterable[Artefact]) -> dict[str, Artefact]:
    """The last record of each path."""
    return {one.path: one for one in records}


def origin(run_dir: Path, place: str) -> tuple[Path, Artefact] | None:
    """The run directory in which something in a record was made, this one or another, and its record there."""
    path = run_dir / place
    for folder in (run_dir, *path.parents[:_DEEPEST]):
        if found := latest(read_lineage(folder)).get(_place(folder, path)):
            return folder, found
    return None


def state(run_dir: Path, artefact: Artefact) -> State:
    """Whether the artefact is there as it was made."""
    path = run_dir / artefact.path
    if not path.exists():
        return "missing"
    return "whole" if digest(path) == artefact.sha256 else "changed"


def done(run_dir: Path, path: Path) -> bool:
    """Whether a step whose result is `path` need not be repeated: it is recorded, and there as it was made.

    Raises ValueError when it is there but not as it was made.
    """
    artefact = latest(read_lineage(run_dir)).get(_place(run_dir, path))
    if artefact is None or (found := state(run_dir, artefact)) == "missing":
        return False
    if found == "changed":
        raise ValueError(
            f"{path} has changed since `{artefact.command}` made it on {artefact.time}: put the old one back, or "
            "remove it to have it made again"
        )
    return True


def digest(path: Path) -> str:
    """sha256 of a file, or of a folder over the sorted "hash  name" lines of all its files but its card.

    Raises OSError.
    """
    if path.is_file():
        return _file_digest(path)
    files = sorted(file for file in path.rglob("*") if file.is_file() and file != path / CARD)
    with ThreadPoolExecutor(4) as pool:
        hashes = pool.map(_file_digest, files)
    lines = (f"{one}  {file.relative_to(path).as_posix()}\n" for file, one in zip(files, hashes, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    found = path.stat()
    return _content_digest(str(path.resolve()), found.st_ino, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=10_000)
def _content_digest(path: str, *stamp: int) -> str:
    """The same file with the same stamp is read once; a command meets a model several times."""
    return file_sha256(Path(path))


@cache
def code_version() -> tuple[str, str | None]:
    """(version of the package, git commit of the checkout it runs from or None)."""
    try:
        version = importlib.metadata.version("rayward")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return version, None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return version, subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return version, None


def lineage_json(run_dir: Path) -> str:
    """The last record of each path with its state, as a JSON list."""
    rows = [asdict(one) | {"state": state(run_dir, one)} for one in latest(read_lineage(run_dir)).values()]
    return json.dumps(visible(rows), indent=2, ensure_ascii=False)


def lineage_tree(run_dir: Path) -> Tree:
    """What nothing else was made of, with what it was made of below, and so on. Raises ValueError without records."""
    known = latest(read_lineage(run_dir))
    if not known:
        raise ValueError(f"{run_dir} has no {FILE}: it is written by the commands that make something there")
    used = {source.path for one in known.values() for source in one.inputs}
    tree, shown = Tree(Text(str(run_dir), style="bold")), set[str]()
    for path in known:
        if path not in used:
            _grow(tree, run_dir, Input(path=path, sha256=known[path].sha256), known, shown)
    return tree


def _grow(branch: Tree, run_dir: Path, source: Input, known: Mapping[str, Artefact], shown: set[str]) -> None:
    label, artefact = Text(visible(source.path), overflow="fold", no_wrap=False), known.get(source.path)
    for note in _notes(run_dir, source, artefact) if artefact else ():
        label.append(f"  {note}", style="bold red")
    label.append(f"  {source.sha256[:12] if source.sha256 else 'not hashed'}", style="dim")
    if artefact is None:
        branch.add(label)
        return
    label.append(
        f"  {artefact.kind}, {artefact.time[:16].replace('T', ' ')}, {visible(' '.join(artefact.command.split()[:2]))}",
        style="dim",
    )
    if source.path in shown:
        branch.add(label.append("  (see above)", style="dim") if artefact.inputs else label)
        return
    shown.add(source.path)
    twig = branch.add(label)
    for one in artefact.inputs:
        _grow(twig, run_dir, one, known, shown)


def _notes(run_dir: Path, source: Input, artefact: Artefact) -> Iterator[str]:
    if source.sha256 != artefact.sha256:
        yield f"made again since, now {artefact.sha256[:12]}"
    if artefact.trust_remote_code:
        yield "made with code that a model's folder brought along"
    if (found := state(run_dir, artefact)) != "whole":
        yield "changed since it was made" if found == "changed" else "no longer there"


def _place(run_dir: Path, path: str | Path) -> str:
    """As it stands in records: relative inside the run directory, absolute outside; a hub id as it is."""
    if not os.path.exists(path):
        return str(path)
    absolute, root = Path(path).resolve(), run_dir.resolve()
    return (absolute.relative_to(root) if absolute.is_relative_to(root) else absolute).as_posix()
