"""A W&B workspace for runs of Rayward, as code: `rayward dashboard` makes it in a project, and again after a change."""

from collections.abc import Sequence

import wandb_workspaces.reports.v2 as reports
import wandb_workspaces.workspaces as workspaces

from cluster.cli import DONE
from cluster.commands import command_parser

_X = "ppo/step"
SECTIONS = {
    "Is it learning?": {
        "Score of the reward model": ("ppo/score/mean",),
        "Gold (labeler's verdict)": ("ppo/gold/mean",),
        "KL to the SFT model, nats a response": ("ppo/kl/mean",),
        "Pretraining loss, nats a token": ("ppo/loss/pretraining",),
        "Response length, tokens": ("ppo/response/length",),
        "Share of responses that ended": ("ppo/response/eos_rate",),
        "Spread of scores": ("ppo/score/std",),
        "Entropy, nats a token": ("ppo/policy/entropy",),
    },
    "Is it sound?": {
        "Gap of sampler and learner, nats a token": ("ppo/parity/mean_gap", "ppo/importance/log_ratio_mean"),
        "Ratio of the first minibatch (1 on policy)": ("ppo/ratio/first_minibatch",),
        "Share of clipped tokens": ("ppo/policy/clip_fraction",),
        "Approximate KL of a step": ("ppo/policy/approx_kl",),
        "Effective sample size, share": ("ppo/importance/effective_share",),
        "Staleness, versions": ("ppo/staleness/mean", "ppo/staleness/max"),
        "Gradient norms of both terms": ("ppo/grad_norm/policy", "ppo/grad_norm/pretraining"),
        "Gradient norm of the critic": ("ppo/grad_norm/value",),
        "Explained variance of the critic": ("ppo/value/explained_variance",),
    },
    "Where does the time go?": {
        "Seconds of an iteration": tuple(f"ppo/time/{phase}" for phase in ("rollout", "evaluate", "update", "publish")),
    },
}
"""section -> title of a plot -> metrics in it"""


def workspace(entity: str, project: str) -> workspaces.Workspace:
    """The workspace as an object; `save` makes it in W&B."""
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name="Rayward",
        sections=[
            workspaces.Section(
                name=name,
                is_open=True,
                panels=[reports.LinePlot(title=title, x=_X, y=list(metrics)) for title, metrics in plots.items()],
            )
            for name, plots in SECTIONS.items()
        ],
    )


def dashboard(words: Sequence[str]) -> int:
    """Make the workspace in a project of W&B and print its address. Raises RuntimeError when W&B does not take it."""
    parser = command_parser("dashboard")
    parser.add_argument("--entity", required=True, help="user or team of W&B")
    parser.add_argument("--project", default="rayward", help="project of W&B (rayward)")
    given = parser.parse_args(words)
    made = workspace(given.entity, given.project)
    try:
        made.save()
    except Exception as error:  # wandb and the network each raise their own
        raise RuntimeError(
            f"W&B did not take the workspace ({type(error).__name__}: {error}). Remedy: `wandb login`, and see that "
            f"the project {given.entity}/{given.project} exists"
        ) from error
    return DONE
