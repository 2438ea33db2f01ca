"""A W&B workspace for runs of Rayward, as code: `rayward dashboard` makes it in a project, and again after a change."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import wandb_workspaces.reports.v2 as reports
import wandb_workspaces.workspaces as workspaces

from cluster.runtime.exit_codes import DONE

SECTIONS: dict[str, dict[str, list[str]]] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
"""section -> title of a plot -> metrics in it, of one stage"""


def workspace(entity: str, project: str) -> workspaces.Workspace:
    """The workspace as an object; `save` makes it in W&B. A line is a pipeline: the commands of a run directory."""
    spent: list[Any] = [reports.SummaryMetric(f"seconds/{stage}") for stage in ("sft", "sample", "reward", "ppo")]
    more = {
        "On held-out prompts": [reports.WeavePanelSummaryTable(table_name="ppo/heldout/samples")],
        "Where does the time go?": [reports.BarPlot(title="Seconds of each stage", metrics=spent)],
    }
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name="Rayward",
        sections=[
            workspaces.Section(
                name=name, is_open=True, panels=[*(_plot(*plot) for plot in plots.items()), *more.get(name, [])]
            )
            for name, plots in SECTIONS.items()
        ],
        runset_settings=workspaces.RunsetSettings(groupby=[workspaces.Metric("Group")]),
    )


def _plot(title: str, metrics: Sequence[str]) -> reports.LinePlot:
    """A plot over the steps of the metrics' stage; of ages there are as many as there are."""
    stage = metrics[0].partition("/")[0]
    axis, counted = f"{stage}/step", "PPO iterations" if stage == "ppo" else "optimizer steps"
    if metrics[0].endswith("age_0"):
        ages = metrics[0].replace("age_0", "age_.*")
        return reports.LinePlot(title=title, x=axis, title_x=counted, metric_regex=ages, plot_type="pct-area")
    kind = "stacked-area" if title.endswith("by phase") else None
    return reports.LinePlot(title=title, x=axis, title_x=counted, y=list(metrics), plot_type=kind)


def dashboard(entity: str, project: str) -> int:
    """Make the workspace in a project of W&B and print its address. Raises RuntimeError when W&B does not take it."""
    made = workspace(entity, project)
    try:
        made.save()
    except Exception as error:  # wandb and the network each raise their own
        raise RuntimeError(
            f"W&B did not take the workspace ({type(error).__name__}: {error}). Remedy: `wandb login`, and see that "
            f"the project {entity}/{project} exists"
        ) from error
    return DONE
