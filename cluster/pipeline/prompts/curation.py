"""Which raw prompts are kept, and in which set: pure functions of the prompts and the settings.

InstructGPT (section 3.2) drops prompts that share a long prefix, keeps at most 200 of a user, and splits by user, so
that nobody who is measured on was trained on. How long "long" is the paper does not say.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

from actors.prompts import stable_hash
from cluster.config.schema import PromptsConfig
from cluster.pipeline.prompts.raw import RawPrompt

EQUAL, PREFIX, LIMIT, BAD = "equal prompt", "shared prefix", "limit of a user", "bad row"
REASONS = (EQUAL, PREFIX, LIMIT, BAD)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """A prompt that is in no set."""

    line: int
    """number of its row in the file"""
    reason: str
    """one of REASONS"""
    prompt: RawPrompt | None
    """the prompt; None for a bad row"""
    detail: str
    """in words"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curated:
    """What became of the rows of a file; every prompt is in one of both."""

    sets: dict[str, list[RawPrompt]]
    """kept, by the data file that they are for, in the order of the raw file"""
    dropped: list[Dropped]
    """not kept, in the order of the raw file"""


def curate(raw: Sequence[RawPrompt], config: PromptsConfig) -> Curated:
    """Drop what begins alike, then what is too much of one user, and split the rest by user.

    Raises ValueError for a set that is wanted and gets no prompt.
    """
    dropped = list(_begin_alike(raw, config.prefix_chars))
    gone = {one.prompt.id for one in dropped if one.prompt}
    rest = [prompt for prompt in raw if prompt.id not in gone]
    dropped += _too_many(rest, config)
    gone = {one.prompt.id for one in dropped if one.prompt}
    sets = {name: list[RawPrompt]() for name in config.shares}
    for prompt in rest:
        if prompt.id not in gone:
            sets[set_of(prompt.owner, config)].append(prompt)
    for name, share in config.shares.items():
        if share and not sets[name]:
            remedy = "raise the share" if name != "prompts" else "lower the other shares"
            raise ValueError(
                f"none of the {len(rest)} prompts of {len({one.owner for one in rest})} users falls to {name}, whose "
                f"share of the users is {share:g}: {remedy}, set a share to 0 to go without that set, or give another "
                "prompts.seed"
            )
    return Curated(sets=sets, dropped=sorted(dropped, key=lambda one: one.line))


def set_of(owner: tuple[str, str], config: PromptsConfig) -> str:
    """The set that a user's prompts are in: a function of the user, the seed and the shares alone."""
    at = stable_hash("split", config.seed, *owner) / 2**63
    for name, share in config.shares.items():
        if at < share:
            return name
        at -= share
    return "prompts"


def _begin_alike(raw: Iterable[RawPrompt], characters: int) -> Iterator[Dropped]:
    """All but the first of those that begin with the same characters; how many stay does not depend on the order."""
    first: dict[str, RawPrompt] = {}
    for prompt in raw:
        kept = first.setdefault(prompt.text[:characters], prompt)
        if kept.line == prompt.line:  # itself, or another prompt of the same pairs
            continue
        if kept.text == prompt.text:
            yield Dropped(line=prompt.line, reason=EQUAL, prompt=prompt, detail=f"as {kept.id!r}, line {kept.line}")
        else:
            shared = sum(
                1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(kept.text, prompt.text, strict=False))
            )
            detail = f"{shared} characters with {kept.id!r}, line {kept.line}"
            yield Dropped(line=prompt.line, reason=PREFIX, prompt=prompt, detail=detail)


def _too_many(raw: Iterable[RawPrompt], config: PromptsConfig) -> Iterator[Dropped]:
    """What users have beyond the limit; which of theirs stay is drawn by hash, so early ones are not preferred."""
    of_user = defaultdict[tuple[str, str], list[RawPrompt]](list)
    for prompt in raw:
        of_user[prompt.owner].append(prompt)
    for prompts in of_user.values():
        drawn = sorted(
            prompts, key=lambda one: stable_hash("limit", config.seed, *((m.role, m.content) for m in one.messages))
        )
        for prompt in drawn[config.per_user :]:
            detail = f"one of {len(prompts)} prompts of user {prompt.user!r}, of which {config.per_user} stay"
            yield Dropped(line=prompt.line, reason=LIMIT, prompt=prompt, detail=detail)
