"""Models and data files that are not what a command wants: each is told with its key, its place and the remedy."""

import json
import re
import time
from pathlib import Path

import pytest

from cluster.config.schema import Config
from cluster.rundir.inputs import Model, check_base, check_data, common_prompts, data_file
from cluster.rundir.inputs import model_folder as find_model
from tests.model_folders import model_folder


def rows(path: Path, *values: object) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def model(path: Path) -> Model:
    return Model(name="sft", path=path)


def test_small_files_tell_positions_vocabulary_and_size(tmp_path: Path) -> None:
    found = model(model_folder(tmp_path / "m", positions=128, vocabulary=7, parameters=12))
    found.check()
    assert (found.positions, found.vocabulary, found.tokens, found.parameters) == (128, 7, 3, 12)


def test_gpt2_and_models_of_more_than_text_say_it_elsewhere(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_positions": 1024, "vocab_size": 9}))
    assert model(folder).positions == 1024
    text = {"max_position_embeddings": 99, "vocab_size": 5}
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    assert (model(folder).positions, model(folder).vocabulary) == (99, 5)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda m: (m / "config.json").unlink(), "has no config.json, so it is not a model's folder"),
        (lambda m: (m / "config.json").rename(m / "adapter_config.json"), r"holds an adapter.*merge it into its base"),
        (lambda m: (m / "config.json").write_text("{"), r"config\.json cannot be read as JSON \(.*line 1"),
        (lambda m: (m / "config.json").write_text("[]"), r"config\.json holds no JSON object"),
        (lambda m: (m / "config.json").write_text("{}"), "has a config.json without model_type"),
        (lambda m: (m / "tokenizer.json").unlink(), r"has no tokenizer \(tokenizer\.json\): save it there too"),
        (lambda m: (m / "model.safetensors").unlink(), r"has no weights \(model\.safetensors\)"),
        (
            lambda m: (m / "model.safetensors.index.json").write_text(
                '{"weight_map": {"w": "model-1-of-2.safetensors"}}'
            ),
            r"lacks 1 of its files, first model-1-of-2\.safetensors: copy all",
        ),
        (
            lambda m: (m / "tokenizer.json").write_text('{"added_tokens": [{"content": "<pad>", "id": 4}]}'),
            "has a tokenizer with ids up to 4, and the model's vocabulary ends at 3: give the tokenizer that",
        ),
    ],
)
def test_a_folder_that_is_no_whole_model_says_what_it_lacks(tmp_path: Path, spoil, said: str) -> None:
    folder = model_folder(tmp_path / "m")
    spoil(folder)
    with pytest.raises(ValueError, match=said) as caught:
        model(folder).check()
    assert str(folder) in str(caught.value)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"models\.sft = .*/m is a file, and a model is a folder"):
        model(rows(tmp_path / "m", {})).check()


def test_weights_that_are_cut_off_or_damaged_are_told_without_loading_them(tmp_path: Path) -> None:
    file = model_folder(tmp_path / "m") / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=rf"model\.safetensors is cut off: it should have {len(whole)} bytes"):
        _ = model(tmp_path / "m").parameters
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: its header cannot be read"):
        _ = model(tmp_path / "m").parameters


def test_a_hub_that_cannot_be_reached_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left to itself, the client of the hub tried for 47 seconds, and said nothing of models.base."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    for variable in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"models\.base = some/model is not in the local cache, and the hub at http"):
        check_base("some/model")
    assert time.monotonic() - start < 3
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"HF_HUB_OFFLINE is set\. Give models.base a Hugging Face folder"):
        check_base("some/model")
    model_folder(tmp_path / "hub" / "models--some--model" / "snapshots" / "0123")
    check_base("some/model")


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "a/b/c", "nowhere"])
def test_a_base_that_can_only_be_a_folder_is_not_asked_of_the_hub(name: str) -> None:
    with pytest.raises(ValueError, match=rf"models\.base = {re.escape(name)}: there is no such folder"):
        check_base(name)


PROMPT, TEXT = {"prompt": "hello"}, {"text": "hello"}
DEMONSTRATION = {"prompt": "hello", "response": "hi"}
PAIR, RANKED = {"chosen": "a", "rejected": "b"}, {"prompt": "hello", "completions": []}


