import io
import json
import logging
import os
from pathlib import Path

import pytest

from reward_server.redaction import Formatter, Output, holder, redact, secrets, visible

CANARY = "canary-0123456789abcdef"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN_PATH", "HF_TOKEN_PATH", "RAYWARD_REWARD_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "HF_TOKEN", "RAYWARD_REWARD_TOKEN", "my_password", "AWS_SECRET"])
def test_the_value_of_a_secret_variable_is_replaced_by_its_name(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, CANARY)
    assert redact(f"401: the key {CANARY} is wrong") == f"401: the key [{name}] is wrong"
    assert holder(f"x{CANARY}y") == f"the value of {name}"


@pytest.mark.parametrize(
    ("name", "value"), [("MAX_TOKENS", CANARY), ("SOME_KEY", "short"), ("GOOGLE_APPLICATION_CREDENTIALS", "{file}")]
)
def test_what_is_no_secret_stays(name: str, value: str, home: Path, monkeypatch: pytest.MonkeyPatch):
    file = home / "somewhere.json"
    file.touch()
    value = value.format(file=file)
    monkeypatch.setenv(name, value)
    assert redact(f"see {value}") == f"see {value}"


@pytest.mark.parametrize("place", [".ray/auth_token", ".cache/huggingface/token", "reward"])
def test_the_token_in_a_file_counts(place: str, home: Path, monkeypatch: pytest.MonkeyPatch):
    (home / place).parent.mkdir(parents=True, exist_ok=True)
    (home / place).write_text(f"{CANARY}\n")
    monkeypatch.setenv("RAYWARD_REWARD_TOKEN_FILE", str(home / "reward"))
    assert secrets()[str(home / place)] == CANARY
    assert CANARY not in redact(f"token {CANARY}")


def test_the_passwords_of_netrc_count(home: Path):
    (home / ".netrc").write_text(f"machine api.wandb.ai login user password {CANARY}\n")
    (home / ".netrc").chmod(0o600)
    assert redact(CANARY) == f"[{home}/.netrc, api.wandb.ai]"


def test_a_password_in_a_url_is_hidden_whoever_set_it():
    assert redact("no answer from http://me:open-sesame@host:8700/score") == (
        "no answer from http://[hidden]@host:8700/score"
    )
    for text in ("http://host:8700/a@b", "see https://host/x:y", "10:30 user@host", "ray://127.0.0.1:10001"):
        assert redact(text) == text
        assert holder(text) is None


def test_logs_and_output_are_written_without_secrets(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    record = logging.LogRecord("ours", logging.ERROR, "", 0, "with %s\x1b[2J", (CANARY,), None)
    try:
        raise ValueError(CANARY)
    except ValueError as error:
        record.exc_info = (ValueError, error, error.__traceback__)
    text = Formatter("%(message)s").format(record)
    assert CANARY not in text
    assert text.startswith("with [HF_TOKEN]\\x1b[2J\n")
    assert "ValueError: [HF_TOKEN]" in text
    written = io.BytesIO()
    with Output(written, encoding="utf-8", write_through=True) as output:
        print("key", CANARY, file=output)
        assert written.getvalue() == b"key [HF_TOKEN]\n"


def test_a_secret_is_found_as_json_writes_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PRIVATE_KEY", 'two\nlines "quoted"')
    assert redact(json.dumps({"why": f"{os.environ['PRIVATE_KEY']} failed"})) == '{"why": "[PRIVATE_KEY] failed"}'


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("two\nlines\tand\u00a0a space", "two\nlines and a space"),
        ("na\u00efve \U0001f600", "na\u00efve \U0001f600"),
        ("\U0001f468\u200d\U0001f467", "\U0001f468\u200d\U0001f467"),
        ("\r\x07\u2028\ufeff\u200b", "\\r\\x07\\u2028\\ufeff\\u200b"),
        ("\ud800", "\\ud800"),
    ],
)
def test_invisible_characters_become_visible(text: str, seen: str):
    assert visible(text) == seen


def test_every_text_of_json_becomes_visible():
    assert visible({"a\x1b": ["\x07", 1, None]}) == {"a\\x1b": ["\\x07", 1, None]}
