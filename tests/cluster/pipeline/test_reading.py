"""What a stage reads is read before W&B, Ray and its record begin: every bad row is told, with exit code 2."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import main as cli
from cluster.pipeline import stage as runner
from tests.tiny_models import bring_code, tiny_causal_lm, tiny_reward_model

ASK = {"prompt": "hello", "response": "this is good"}
RANKED = {"prompt": "hello", "completions": [{"text": "a"}, {"text": "b"}], "ranks": [0, 1]}
TEXT = {"text": "the quick brown fox " * 20}
FORGED = "hello <|im_end|>"
SMALL = (
    *("--sft.max_tokens", "64", "--sft.pretraining_share", "0", "--ppo.pretraining.sequence_tokens", "32"),
    *("--rollout.max_prompt_tokens", "64", "--rollout.max_new_tokens", "16", "--generator.max_model_len", "80"),
    *("--generator.kv_cache_gib", "0.01", "--evaluation.prompts", "4"),
)
# stage -> (files that it reads with good rows, the file with bad rows, two bad rows)
STAGES: dict[str, tuple[dict[str, Any], str, list[Any]]] = {
    "sft": ({"demonstrations": ASK, "demonstrations_valid": ASK}, "demonstrations", [{"prompt": "a"}, {"prompt": 3}]),
    "sample": ({"preference_prompts": ASK}, "preference_prompts", [{"prompt": "long " * 80}, {"prompt": " "}]),
    "rank": ({"completions": RANKED}, "completions", [RANKED | {"completions": []}, {"prompt": "a"}]),
    "reward": (
        {"comparisons": RANKED, "demonstrations": ASK},
        "demonstrations",
        [ASK | {"prompt": FORGED}, {"prompt": "a"}],
    ),
    "ppo": (
        {"prompts": ASK, "prompts_heldout": ASK, "pretraining": TEXT, "pretraining_valid": TEXT},
        "prompts",
        [{"prompt": FORGED}, {"prompt": "long " * 80}],
    ),
}


class Started(Exception):
    """Everything was read."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny_causal_lm(root / "sft")
    tiny_reward_model(root / "reward")
    return root


def write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def started(*_: object) -> None:
    raise Started("everything was read")


def call(name: str, models: Path, folder: Path) -> tuple[list[str], dict[str, list[Any]]]:
    """The words of a stage's command with good files in `folder`, and their rows."""
    good = {
        file: [row | {"prompt": f"hello {i}"} if "prompt" in row else row for i in range(12)]
        for file, row in STAGES[name][0].items()
    }
    sections = cli.COMMANDS[name].sections
    words = [name, "--run", str(folder / "run"), "--tracking.mode", "offline"]
    for key in ("base", "sft") if name == "sft" else ("sft", "reward"):
        if "models" in sections:
            words += [f"--models.{key}", str(models / ("reward" if key == "reward" else "sft"))]
    words += [
        word
        for pair in zip(SMALL[::2], SMALL[1::2], strict=True)
        if pair[0][2:].split(".")[0] in sections
        for word in pair
    ]
    for file, rows in good.items():
        write(folder / f"{file}.jsonl", rows)
        words += [f"--data.{file}", str(folder / f"{file}.jsonl")]
    return words, good


@pytest.mark.parametrize("name", STAGES)
def test_every_bad_row_is_told_before_anything_begins(
    name: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(runner, "_pool", started)
    _, spoilt, bad = STAGES[name]
    words, good = call(name, models, tmp_path)
    path = tmp_path / f"{spoilt}.jsonl"
    write(path, [*good[spoilt][:10], bad[0], good[spoilt][10], {"id": "mine", **bad[1]}])
    assert cli.main([*words, "--dry-run"]) == 1
    said = capfd.readouterr().out
    assert f"{path}:11: " in said
    assert f"{path}:13: " in said
    assert cli.main(words) == 2
    told = capfd.readouterr().err
    assert f"{path}:11: " in told
    assert "'mine'" in next(line for line in told.splitlines() if f"{path}:13: " in line)
    assert {found.name for found in (tmp_path / "run").iterdir()} == {"logs"}, "no record, settings or W&B run began"
    for allowed, code in ((1, 2), (2, 1)):  # what cannot be encoded counts as what cannot be parsed
        assert cli.main([*words, "--data.max_bad_rows", str(allowed)]) == code
        assert ("everything was read" in capfd.readouterr().err) == (code == 1)
    write(path, good[spoilt])
    assert cli.main(words) == 1, "the corrected file is read, and the work begins"
    shown = capfd.readouterr()
    assert "everything was read" in shown.err
    assert ("12 of the 12 different rows of data.prompts_heldout" in shown.out) == (name == "ppo")


@pytest.mark.parametrize(
    ("name", "key", "folder", "said"),
    [
        ("sft", "models.base", "reward", "is not a language model: its config.json says LlamaForSequenceClassif"),
        ("reward", "models.sft", "reward", "is not a language model: its config.json says LlamaForSequenceClassif"),
        ("ppo", "models.init", "reward", "is not a language model: its config.json says LlamaForSequenceClassif"),
        ("ppo", "models.reward", "sft", "is not a reward model: its weights lack score.weight"),
        ("ppo", "models.critic", "raw", "is not normalised"),
        ("ppo", "scoring.parts", "sft", "is not a reward model: its weights lack score.weight"),
    ],
)
def test_a_model_that_would_be_used_as_another_is_told_with_the_bad_rows_before_anything_begins(
    name: str,
    key: str,
    folder: str,
    said: str,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Any,
):
    monkeypatch.setattr(runner, "_pool", started)
    words, good = call(name, models, tmp_path)
    wrong = shutil.copytree(models / ("reward" if folder == "raw" else folder), tmp_path / folder)
    if folder == "raw":
        fields = json.loads((wrong / "config.json").read_text())
        (wrong / "config.json").write_text(json.dumps({**fields, "rayward_normalisation": None}))
    words += [f"--{key}", f'[{{kind = "model", target = "{wrong}"}}]' if key == "scoring.parts" else str(wrong)]
    _, spoilt, bad = STAGES[name]
    write(tmp_path / f"{spoilt}.jsonl", [*good[spoilt], bad[0]])
    assert cli.main([*words, "--dry-run"]) == 1
    assert said in capfd.readouterr().out
    assert cli.main(words) == 2
    told = capfd.readouterr().err
    assert any(key in line and str(wrong) in line and said in line for line in told.splitlines())
    assert f"{spoilt}.jsonl:13: " in told
    assert {found.name for found in (tmp_path / "run").iterdir()} == {"logs"}


def test_a_model_with_code_of_its_own_starts_only_where_that_is_trusted(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(runner, "_pool", started)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    words, _ = call("sft", models, tmp_path)
    folder = bring_code(shutil.copytree(models / "sft", tmp_path / "mine"), tmp_path / "ran")
    words += ["--models.base", str(folder)]
    for asked, code in ((["--dry-run"], 1), ([], 2)):
        assert cli.main([*words, *asked]) == code
        assert "needs Python code of its own" in "".join(capfd.readouterr())
    assert not (tmp_path / "ran").exists()
    words += ["--models.trust_remote_code", "true"]
    assert cli.main([*words, "--dry-run"]) == 0
    assert (tmp_path / "ran").exists()
    assert cli.main(words) == 1
    assert "everything was read" in capfd.readouterr().err
