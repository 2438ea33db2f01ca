import json
from typing import Any

import pytest

from cluster.tracking import workspace as dashboard
from cluster.tracking.workspace import SECTIONS, workspace


def test_the_workspace_has_every_plot_over_the_steps_of_its_stage():
    made = workspace("us", "rayward")
    panels: list[Any] = [panel for section in made.sections for panel in section.panels if hasattr(panel, "x")]
    plots = {panel.title: panel for panel in panels}
    assert plots.keys() == {title for section in SECTIONS.values() for title in section}
    for name, section in SECTIONS.items():
        for title, metrics in section.items():
            assert {metric.split("/")[0] + "/step" for metric in metrics} == {plots[title].x}, name
    assert plots["Gradient norms of both terms"].y == ["ppo/grad_norm/policy", "ppo/grad_norm/pretraining"]


def test_the_workspace_is_what_the_server_of_wandb_takes():
    """The library turns it into the JSON that it posts: titles, axes, stacked areas, the table and the bars."""
    spec = json.loads(workspace("us", "rayward")._to_model().spec.model_dump_json(by_alias=True))
    sections = {one["name"]: one["panels"] for one in spec["section"]["panelBankConfig"]["sections"]}
    assert sections.keys() == SECTIONS.keys()
    (time, *_, spent) = sections["Where does the time go?"]
    assert (time["viewType"], time["config"]["plotType"]) == ("Run History Line Plot", "stacked-area")
    assert time["config"]["xAxis"] == "ppo/step"
    assert time["config"]["metrics"] == [f"ppo/time/{part}" for part in ("rollout", "evaluate", "update", "publish")]
    assert spent["viewType"] == "Bar Chart"
    assert spent["config"]["metrics"] == [
        f"summary_metrics.seconds/{stage}" for stage in ("sft", "sample", "reward", "ppo")
    ]
    assert "ppo/heldout/samples" in json.dumps(sections["On held-out prompts"][-1])
    (runs,) = spec["section"]["runSets"]
    assert runs["grouping"] == [{"section": "run", "name": "group"}]
    ages = sections["How old are the samples?"][1]["config"]
    assert (ages["metricRegex"], ages["plotType"]) == ("ppo/staleness/age_.*", "pct-area")


def test_what_wandb_says_is_told_with_a_remedy(monkeypatch):
    def refuse(self):
        raise ValueError("no such entity")

    monkeypatch.setattr(dashboard.workspaces.Workspace, "save", refuse)
    with pytest.raises(RuntimeError, match=r"no such entity.*wandb login"):
        dashboard.dashboard("us", "rayward")
