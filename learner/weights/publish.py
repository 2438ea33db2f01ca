"""Publishing: the learner's weights to every generator, in four phases, with proof that they are in use."""

import asyncio
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

from actors.transfer import Manifest, Rendezvous, mismatched
from actors.waits import Waits
from learner.config import PublishConfig

_ATTEMPTS = 2  # how often in all to try a transfer that breaks although everybody lives
_MARGIN_S = 10.0  # what a phase gets beyond its deadline, so that the error of whoever is late arrives first
_LEARNER = "learner"  # the name of the sending side among those who take part


class PublishError(RuntimeError):
    """A version could not be published; the text names who failed, in which phase, and why."""


class NobodyLeft(PublishError):
    """No generator has the version; those that were asked are all lost."""

    def __init__(self, text: str, lost: dict[str, str]) -> None:
        super().__init__(text)
        self.lost = lost
        """Why, by name."""


class StaleWeights(PublishError):
    """What a generator received, now or earlier, is not what the learner has."""


class ParityError(PublishError):
    """A generator has the learner's weights and yet gives other log-probabilities."""


class Receiver(Protocol):
    """What publishing asks of an `actors.generator.Generator`, which documents it, or of a handle to one elsewhere."""

    @property
    def name(self) -> str: ...  # in messages; no two have the same
    async def join(self, rendezvous: Rendezvous, rank: int) -> None: ...
    async def begin_update(self, recompute: bool = False) -> None: ...
    async def receive(self, manifest: Manifest) -> dict[str, int]: ...
    async def finish_update(self, version: int) -> None: ...
    async def abort_update(self) -> None: ...
    async def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]: ...


class Source(Protocol):
    """What publishing asks of the learner: a WeightSender over its weights, and its view of some tokens."""

    async def listen_transfer(self, world_size: int, epoch: int) -> Rendezvous: ...
    async def connect_transfer(self) -> None: ...
    async def transfer_manifest(self) -> Manifest: ...
    async def send_weights(self) -> dict[str, int]: ...
    async def probe_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """How one publication went."""

    metrics: dict[str, float]
    """Seconds a phase, bytes, and the probe's gaps, as `area/name`."""
    lost: dict[str, str]
    """Generators that did not get the version, by name, with the reason. They must not be given work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A token sequence on which generators and learner must agree."""

    ids: Sequence[int]
    """query ++ response"""
    first: int = 1
    """Index of the first token whose log-prob counts, from 1: that of the response, which is what is sampled. In
    bfloat16 the gap grows with how unlikely a token is, and a chat template's words are the least likely of all."""


