"""Small examples and trajectories of random tokens, for the tiny models' vocabulary of 320."""

import torch

from actors.chat import ChatExample
from actors.trajectory import Completion, SampleKey, Trajectory


def tokens(length: int, seed: int) -> tuple[int, ...]:
    """Ordinary tokens that depend on the seed only."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, 300, (length,), generator=generator).tolist())


def example(length: int, first: int, seed: int = 0) -> ChatExample:
    """`length` tokens, of which those from `first` on are targets."""
    return ChatExample(ids=tokens(length, seed), loss_mask=tuple(j >= first for j in range(length)))


def trajectory(query: int, response: int, seed: int, score: float, version: int = 0) -> Trajectory:
    """A response whose sampler gave every token the log-probability -1."""
    ids = tokens(query + response, seed)
    completion = Completion(
        query_ids=ids[:query],
        response_ids=ids[query:],
        logprobs=(-1.0,) * response,
        versions=(version,) * response,
        ended=True,
        text="",
    )
    key = SampleKey(prompt_id=str(seed), epoch=0, k=0, attempt=0)
    return Trajectory(key=key, prompt=(), completion=completion, score=score, parts={})
