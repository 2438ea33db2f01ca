"""`rayward audit RUN`: what the ledgers of a run say of every sample, and whether it is what was promised."""

import json
import math
from dataclasses import asdict
from pathlib import Path

from cluster.rundir.files import Run, read_run
from cluster.tracking.console import Console
from learner.data.ledger import Audit, audit

_TOLERANCE = 1e-3  # of a mean that was logged in single precision


def run_audit(run_dir: Path, console: Console, as_json: bool) -> int:
    """Replay every RUN/ledger-*.jsonl and show what it holds; 0 when all promises hold, else 1.

    Raises ValueError when there is no ledger.
    """
    if not (files := sorted(run_dir.glob("ledger-*.jsonl"))):
        raise ValueError(
            f"{run_dir} has no ledger-*.jsonl: `rayward ppo` writes one. Remedy: name a run with PPO in it"
        )
    run, found = read_run(run_dir), {file.stem.removeprefix("ledger-"): audit(file) for file in files}
    broken = {stage: [*one.violations, *_disagreements(run, stage, one)] for stage, one in found.items()}
    if as_json:
        rows = {stage: asdict(one) | {"violations": broken[stage]} for stage, one in found.items()}
        console.line(json.dumps({"ok": not any(broken.values()), "stages": rows}, indent=2))
        return int(any(broken.values()))
    for stage, one in found.items():
        for line in _lines(stage, one):
            console.line(line)
        for violation in broken[stage]:
            console.error(f"ledger-{stage}.jsonl: {violation}")
        console.line("" if broken[stage] else "  every sample is accounted for, and none was trained twice\n")
    return int(any(broken.values()))


def _lines(stage: str, one: Audit) -> list[str]:
    """The account of a stage, in prompts with all their samples."""
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(one.dropped.items()))
    dropped = f"{sum(one.dropped.values())} dropped" + (f" ({reasons})" if reasons else "")
    return [
        f"{stage}: {one.issued} issued = {one.trained} trained + {dropped} + {one.outstanding} outstanding",
        f"  {one.iterations} iterations, {one.samples} samples, {one.tokens} tokens; staleness at most {one.staleness}",
        f"  {one.twice} trained twice; newest checkpoint {one.committed or 'none'}; resumed {one.resumed} times",
    ]


def _disagreements(run: Run, stage: str, one: Audit) -> list[str]:
    """Iterations whose logged number of tokens is not the ledger's: then the loss was not over what was sampled."""
    lengths = run.series(stage, "response/length")
    found = []
    for step, (samples, tokens) in one.steps.items():
        logged = lengths.get(step + 1)
        if logged is not None and not math.isclose(logged * samples, tokens, rel_tol=_TOLERANCE):
            found.append(f"step {step} has {tokens} tokens, and metrics.jsonl says {logged * samples:.0f}")
    return found
