"""Win rates of pairs by hand, by length, and strengths of several models; and the whole of it as a stage."""

import json
import math
import shutil
from dataclasses import replace

import pytest

from actors.evaluation.task import Reply
from actors.prompts import Prompt
from cluster.pipeline.evaluate import Evaluate
from cluster.pipeline.evaluation.comparison import compared, strengths
from cluster.pipeline.evaluation.judges import Pair, Preference
from cluster.pipeline.evaluation.suite import PAPER, read_suite
from reward_server.schema import Message
from tests.chat_server import serving
from tests.fakes import FakeGenerator
from tests.stage_runs import make_job, rows, run_stage, summary
from tests.tiny_models import tiny_causal_lm


def pair(n: int, one: int = 1, other: int = 1, models: tuple[str, str] = ("a", "b")) -> Pair:
    """Replies of so many characters."""
    prompt = Prompt(id=f"p{n}", messages=(Message(role="user", content="hi"),), reference=None)
    return Pair(
        prompt=prompt, models=models, replies=(Reply(text="x" * one, ended=True), Reply(text="y" * other, ended=True))
    )


def said(*won: float | None) -> list[Preference | None]:
    return [Preference(won=one) for one in won]


def test_ties_are_half_and_the_interval_is_wilsons():
    found = compared([pair(n) for n in range(100)], said(*[1.0] * 61, *[0.0] * 33, *[0.5] * 6))
    assert found is not None
    rate = found.win_rate
    assert (rate.wins, rate.losses, rate.ties, rate.rate) == (61, 33, 6, 0.64)
    assert rate.ci == pytest.approx((0.542354, 0.727288), abs=1e-6)
    assert (found.longer_won, found.position_bias) == (None, None)
    assert list(found.by_length) == ["+0 to +0"], "equal differences stay together"


def test_what_was_not_judged_is_counted_or_left_out():
    found = compared([pair(n) for n in range(4)], [*said(1.0, None, 1.0), None])
    assert found is not None
    assert (found.win_rate.wins, found.unparsed, found.votes) == (2, 1, 3)
    assert found.win_rate.ci == pytest.approx((0.342380, 1.0), abs=1e-6)  # 1 / (1 + z^2 / 2)
    assert compared([pair(0), pair(1)], [*said(None), None]) is None
    assert compared([], []) is None


def test_a_judge_who_likes_length_is_found_out():
    """Ten pairs, longer by -5 .. +5: the longer one always wins."""
    gaps = [gap for gap in range(-5, 6) if gap]
    pairs = [pair(n, one=10, other=10 + gap) for n, gap in enumerate(gaps)]
    found = compared(pairs, said(*(float(gap > 0) for gap in gaps)))
    assert found is not None
    assert found.win_rate.rate == 0.5
    assert found.longer_won is not None
    assert (found.longer_won.value, found.longer_won.n) == (1.0, 10)
    assert {name: (one.value, one.n) for name, one in found.by_length.items()} == {
        "-5 to -4": (0.0, 2),
        "-3 to -2": (0.0, 2),
        "-1 to +1": (0.5, 2),
        "+2 to +3": (1.0, 2),
        "+4 to +5": (1.0, 2),
    }
    tied = compared(pairs, said(*[0.5] * 10))
    assert tied is not None
    assert tied.longer_won is None, "there was no winner"


def test_strengths_are_log_odds_and_add_up():
    """b beats a in 3 of 4, c beats b in 3 of 4, and c beats a in 9 of 10, as 3 * 3 says."""
    outcomes = {("a", "b"): 0.75, ("b", "c"): 0.75, ("a", "c"): 0.9}
    pairs = [pair(n, models=models) for models in outcomes for n in range(400)]
    wins = said(*(float(n < 400 * share) for share in outcomes.values() for n in range(400)))
    found = strengths(["a", "b", "c"], pairs, wins)
    assert found["a"].value == 0.0
    assert found["b"].value == pytest.approx(math.log(3), abs=0.01)
    assert found["c"].value == pytest.approx(math.log(9), abs=0.01)
    assert found["b"].ci[0] < math.log(3) < found["b"].ci[1]
    assert found["c"].n == 400
    assert found["c"].ci[1] - found["c"].ci[0] < 1.2


def test_strengths_of_equals_are_equal_and_of_one_that_always_wins_finite():
    models = ["a", "b", "c"]
    pairs = [pair(n, models=(one, other)) for one, other in (("a", "b"), ("a", "c"), ("b", "c")) for n in range(20)]
    for one in strengths(models, pairs, said(*[0.5] * 60)).values():
        assert (one.value, *one.ci) == pytest.approx((0.0, 0.0, 0.0), abs=1e-9)
    always = strengths(models, pairs, said(*[0.0] * 60))
    assert 0 > always["b"].value > always["c"].value > -30
    assert strengths(models, pairs, said(*[None] * 60)) == {}


# --- the stage


@pytest.fixture
def job(tmp_path):
    def make(*judges, models=("base", "sft"), **evaluation):
        tiny = tmp_path / "tiny"
        if not tiny.exists():
            tiny_causal_lm(tiny, max_positions=1024)
        for name in models:
            shutil.copytree(tiny, tmp_path / "run" / name, dirs_exist_ok=True)
        prompts = rows(tmp_path / "prompts.jsonl", *({"id": f"p{n}", "prompt": f"hello {n}"} for n in range(8)))
        asked = {"suite": "win_rate", "items": 4, **({"judges": [*judges]} if judges else {}), **evaluation}
        return make_job(
            tmp_path / "run",
            data={"prompts_heldout": str(prompts)},
            evaluation=asked,
            rollout={"max_new_tokens": 8},
            scoring={"retry_s": 2.0},
        )

    return make


