"""What `rayward plan` expects of a run that is complete, beside what the run has measured, as a table in Markdown.

    rayward quickstart --run RUN --ppo.iterations 3
    python benchmarks/plan.py RUN

The plan is made here and now, with the lengths of the run's own prompts and responses: do this on the machine that ran
it, when nothing else runs there.
"""

import json
import platform
import sys
from datetime import date
from pathlib import Path
from statistics import fmean

from cluster.config.load import compose, read_toml
from cluster.config.schema import Config
from cluster.plan.dry_run import foresee

STEPS = ("sft", "sample", "reward")
LAPS = {  # what the loop measures of an iteration, and the phases of the plan in it
    "rollout": ("generate", "score"),
    "evaluate": ("evaluate",),
    "update": ("update policy", "update critic"),
    "publish": ("publish",),
}


def rows(path: Path) -> list[dict]:
    """Of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def measured(run_dir: Path) -> dict[str, float]:
    """Seconds of each step, and of each lap of an iteration on average."""
    found = {row["stage"]: row["seconds"] for row in rows(run_dir / "phases.jsonl") if row["stage"] in STEPS}
    iterations = [row for row in rows(run_dir / "metrics.jsonl") if row["stage"] == "ppo" and "time/rollout" in row]
    return found | {f"ppo: {lap}": fmean(row[f"time/{lap}"] for row in iterations) for lap in LAPS}


def planned(run_dir: Path) -> dict[str, float]:
    """The same, expected."""
    config = compose(Config, read_toml(Config, run_dir / "config.toml"))
    steps = {step.name: step for step in foresee(config, run_dir).steps}
    phases = {phase.name: phase.expected for phase in steps["ppo"].phases}
    laps = {f"ppo: {lap}": sum(phases[name] for name in names) for lap, names in LAPS.items()}
    return {name: steps[name].times * steps[name].expected_s for name in STEPS} | laps


def main() -> None:
    """Print the table."""
    run_dir = Path(sys.argv[1])
    took, expected = measured(run_dir), planned(run_dir)
    print(f"{date.today()}, {platform.processor() or platform.machine()}, {sys.argv[1]}\n")
    print("| seconds | planned | measured | ratio |\n|---|---|---|---|")
    for name, seconds in took.items():
        print(f"| {name} | {expected[name]:.1f} | {seconds:.1f} | {seconds / expected[name]:.2f} |")


if __name__ == "__main__":
    main()
