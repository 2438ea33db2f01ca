"""Supervised examples: which tokens are learnt."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from actors.chat import chat_example
from reward_server.encoding import ChatEncoding
from reward_server.schema import Message
from tests.fakes import ASSISTANT, EOS, USER, FakeEncoding
from tests.tiny_models import tiny_tokenizer

PROMPT = (Message(role="user", content="ab"),)


def test_the_response_and_its_eos_are_targets() -> None:
    example = chat_example(FakeEncoding(), PROMPT, "cd", max_tokens=20)
    assert example.ids == (USER, 4, 5, ASSISTANT, 6, 7, EOS)
    assert example.loss_mask == (False, False, False, False, True, True, True)


def test_with_the_prompt_learnt_all_but_the_first_token_are_targets() -> None:
    example = chat_example(FakeEncoding(), PROMPT, "cd", max_tokens=20, mask_prompt=False)
    assert example.loss_mask == (False, True, True, True, True, True, True)


def test_an_exact_fit_keeps_its_eos_and_a_longer_response_loses_it() -> None:
    assert chat_example(FakeEncoding(), PROMPT, "cd", max_tokens=7).ids[-1] == EOS
    cut = chat_example(FakeEncoding(), PROMPT, "cd", max_tokens=6)
    assert cut.ids == (USER, 4, 5, ASSISTANT, 6, 7)
    assert cut.loss_mask == (False, False, False, False, True, True)


def test_a_prompt_that_leaves_no_room_is_refused() -> None:
    assert len(chat_example(FakeEncoding(), PROMPT, "cd", max_tokens=5).ids) == 5
    with pytest.raises(ValueError, match="the prompt has 4 tokens, which leaves no room for a response in 4"):
        chat_example(FakeEncoding(), PROMPT, "cd", max_tokens=4)


def test_a_real_chat_template_is_masked_up_to_the_opening_of_the_reply() -> None:
    encoding = ChatEncoding(tiny_tokenizer())
    example = chat_example(encoding, PROMPT, "good", max_tokens=100)
    learnt = [i for i, target in zip(example.ids, example.loss_mask, strict=True) if target]
    assert learnt[-1] == encoding.eos_id
    assert encoding.tokenizer.decode(learnt) == "good<|im_end|>"
    assert encoding.tokenizer.decode(example.ids).endswith("<|im_start|>assistant\ngood<|im_end|>")


LETTERS = st.text("abcdef", max_size=12)


@given(st.lists(LETTERS, min_size=1, max_size=4), LETTERS, st.integers(1, 40), st.booleans())
def test_targets_are_the_tail_of_the_tokens_whatever_the_lengths(
    turns: list[str], response: str, max_tokens: int, mask_prompt: bool
) -> None:
    messages = [Message(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(turns)]
    messages = messages if len(turns) % 2 else messages[:-1] or messages
    encoding = FakeEncoding()
    query, reply = encoding.prompt(messages), encoding.response(response, ended=True)
    if len(query) >= max_tokens:
        with pytest.raises(ValueError, match="leaves no room"):
            chat_example(encoding, messages, response, max_tokens, mask_prompt)
        return
    example = chat_example(encoding, messages, response, max_tokens, mask_prompt)
    assert example.ids == tuple([*query, *reply][:max_tokens])
    assert len(example.loss_mask) == len(example.ids) <= max_tokens
    first = len(query) if mask_prompt else 1
    assert list(example.loss_mask) == [False] * first + [True] * (len(example.ids) - first)
    whole = len(query) + len(reply) <= max_tokens
    assert (example.ids[-1] == EOS and example.loss_mask[-1]) == whole  # a reply cut off has no EOS to learn


REAL = ChatEncoding(tiny_tokenizer())


@given(st.text(max_size=20), st.text(max_size=20), st.integers(40, 80), st.booleans())
def test_what_is_learnt_with_a_real_tokenizer_reads_as_the_response(
    question: str, response: str, max_tokens: int, mask_prompt: bool
) -> None:
    """In any script, even where the response spells a control token; but no token of the template's is learnt."""
    messages = [Message(role="user", content=question)]
    query, response = REAL.prompt(messages), f"{response}<|im_end|>"
    assume(len(query) < max_tokens)
    example = chat_example(REAL, messages, response, max_tokens, mask_prompt)
    reply = example.ids[len(query) :]
    learnt = [i for i, target in zip(example.ids, example.loss_mask, strict=True) if target]
    assert learnt == list(reply if mask_prompt else example.ids[1:])
    ended = len(query) + len(REAL.response(response, ended=True)) <= max_tokens
    assert reply.count(REAL.eos_id) == ended
    assert not ended or (reply[-1] == REAL.eos_id and REAL.text(reply) == response)
