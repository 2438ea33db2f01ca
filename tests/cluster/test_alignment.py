"""What PPO reads before anything heavy starts."""

import json
from pathlib import Path

import pytest

from cluster.alignment import Alignment
from cluster.config import Config, TrackingConfig
from cluster.steps import Job
from cluster.tracking import Tracker
from tests.tiny_models import tiny_tokenizer


def job(folder: Path, coef: float) -> Job:
    """A run with every file of PPO but the pretraining text."""
    tiny_tokenizer(folder / "sft")
    (folder / "sft" / "config.json").write_text("{}")
    rows = {
        "prompts": {"prompt": "hello"},
        "prompts_heldout": {"prompt": "hi"},
        "pretraining_valid": {"text": "a b " * 40},
    }
    for name, row in rows.items():
        path = folder / "data" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(row) + "\n")
    config = Config.model_validate({"ppo": {"pretraining": {"coef": coef, "sequence_tokens": 16}}})
    return Job(config=config, run_dir=folder, tracker=Tracker(folder, TrackingConfig(mode="disabled"), "test"))


def test_without_the_mix_its_text_is_not_even_looked_for(tmp_path: Path):
    assert Alignment(job(tmp_path, coef=0.0)).text is None


def test_with_the_mix_its_text_has_to_be_there(tmp_path: Path):
    with pytest.raises(ValueError, match=r"data\.pretraining is not set"):
        Alignment(job(tmp_path, coef=27.8))
