"""All ranks of the learner as one: a call goes to every rank, and what they return is added up."""

import asyncio
from collections.abc import Callable, Sequence
from functools import reduce, wraps
from operator import add
from types import CoroutineType
from typing import Any, Concatenate, ParamSpec, TypeVar

from actors.chat import ChatExample
from actors.transfer import TransferError
from learner.maths.losses import add_sums
from learner.worker.supervised import targets_of
from learner.worker.worker import LearnerWorker

P = ParamSpec("P")
T = TypeVar("T")
_LEARN_S = 10.0  # in which the other ranks learn that one has failed
Method = Callable[Concatenate[LearnerWorker, P], T]


class RanksDiffer(RuntimeError):
    """A call failed on one rank and not, or otherwise, on the others, which are no longer alike."""


def _first(answers: Sequence[T]) -> T:
    return answers[0]


def _total(answers: Sequence[Any]) -> Any:
    """The sum of arrays, each zero where it is another rank's share, or of what is made of such arrays."""
    return reduce(add, answers)


def _by_minibatch(answers: Sequence[list[dict[str, float]]]) -> list[dict[str, float]]:
    return [add_sums(minibatch) for minibatch in zip(*answers, strict=True)]


def _on_every(
    method: Method[P, T], combined: Callable[[Sequence[T]], T]
) -> "Callable[Concatenate[LearnerGroup, P], CoroutineType[Any, Any, T]]":
    """A method of every rank, of whose answers `combined` makes one."""

    @wraps(method)
    async def call(self: "LearnerGroup", *args: P.args, **settings: P.kwargs) -> T:
        return combined(await self._every(method.__name__, *args, **settings))

    return call


def _on_first(method: Method[P, T]) -> "Callable[Concatenate[LearnerGroup, P], CoroutineType[Any, Any, T]]":
    """A method of the first rank alone."""

    @wraps(method)
    async def call(self: "LearnerGroup", *args: P.args, **settings: P.kwargs) -> T:
        return await getattr(self.ranks[0], method.__name__)(*args, **settings)

    return call


class LearnerGroup:
    """Handles of one `LearnerWorker` a rank, whose methods are awaitable (remote, or in this process)."""

    def __init__(self, ranks: Sequence[Any]) -> None:
        self.ranks = ranks

    load = _on_every(LearnerWorker.load, _first)
    unload = _on_every(LearnerWorker.unload, _first)
    save = _on_every(LearnerWorker.save, _first)
    save_state = _on_every(LearnerWorker.save_state, _first)
    load_state = _on_every(LearnerWorker.load_state, _first)

    ranking_step = _on_every(LearnerWorker.ranking_step, add_sums)
    last_values = _on_every(LearnerWorker.last_values, _total)
    normalise = _on_every(LearnerWorker.normalise, _first)

    evaluate = _on_every(LearnerWorker.evaluate, _total)
    response_logprobs = _on_every(LearnerWorker.response_logprobs, _total)
    update = _on_every(LearnerWorker.update, _by_minibatch)

    open_sender = _on_first(LearnerWorker.open_sender)
    listen_transfer = _on_first(LearnerWorker.listen_transfer)
    connect_transfer = _on_first(LearnerWorker.connect_transfer)
    transfer_manifest = _on_first(LearnerWorker.transfer_manifest)
    send_weights = _on_every(LearnerWorker.send_weights, _first)  # the other ranks hold partitions of them
    probe_logprobs = _on_every(LearnerWorker.probe_logprobs, _first)

    async def start(self, loopback: bool, deadline_s: float) -> None:
        """Let the ranks find each other, at an address of the first one's machine."""
        address, port = await self.ranks[0].meeting_point(loopback)
        await self._every("start", address, port, deadline_s)

    async def language_model_loss(self, name: str, examples: Sequence[ChatExample], max_tokens: int) -> float:
        """Mean negative log-likelihood of the examples' targets, nats a token."""
        sums = add_sums(await self._every("language_model_loss", name, examples, max_tokens))
        return sums["nll"] / targets_of(examples)

    async def language_model_step(
        self, name: str, examples: Sequence[ChatExample], max_tokens: int, lr: float
    ) -> dict[str, float]:
        """One optimizer step on the examples: "loss" (mean, nats a token) and "grad_norm", or that it was "skipped"."""
        sums = add_sums(await self._every("language_model_step", name, examples, max_tokens, lr))
        if "nll" in sums:
            sums["loss"] = sums.pop("nll") / targets_of(examples)
        return sums

    async def _every(self, method: str, *args: Any, **settings: Any) -> list[Any]:
        calls = [asyncio.ensure_future(getattr(rank, method)(*args, **settings)) for rank in self.ranks]
        try:
            _, late = await asyncio.wait(calls, return_when=asyncio.FIRST_EXCEPTION)
            if late:  # one has failed, and the others mostly learn of it
                await asyncio.wait(late, timeout=_LEARN_S)
            errors = [call.exception() if call.done() else TimeoutError("it waits for the others") for call in calls]
        finally:
            for call in calls:
                call.cancel()
        if not any(errors):
            return [call.result() for call in calls]
        told = [f"{type(error).__name__}: {error}" if error else "done" for error in errors]
        error = next(error for error in errors if error)
        if len(set(told)) == 1 or isinstance(error, TransferError):  # rank 0 alone sends, and may try again
            raise error
        ends = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(told))
        raise RanksDiffer(f"{method} ended otherwise on some ranks of the learner: {ends}") from error
