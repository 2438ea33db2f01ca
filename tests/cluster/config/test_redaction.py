import io
import logging
from pathlib import Path

import pytest

from cluster.config.load import ConfigError, compose, read_overrides, read_toml
from cluster.config.redaction import Formatter, Output, holder, redact, secrets
from cluster.config.schema import Config

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
    record = logging.LogRecord("ours", logging.ERROR, "", 0, "with %s", (CANARY,), None)
    try:
        raise ValueError(CANARY)
    except ValueError as error:
        record.exc_info = (ValueError, error, error.__traceback__)
    text = Formatter("%(message)s").format(record)
    assert CANARY not in text
    assert "ValueError: [HF_TOKEN]" in text
    written = io.BytesIO()
    with Output(written, encoding="utf-8", write_through=True) as output:
        print("key", CANARY, file=output)
        assert written.getvalue() == b"key [HF_TOKEN]\n"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("tracking.entity", CANARY, "tracking.entity (command line) holds the value of WANDB_API_KEY"),
        ("tracking.api_key", "something-else-entirely", "tracking.api_key = [hidden] (command line)"),
        (
            "scoring.parts",
            '[{name = "a", kind = "url", target = "http://me:something-else-entirely@host/"}]',
            "scoring.parts (command line) holds a user and password in a URL",
        ),
    ],
)
def test_a_secret_in_a_setting_is_refused_and_not_shown(
    key: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    with pytest.raises(ConfigError) as error:
        compose(Config, read_overrides(Config, [(key, value)]))
    text = str(error.value)
    assert said in text
    assert "Remedy: set it in the environment or in a file of mode 0600" in text
    assert CANARY not in text
    assert "something-else" not in text
    section, _, name = key.partition(".")
    file = tmp_path / "mine.toml"
    file.write_text(f"[{section}]\n{name} = {value if value.startswith('[') else repr(value)}\n")
    with pytest.raises(ConfigError) as error:
        compose(Config, read_toml(Config, file))
    assert CANARY not in str(error.value)
    assert "something-else" not in str(error.value)
