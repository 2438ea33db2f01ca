"""A rollout generator: it samples responses, with weights that a learner can replace while it does."""

import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar

from actors.config import GeneratorConfig
from actors.engine import Engine, GeneratorError, GeneratorTimeout
from actors.trajectory import Completion
from actors.transfer import Manifest, Rendezvous
from reward_server.config import UNTRUSTED, LoadingConfig
from reward_server.encoding import ChatEncoding

__all__ = ["Generator", "GeneratorError", "GeneratorTimeout"]

_MARGIN_S = 5.0  # what a wait gets beyond the deadline of the transfer group, whose own error says more


class Generator:
    """Samples responses and hands back the log-probability and weight version of every token.

    A weight update is `join` once per membership of the transfer group, then `begin_update`, `receive` and
    `finish_update` (or `abort_update`). Requests may be in flight all the while: they stand still from `begin_update`
    to the end, keep their tokens (and cached keys, unless told otherwise), and go on with the new weights.
    """

    worker_extension: ClassVar[str] = "actors.weights.WeightReceiver"
    """Qualified name of the class that vLLM adds to its workers, where its module registers our transfer."""

    def __init__(
        self,
        config: GeneratorConfig,
        model_path: str | Path,
        name: str = "generator",
        direct: bool = False,
        loading: LoadingConfig = UNTRUSTED,
    ) -> None:
        """`direct`: weights come from the learner's GPU over NCCL; otherwise through main memory over gloo."""
        self.config = config
        self.model_path = Path(model_path)
        self.name = name
        self.loading = loading
        self._engine = Engine(config, self.model_path, name, self.worker_extension, direct, loading)
        self._encoding: ChatEncoding
        self._transfer_deadline_s = config.call_deadline_s

    async def start(self, version: int = 0) -> None:
        """Load the model folder, whose weights are those of `version`.

        Raises GeneratorError if the engine cannot start, and whatever ChatEncoding.load raises.
        """
        self._encoding = await asyncio.to_thread(ChatEncoding.load, self.model_path, self.loading)
        await self._engine.start()
        await self._engine.set_version(str(version))

    async def stop(self) -> None:
        """End the engine's processes."""
        await self._engine.stop()

    async def version(self) -> int:
        """The version of the weights in use, asked of the engine itself: a sign of life as well."""
        return int(await self._engine.version())

    async def progress(self) -> int:
        """Tokens sampled so far, without asking the engine. Raises GeneratorError when it is dead."""
        return self._engine.tokens()

    def stats(self) -> dict[str, float]:
        """What a run's status shows, from any thread: see Engine."""
        return self._engine.stats()

    async def generate(
        self,
        query_ids: Sequence[Sequence[int]],
        seeds: Sequence[int],
        max_new_tokens: int,
        temperature: float,
    ) -> list[Completion]:
        """Sample one response to each query (no top-k, top-p or penalties), in the order of the queries.

        `seeds`, one a query, make a response independent of what else is sampled, up to rounding. Behaviour
        log-probabilities are those of the distribution sampled from, temperature included. An EOS is part of
        the response.
        Raises ValueError, before any is sampled, for a query that cannot be served.
        """
        for index, query in enumerate(query_ids):
            self._check(f"query {index}", query, max_new_tokens)
        stop_ids = sorted(self._encoding.eos_ids)
        sampled = await self._engine.sample(query_ids, seeds, max_new_tokens, temperature, stop_ids)
        return [
            Completion(
                query_ids=tuple(query),
                response_ids=response.ids,
                logprobs=response.logprobs,
                versions=response.versions,
                ended=response.stopped,
                text=self._encoding.text(response.ids),
            )
            for query, response in zip(query_ids, sampled, strict=True)
        ]

    async def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """log p(x_j | x_<j) at temperature 1 for j = 1 .. len-1 of each sequence, by the weights in use."""
        for index, sequence in enumerate(sequences):
            self._check(f"sequence {index}", sequence, 1)
        return await self._engine.prompt_logprobs(sequences)

    async def echo(self, sequences: Sequence[Sequence[int]]) -> list[tuple[list[float], list[float]]]:
        """As `logprobs`, with one more for the likeliest token that may follow, and beside each that of the likeliest
        token in its place: a sequence is what greedy sampling says where the two agree.
        """
        for index, sequence in enumerate(sequences):
            self._check(f"sequence {index}", sequence, 1)
        return await self._engine.echo(sequences)

    async def join(self, rendezvous: Rendezvous, rank: int) -> None:
        """Become member `rank` (and the next, one a worker) of a transfer group; leaves an earlier one."""
        self._transfer_deadline_s = rendezvous.deadline_s + _MARGIN_S
        info = {"rendezvous": asdict(rendezvous), "rank_offset": rank}
        await self._engine.workers(
            "join the transfer group",
            "init_weight_transfer_engine",
            self._transfer_deadline_s,
            init_info=info,
        )

    async def begin_update(self, recompute: bool = False) -> None:
        """Let requests in flight stand still, and get ready to receive.

        With `recompute` the keys and values of their tokens are made anew by the new weights.
        """
        await self._engine.pause(recompute)
        await self._engine.workers("start a weight update", "start_weight_update")

    async def receive(self, manifest: Manifest) -> dict[str, int]:
        """Receive a manifest's tensors. On a CPU nothing is loaded yet.

        Returns the checksum of each, and of those that came earlier from the same group and stay in use.
        """
        await self._engine.workers(
            "receive weights", "update_weights", self._transfer_deadline_s, update_info=asdict(manifest)
        )
        first, *others = await self._engine.workers("tell its checksums", "received_checksums")
        if any(other != first for other in others):
            raise GeneratorError(f"generator {self.name!r}: its workers received different weights")
        return first

    async def finish_update(self, version: int) -> None:
        """Load what was received, call it `version`, and let requests go on.

        Raises GeneratorError, and the generator is of no more use, if that fails half way.
        """
        try:
            await self._engine.workers("load weights", "finish_weight_update")
            await self._engine.set_version(str(version))
        except GeneratorError as error:
            self._engine.give_up(f"its weights are half replaced, since {error}")
            raise
        await self._engine.resume()

    async def abort_update(self) -> None:
        """Drop what was received and go on with the old weights; without an update, only a sign of life.

        Raises GeneratorError, and the generator is of no more use, if the old weights are gone.
        """
        if not self._engine.paused:
            await self._engine.version(self._transfer_deadline_s)  # it may be meeting somebody who never comes
            return
        try:
            await self._engine.workers("drop received weights", "abandon_weight_update", self._transfer_deadline_s)
        except GeneratorError as error:
            self._engine.give_up(f"a broken weight update could not be undone, since {error}")
            raise
        await self._engine.resume()

    def _check(self, what: str, ids: Sequence[int], room: int) -> None:
        """Refuse here what would end the engine, or cut a response short without a word."""
        where = f"generator {self.name!r}: {what}"
        if not ids:
            raise ValueError(f"{where} is empty; a first token needs something to follow")
        if len(ids) + room > self.config.max_model_len:
            raise ValueError(
                f"{where} has {len(ids)} tokens and needs room for {room} more, but max_model_len is "
                f"{self.config.max_model_len}; shorten it, or raise max_model_len"
            )
        wrong = next((token for token in ids if not 0 <= token < self._engine.vocabulary), None)
        if wrong is not None:
            raise ValueError(f"{where} holds token id {wrong}, outside the vocabulary of {self._engine.vocabulary}")
