import pytest

from cluster.pipeline.evaluate import telling


def rows(count):
    return [{"id": str(n), "score": float((n * 7) % count)} for n in range(count)]


def test_the_best_the_worst_and_some_of_the_rest_are_shown():
    shown = telling(rows(11), each=2, seed=0)
    by_reason = {why: [row["score"] for row in shown if row["shown for"] == why] for why in ("highest", "lowest")}
    assert by_reason == {"highest": [10.0, 9.0], "lowest": [0.0, 1.0]}
    assert len(shown) == len({row["id"] for row in shown}) == 6
    assert telling(rows(11), each=2, seed=0) == shown


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 6, 7])
def test_no_sample_is_shown_twice_and_few_are_all_shown(count):
    shown = telling(rows(count), each=2, seed=1)
    assert len(shown) == len({row["id"] for row in shown}) == min(count, 6)
