"""Who compares replies, what each makes of pairs, and whom PPO was trained to please."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertForSequenceClassification

from actors.evaluation.task import Reply
from actors.prompts import Prompt
from cluster.pipeline.evaluation.comparison import compared
from cluster.pipeline.evaluation.judges import (
    Pair,
    Preference,
    attending,
    chat_model,
    judged_file,
    read_judges,
    ready,
)
from reward_server import client as client_module
from reward_server.preferences.judges import JudgeUnavailable
from reward_server.preferences.records import RecordError
from reward_server.schema import Message
from tests.chat_server import serving
from tests.fakes import FakeScorer
from tests.stage_runs import make_job
from tests.tiny_models import tiny_reward_model, tiny_tokenizer

PROMPTS = [
    Prompt(id=f"p{n}", messages=(Message(role="user", content=f"question {n}"),), reference=None) for n in range(9)
]


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(client_module, "_FIRST_DELAY_S", 0.01)
    monkeypatch.delenv("RAYWARD_JUDGE_TOKEN", raising=False)


@pytest.fixture
def job(tmp_path):
    def make(*judges, **sections):
        sections = {"scoring": {"retry_s": 0.3}} | sections
        return make_job(tmp_path / "run", evaluation={"judges": [str(one) for one in judges]}, **sections)

    return make


def pairs(*texts: tuple[str, str], models: tuple[str, str] = ("sft", "policy")) -> list[Pair]:
    return [
        Pair(prompt=prompt, models=models, replies=(Reply(text=one, ended=True), Reply(text=other, ended=True)))
        for prompt, (one, other) in zip(PROMPTS, texts, strict=False)
    ]


def preferred(job, some: list[Pair], processes: Any = None) -> list[Preference | None]:
    async def run():
        (judge,) = read_judges(job)
        ready([judge], job, PROMPTS, {"sft": job.run_dir / "sft", "policy": job.run_dir / "policy"})
        async with attending([judge]):
            return await judge.prefer(job, processes, some)

    return asyncio.run(run())


def won(found: list[Preference | None]) -> list[float | None]:
    return [None if one is None else one.won for one in found]


# --- labelers and reward models


def test_the_labeler_s_verdicts_are_compared_and_close_ones_are_a_tie(job):
    some = pairs(("good", "bad"), ("bad", "good"), ("good", "good"))
    assert won(preferred(job("labeler"), some)) == [0.0, 1.0, 0.5]
    assert won(preferred(job("labeler", labeler={"tie_margin": 2.0}), some)) == [0.5, 0.5, 0.5]
    assert [judge.name for judge in read_judges(job("labeler"))] == ["simulated labeler (VADER)"]


class Processes:
    """A reward service that scores with the number of letters."""

    def __init__(self):
        self.scorer, self.served = FakeScorer(), []

    async def rewards(self, model, scoring=None):
        self.served.append((model, scoring))
        return self.scorer


def test_a_reward_model_scores_each_reply_once_and_whatever_its_normalisation(job, tmp_path):
    model = tiny_reward_model(tmp_path / "gold")
    model.config.rayward_normalisation = None
    model.save_pretrained(tmp_path / "gold")
    processes, some = Processes(), pairs(("ab", "abc"), ("abc", "a"), ("abc", "xyz"), ("same", "same"))
    assert won(preferred(job(tmp_path / "gold"), some, processes)) == [1.0, 0.0, 0.5, 0.5]
    ((model, scoring),) = processes.served
    (part,) = scoring.parts
    assert (model, part.kind, part.target, part.raw) == (None, "model", str(tmp_path / "gold"), True)
    assert sorted(request.response for request in processes.scorer.batches[0]) == sorted(
        ["ab", "abc", "abc", "a", "abc", "xyz", "same"]
    )


def encoder(folder: Path, labels: int) -> None:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "initializer_range": 1.0}
    sizes |= {"vocab_size": len(tiny_tokenizer(folder)), "max_position_embeddings": 64, "num_labels": labels}
    BertForSequenceClassification(BertConfig(**sizes)).save_pretrained(folder)


def test_an_encoder_reads_prompt_and_reply_as_a_pair_and_says_nothing_of_what_it_cannot_read_whole(job, tmp_path):
    encoder(tmp_path / "gold", labels=1)
    tokenizer = tiny_tokenizer()
    model = BertForSequenceClassification.from_pretrained(tmp_path / "gold").eval()
    some = pairs(("hello", "a fox"), ("a fox", "hello"), ("same", "same"), ("word " * 80, "a fox"))

    def score(prompt: Prompt, reply: str) -> float:
        return model(**tokenizer(prompt.messages[0].content, reply, return_tensors="pt")).logits.item()

    gaps = [score(pair.prompt, pair.replies[1].text) - score(pair.prompt, pair.replies[0].text) for pair in some[:2]]
    found = preferred(job(tmp_path / "gold"), some)
    assert won(found) == [*(float(gap > 0) for gap in gaps), 0.5, None]
    told = compared(some, found)
    assert told
    assert (told.win_rate.ties, told.unparsed) == (1, 1)
    encoder(tmp_path / "gold", labels=2)
    with pytest.raises(ValueError, match=r"gold is no reward model \(.*has 2 labels, and a score is one number"):
        read_judges(job(tmp_path / "gold"))


@pytest.mark.parametrize("where", ["run", "models.reward", "scoring.parts", "another run"])
def test_the_reward_model_of_ppo_is_no_judge_of_it(job, tmp_path, where):
    made = {"run": tmp_path / "run" / "reward", "another run": tmp_path / "other" / "reward"}
    own = made.get(where, tmp_path / "reward")
    own.parent.mkdir(exist_ok=True)
    tiny_reward_model(own)
    shutil.copytree(own, tmp_path / "gold")
    config = tmp_path / "gold" / "config.json"
    config.write_text(config.read_text() + "\n")  # the same weights under another name
    sections = {
        "models.reward": {"models": {"reward": str(own)}},
        "scoring.parts": {"scoring": {"parts": [{"kind": "model", "target": str(own)}]}},
    }
    one = job(tmp_path / "gold", **sections.get(where, {}))
    models = {"sft": one.run_dir / "sft", "policy": tmp_path / "other" / "policy"}
    with pytest.raises(ValueError, match=r"gold has the weights of .*reward .*which PPO was trained on"):
        ready(read_judges(one), one, PROMPTS, models)
    tiny_reward_model(tmp_path / "held-out", seed=1)
    one = job(tmp_path / "held-out", **sections.get(where, {}))
    ready(read_judges(one), one, PROMPTS, models)


def test_the_reward_model_that_another_run_was_configured_with_is_no_judge_either(job, tmp_path):
    tiny_reward_model(tmp_path / "reward")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.toml").write_text(f'[models]\nreward = "{tmp_path / "reward"}"\n')
    one = job(tmp_path / "reward")
    with pytest.raises(ValueError, match=r"the run of policy\), which PPO was trained on"):
        ready(read_judges(one), one, PROMPTS, {"policy": tmp_path / "other" / "policy"})


# --- chat models


def first_and_second(question: str) -> tuple[str, str]:
    first, second = (question.partition(f"<reply {letter}>\n")[2].partition("\n</reply")[0] for letter in "AB")
    return first, second


def test_one_that_always_prefers_what_stands_first_is_all_bias_and_no_preference(job):
    some = pairs(("one", "another"), ("two", "others"), ("three", "more"), ("same", "same"))
    with serving(lambda question: "[[A]]") as server:
        found = preferred(job(f"{server.url}#judge"), some)
    assert won(found) == [0.5, 0.5, 0.5, 0.5]
    figures = compared(some, found)
    assert figures is not None
    assert (figures.win_rate.rate, figures.win_rate.ties) == (0.5, 4)
    assert figures.position_bias is not None
    assert (figures.position_bias.value, figures.position_bias.n) == (1.0, 6)
    assert len(server.asked) == 1 + 6, "the same reply twice is a tie, and nobody is asked"


def test_both_orders_have_to_agree(job):
    """It prefers good replies; what is hard it calls a tie in one order; of what is odd it says nothing in one."""

    def answer(question: str) -> str:
        first, second = first_and_second(question)
        if {first, second} == {"hard", "good"} and first == "hard":
            return "[[C]]"
        if {first, second} == {"odd", "good"} and first == "odd":
            return "I would rather not say."
        return "[[A]]" if first == "good" else "[[B]]"

    some = pairs(("bad", "good"), ("good", "bad"), ("hard", "good"), ("odd", "good"))
    with serving(answer) as server:
        one = job(f"{server.url}#judge")
        found = preferred(one, some)
    assert won(found) == [1.0, 0.0, 0.5, None]
    figures = compared(some, found)
    assert figures is not None
    assert (figures.win_rate.wins, figures.win_rate.losses, figures.win_rate.ties) == (1, 1, 1)
    assert figures.unparsed == 1
    assert figures.position_bias is not None
    assert (figures.position_bias.value, figures.position_bias.n) == (pytest.approx(4 / 6), 6)
    lines = [json.loads(line) for line in judged_file(one, read_judges(one)[0], ".answers").read_text().splitlines()]
    assert len(lines) == 8
    (silent,) = [line for line in lines if line["verdict"] is None]
    assert (silent["id"], silent["first"], silent["second"]) == ("p3", "sft", "policy")
    assert silent["answer"] == "I would rather not say."


def test_nothing_is_made_up_of_a_judge_that_never_says_which(job):
    some = pairs(("one", "another"))
    for answer in ("42", 413):
        with serving(lambda question, answer=answer: "ok" if question == "Reply with yes." else answer) as server:
            found = preferred(job(f"{server.url}#judge"), some)
        assert won(found) == [None]
        assert compared(some, found) is None


def test_what_was_answered_is_not_asked_again_after_a_judge_broke_down(job):
    left = 4

    def answer(question: str) -> str | int:
        nonlocal left
        left -= 1
        return "[[A]]" if left >= 0 else 500

    some = pairs(*((f"one {n}", f"other {n}") for n in range(4)))
    with serving(answer) as server:
        one = job(f"{server.url}#judge")
        with pytest.raises(JudgeUnavailable, match="HTTP 500"):
            preferred(one, some)
        path = judged_file(one, read_judges(one)[0], ".answers")
        assert len(path.read_text().splitlines()) == 3, "one of four answers was that it is there"
        with path.open("a") as file:
            file.write('{"key": "half a li')  # killed
        left, before = 100, len(server.asked)
        assert won(preferred(one, some)) == [0.5] * 4
        assert len(server.asked) - before == 1 + 5
        changed = pairs(*((f"one {n}", f"new {n}") for n in range(4)))
        before = len(server.asked)
        preferred(one, changed)
        assert len(server.asked) - before == 1 + 8, "other replies are asked about"


def test_a_judge_that_is_not_there_is_told_before_anything_is_sampled(job):
    async def run(judges):
        async with attending(judges):
            raise AssertionError("it went on")

    with pytest.raises(JudgeUnavailable, match="gave no valid answer"):
        asyncio.run(run(read_judges(job("http://127.0.0.1:9/v1#judge"))))


# --- people


def test_the_majority_of_people_decides_in_whatever_order_they_saw_the_models(job, tmp_path):
    path = tmp_path / "votes.csv"
    path.write_text(
        "prompt,model_a,model_b,verdict\n"
        "p0,sft,policy,b\np0,policy,sft,a\np0,sft,policy,a\n"  # two for the policy, one against
        "p1,sft,policy,a\np1,policy,sft,a\n"  # one each
        "p2,policy,sft,b\n"
    )
    found = preferred(job(path), pairs(*[("x", "y")] * 4))
    assert found == [Preference(won=1.0, votes=3), Preference(won=0.5, votes=2), Preference(won=0.0, votes=1), None]
    path.write_text("prompt,model_a,model_b,verdict\np0,sft,ppo,b\n")
    with pytest.raises(
        RecordError, match=r"votes.csv:2: no model is called 'ppo'; those that are measured: sft, policy"
    ):
        preferred(job(path), [])


# --- what is a judge


def test_what_is_no_judge_is_refused(job, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"evaluation.judges: 'nobody' is no judge; it is 'labeler', the folder of"):
        read_judges(job("nobody"))
    with pytest.raises(ValueError, match="twice: name it once"):
        read_judges(job("labeler", "labeler"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"evaluation\.judges: .*empty is no reward model"):
        read_judges(job(tmp_path / "empty"))
    addresses = ("http://one/v1#m", "http://two/v1#m")
    assert len(read_judges(job(*addresses))) == 2
    monkeypatch.setenv("RAYWARD_JUDGE_TOKEN", "a-secret-of-one-host")
    with pytest.raises(ValueError, match="one and two, and RAYWARD_JUDGE_TOKEN is for one host") as error:
        read_judges(job(*addresses))
    assert "a-secret" not in str(error.value)


def test_a_chat_model_answers_the_questions_of_other_tasks(job):
    assert chat_model(read_judges(job("labeler"))) is None
    found = chat_model(read_judges(job("labeler", "http://host/v1#m")))
    assert found is not None
    assert found.name == "m at host"
