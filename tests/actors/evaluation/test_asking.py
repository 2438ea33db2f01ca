"""Requests become token ids, go through generators in any order, and items lose nothing when a generator does."""

import asyncio
from dataclasses import dataclass, field

import pytest
import torch

from actors.config import RolloutConfig
from actors.evaluation.asking import ask, encode
from actors.evaluation.task import Generation, Likelihood, Logprob, Metric, Reply, Task
from actors.sampling import GeneratorFailed, PromptFailed
from reward_server.encoding import ChatEncoding
from reward_server.schema import Message
from tests.fakes import ASSISTANT, EOS, USER, FakeEncoding, FakeFleet, FakeGenerator
from tests.hf_generator import HfGenerator
from tests.tiny_models import tiny_causal_lm


class Plain(FakeEncoding):
    """Letters, of a model without a BOS."""

    document_end = EOS

    def plain(self, text):
        return self.response(text, ended=False)

    def _letters(self, text):
        return super()._letters(text.replace(" ", "z"))


class WithBos(Plain):
    """The same with a BOS."""

    def plain(self, text):
        return [99, *super().plain(text)]


@dataclass
class Reader(FakeGenerator):
    """Says that every token has the log-prob -(its id), and notes what it was asked."""

    asked: list[list[list[int]]] = field(default_factory=list)

    async def logprobs(self, sequences):
        self.asked.append([list(ids) for ids in sequences])
        await asyncio.sleep(0)
        if error := self.fault(sequences):
            raise error
        return [[-float(token) for token in ids[1:]] for ids in sequences]


@dataclass(frozen=True)
class Word:
    """An item."""

    id: str


class Spelling(Task):
    """Asks how likely a word is after "ab", and for a text."""

    name, claim = "spelling", "none"

    @property
    def metrics(self):
        return {"logprob": Metric()}

    @classmethod
    def read(cls, path, max_bad_rows=0):
        return []

    def requests(self, item):
        return [
            Generation(prompt="ab", max_tokens=5, stop="c"),
            Likelihood(context="ab", continuation=item.id),
            Generation(prompt="ab", max_tokens=5, stop=None, sample=1),
        ]

    async def judge(self, item, answers):
        _, likelihood, _ = answers
        assert isinstance(likelihood, Logprob)
        return {"logprob": (likelihood.total, likelihood.tokens)}


def asked_of(fleet, words, **settings):
    found = {}
    config = RolloutConfig(prompts_per_wave=2, max_attempts=3)
    items = [(Spelling([]), Word(word)) for word in words]

    async def run():
        took = lambda one: found.update({one.item.id: one})  # noqa: E731
        await ask(fleet, Plain(), items, config, took, chat=False, seed=7, **settings)

    asyncio.run(run())
    return found


def test_a_continuation_is_told_from_its_context():
    one = encode(Likelihood(context="ab", continuation="cd"), Plain(), chat=False)
    assert (one.ids, one.given) == ([4, 5, 6, 7], 2)
    assert encode(Likelihood(context="ab", continuation="cd"), WithBos(), chat=False).given == 3


def test_spaces_before_a_continuation_are_its_own():
    space = 29
    for context, continuation in (("ab ", "cd"), ("ab", " cd")):
        one = encode(Likelihood(context=context, continuation=continuation), Plain(), chat=False)
        assert (one.ids, one.given) == ([4, 5, space, 6, 7], 2)


def test_the_beginning_of_a_text_follows_something():
    assert encode(Likelihood(context="", continuation="ab"), Plain(), chat=False).ids == [EOS, 4, 5]
    one = encode(Likelihood(context="", continuation="ab"), WithBos(), chat=True)
    assert (one.ids, one.given) == ([99, 4, 5], 1)


def test_a_chat_asks_as_a_user():
    one = encode(Likelihood(context="ab", continuation=" cd"), Plain(), chat=True)
    assert (one.ids, one.given) == ([USER, 4, 5, ASSISTANT, 6, 7], 4)
    assert encode(Generation(prompt="ab", max_tokens=3), Plain(), chat=True).ids == [USER, 4, 5, ASSISTANT]
    message = (Message(role="user", content="ab"),)
    assert encode(Generation(prompt=message, max_tokens=3), Plain(), chat=False).ids == [USER, 4, 5, ASSISTANT]


