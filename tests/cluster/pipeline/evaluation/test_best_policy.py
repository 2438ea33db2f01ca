"""Which policy is kept: by hand-made measurements, over stops."""

import asyncio
from functools import partial

import pytest

from cluster.pipeline.evaluate import Evaluation
from cluster.pipeline.evaluation.best_policy import BestPolicy
from tests.stage_runs import make_job, summary


def measured(gold: float, kl: float) -> Evaluation:
    return Evaluation(
        gold=gold,
        gold_ci=(gold - 0.1, gold + 0.1),
        score=1.0,
        kl=kl,
        pretraining_loss=3.0,
        length=5.0,
        eos_rate=1.0,
        seconds=1.0,
        use_cases={},
    )


@pytest.fixture
def offer(tmp_path):
    """Offers policies to what a command keeps that begins when so many iterations are done."""
    job = make_job(tmp_path)

    def make(done: int, *offered: tuple[int, float, float], fails: bool = False):
        best = BestPolicy(job, "ppo", tmp_path / "policy_best", done)

        async def save(iteration, folder):
            folder.mkdir(exist_ok=True)
            (folder / "weights").write_text(str(iteration))
            if fails:
                raise OSError("no more")

        for iteration, gold, kl in offered:
            asyncio.run(best.offer(iteration, measured(gold, kl), partial(save, iteration)))
        return summary(job)["ppo"]["ppo"]["best"], (tmp_path / "policy_best" / "weights").read_text()

    return make


def test_the_most_gold_is_kept_and_of_equal_golds_the_smaller_kl_and_of_these_the_first(offer):
    record, weights = offer(0, (1, 0.2, 1.0), (2, 0.5, 4.0), (3, 0.5, 3.0), (4, 0.5, 3.0), (5, 0.4, 2.0))
    assert weights == "3"
    assert record == {"iteration": 3, "gold": 0.5, "gold_ci": [0.4, 0.6], "kl": 3.0}


def test_a_run_that_goes_on_knows_it_and_one_that_starts_over_does_not(offer):
    offer(0, (1, 0.5, 1.0))
    assert offer(1, (2, 0.4, 1.0))[1] == "1"
    assert offer(2, (3, 0.6, 1.0))[1] == "3"
    record, weights = offer(0, (1, 0.1, 1.0))
    assert (record["iteration"], weights) == (1, "1")


def test_after_a_crash_while_it_is_replaced_the_next_one_is_kept(offer):
    offer(0, (1, 0.5, 1.0))
    with pytest.raises(OSError, match="no more"):
        offer(1, (2, 0.9, 1.0), fails=True)
    record, weights = offer(2, (3, 0.1, 1.0))
    assert (record["iteration"], weights) == (3, "3")


def test_a_record_without_its_folder_is_none(offer, tmp_path):
    offer(0, (1, 0.5, 1.0))
    (tmp_path / "policy_best").rename(tmp_path / "away")
    assert offer(1, (2, 0.1, 1.0))[1] == "2"
