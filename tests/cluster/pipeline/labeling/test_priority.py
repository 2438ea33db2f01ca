"""Which completions come first: by hand, as invariants, and with scores that come from elsewhere."""

import asyncio
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.pipeline.labeling.priority import ordered, scorers, uncertainty, unsure
from reward_server.labeling.items import Item
from reward_server.model import Normalisation, store_normalisation
from reward_server.preferences.labeling import Comparison, write_comparisons
from reward_server.schema import Message, ScoreReply, ScoreRequest
from reward_server.scorer import RewardModelSource
from tests.stage_runs import make_job
from tests.tiny_models import tiny_reward_model

SCORES = st.floats(-20, 20)


def comparison(name: str, *texts: str) -> Comparison:
    prompt = (Message(role="user", content=f"say {name}"),)
    return Comparison(id=name, prompt=prompt, responses=texts, ended=(True,) * len(texts), ranks=None, labeler=None)


def many(count: int) -> list[Item]:
    return [Item.of(comparison(f"c{n}", "a", "b")) for n in range(count)]


def test_uncertainty_by_hand():
    assert uncertainty([[0.0, 0.0]]) == 1.0  # a coin flip
    assert uncertainty([[2.0, -2.0], [-2.0, 2.0]]) == pytest.approx(1.0)  # each sure, and of opposite minds
    p = 1 / (1 + math.exp(-1.0))
    assert uncertainty([[1.0, 0.0]]) == pytest.approx(4 * p * (1 - p))
    q = (p + 1 / (1 + math.exp(-3.0))) / 2
    assert uncertainty([[1.0, 0.0], [3.0, 0.0]]) == pytest.approx(4 * q * (1 - q))
    pairs = [p, p, 1 / (1 + math.exp(-2.0))]
    assert uncertainty([[0.0, 1.0, 2.0]]) == pytest.approx(sum(4 * x * (1 - x) for x in pairs) / 3)
    assert uncertainty([[1000.0, -1000.0]]) == 0.0  # no overflow


@given(st.lists(st.lists(SCORES, min_size=3, max_size=3), min_size=1, max_size=3), SCORES, st.permutations(range(3)))
def test_uncertainty_is_a_share_whatever_the_order_and_the_zero_of_scores(scores, shift, order):
    found = uncertainty(scores)
    assert 0 <= found <= 1 + 1e-12
    assert uncertainty([[one[at] + shift for at in order] for one in scores]) == pytest.approx(found, abs=1e-9)


def test_the_control_is_drawn_by_ids_alone_and_spread_over_the_whole():
    items = many(50)
    unsure_of = {one.id: n / 50 for n, one in enumerate(items)}
    found = ordered(items, unsure_of, 0.2)
    control = {one.id for one in found if one.control}
    assert len(control) == 10
    assert control == {one.id for one in ordered(items, dict.fromkeys(unsure_of, 0.5), 0.2) if one.control}
    given_first = sorted(found, key=lambda one: -one.priority)
    counts = [sum(one.control for one in given_first[: n + 1]) for n in range(50)]
    assert all(abs(count - 0.2 * (n + 1)) <= 1.5 for n, count in enumerate(counts))
    chosen = [one for one in given_first if not one.control]
    assert [one.priority for one in chosen] == sorted((unsure_of[one.id] for one in chosen), reverse=True)
    assert all(one.priority == unsure_of[one.id] for one in chosen)


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (1.0, 7)])
def test_none_or_all_may_be_control(share, count):
    found = ordered(many(7), {f"c{n}": 0.5 for n in range(7)}, share)
    assert sum(one.control for one in found) == count


