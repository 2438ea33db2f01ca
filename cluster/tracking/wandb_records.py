"""What a W&B run is given: each function makes something for the feed's thread to do with the module and the run."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.rundir.lineage import Artefact, origin

Record = Callable[[Any, Any], None]
"""(wandb, run) -> done"""
_AGE = "staleness/age_"


def step_record(stage: str, step: int, values: Mapping[str, Any], axes: set[str]) -> Record:
    """Metrics of a step. Each stage counts its own steps, so the stage's step is the axis of its metrics.

    axes: of the stages that have been given theirs already, which is added to.
    """

    def give(wandb: Any, run: Any) -> None:
        _axis(run, stage, axes)
        found = dict(values)
        if ages := {int(name.removeprefix(_AGE)): value for name, value in values.items() if name.startswith(_AGE)}:
            shares = [ages.get(age, 0.0) for age in range(max(ages) + 1)]
            edges = [age - 0.5 for age in range(len(shares) + 1)]
            found["staleness/ages"] = wandb.Histogram(np_histogram=(shares, edges))
        run.log({f"{stage}/step": step, **_named(stage, found)})

    return give


def samples_record(
    stage: str,
    step: int,
    shown: Sequence[Mapping[str, Any]],
    distributions: Mapping[str, Sequence[float]],
    axes: set[str],
) -> Record:
    """Samples of a step as a table, and histograms of all of them. W&B keeps those of every step."""

    def give(wandb: Any, run: Any) -> None:
        _axis(run, stage, axes)
        columns = list(shown[0]) if shown else []
        table = wandb.Table(columns=columns, data=[[row[column] for column in columns] for row in shown])
        bars = {f"heldout/{name}_histogram": wandb.Histogram(values) for name, values in distributions.items()}
        run.log({f"{stage}/step": step, **_named(stage, {"heldout/samples": table, **bars})})

    return give


def seconds_record(spent: Mapping[str, float]) -> Record:
    """Seconds of each stage so far, as the run's summary: a column to compare runs by."""
    seconds = {f"seconds/{stage}": value for stage, value in spent.items()}
    return lambda wandb, run: run.summary.update(seconds)


def phases_record(rows: Sequence[tuple[str, str, float]]) -> Record:
    """A table of (stage, phase, seconds), with a bar for each."""

    def give(wandb: Any, run: Any) -> None:
        table = wandb.Table(columns=["stage", "phase", "seconds"], data=[list(row) for row in rows])
        run.log({"phases": wandb.plot.bar(table, "phase", "seconds", title="Seconds of each phase")})

    return give


def artefact_record(made: Artefact, run_dir: Path) -> Record:
    """A file or folder of a run with what it was made of, by reference: nothing is uploaded.

    What it was made of is given once more, as used: with the same content it is the same version in W&B, whoever gave
    it first and in whatever order offline runs are synced.
    """

    def give(wandb: Any, run: Any) -> None:
        for one in made.inputs:
            if one.sha256:
                used = _reference(wandb, run_dir, one.path, one.sha256)
                # use_artifact does the same, but refuses to offline, and waits for the server online
                run._log_artifact(used, is_user_created=True, use_after_commit=True)
        run.log_artifact(_reference(wandb, run_dir, made.path, made.sha256))

    return give


def _reference(wandb: Any, run_dir: Path, path: str, sha256: str) -> Any:
    """Named after the run in which it was made, and of the kind that is written down there; "input" where none is."""
    name, kind = path.strip("/") if path.startswith("/") else f"{run_dir.resolve().name}-{path}", "input"
    facts: dict[str, Any] = {}
    if found := origin(run_dir, path):
        folder, made = found
        name, kind = f"{folder.resolve().name}-{made.path}", made.kind
        if made.sha256 == sha256:
            inputs = [one.path for one in made.inputs]
            facts = {"command": made.command, "config": made.config, "commit": made.commit, "inputs": inputs}
    artifact = wandb.Artifact(re.sub(r"[^A-Za-z0-9_.-]+", "-", name)[-128:], type=kind, metadata=facts)
    # Named after their hash, files that were made anew are another version. They are not read once more.
    artifact.add_reference((run_dir / path).resolve().as_uri(), name=f"sha256-{sha256}", checksum=False)
    return artifact


def _axis(run: Any, stage: str, axes: set[str]) -> None:
    if stage not in axes:
        axes.add(stage)
        run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")


def _named(stage: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {name if name.startswith(f"{stage}/") else f"{stage}/{name}": value for name, value in values.items()}
