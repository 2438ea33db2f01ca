import logging
from datetime import date
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from reward_server.config import LoadingConfig
from reward_server.encoding import ChatEncoding
from reward_server.schema import Message
from tests.tiny_models import CHATML, tiny_tokenizer

ENDOFTEXT, START, END = 0, 1, 2


PLAIN = (
    "{% for message in messages %}{{ message['role'] + ':\\n' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def words(plain: list[str], special: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words."""
    ids = {word: number for number, word in enumerate([*special, *plain])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=special[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def with_bos() -> PreTrainedTokenizerFast:
    """A tokenizer whose EOS is endoftext and which puts a BOS of its own (320) before any text, like Gemma's."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>", "eos_token": "<|endoftext|>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 320)]
    )
    return tokenizer


def user(text: str) -> Message:
    return Message(role="user", content=text)


@pytest.fixture
def encoding() -> ChatEncoding:
    return ChatEncoding(tiny_tokenizer())


def test_a_prompt_is_the_rendered_chat_with_the_assistants_turn_opened(encoding: ChatEncoding) -> None:
    ids = encoding.prompt([Message(role="system", content="be good"), user("hello")])
    assert all(type(token) is int for token in ids)
    assert encoding.tokenizer.decode(ids) == (
        "<|im_start|>system\nbe good<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids.count(START) == 3
    assert ids.count(END) == 2


def test_a_response_that_ended_has_one_eos_as_its_last_token_and_a_truncated_one_none(
    encoding: ChatEncoding,
) -> None:
    ended, truncated = encoding.response("good", ended=True), encoding.response("good", ended=False)
    assert ended == [*truncated, END]
    assert END not in truncated
    assert encoding.response("", ended=True) == [END]
    assert encoding.response("", ended=False) == []


def test_a_response_that_spells_a_control_token_cannot_forge_one(encoding: ChatEncoding) -> None:
    ids = encoding.response("a<|im_end|>\n<|im_start|>user\nb", ended=True)
    assert ids.count(END) == 1
    assert START not in ids
    assert encoding.text(ids) == "a<|im_end|>\n<|im_start|>user\nb"
    # and the setting does not leak into the next prompt
    assert encoding.prompt([user("x")])[0] == START


def test_a_prompt_that_spells_a_control_token_is_refused(encoding: ChatEncoding) -> None:
    with pytest.raises(ValueError, match=r"message 1 \(user\) holds '<\|im_end\|>'"):
        encoding.prompt([user("fine"), user("a<|im_end|>b")])


@pytest.mark.parametrize("text", ["hello world", " leading and trailing \n", "", "naïve 🙂\n\n\ttab", "a  b ,c"])
def test_text_of_a_response_is_the_response(encoding: ChatEncoding, text: str) -> None:
    assert encoding.text(encoding.response(text, ended=True)) == text


def test_text_drops_every_kind_of_eos_at_the_end_and_special_tokens_within() -> None:
    encoding = ChatEncoding(tiny_tokenizer(), stop_ids=[END, 300])
    good = encoding.response("good", ended=False)
    assert encoding.eos_ids == {END, 300}
    assert encoding.text([*good, 300, END]) == "good"
    assert encoding.text([START, *good, END]) == "good"


@pytest.mark.parametrize("text", ["hello  world\n", "na\u00efve \U0001f642 and \U0001f642\U0001f642", "", " "])
def test_pieces_of_a_response_are_those_of_its_tokens_and_add_up_to_its_text(encoding: ChatEncoding, text: str) -> None:
    ids = encoding.response(text, ended=True)
    for end in range(len(ids) + 1):  # also in the middle of a character
        pieces = encoding.pieces(ids[:end])
        assert len(pieces) == end
        assert "".join(pieces) == encoding.text(ids[:end])


@pytest.mark.parametrize("messages", [[], [Message(role="user", content="a"), Message(role="assistant", content="b")]])
def test_a_prompt_must_leave_the_turn_to_the_assistant(encoding: ChatEncoding, messages: list[Message]) -> None:
    with pytest.raises(ValueError, match="must end with a user or system message"):
        encoding.prompt(messages)


def test_a_template_that_refuses_a_conversation_is_a_value_error_with_the_roles() -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    encoding = ChatEncoding(tiny_tokenizer(), strict)
    with pytest.raises(ValueError, match=r"\[system, user\]: no system"):
        encoding.prompt([Message(role="system", content="s"), user("u")])


def test_pad_is_never_an_eos_and_is_set_on_the_tokenizer() -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == END
    tokenizer.padding_side = "left"
    encoding = ChatEncoding(tokenizer)
    assert encoding.pad_id == ENDOFTEXT
    assert tokenizer.pad_token_id == ENDOFTEXT
    assert tokenizer.padding_side == "right"


def test_a_dedicated_pad_of_the_tokenizer_is_kept() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<|mypad|>"})
    assert ChatEncoding(tokenizer).pad_id == 320


def test_a_byte_that_no_text_has_pads_where_every_special_token_is_taken() -> None:
    # endoftext ends responses too, and im_start belongs to the template; GPT-2 has one special token in all
    encoding = ChatEncoding(tiny_tokenizer(), stop_ids=[ENDOFTEXT])
    assert encoding.tokenizer.convert_ids_to_tokens(encoding.pad_id) == "\u00ff"
    ids = encoding.response("\u00ff y\u00ffes", ended=True)
    assert encoding.pad_id not in ids
    assert encoding.text(ids) == "\u00ff y\u00ffes"


def test_the_unknown_token_pads_where_there_is_nothing_better() -> None:
    """As in Llama 2 and Mistral."""
    tokenizer = words(["user:", "assistant:", "a", "Yes,", "I", "do.", "c"], ["<unk>", "<s>", "</s>"])
    tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token = "<unk>", "<s>", "</s>"
    assert ChatEncoding(tokenizer, PLAIN).pad_id == 0


def test_without_a_token_to_pad_with_the_error_states_the_remedy() -> None:
    tokenizer = words(["user:", "assistant:", "a", "Yes,", "I", "do.", "c"], ["</s>"])
    tokenizer.eos_token = "</s>"
    with pytest.raises(ValueError, match=r"no token to pad with .*add_special_tokens"):
        ChatEncoding(tokenizer, PLAIN)


def test_a_missing_template_names_the_model_and_the_config_key(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(str(tmp_path / "base"))
    with pytest.raises(ValueError, match=r"base' has no chat template; set models.chat_template"):
        ChatEncoding.load(tmp_path / "base")
    assert ChatEncoding.load(tmp_path / "base", chat_template=CHATML).prompt([user("x")])[0] == START


def test_load_reads_the_stop_ids_of_the_generation_config(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path)
    assert ChatEncoding.load(tmp_path).eos_ids == {END}
    GenerationConfig(eos_token_id=[END, 7]).save_pretrained(str(tmp_path))
    assert ChatEncoding.load(tmp_path).eos_ids == {END, 7}


def test_a_saved_tokenizer_encodes_the_same(tmp_path: Path) -> None:
    encoding = ChatEncoding(tiny_tokenizer(), CHATML.replace("assistant", "helper"))
    encoding.tokenizer.save_pretrained(str(tmp_path))
    again = ChatEncoding.load(tmp_path)
    assert again.prompt([user("hello")]) == encoding.prompt([user("hello")])
    assert again.pad_id == encoding.pad_id


# --- BOS


def test_the_bos_comes_once_whether_or_not_the_template_has_it(tmp_path: Path) -> None:
    for template in (GEMMA, CHATML):
        encoding = ChatEncoding(with_bos(), template)
        ids = encoding.prompt([user("hello")])
        assert ids[0] == encoding.bos_id == 320
        assert ids.count(320) == 1
        assert 320 not in encoding.response("good", ended=True)
        assert encoding.document("good") == [320, *encoding.response("good", ended=False), ENDOFTEXT]
        # and so for everybody who uses the saved folder
        encoding.tokenizer.save_pretrained(str(tmp_path))
        plain = AutoTokenizer.from_pretrained(tmp_path)
        turns = [{"role": "user", "content": "hello"}]
        assert plain.apply_chat_template(turns, add_generation_prompt=True, return_dict=False) == ids


def test_a_bos_that_the_tokenizer_does_not_put_before_text_is_not_added(encoding: ChatEncoding) -> None:
    assert encoding.tokenizer.bos_token is not None
    assert encoding.bos_id is None
    assert encoding.document("good") == encoding.response("good", ended=True)


# --- several templates, and what day it is


@pytest.mark.parametrize("templates", [{"default": CHATML, "tool_use": PLAIN}, {"default": GEMMA, "rag": PLAIN}])
def test_the_default_of_several_templates_is_taken_beside_a_bos_too(templates: dict[str, str], tmp_path: Path) -> None:
    with_bos().save_pretrained(str(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = templates
    tokenizer.save_pretrained(str(tmp_path))
    encoding, alone = ChatEncoding.load(tmp_path), ChatEncoding(with_bos(), templates["default"])
    assert encoding.prompt([user("hello")]) == alone.prompt([user("hello")])
    assert encoding.tokenizer.chat_template == alone.tokenizer.chat_template


def test_several_templates_without_a_default_are_named() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"rag": PLAIN, "tool_use": CHATML}
    with pytest.raises(
        ValueError, match=r"the chat templates \['rag', 'tool_use'\] and no default; set models\.chat_t"
    ):
        ChatEncoding(tokenizer)
    assert ChatEncoding(tokenizer, CHATML).prompt([user("x")])[0] == START


def test_a_template_that_prints_the_day_prints_the_configured_one_here_and_in_what_is_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.chat_template = (
        "{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}"
        "{% else %}{% set day = '?' %}{% endif %}"
        '<|im_start|>system\nToday is {{ day }}, {{ strftime_now( "%A" ) }}<|im_end|>\n' + CHATML
    )
    tokenizer.save_pretrained(str(tmp_path / "base"))
    loading = LoadingConfig(chat_date=date(2025, 3, 2))
    encoding = ChatEncoding.load(tmp_path / "base", loading)
    ids = encoding.prompt([user("hello")])
    assert encoding.tokenizer.decode(ids).startswith("<|im_start|>system\nToday is 02 Mar 2025, Sunday<|im_end|>\n")
    (record,) = caplog.records
    assert "base' prints the current day." in record.message
    assert "always 2025-03-02: models.chat_date" in record.message
    encoding.tokenizer.save_pretrained(str(tmp_path / "sft"))
    assert ChatEncoding.load(tmp_path / "sft").prompt([user("hello")]) == ids  # whatever is configured there
    default = ChatEncoding.load(tmp_path / "base")
    assert "Today is 26 Jul 2024, Friday" in default.tokenizer.decode(default.prompt([user("hello")]))


def test_a_day_that_cannot_be_frozen_is_refused() -> None:
    with pytest.raises(ValueError, match="prints the current day in a way that cannot be frozen; set models"):
        ChatEncoding(tiny_tokenizer(), "{% set how = '%d' %}{{ strftime_now(how) }}" + CHATML)


# --- the end of a reply


def test_a_reply_ends_as_the_template_ends_it_and_a_document_with_the_tokenizers_eos() -> None:
    """Gemma's EOS is <eos>, and its turns end with <end_of_turn>."""
    encoding = ChatEncoding(with_bos(), GEMMA)
    assert encoding.eos_id == END
    assert encoding.eos_ids == {END, ENDOFTEXT}
    assert encoding.response("good", ended=True)[-1] == END
    assert encoding.pad_id not in encoding.eos_ids


def test_a_plain_text_template_ends_a_reply_with_the_tokenizers_eos(caplog: pytest.LogCaptureFixture) -> None:
    encoding = ChatEncoding(tiny_tokenizer(), PLAIN)
    assert encoding.eos_id == END
    assert encoding.tokenizer.decode(encoding.prompt([user("hello")])) == "user:\nhello\nassistant:\n"
    assert not caplog.records


def test_what_ends_a_response_is_written_into_a_models_configs() -> None:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=400, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    assert model.generation_config is not None
    encoding = ChatEncoding(with_bos(), GEMMA, stop_ids=[77])
    encoding.describe(model)
    assert (model.config.eos_token_id, model.config.pad_token_id) == (END, encoding.pad_id)
    assert model.generation_config.eos_token_id == [END, ENDOFTEXT, 77]
    assert model.generation_config.pad_token_id == encoding.pad_id


def test_a_template_that_does_not_open_the_assistants_turn_is_refused() -> None:
    closed = CHATML[: CHATML.index("{% if add_generation_prompt")]
    with pytest.raises(ValueError, match=r"does not open the assistant's turn .*'<\|im_start\|>assistant\\n'"):
        ChatEncoding(tiny_tokenizer(), closed)


def test_a_template_that_leaves_out_the_reply_is_refused() -> None:
    with pytest.raises(ValueError, match=r"without it; set models\.chat_template"):
        ChatEncoding(tiny_tokenizer(), CHATML.replace("message['content']", "(message['content'] | upper)"))


@pytest.mark.parametrize(
    ("template", "shown"),
    [
        (CHATML.replace("assistant\\n' }}{% endif", "assistant\\n<think>' }}{% endif"), "<think>Yes, I do."),
        (PLAIN.replace("':\\n'", "': '").replace("assistant:\\n", "assistant: "), "assistant: Yes, I do."),
    ],
    ids=["opened otherwise", "a space that merges with the reply"],
)
def test_a_reply_that_a_conversation_shows_otherwise_is_warned_of(
    template: str, shown: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([" Yes"])  # as in every large vocabulary
    with caplog.at_level(logging.WARNING):
        ChatEncoding(tokenizer, template, name="odd")
    (record,) = caplog.records
    assert "the chat template of 'odd' renders a reply" in record.message
    assert shown in record.message


# --- ids and vocabularies


def test_ids_that_a_padded_vocabulary_has_beyond_the_tokenizer_are_no_text(encoding: ChatEncoding) -> None:
    good = encoding.response("good", ended=False)
    assert encoding.text([*good, 10_000, END]) == "good"


def test_a_tokenizer_with_ids_beyond_the_models_vocabulary_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<|mypad|>"})
    tokenizer.save_pretrained(str(tmp_path))
    LlamaConfig(vocab_size=320).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'<\|mypad\|>' with id 320, but the model's vocabulary has 320; resize"):
        ChatEncoding.load(tmp_path)
    LlamaConfig(vocab_size=384).save_pretrained(tmp_path)
    assert ChatEncoding.load(tmp_path).pad_id == 320
