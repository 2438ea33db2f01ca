"""Scores of responses that are no experience: to held-out prompts, for the best of n, for the epochs of a model."""

from collections.abc import Sequence
from uuid import uuid4

from actors.config import MissingEos
from actors.prompts import Prompt
from actors.rollout import Scorer
from actors.trajectory import Completion
from reward_server.schema import ScoreRequest


async def score_groups(
    scorer: Scorer, prompts: Sequence[Prompt], groups: Sequence[Sequence[Completion]], missing_eos: MissingEos
) -> list[list[float]]:
    """The score of every response in each prompt's group, cut-off ones by the rule.

    Ids of requests are never used twice, so a server that lives longer than this process computes each score anew.
    """
    nonce = uuid4().hex[:12]
    requests = [
        ScoreRequest(id=f"{nonce}/{prompt.id}/{k}", prompt=prompt.messages, response=one.text, ended=one.ended)
        for prompt, group in zip(prompts, groups, strict=True)
        for k, one in enumerate(group)
    ]
    replies = iter(await scorer.score(requests))
    return [[missing_eos.apply(next(replies).score, one.ended) for one in group] for group in groups]
