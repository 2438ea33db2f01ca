"""A sampler in this process, over a copy of the policy that a learner's worker trains."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from actors.trajectory import Completion
from learner.worker.worker import LearnerWorker
from reward_server.encoding import ChatEncoding
from reward_server.schema import ScoreReply, ScoreRequest
from reward_server.sources import Source


class HfGenerator:
    """Samples token by token with a Hugging Face model whose weights it is given by `receive`."""

    name = "hf"

    def __init__(self, path: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.encoding = ChatEncoding.load(path)
        self.version = 0
        self._asked: list[tuple[list[list[int]], list[int]]] = []
        self._sampled: asyncio.Task[list[list[Completion]]] | None = None

    def receive(self, worker: LearnerWorker, version: int) -> None:
        """Take over the worker's weights."""
        weights = dict(worker.weights())
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(weights[name])
        self.version = version

    async def generate(
        self, query_ids: list[list[int]], seeds: list[int], max_new_tokens: int, temperature: float
    ) -> list[Completion]:
        """As an engine does, sample at once what is asked for at the same time."""

        async def sample() -> list[list[Completion]]:
            asked, self._asked, self._sampled = self._asked, [], None
            queries, dice = [q for group, _ in asked for q in group], [seed for _, own in asked for seed in own]
            rest = iter(self._sample(queries, dice, max_new_tokens, temperature))
            return [[next(rest) for _ in own] for _, own in asked]

        place = len(self._asked)
        self._asked.append((query_ids, seeds))
        self._sampled = sampled = self._sampled or asyncio.create_task(sample())
        return (await asyncio.shield(sampled))[place]

    @torch.no_grad()
    async def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """log p(x_j | x_<j), j = 1 .. len-1 of each sequence."""
        rows = [self.model(torch.tensor([list(ids)])).logits[0, :-1].log_softmax(-1) for ids in sequences]
        return [row[torch.arange(len(row)), list(ids[1:])].tolist() for row, ids in zip(rows, sequences, strict=True)]

    @torch.no_grad()
    async def echo(self, sequences: Sequence[Sequence[int]]) -> list[tuple[list[float], list[float]]]:
        """As `logprobs`, with the likeliest token's beside them, and that after the end."""
        found = []
        for ids in sequences:
            rows = self.model(torch.tensor([list(ids)])).logits[0].log_softmax(-1)
            likeliest = rows.max(-1).values.tolist()
            own = rows[torch.arange(len(rows) - 1), list(ids[1:])].tolist()
            found.append(([*own, likeliest[-1]], likeliest))
        return found

    @torch.no_grad()
    def _sample(
        self, queries: Sequence[list[int]], seeds: Sequence[int], max_new_tokens: int, temperature: float
    ) -> list[Completion]:
        dice = [torch.Generator().manual_seed(seed) for seed in seeds]
        rows = [list(query) for query in queries]
        logprobs: list[list[float]] = [[] for _ in queries]
        for _ in range(max_new_tokens):
            width = max(map(len, rows))
            ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
            ends = torch.tensor([len(row) - 1 for row in rows])
            logits = self.model(ids).logits[torch.arange(len(rows)), ends] / temperature
            for row, said, generator, scores in zip(rows, logprobs, dice, logits.log_softmax(-1), strict=True):
                if not said or row[-1] != self.encoding.eos_id:
                    token = int(torch.multinomial(scores.exp(), 1, generator=generator))
                    row.append(token)
                    said.append(float(scores[token]))
        return [
            self._completion(query, row[len(query) :], said)
            for query, row, said in zip(queries, rows, logprobs, strict=True)
        ]

    def _completion(self, query: list[int], response: list[int], logprobs: list[float]) -> Completion:
        return Completion(
            query_ids=tuple(query),
            response_ids=tuple(response),
            logprobs=tuple(logprobs),
            versions=(self.version,) * len(response),
            ended=response[-1] == self.encoding.eos_id,
            text=self.encoding.text(response),
        )


class SourceScorer:
    """A source of scores without the server around it."""

    paused_s = 0.0

    def __init__(self, source: Source) -> None:
        self.source = source

    async def ready(self) -> None:
        """It is never paused."""

    async def score(self, requests: list[ScoreRequest]) -> list[ScoreReply]:
        return self.source.score(requests)


def share_of_letters(prompts: list[list[dict]], responses: list[str]) -> list[float]:
    """Share of a response's characters that are lower-case letters of ASCII: what the tests have a policy learn."""
    return [sum("a" <= c <= "z" for c in response) / max(len(response), 1) for response in responses]
