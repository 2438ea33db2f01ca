"""Lengths are counted where there is something to count, and the plan says which were taken."""

from pathlib import Path

from cluster.config.schema import Config
from cluster.plan.counts import Lengths
from cluster.plan.lengths import lengths_of
from cluster.plan.remedies import changed
from reward_server.encoding import ChatEncoding
from reward_server.schema import Message
from tests.tiny_models import tiny_causal_lm


def write(path: Path, *rows: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(rows) + "\n")


def test_without_files_the_settings_count():
    config = changed(Config(), {"rollout.max_prompt_tokens": 50, "rollout.max_new_tokens": 30})
    assert lengths_of(config, Path("nowhere")) == Lengths(
        prompt=50, response=30, longest=30, source="the longest prompts allowed and the longest responses allowed"
    )
    stated = lengths_of(changed(config, {"plan.prompt_tokens": 7, "plan.response_tokens": 5}), Path("nowhere"))
    assert (stated.prompt, stated.response, stated.longest) == (7, 5, 30)
    assert stated.source == "plan.prompt_tokens and plan.response_tokens"
    assert stated.sequence == 12


def test_files_and_the_models_tokenizer_come_first(tmp_path: Path):
    tiny_causal_lm(tmp_path / "sft")
    encoding = ChatEncoding.load(tmp_path / "sft")
    short, long = "Hi there", "a much longer prompt that nobody will ever sample from, since it is left out of the run"
    write(tmp_path / "data" / "prompts.jsonl", f'{{"prompt": "{short}"}}', f'{{"prompt": "{long}"}}')
    write(tmp_path / "data" / "demonstrations.jsonl", '{"prompt": "Hi", "response": "yes"}')
    length = len(encoding.prompt([Message(role="user", content=short)]))
    config = changed(Config(), {"plan.prompt_tokens": 7, "rollout.max_prompt_tokens": length + 1})
    found = lengths_of(config, tmp_path)
    assert found.prompt == length
    assert found.response == len(encoding.response("yes", ended=True))
    assert found.source == "prompts of prompts.jsonl and responses of demonstrations.jsonl"
    row = '{"id": "c", "prompt": "Hi", "completions": [{"text": "no, not at all", "ended": false}], "ranks": [0]}'
    write(tmp_path / "data" / "completions.jsonl", row)
    sampled = lengths_of(changed(config, {"rollout.max_new_tokens": 3}), tmp_path)
    assert sampled.source.endswith("responses of completions.jsonl")
    assert sampled.response == 3  # where sampling would have cut it


def test_a_file_that_cannot_be_read_counts_as_none(tmp_path: Path):
    tiny_causal_lm(tmp_path / "sft")
    write(tmp_path / "data" / "prompts.jsonl", "not JSON")
    assert lengths_of(Config(), tmp_path).source.startswith("the longest prompts allowed")
