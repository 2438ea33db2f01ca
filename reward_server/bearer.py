"""The reward service's bearer token: from the environment, or a file that only its owner can read."""

import os
import stat
from pathlib import Path

TOKEN_VARIABLE = "RAYWARD_REWARD_TOKEN"
"""Environment variable with the bearer token that clients must send; needed off the loopback."""
FILE_VARIABLE = "RAYWARD_REWARD_TOKEN_FILE"
"""Environment variable that names a file with the token instead, such as a mounted secret."""

JUDGE_VARIABLE = "RAYWARD_JUDGE_TOKEN"
"""Environment variable with the bearer token for the endpoint of a judge, which is sent to no other host."""


def bearer_token() -> str | None:
    """Return the token that this machine knows, None where there is none.

    Raises ValueError, which never holds the token, when it is given twice, when its file cannot be read or could be
    read by others, and when it is no token.
    """
    token, name = os.environ.get(TOKEN_VARIABLE), os.environ.get(FILE_VARIABLE)
    if name is None:
        return None if token is None else _checked(token, TOKEN_VARIABLE)
    if token is not None:
        raise ValueError(
            f"{TOKEN_VARIABLE} and {FILE_VARIABLE} are both set, and it is unclear which counts; unset one"
        )
    return _checked(_read(Path(name)), f"the file {name} of {FILE_VARIABLE}")


def token_of(variable: str) -> str:
    """The token of another service, in an environment variable. Raises ValueError without one."""
    if (token := os.environ.get(variable)) is None:
        raise ValueError(f"{variable}, which scoring.parts names as the token of a url, is not set; export it")
    return _checked(token, variable)


def judge_token() -> str | None:
    """The token for a judge's endpoint, None where there is none. Raises ValueError for what is no token."""
    return token_of(JUDGE_VARIABLE) if JUDGE_VARIABLE in os.environ else None


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            found = os.fstat(file.fileno())
            if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o177:
                raise ValueError(
                    f"{FILE_VARIABLE} names {path}, which has mode {stat.S_IMODE(found.st_mode):04o} and belongs to "
                    f"user {found.st_uid}; a secret must be this user's ({os.geteuid()}) alone: chown it, chmod 600 it"
                )
            return file.read(10_000)
    except UnicodeDecodeError:
        raise ValueError(
            f"{FILE_VARIABLE} names {path}, which is no text; put the token into it, nothing else"
        ) from None
    except OSError as error:
        raise ValueError(
            f"{FILE_VARIABLE} names {path}, which cannot be read ({error.strerror}); correct or unset it"
        ) from error


def _checked(text: str, where: str) -> str:
    # What is no header value would be quoted in the errors of the HTTP client.
    token = text.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(f"{where} holds no token; set a secret of visible ASCII characters without spaces")
    return token
