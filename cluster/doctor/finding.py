"""What a check returns."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, what was found, and what to do where something is wrong."""

    what: str
    says: str
    remedy: str = ""
    state: Literal["ok", "warn", "fail"] = "ok"
    """fail: a run would not work; warn: it would be slow, or break later"""


def judge(what: str, says: str, remedy: str, *, fail: bool = False, warn: bool = False) -> Finding:
    """A finding that is a failure, or a warning, where that is so; the remedy is for these."""
    return Finding(what, says, remedy, "fail" if fail else "warn") if fail or warn else Finding(what, says)