class Different(FakeGenerator):
    """Another model says something else to the same seeds."""

    asked = 0

    async def generate(self, query_ids, seeds, max_new_tokens, temperature):
        assert (max_new_tokens, temperature) == (8, 1.0)
        self.asked += len(seeds)
        model = (self.asked - 1) // 4
        return await super().generate(query_ids, [seed + model for seed in seeds], max_new_tokens, temperature)


def test_two_models_of_the_same_weights_win_half(job, capsys):
    one = job()
    run_stage(Evaluate(one), generators=[generator := FakeGenerator()])
    assert len(generator.seeds) == 2 * 4
    told = summary(one)["suite"]["sft"]["win_rate"]["simulated labeler (VADER)"]["base"]
    assert told["win_rate"] | {"ci": None} == {"rate": 0.5, "ci": None, "wins": 0, "losses": 0, "ties": 4}
    assert "win_rate" not in summary(one)["suite"]["base"]
    assert "win rate, judged by simulated labeler (VADER)" in capsys.readouterr().out
    lines = (one.run_dir / "evaluations" / "sft" / "win_rate.jsonl").read_text().splitlines()
    answered = next(row for row in map(json.loads, lines) if row["id"] == "p0")
    assert answered["requests"][0]["prompt"] == [{"role": "user", "content": "hello 0"}]
    assert answered["answers"][0].keys() == {"text", "ended"}
    verdicts = one.run_dir / "evaluations" / "win_rate" / "simulated-labeler-VADER.jsonl"
    found = [json.loads(line) for line in verdicts.read_text().splitlines()]
    assert [(row["id"], row["first"], row["second"], row["won"]) for row in found] == [
        (f"p{n}", "base", "sft", 0.5) for n in (0, 2, 4, 6)
    ]
    metrics = [json.loads(line) for line in (one.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert any(row.get("suite/win_rate.simulated-labeler-VADER") == 0.5 for row in metrics)


def test_answers_are_not_sampled_again_and_other_judges_judge_them(job):
    run_stage(Evaluate(job()), generators=[FakeGenerator()])
    with serving(lambda question: "[[A]]") as server:
        run_stage(Evaluate(one := job(f"{server.url}#m", "labeler")), generators=[again := FakeGenerator()])
        assert again.seeds == []
        assert len(server.asked) == 1, "all replies are the same; it was asked whether it is there"
    assert len(summary(one)["suite"]["sft"]["win_rate"]) == 2


def test_a_chat_model_that_prefers_what_stands_first_lets_everybody_win_half(job, capsys):
    with serving(lambda question: "[[A]]") as server:
        one = job(f"{server.url}#m", models=("base", "sft", "policy"))
        run_stage(Evaluate(one), generators=[Different()])
        by = f"m at {server.url.removeprefix('http://').removesuffix('/v1')}"
    told = summary(one)["suite"]
    assert told["policy"]["win_rate"][by].keys() == {"base", "sft"}
    for label, other in (("sft", "base"), ("policy", "base"), ("policy", "sft")):
        found = told[label]["win_rate"][by][other]
        assert found["win_rate"]["rate"] == 0.5
        assert found["position_bias"]["value"] == 1.0
    assert told["policy"]["strength"][by]["value"] == pytest.approx(0.0, abs=1e-9)
    shown = capsys.readouterr().out
    assert f"strength (Bradley-Terry), judged by {by}" in " ".join(shown.split())


def test_a_judge_without_one_verdict_makes_no_figure_and_is_counted(job, capsys):
    with serving(lambda question: "Hm.") as server:
        run_stage(Evaluate(one := job(f"{server.url}#m")), generators=[Different()])
    (found,) = summary(one)["suite"]["sft"]["win_rate"].values()
    assert found == {"base": {"win_rate": None, "unparsed": 4}}
    shown = " ".join(capsys.readouterr().out.split())
    assert "no verdict on sft and base, so there is no win rate (4 pairs were asked)" in shown


def test_win_rates_take_two_models(job, caplog):
    with pytest.raises(ValueError, match="win_rate compares models, and base is alone"):
        read_suite(job(models=("base",)))
    assert [task.name for task in read_suite(job(models=("base",), suite=PAPER)).tasks] == []
    assert "there is one model only: win_rate" in caplog.text


def test_a_chat_model_judges_the_truth_of_answers_too(job, tmp_path):
    row = {"Question": "Is it?", "Best Answer": "Yes", "Correct Answers": "Yes", "Incorrect Answers": "No"}
    data = rows(tmp_path / "truth.jsonl", row)
    one = job("labeler", "http://host/v1#m", suite="truthfulqa_generation")
    named = one.config.benchmarks.model_copy(update={"truthfulqa": str(data)})
    (task,) = read_suite(replace(one, config=one.config.model_copy(update={"benchmarks": named}))).tasks
    assert task.judged_by == "m at host"
    assert task.metrics["true_and_informative/qa"].note == "judged by m at host"