def test_nothing_to_be_likely_is_refused():
    with pytest.raises(ValueError, match="without text"):
        encode(Likelihood(context="ab", continuation=" "), Plain(), chat=False)


def test_a_verdict_is_of_the_continuation_alone_and_an_answer_ends_at_its_stop():
    found = asked_of(FakeFleet(Reader()), ["c", "de"])
    assert {name: one.verdict["logprob"] for name, one in found.items()} == {"c": (-6.0, 1), "de": (-15.0, 2)}
    for one in found.values():
        cut, _, whole = one.answers
        assert "c" not in cut
        assert isinstance(whole, str)


def test_answers_depend_on_neither_order_nor_batch_nor_generator():
    words = [chr(ord("a") + n) for n in range(9)]
    one = asked_of(FakeFleet(Reader()), words)
    other = asked_of(FakeFleet(Reader(), Reader(turns=lambda: 3)), words[::-1])
    assert {name: one[name].answers for name in words} == {name: other[name].answers for name in words}
    assert len({answers.answers[0] for answers in one.values()}) > 1, "each item has seeds of its own"


class Sayings(Task):
    """Asks how likely two continuations are."""

    name, claim = "sayings", "none"
    asked = (
        Likelihood(context="the quick brown", continuation=" fox jumps"),
        Likelihood(context="", continuation="hello world"),
    )

    @classmethod
    def read(cls, path, max_bad_rows=0):
        return []

    @property
    def metrics(self):
        return {}

    def requests(self, item):
        return self.asked

    async def judge(self, item, answers):
        return {}


@pytest.mark.parametrize("chat", [False, True])
def test_likelihoods_are_those_of_transformers_on_the_same_tokens(tmp_path, chat):
    tiny_causal_lm(tmp_path)
    encoding, generator, found = ChatEncoding.load(tmp_path), HfGenerator(tmp_path), []

    async def run():
        items = [(Sayings([]), Word("one"))]
        await ask(FakeFleet(generator), encoding, items, RolloutConfig(), found.append, chat=chat, seed=0)

    asyncio.run(run())
    (one,) = found
    for request, answer in zip(Sayings.asked, one.answers, strict=True):
        encoded = encode(request, encoding, chat)
        labels = torch.tensor([[-100] * encoded.given + encoded.ids[encoded.given :]])
        with torch.no_grad():
            loss = generator.model(torch.tensor([encoded.ids]), labels=labels).loss  # the mean over what is labelled
        assert answer.tokens == (labels >= 0).sum() > 1
        assert answer.total == pytest.approx(-float(loss) * answer.tokens, rel=1e-5)


def test_what_a_lost_generator_owed_is_asked_of_another():
    calls = []

    def fault(_):
        calls.append(1)
        return GeneratorFailed("gone") if len(calls) > 3 else None

    words = list("abcdefgh")
    found = asked_of(FakeFleet(Reader(fault=fault), spares=[Reader()]), words)
    assert sorted(found) == words


def test_an_item_that_nobody_can_answer_is_named():
    broken = Reader(fault=lambda sequences: RuntimeError("no") if [4, 5, 7] in [list(s) for s in sequences] else None)
    with pytest.raises(PromptFailed, match="spelling/d could not be sampled in 3 attempts"):
        asked_of(FakeFleet(broken, spares=[broken] * 9), list("abcdef"))


class Talking(Spelling):
    """Asks for a reply to a conversation."""

    def requests(self, item):
        asked = (Message(role="user", content=item.id),)
        return [Generation(prompt=asked, max_tokens=room, stop=None) for room in (9, 1)]

    async def judge(self, item, answers):
        return {}


def test_a_conversation_s_answer_is_a_reply_that_ended_or_was_cut():
    found = []

    async def run():
        fleet, items = FakeFleet(Reader()), [(Talking([]), Word(letter)) for letter in "abcdef"]
        await ask(fleet, Plain(), items, RolloutConfig(), found.append, chat=False, seed=7)

    asyncio.run(run())
    whole, cut = zip(*(one.answers for one in found), strict=True)
    assert all(isinstance(one, Reply) and one.ended and len(one.text) <= 5 for one in whole)
    assert {one.ended for one in cut} <= {True, False}
    assert all(one.ended == (one.text == "") for one in cut), "the one token was a letter, or the end"
    assert any(not one.ended for one in cut)