@pytest.mark.parametrize(
    ("name", "row", "kind", "wanted"),
    [
        ("demonstrations", PROMPT, "prompts", "demonstrations"),
        ("demonstrations", PAIR, "comparisons", "demonstrations"),
        ("demonstrations_valid", TEXT, "pretraining text", "demonstrations"),
        ("comparisons", DEMONSTRATION, "demonstrations", "comparisons"),
        ("completions", PROMPT, "prompts", "comparisons"),
        ("pretraining", DEMONSTRATION, "demonstrations", "pretraining text"),
        ("prompts", TEXT, "pretraining text", "prompts"),
    ],
)
def test_a_file_of_another_kind_is_told_by_its_first_row(
    tmp_path: Path, name: str, row: object, kind: str, wanted: str
) -> None:
    path = rows(tmp_path / "d.jsonl", row)
    said = rf"^data\.{name}: .*d\.jsonl:1 looks like a row of {kind} \(its keys are .*and {wanted} are wanted: \{{\""
    with pytest.raises(ValueError, match=said):
        check_data(name, path)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("demonstrations", DEMONSTRATION),
        ("prompts", PROMPT),
        ("prompts", DEMONSTRATION),
        ("comparisons", PAIR),
        ("completions", RANKED),
        ("pretraining", TEXT),
        ("demonstrations", {"strange": 1}),  # left to the reader, who knows how many bad rows may be skipped
    ],
)
def test_a_file_of_the_right_kind_passes(tmp_path: Path, name: str, row: object) -> None:
    check_data(name, rows(tmp_path / "d.jsonl", row))


def test_files_of_which_nothing_can_be_read_are_named_with_their_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^data\.prompts: .*/none\.jsonl: there is no such file"):
        check_data("prompts", tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"^data\.prompts: .*the file is empty"):
        check_data("prompts", rows(tmp_path / "empty.jsonl"))
    (tmp_path / "bad.jsonl").write_text("nonsense\n" + json.dumps(PROMPT) + "\n")
    check_data("prompts", tmp_path / "bad.jsonl")  # data.max_bad_rows may allow it


def test_what_is_configured_comes_before_the_runs_own(tmp_path: Path) -> None:
    own = model_folder(tmp_path / "run" / "sft")
    other = model_folder(tmp_path / "other")
    assert find_model(Config(), tmp_path / "run", "sft") == own
    config = Config.model_validate({"models": {"sft": other}, "data": {"prompts": tmp_path / "p.jsonl"}})
    assert find_model(config, tmp_path / "run", "sft") == other
    assert data_file(config, tmp_path / "run", "prompts") == tmp_path / "p.jsonl"
    with pytest.raises(ValueError, match=r"data\.prompts_heldout is not set and .*/run/data/prompts_heldout\.jsonl"):
        data_file(config, tmp_path / "run", "prompts_heldout")


def test_what_is_trained_on_and_held_out_is_told_of_every_pair_of_files(tmp_path: Path) -> None:
    asked = [{"prompt": f"hello {i}"} for i in range(4)]
    talk = [{"role": "user", "content": "hello 1 "}]
    files = {
        "demonstrations": rows(tmp_path / "d.jsonl", asked[0] | {"response": "a"}, {"b": 1}),
        "comparisons": rows(tmp_path / "c.jsonl", {"prompt": talk, "completions": []}),
        "prompts": rows(tmp_path / "p.jsonl", asked[2], asked[3]),
        "prompts_heldout": rows(tmp_path / "h.jsonl", *asked[:3]),
        "prompts_valid": rows(tmp_path / "v.jsonl", {"prompt": "another"}),
        "pretraining": rows(tmp_path / "t.jsonl", TEXT, {"text": "bye"}),
        "pretraining_valid": rows(tmp_path / "tv.jsonl", TEXT),
    }
    told = list(common_prompts(files, files))
    pairs = ["demonstrations", "comparisons", "prompts", "pretraining"]
    assert [re.findall(r"also in data\.(\w+)", line) for line in told] == [[name] for name in pairs]
    assert all(line.startswith("1 of the ") for line in told)
    assert list(common_prompts(files, ["prompts"])) == [told[2]]