class Publisher:
    """Keeps the transfer group of a learner and its generators, and publishes versions through it."""

    def __init__(
        self,
        source: Source,
        config: PublishConfig,
        probes: Sequence[Probe],
        workers: int = 1,
        waits: Waits | None = None,
    ) -> None:
        """`probes`: what to compare log-probs on; `workers`: receiving processes a generator; `waits`: of the run."""
        self.source = source
        self.config = config
        self.probes = probes
        self.workers = workers
        self._waits = waits or Waits()
        self._epoch = 0
        self._members: dict[str, Receiver] = {}  # of the current epoch; empty without a usable group

    async def publish(self, generators: Sequence[Receiver], version: int) -> Publication:
        """Give every generator the learner's weights as `version`.

        The group is formed anew whenever the generators are not those of the last time. One that fails is
        left out and named in the result, and the others get the version all the same. A new group gets every
        tensor, one that has had them only what training changes; checksums are compared over all either way.
        Raises NobodyLeft when none is left, PublishError when the transfer itself keeps failing, StaleWeights
        and ParityError when a proof fails.
        """
        started = time.monotonic()
        members = {generator.name: generator for generator in generators}
        lost: dict[str, str] = {}
        metrics: dict[str, float] = {}
        failures = 0
        while True:
            if not members:
                reasons = "; ".join(lost.values()) or "there are no generators"
                raise NobodyLeft(f"version {version} reached no generator: {reasons}", lost)
            error, gone = await self._attempt(members, version, metrics)
            lost |= gone
            members = {name: m for name, m in members.items() if name not in gone}
            if error is None and members:
                break
            failures += not gone
            if failures == _ATTEMPTS:
                raise PublishError(f"version {version}: {failures} transfers failed, lastly since {error}") from error
        gaps, gone = await self._prove(members, version)
        lost |= gone
        if gone.keys() == members.keys():
            raise NobodyLeft(f"version {version} reached no generator: {'; '.join(lost.values())}", lost)
        metrics |= gaps
        metrics["time/publish"] = time.monotonic() - started
        return Publication(metrics=metrics, lost=lost)

    async def _attempt(
        self, members: dict[str, Receiver], version: int, metrics: dict[str, float]
    ) -> tuple[Exception | None, dict[str, str]]:
        """Run the phases once. Returns the error that asks for another attempt, and who is lost."""
        clock = time.monotonic()

        def lap(phase: str) -> None:
            nonlocal clock
            clock, since = time.monotonic(), clock
            metrics[f"publish/{phase}_s"] = clock - since

        try:
            await self._regroup(members)
            lap("join")
            recompute = self.config.kv_cache == "recompute"
            await self._all("pause", {name: m.begin_update(recompute) for name, m in members.items()})
            lap("pause")
            manifest = await self.source.transfer_manifest()
            receiving = {name: m.receive(manifest) for name, m in members.items()}
            sums = await self._all("transfer weights", {_LEARNER: self.source.send_weights(), **receiving})
            lap("transfer")
            _compare(sums, version)
        except Exception as error:
            # Whoever can still go back to the old weights is alive; the others are lost.
            self._members = {}
            gone = await self._each(
                "go back to its old weights", {name: m.abort_update() for name, m in members.items()}
            )
            if isinstance(error, StaleWeights):
                raise
            return error, {name: f"{reason} (after: {error})" for name, reason in gone.items()}
        gone = await self._each("load its new weights", {name: m.finish_update(version) for name, m in members.items()})
        lap("load")
        metrics["publish/bytes"] = float(manifest.total_bytes)
        if gone:
            self._members = {}
        return None, gone

    async def _regroup(self, members: dict[str, Receiver]) -> None:
        """Form the transfer group of these members, unless it is there already."""
        if members.keys() == self._members.keys() and all(self._members[n] is m for n, m in members.items()):
            return
        self._members = {}
        self._epoch += 1
        meeting = await self.source.listen_transfer(1 + self.workers * len(members), self._epoch)
        joins = {name: m.join(meeting, 1 + self.workers * index) for index, (name, m) in enumerate(members.items())}
        await self._all("join the transfer group", {_LEARNER: self.source.connect_transfer(), **joins})
        self._members = members

    async def _prove(self, members: dict[str, Receiver], version: int) -> tuple[dict[str, float], dict[str, str]]:
        """Compare log-probabilities on the probes' tokens: the largest gaps of any generator, and who is lost."""
        sequences = [probe.ids for probe in self.probes]
        expected = self._counted(await self.source.probe_logprobs(sequences))
        calls = {name: m.logprobs(sequences) for name, m in members.items()}
        answers, gone = await self._run("give log-probabilities", calls, asyncio.ALL_COMPLETED)
        if gone:
            self._members = {}
        bounds = self.config.parity
        worst = {"parity/mean_gap": 0.0, "parity/max_gap": 0.0}
        for name, answer in answers.items():
            mean, largest = log_prob_gaps(expected, self._counted(answer))
            if not (mean <= bounds.mean_bound and largest <= bounds.max_bound):  # so that a NaN fails
                raise ParityError(
                    f"version {version}: {name} and the learner disagree on the same tokens: mean gap "
                    f"{mean:.4g} nats (bound {bounds.mean_bound:g}), largest {largest:.4g} (bound "
                    f"{bounds.max_bound:g}). The weights arrived, so the engine does not use all of them, or "
                    "it computes otherwise (dtype, kernels): see the gap of a fresh engine before raising "
                    "the bounds of publish.parity"
                )
            worst["parity/mean_gap"] = max(worst["parity/mean_gap"], mean)
            worst["parity/max_gap"] = max(worst["parity/max_gap"], largest)
        return worst, gone

    def _counted(self, logprobs: Sequence[Sequence[float]]) -> list[Sequence[float]]:
        """Leave out the tokens before each probe's first; entry j - 1 of a row is the log-prob of token j."""
        return [row[probe.first - 1 :] for row, probe in zip(logprobs, self.probes, strict=True)]

    async def _all(self, phase: str, calls: Mapping[str, Coroutine[Any, Any, Any]]) -> dict[str, Any]:
        """Run calls at once; the first that fails, or the deadline, ends all with an error that names who."""
        results, failed = await self._run(phase, calls, asyncio.FIRST_EXCEPTION)
        if failed:
            raise PublishError("; ".join(failed.values()))
        return results

    async def _each(self, phase: str, calls: Mapping[str, Coroutine[Any, Any, Any]]) -> dict[str, str]:
        """Run calls at once, each to its own end; returns why some failed, by name."""
        _, failed = await self._run(phase, calls, asyncio.ALL_COMPLETED)
        return failed

    async def _run(
        self, phase: str, calls: Mapping[str, Coroutine[Any, Any, Any]], until: str
    ) -> tuple[dict[str, Any], dict[str, str]]:
        tasks = {name: asyncio.ensure_future(call) for name, call in calls.items()}
        seconds = self.config.deadline_s + _MARGIN_S

        def waiting() -> str:
            names = ", ".join(name for name, task in tasks.items() if not task.done())
            return f"{names} to {phase} (deadline {seconds:g} s)"

        try:
            with self._waits.reported("publishing", waiting):
                done, pending = await asyncio.wait(tasks.values(), timeout=seconds, return_when=until)
        finally:
            for task in tasks.values():
                task.cancel()
        for task in done:
            if isinstance(error := task.exception(), ValueError):  # of what was asked; who was asked is not lost
                raise error
        failed = {
            name: f"{name} failed to {phase}: {task.exception()}"
            for name, task in tasks.items()
            if task in done and task.exception() is not None
        }
        results = {name: task.result() for name, task in tasks.items() if task in done and name not in failed}
        if not failed or until == asyncio.ALL_COMPLETED:  # else those that still wait are not to blame
            late = [name for name, task in tasks.items() if task in pending]
            failed |= {name: f"{name} did not {phase} within {seconds:g} s" for name in late}
        return results, failed


def log_prob_gaps(expected: Sequence[Sequence[float]], given: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Mean and largest absolute difference over all tokens of some sequences, in nats."""
    pairs = zip(chain.from_iterable(expected), chain.from_iterable(given), strict=True)
    gaps = [abs(ours - theirs) for ours, theirs in pairs]
    return sum(gaps) / len(gaps), max(gaps)


def _compare(sums: Mapping[str, dict[str, int]], version: int) -> None:
    """Raise StaleWeights unless every generator has the learner's checksum of every tensor."""
    sent = sums[_LEARNER]
    for name, received in sums.items():
        if wrong := mismatched(sent, received):
            first = wrong[0]
            raise StaleWeights(
                f"version {version}: {len(wrong)} of {len(sent)} tensors of {name} are not the learner's, first "
                f"{first!r} (checksum of the learner {sent.get(first)}, of {name} {received.get(first)}); "
                "the generators keep their old weights"
            )
