"""The parts of a report: a section for each question that a reader has, and none for what was not done."""

from dataclasses import dataclass

from cluster.report import pictures, round_pictures
from cluster.report.canvas import Picture
from cluster.rundir.files import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the report."""

    title: str
    """heading"""
    lead: str
    """what to look at, in a sentence or two"""
    pictures: tuple[Picture, ...]
    """what it shows"""
    small: bool = False
    """three pictures in a row rather than two"""
    samples: bool = False
    """the samples belong below the pictures"""


def sections(run: Run) -> list[Section]:
    """The sections for which the run has anything to show, in reading order."""
    verdicts = f"Gold is the verdict of the {run.labeler}, which the policy never saw."
    compared, kinds = len(run.arms) > 1, {pictures.kind(run, arm) for arm in run.arms}
    found = (
        Section(
            title="Rounds",
            lead="In each round the newest policy's completions are compared, and a reward model and a policy trained. "
            f"A win rate is the share of held-out prompts on which the {run.labeler} prefers the round's policy, a tie "
            "counting half.",
            pictures=tuple(round_pictures.rounds(run)),
            small=True,
        ),
        Section(
            title="What the pretraining mix does" if len(kinds) > 1 else "The runs compared",
            lead="In the paper, PPO earns a similar reward without the pretraining mix, and the language "
            f"model pays for it: its loss on pretraining text, the alignment tax, rises. {verdicts}",
            pictures=(*pictures.gold(run), *pictures.tax(run)) if compared else (),
        ),
        Section(
            title="Learning",
            lead=f"One point an iteration; a band is one standard deviation each way. {verdicts}",
            pictures=(
                *(() if compared else pictures.gold(run)),
                *pictures.learning(run),
                *(pictures.gold_by_kl(run) if compared else ()),
            ),
        ),
        Section(
            title="Held-out measurements on the way",
            lead=f"Prompts and text that none of the models was trained on, measured while PPO worked. {verdicts}",
            pictures=tuple(pictures.held_out(run)),
        ),
        Section(
            title="What it cost",
            lead="The alignment tax is the loss on held-out pretraining text that PPO added. A point of the "
            "curve is an iteration: where more KL buys no more gold, the policy exploits the reward model.",
            pictures=() if compared else (*pictures.tax(run), *pictures.gold_by_kl(run)),
        ),
        Section(
            title="Held-out responses",
            lead=f"Every model's responses to the same prompts, which none was trained on. {verdicts}",
            pictures=tuple(pictures.responses(run)),
            samples=bool(run.evaluations),
        ),
        Section(
            title="The reward model",
            lead=f"Measured on held-out comparisons ranked by {run.rankings}. A reward model that learnt "
            "only to like long responses would do as well as the rule that the longer one wins.",
            pictures=tuple(pictures.reward_model(run)),
            small=True,
        ),
        Section(
            title="Supervised training",
            lead="Mean loss a token, of training batches and of held-out text. The best epoch of a model is the one "
            "whose responses to validation prompts score highest: its held-out loss may have risen long before.",
            pictures=(*pictures.supervised(run), *pictures.selection(run)),
        ),
        Section(
            title="Inside PPO",
            lead="The parity gap is how far the sampler's log-probs are from the learner's after a publish: "
            "a jump means that stale or damaged weights are sampling.",
            pictures=tuple(pictures.inside_ppo(run)),
            small=True,
        ),
        Section(
            title="Lineage",
            lead="Models and comparisons, each below what it was made of. `rayward lineage` has hashes and commands, "
            "and tells what has changed since.",
            pictures=tuple(round_pictures.lineage(run)),
        ),
        Section(
            title="Time",
            lead="Where the time of the run, and of one iteration, went.",
            pictures=tuple(pictures.time_spent(run)),
        ),
    )
    return [section for section in found if section.pictures or section.samples]
