"""The secrets that this process knows, from the environment and files, and texts without them.

What is shown, written or sent goes through here: an error of somebody's own function may have a key in it.
"""

import contextlib
import io
import logging
import netrc
import os
import re
from collections.abc import Iterator
from pathlib import Path

SECRET_NAME = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|KEY|CREDENTIALS)$")
"""Names of environment variables that hold a secret."""
_SHORTEST = 8  # characters of a value that counts; a shorter one may be any word
_URL = re.compile(r"(?<=://)[^\s/@:\"']*:[^\s/@\"']+(?=@)")


def secrets() -> dict[str, str]:
    """Each secret by where it comes from: an environment variable or a file."""
    found = {name: value.strip() for name, value in os.environ.items() if SECRET_NAME.search(name.upper())}
    # A variable such as GOOGLE_APPLICATION_CREDENTIALS names a file, and its name is no secret.
    found = {name: value for name, value in found.items() if not os.path.exists(value)} | dict(_stored())
    return {where: value for where, value in found.items() if len(value) >= _SHORTEST}


def secret_files() -> tuple[Path, ...]:
    """Files that hold nothing but one secret, where they are there."""
    home = Path.home()
    named = (
        Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or home / ".ray/auth_token"),
        Path(os.environ.get("HF_TOKEN_PATH") or home / ".cache/huggingface/token"),
        *map(Path, filter(None, [os.environ.get("RAYWARD_REWARD_TOKEN_FILE")])),
    )
    return tuple(path for path in named if path.is_file())


def holder(text: str) -> str | None:
    """Which secret a text holds, in words; None for a text without one."""
    if _URL.search(text):
        return "a user and password in a URL"
    return next((f"the value of {where}" for where, value in secrets().items() if value in text), None)


def redact(text: str) -> str:
    """The text with the name of each secret in its place."""
    for where, value in secrets().items():
        text = text.replace(value, f"[{where}]")
    return _URL.sub("[hidden]", text)


class Formatter(logging.Formatter):
    """Formats records for a file or a screen, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class Output(io.TextIOWrapper):
    """A text file that is written without secrets."""

    def write(self, text: str, /) -> int:
        super().write(redact(text))
        return len(text)


def _stored() -> Iterator[tuple[str, str]]:
    for path in secret_files():
        with contextlib.suppress(OSError, ValueError):
            yield str(path), path.read_text(encoding="utf-8").strip()
    file = Path.home() / ".netrc"
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        yield from ((f"{file}, {host}", login[2] or "") for host, login in netrc.netrc(file).hosts.items())
