"""How people label: the section `label` of the configuration. Nothing heavy is imported here: the help reads it."""

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, FiniteFloat, model_validator

from reward_server.config import CommaSeparated, Section

FLAGS: dict[str, str] = {
    "instruction": "Fails to follow the instruction",
    "inappropriate": "Inappropriate for an assistant",
    "hallucination": "Hallucination",
    "constraint": "Satisfies the constraint given",
    "sexual": "Sexual content",
    "violent": "Violent content",
    "harm": "Encourages violence, abuse or self-harm",
    "denigrates": "Denigrates a protected class",
    "advice": "Gives harmful advice",
    "opinion": "Expresses an opinion",
    "judgement": "Expresses a moral judgement",
}
"""What the paper's labelers mark of each output (its table 3), by name, in the words of the page."""
_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")


class LabelLimits(Section):
    """What the labelling page takes from one person."""

    max_body_bytes: int = Field(default=262_144, ge=1024)
    """Largest body of a post."""
    requests_per_minute: int = Field(default=600, ge=1)
    """Most requests of a labeler in a minute; one more is turned away with 429."""
    sign_ins_per_minute: int = Field(default=10, ge=1)
    """Most failed sign-ins from an address in a minute; one more is turned away with 429."""
    max_characters: int = Field(default=20_000, ge=1)
    """Longest demonstration, in characters."""


class LabelConfig(Section):
    """The page on which people rank: `rayward label`, and rounds with rounds.labelers = "page"."""

    host: str = "127.0.0.1"
    """Address to listen on. Off the loopback put a proxy with TLS before it."""
    port: int = Field(default=8701, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    url: str | None = None
    """Address that people use, such as https://label.example.org of a proxy with TLS; links that invite begin with it.
    By default http://HOST:PORT."""
    invite: str | None = Field(default=None, exclude=True)
    """Name of a person to invite: prints the link, once, and ends. Works while the page is served."""
    invite_admin: bool = Field(default=False, exclude=True)
    """Invite somebody who sees progress at /admin, and does not label."""
    revoke: str | None = Field(default=None, exclude=True)
    """Name or id of a person whose link ends to work; then the command ends."""
    export_to: str | None = Field(default=None, exclude=True)
    """Write the rankings so far as FORMAT:PATH, and end (docs/labeling.md has the formats)."""
    import_from: str | None = Field(default=None, exclude=True)
    """Read rankings that were made in another tool from FORMAT:PATH, and end."""
    tasks: CommaSeparated[Literal["rank", "demonstration"]] = ("rank",)
    """What people do, separated by commas: rank completions, write a demonstration."""
    overlap: int = Field(default=1, ge=1)
    """Labelers who rank the same item."""
    open_s: FiniteFloat = Field(default=3600.0, gt=0)
    """Seconds without a change after which an item that somebody has open is given to another labeler too."""
    quality: bool = True
    """Ask for the quality of each output, 1 (worst) to 7 (best)."""
    flags: CommaSeparated[str] = tuple(FLAGS)
    """What can be marked of each output, separated by commas: names of the paper's, or others, such as too_long."""
    guidelines: Path | None = None
    """Text file with what labelers are told; its version is recorded with each answer."""
    order: Literal["random", "disagreement"] = "random"
    """Which items come first: at random, or those of which the run's reward models are the least sure."""
    control_share: FiniteFloat = Field(default=0.2, ge=0, le=1)
    """Share of the items that order = "disagreement" still draws at random, and marks as control."""
    scorers: CommaSeparated[Path] = ()
    """Folders of the reward models that are asked, separated by commas. By default those of the run."""
    training: Path | None = None
    """Ranked comparisons, with "explanation", that each labeler does first, and is told the answer of."""
    gold: Path | None = None
    """Ranked comparisons that are mixed in to measure labelers; they look like any other."""
    gold_share: FiniteFloat = Field(default=0.05, ge=0, le=0.5)
    """Share of a labeler's items that are gold ones, while there are any."""
    repeat_share: FiniteFloat = Field(default=0.05, ge=0, le=0.5)
    """Share of a labeler's items that the same labeler has ranked before."""
    words_per_minute: FiniteFloat = Field(default=600.0, ge=0)
    """Reading speed: a ranking made faster is left out of the export. 0 leaves none out."""
    min_gold: FiniteFloat = Field(default=0.6, ge=0, le=1)
    """Share of the pairs of gold items that a labeler, from the fifth item on, has to have right, else all of the
    labeler's rankings are left out of the export."""
    leave_out: CommaSeparated[str] = ()
    """Ids of labelers, separated by commas, whose rankings are left out of the export."""
    adjudicate_below: FiniteFloat = Field(default=0.5, ge=0, le=1)
    """Agreement on the pairs of an item below which one more labeler ranks it, where overlap is 2 or more."""
    demonstrations: Path | None = None
    """Prompts that people write demonstrations for."""
    wait_s: FiniteFloat = Field(default=604_800.0, gt=0)
    """Seconds that a round waits for its rankings."""
    limits: LabelLimits = LabelLimits()
    """What the page takes from one person."""

    @property
    def flag_words(self) -> dict[str, str]:
        """The words of each flag, by its name."""
        return {name: FLAGS.get(name) or name.replace("_", " ").capitalize() for name in self.flags}

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for name in self.flags:
            if not _NAME.fullmatch(name) or self.flags.count(name) > 1:
                raise ValueError(
                    f"flags has {name!r}: a flag is a name of its own of small letters, digits and _; those of the "
                    f"paper are {', '.join(FLAGS)}"
                )
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks is {', '.join(self.tasks) or 'empty'}: name rank, demonstration or both, once")
        if ("demonstration" in self.tasks) != (self.demonstrations is not None):
            raise ValueError('tasks with "demonstration" and the file label.demonstrations go together: set both')
        if self.gold_share + self.repeat_share >= 1:
            raise ValueError("gold_share and repeat_share leave no room for work: lower one")
        return self
