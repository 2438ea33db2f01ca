"""Scores of groups of responses."""

import asyncio

from actors.config import MissingEos
from actors.scoring import score_groups
from tests.fakes import FakeScorer, completion, prompts

GROUPS = [[completion(response_ids=(4,)), completion(response_ids=(4, 5, 6), ended=False)], [completion()]]


def test_every_response_has_its_score_and_a_cut_off_one_that_of_the_rule():
    scorer, plain = FakeScorer(), MissingEos(rule="none")
    for rule, cut_off in ((plain, 3.0), (MissingEos(rule="replace", value=-1.0), -1.0)):
        lengths = [[float(len(one.text)) for one in group] for group in GROUPS]
        lengths[0][1] = cut_off if rule is not plain else lengths[0][1]
        assert asyncio.run(score_groups(scorer, prompts(2), GROUPS, rule)) == lengths
    asked = [request for batch in scorer.batches for request in batch]
    assert [(one.prompt[0].content, one.ended) for one in asked[:3]] == [("a", True), ("a", False), ("b", True)]
    assert len({one.id for one in asked}) == 6  # the second time none is known