class Rewards:
    """Scores by the length of a text: longer is better, of a folder called short worse."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def rewards(self, model: Any, scoring: Any) -> Any:
        (part,) = scoring.parts
        assert part.raw  # differences of what the head says are log-odds; of normalised scores they need not be
        assert scoring.truncate_prompt
        sign = -1 if "short" in part.target else 1

        async def score(requests: Any) -> list[ScoreReply]:
            self.asked.append(part.target)
            return [ScoreReply(id=one.id, score=sign * float(len(one.response))) for one in requests]

        return SimpleNamespace(score=score)


def test_uncertainties_come_of_all_models_and_are_not_asked_for_twice(tmp_path):
    job = make_job(tmp_path / "run")
    rows = [comparison("close", "a", "b"), comparison("apart", "a", "b" * 40)]
    write_comparisons(job.run_dir / "data" / "completions.jsonl", rows)
    items, folders = [Item.of(one) for one in rows], [tmp_path / name for name in ("long", "short")]
    for folder in folders:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    pool: Any = Rewards()
    alone = asyncio.run(unsure(job, pool, items, folders[:1]))
    assert alone["close"] == 1.0
    assert alone["apart"] == pytest.approx(0.0, abs=1e-9)
    both = asyncio.run(unsure(job, pool, items, folders))
    assert both == {"close": 1.0, "apart": pytest.approx(1.0)}  # of opposite minds
    assert asyncio.run(unsure(job, pool, items, folders)) == both
    assert pool.asked == [str(folders[0]), *map(str, folders)]
    (folders[1] / "config.json").write_text('{"trained": "again"}')
    asyncio.run(unsure(job, pool, items, folders))
    assert len(pool.asked) == 5
    assert json.loads((job.run_dir / "labeling" / "priority.json").read_text())["priorities"] == both


def test_without_processes_it_is_scored_here(tmp_path, monkeypatch):
    job, rows = make_job(tmp_path / "run"), [comparison("one", "a", "bb")]
    write_comparisons(job.run_dir / "data" / "completions.jsonl", rows)

    def build(scoring: Any, model: Any, loading: Any) -> Any:
        assert scoring.parts[0].target == str(tmp_path / "model")
        return SimpleNamespace(score=lambda asked: [ScoreReply(id=one.id, score=0.0) for one in asked])

    monkeypatch.setattr("reward_server.sources.build_source", build)
    assert asyncio.run(unsure(job, None, [Item.of(one) for one in rows], [tmp_path / "model"])) == {"one": 1.0}


@pytest.mark.slow
def test_real_reward_models_are_asked_for_what_their_heads_say(tmp_path):
    job = make_job(tmp_path / "run", scoring={"dtype": "float32"})
    rows = [comparison("one", "hello world", "good"), comparison("other", "is it good?", "the day", "")]
    write_comparisons(job.run_dir / "data" / "completions.jsonl", rows)
    folders = [job.run_dir / "reward", job.run_dir / "round-1" / "reward"]
    for seed, folder in enumerate(folders):
        tiny_reward_model(folder, seed=seed)
        store_normalisation(folder, Normalisation(gain=50.0, bias=3.0))  # of which differences are no log-odds
    assert scorers(job) == folders
    asked = [
        ScoreRequest(id=f"{one.id}-{place}", prompt=one.prompt, response=text, ended=True)
        for one in rows
        for place, text in enumerate(one.responses)
    ]
    said = [[one.score for one in RewardModelSource(folder, raw=True).score(asked)] for folder in folders]
    found = asyncio.run(unsure(job, None, [Item.of(one) for one in rows], folders))
    assert found["one"] == pytest.approx(uncertainty([scores[:2] for scores in said]), abs=1e-5)
    assert found["other"] == pytest.approx(uncertainty([scores[2:] for scores in said]), abs=1e-5)
    assert found["one"] != pytest.approx(found["other"], abs=1e-4)


def test_the_reward_models_are_those_of_the_run_and_its_rounds_or_those_that_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("reward_server.model.check_model", lambda *_: None)
    own = ["reward", "round-1/reward", "round-2/reward"]
    for name in own:
        (tmp_path / "run" / name).mkdir(parents=True)
    job = make_job(tmp_path / "run")
    assert scorers(job) == [job.run_dir / name for name in own]
    assert scorers(make_job(tmp_path / "run", label={"scorers": [Path("mine")]})) == [Path("mine")]


def test_a_folder_that_is_no_reward_model_is_named(tmp_path):
    job = make_job(tmp_path / "run", label={"scorers": [tmp_path / "mine"]})
    with pytest.raises(ValueError, match=r"label\.scorers: .*mine is no reward model"):
        scorers(job)
