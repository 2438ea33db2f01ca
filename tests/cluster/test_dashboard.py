from typing import Any

import pytest

from cluster import dashboard
from cluster.dashboard import SECTIONS, workspace


def test_the_workspace_has_every_plot_over_the_iterations():
    made = workspace("us", "rayward")
    panels: list[Any] = [panel for section in made.sections for panel in section.panels]
    plots = {panel.title: panel for panel in panels}
    assert plots.keys() == {title for section in SECTIONS.values() for title in section}
    assert {plot.x for plot in plots.values()} == {"ppo/step"}
    assert plots["Gradient norms of both terms"].y == ["ppo/grad_norm/policy", "ppo/grad_norm/pretraining"]


def test_what_wandb_says_is_told_with_a_remedy(monkeypatch):
    def refuse(self):
        raise ValueError("no such entity")

    monkeypatch.setattr(dashboard.workspaces.Workspace, "save", refuse)
    with pytest.raises(RuntimeError, match=r"no such entity.*wandb login"):
        dashboard.dashboard(["--entity", "us"])
