"""Where the bearer token comes from, and what is refused without telling it."""

import os
from pathlib import Path

import pytest

from reward_server.bearer import FILE_VARIABLE, TOKEN_VARIABLE, bearer_token

SECRET = "open-sesame-0123456789"


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    monkeypatch.delenv(FILE_VARIABLE, raising=False)


def secret_file(folder: Path, content: bytes = SECRET.encode() + b"\n", mode: int = 0o600) -> Path:
    path = folder / "token"
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_there_is_none_unless_one_is_set() -> None:
    assert bearer_token() is None


def test_it_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, f" {SECRET}\n")
    assert bearer_token() == SECRET


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_it_comes_from_a_file_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int) -> None:
    monkeypatch.setenv(FILE_VARIABLE, str(secret_file(tmp_path, mode=mode)))
    assert bearer_token() == SECRET


def refused(reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        bearer_token()
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o700])
def test_a_file_that_others_may_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int) -> None:
    path = secret_file(tmp_path, mode=mode)
    monkeypatch.setenv(FILE_VARIABLE, str(path))
    refused(f"RAYWARD_REWARD_TOKEN_FILE names {path}, which has mode {mode:04o} .* chmod 600 it")


def test_a_file_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FILE_VARIABLE, str(secret_file(tmp_path)))
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    refused(f"belongs to user {os.getuid()}; a secret must be this user's")


def test_a_file_that_is_not_there_or_no_text_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "none"))
    refused(r"which cannot be read \(No such file or directory\); correct or unset it")
    monkeypatch.setenv(FILE_VARIABLE, str(secret_file(tmp_path, b"\xff\xfe")))
    refused("which is no text")


def test_two_tokens_are_one_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, SECRET)
    monkeypatch.setenv(FILE_VARIABLE, str(secret_file(tmp_path)))
    refused("are both set, .*unset one")


@pytest.mark.parametrize(
    "content", ["", " \n", f"{SECRET}\n{SECRET}", f"{SECRET} x", f"{SECRET}\u00e9", f"{SECRET}\x07"]
)
def test_what_cannot_be_a_header_is_no_token_and_is_not_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    """The HTTP client would quote it, secret and all."""
    monkeypatch.setenv(FILE_VARIABLE, str(secret_file(tmp_path, content.encode())))
    refused("holds no token; set a secret of visible ASCII characters")
    monkeypatch.delenv(FILE_VARIABLE)
    if "\n" not in content.strip():
        monkeypatch.setenv(TOKEN_VARIABLE, content)
        refused("RAYWARD_REWARD_TOKEN holds no token")
