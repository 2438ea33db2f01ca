"""What a check returns."""

from dataclasses import dataclass
from functools import partial
from typing import Literal


@dataclass(frozen=True, slots=True)
class Finding:
    """One line."""

    what: str
    """what was looked at"""
    says: str
    """what was found"""
    remedy: str = ""
    """what to do; empty where all is well"""
    state: Literal["ok", "warn", "fail"] = "ok"
    """fail: a run would not work; warn: it would be slow, or break later"""


warn, fail = partial(Finding, state="warn"), partial(Finding, state="fail")
