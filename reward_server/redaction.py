"""The secrets that this process knows, from the environment and files, and texts without them.

What is shown, written or sent goes through here: an error of somebody's own function may have a key in it, and a text
of a model, a stranger or another job may have control characters, which a terminal obeys.
"""

import contextlib
import io
import json
import logging
import netrc
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SECRET_NAME = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|KEY|CREDENTIALS)$")
"""Names of environment variables that hold a secret."""
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
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
        text = text.replace(value, f"[{where}]").replace(json.dumps(value)[1:-1], f"[{where}]")
    return _URL.sub("[hidden]", text)


def visible(told: Any) -> Any:
    """Replace what a reader would not see, or would see in another order, by its escape: \\x1b, \\u202e.

    Line breaks, spaces of all kinds and the joiner inside an emoji remain. Of a list or dict every text, keys too.
    """
    if isinstance(told, dict):
        return {visible(name): visible(value) for name, value in told.items()}
    if isinstance(told, list):
        return [visible(value) for value in told]
    if not isinstance(told, str) or told.isprintable():
        return told
    return "".join(one if one.isprintable() or one in "\n\u200d" else _escaped(one) for one in told)


def _escaped(one: str) -> str:
    breaks = "\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\u2028\u2029"
    return " " if one.isspace() and one not in breaks else one.encode("unicode_escape").decode()


def shown(text: str) -> str:
    """A text as it may stand on a terminal or in a message: without secrets and control characters."""
    return visible(redact(text))


class Formatter(logging.Formatter):
    """Formats records for a file or a screen."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


class Output(io.TextIOWrapper):
    """A text file that is written without secrets, as far as there is room: nothing stops for what it prints."""

    def write(self, text: str, /) -> int:
        with contextlib.suppress(OSError):
            super().write(redact(text))
        return len(text)


def write_output_to(path: Path) -> None:
    """Send stdout and stderr of this process and of the children to come to the end of the file `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    sys.stdout, sys.stderr = (
        Output(io.FileIO(file, "wb", closefd=False), encoding="utf-8", errors="replace", write_through=True)
        for file in (1, 2)
    )


def _stored() -> Iterator[tuple[str, str]]:
    for path in secret_files():
        with contextlib.suppress(OSError, ValueError):
            yield str(path), path.read_text(encoding="utf-8").strip()
    file = Path.home() / ".netrc"
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        yield from ((f"{file}, {host}", login[2] or "") for host, login in netrc.netrc(file).hosts.items())
