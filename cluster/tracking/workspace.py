"""A W&B workspace for runs of Rayward, as code: `rayward dashboard` makes it in a project, and again after a change."""

import argparse
from collections.abc import Sequence

import wandb_workspaces.reports.v2 as reports
import wandb_workspaces.workspaces as workspaces

from cluster.runtime.exit_codes import DONE

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
    "On held-out prompts": {
        "Held-out gold, with its 95% interval": ("ppo/heldout/gold", "ppo/heldout/gold_low", "ppo/heldout/gold_high"),
        "Held-out score": ("ppo/heldout/score",),
        "Held-out KL, nats a response": ("ppo/heldout/kl",),
        "Held-out pretraining loss, nats a token (rising: alignment tax)": ("ppo/heldout/pretraining_loss",),
        "Held-out response length, tokens": ("ppo/heldout/length",),
    },
    "Is it sound?": {
        "Gap of sampler and learner, nats a token": ("ppo/parity/mean_gap", "ppo/importance/log_ratio_mean"),
        "Ratio of the first minibatch (1 on policy)": ("ppo/ratio/first_minibatch",),
        "Share of clipped tokens": ("ppo/policy/clip_fraction",),
        "Approximate KL of a step, nats a token": ("ppo/policy/approx_kl",),
        "Effective sample size, share of the tokens": ("ppo/importance/effective_share",),
        "Gradient norms of both terms": ("ppo/grad_norm/policy", "ppo/grad_norm/pretraining"),
        "Gradient norm of the critic": ("ppo/grad_norm/value",),
        "Explained variance of the critic": ("ppo/value/explained_variance",),
    },
    "How old are the samples?": {
        "Staleness of responses, versions": ("ppo/staleness/mean", "ppo/staleness/max"),
        "Share of tokens of each age, versions": ("ppo/staleness/age_0",),
        "Share of responses of several versions": ("ppo/staleness/mixed",),
    },
    "Where does the time go?": {
        "Seconds of an iteration, by phase": tuple(
            f"ppo/time/{phase}" for phase in ("rollout", "evaluate", "update", "publish")
        ),
        "Seconds of a held-out measurement": ("ppo/heldout/seconds",),
        "Seconds of a publication, by phase": tuple(
            f"ppo/publish/{phase}_s" for phase in ("join", "pause", "transfer", "load")
        ),
        "Seconds of a checkpoint": ("ppo/checkpoint/seconds",),
    },
    "Who is at work?": {
        "Generators: at work, wanted": ("ppo/fleet/size", "ppo/fleet/wanted"),
        "Generators replaced so far": ("ppo/fleet/restarts",),
        "Samples under way and ready": ("ppo/buffer/in_flight", "ppo/buffer/ready"),
        "Samples issued and trained": ("ppo/buffer/issued", "ppo/buffer/trained"),
    },
    "SFT": {
        "SFT loss, nats a token: training, held out": ("sft/loss", "sft/valid_loss"),
        "SFT: held-out pretraining loss, nats a token": ("sft/pretraining_valid_loss",),
        "SFT: gradient norm": ("sft/grad_norm",),
    },
    "Reward model": {
        "Loss, nats a pair": ("reward/reward_model/loss",),
        "Share of pairs in the batch that are right": ("reward/reward_model/batch_accuracy",),
        "Accuracy on held-out pairs, and of the longer one": (
            "reward/reward_model/accuracy",
            "reward/reward_model/longer_wins",
        ),
        "Reward model: gradient norm": ("reward/reward_model/grad_norm",),
    },
}
"""section -> title of a plot -> metrics in it, of one stage"""
_STACKED = {"Seconds of an iteration, by phase", "Seconds of a publication, by phase"}
_AGES = "Share of tokens of each age, versions"
_TIMED = ("sft", "sample", "reward", "ppo")


def workspace(entity: str, project: str) -> workspaces.Workspace:
    """The workspace as an object; `save` makes it in W&B. A line is a pipeline: the commands of a run directory."""
    more = {
        "On held-out prompts": reports.WeavePanelSummaryTable(table_name="ppo/heldout/samples"),
        "Where does the time go?": reports.BarPlot(
            title="Seconds of each stage", metrics=[reports.SummaryMetric(f"seconds/{stage}") for stage in _TIMED]
        ),
    }
    sections = [
        workspaces.Section(
            name=name,
            is_open=True,
            panels=[*(_plot(*plot) for plot in plots.items()), *([more[name]] if name in more else [])],
        )
        for name, plots in SECTIONS.items()
    ]
    grouped = workspaces.RunsetSettings(groupby=[workspaces.Metric("Group")])
    return workspaces.Workspace(
        entity=entity, project=project, name="Rayward", sections=sections, runset_settings=grouped
    )


def _plot(title: str, metrics: Sequence[str]) -> reports.LinePlot:
    """A plot over the steps of the metrics' stage."""
    stage = metrics[0].partition("/")[0]
    axis, counted = f"{stage}/step", "PPO iterations" if stage == "ppo" else "optimizer steps"
    if title == _AGES:  # as many as there are
        ages = "ppo/staleness/age_.*"
        return reports.LinePlot(title=title, x=axis, title_x=counted, metric_regex=ages, plot_type="pct-area")
    kind = "stacked-area" if title in _STACKED else None
    return reports.LinePlot(title=title, x=axis, title_x=counted, y=list(metrics), plot_type=kind)


def dashboard(given: argparse.Namespace) -> int:
    """Make the workspace in a project of W&B and print its address. Raises RuntimeError when W&B does not take it."""
    made = workspace(given.entity, given.project)
    try:
        made.save()
    except Exception as error:  # wandb and the network each raise their own
        raise RuntimeError(
            f"W&B did not take the workspace ({type(error).__name__}: {error}). Remedy: `wandb login`, and see that "
            f"the project {given.entity}/{given.project} exists"
        ) from error
    return DONE
