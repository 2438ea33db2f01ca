"""Publishing to scripted generators: the order of the phases, who is lost when one fails, and the two proofs."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import pytest

import learner.weights.publish
from actors.transfer import Manifest, Rendezvous
from learner.config import ParityConfig, PublishConfig
from learner.weights.publish import NobodyLeft, ParityError, Probe, Publisher, PublishError, StaleWeights, log_prob_gaps

SUMS = {"a": 11, "b": 22}
BOTH = Manifest(names=("a", "b"), dtypes=("float32", "bfloat16"), shapes=((2,), (3,)), bucket_bytes=64)
PROBES = [Probe(ids=[1, 2, 3]), Probe(ids=[4, 5])]
LOGPROBS = [[-1.0, -2.0], [-3.0]]


async def hang() -> None:
    await asyncio.sleep(60)


def failing(error: Exception) -> Callable[[], Awaitable[None]]:
    async def fail() -> None:
        raise error

    return fail


@dataclass
class Log:
    """Everything that was called, in order."""

    calls: list[str] = field(default_factory=list)


@dataclass
class ScriptedGenerator:
    """Does what it is asked, unless `faults` has something else for that method."""

    name: str
    log: Log
    faults: dict[str, Callable[[], Awaitable[None]]] = field(default_factory=dict)
    sums: dict[str, int] = field(default_factory=lambda: dict(SUMS))
    answer: list[list[float]] = field(default_factory=lambda: [list(row) for row in LOGPROBS])
    version: int = 0

    async def _do(self, method: str, *details: object) -> None:
        self.log.calls.append(" ".join(map(str, (self.name, method, *details))))
        if method in self.faults:
            await self.faults[method]()

    async def join(self, rendezvous: Rendezvous, rank: int) -> None:
        await self._do("join", rendezvous.epoch, rank, rendezvous.world_size)

    async def begin_update(self, recompute: bool = False) -> None:
        await self._do("begin", *["recompute"] * recompute)

    async def receive(self, manifest: Manifest) -> dict[str, int]:
        await self._do("receive", *manifest.names)
        return self.sums

    async def finish_update(self, version: int) -> None:
        await self._do("finish", version)
        self.version = version

    async def abort_update(self) -> None:
        await self._do("abort")

    async def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        assert sequences == [[1, 2, 3], [4, 5]]
        await self._do("logprobs")
        return self.answer


@dataclass
class ScriptedLearner:
    """The other side."""

    log: Log
    faults: dict[str, Callable[[], Awaitable[None]]] = field(default_factory=dict)
    manifest: Manifest = BOTH

    async def _do(self, method: str, *details: object) -> None:
        self.log.calls.append(" ".join(map(str, ("learner", method, *details))))
        if method in self.faults:
            await self.faults[method]()

    async def listen_transfer(self, world_size: int, epoch: int) -> Rendezvous:
        await self._do("listen", epoch)
        return Rendezvous(host="h", port=1, world_size=world_size, epoch=epoch, deadline_s=1, secret="s")

    async def connect_transfer(self) -> None:
        await self._do("connect")

    async def transfer_manifest(self) -> Manifest:
        return self.manifest

    async def send_weights(self) -> dict[str, int]:
        await self._do("send")
        return SUMS

    async def probe_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        await self._do("logprobs")
        return LOGPROBS


class Scene:
    """Two generators, a learner and a publisher."""

    def __init__(self, workers: int = 1, deadline_s: float = 5.0) -> None:
        self.log = Log()
        self.learner = ScriptedLearner(self.log)
        self.one, self.two = (ScriptedGenerator(name, self.log) for name in ("one", "two"))
        parity = ParityConfig(mean_bound=0.1, max_bound=0.3)
        config = PublishConfig(deadline_s=deadline_s, parity=parity)
        self.publisher = Publisher(self.learner, config, PROBES, workers)

    def publish(self, version: int, *generators: ScriptedGenerator) -> learner.weights.publish.Publication:
        return asyncio.run(self.publisher.publish(generators or (self.one, self.two), version))

    def calls(self) -> list[str]:
        calls, self.log.calls = self.log.calls, []
        return calls


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    monkeypatch.setattr(learner.weights.publish, "_MARGIN_S", 0.0)
    return Scene()


def test_the_phases_run_in_order_and_the_group_is_formed_once(scene: Scene) -> None:
    publication = scene.publish(1)
    assert scene.calls() == [
        *("learner listen 1", "learner connect", "one join 1 1 3", "two join 1 2 3"),
        *("one begin", "two begin"),
        *("learner send", "one receive a b", "two receive a b"),
        *("one finish 1", "two finish 1"),
        *("learner logprobs", "one logprobs", "two logprobs"),
    ]
    assert publication.lost == {}
    assert publication.metrics["publish/bytes"] == 2 * 4 + 3 * 2
    assert publication.metrics["parity/max_gap"] == 0.0
    seconds = {f"publish/{phase}_s" for phase in ("join", "pause", "transfer", "load")} | {"time/publish"}
    assert seconds < publication.metrics.keys()
    scene.learner.manifest = Manifest(names=("b",), dtypes=("bfloat16",), shapes=((3,),), bucket_bytes=64)
    assert scene.publish(2).metrics["publish/bytes"] == 3 * 2
    second = ["one begin", "two begin", "learner send", "one receive b", "two receive b"]
    assert scene.calls()[:5] == second


def test_a_generator_of_several_workers_takes_several_ranks() -> None:
    scene = Scene(workers=4)
    scene.publish(1)
    assert [call for call in scene.calls() if "join" in call] == ["one join 1 1 9", "two join 1 5 9"]


def test_members_change_in_epochs_and_a_restarted_one_counts_as_new(scene: Scene) -> None:
    scene.publish(1, scene.one)
    scene.publish(2)
    again = ScriptedGenerator("two", scene.log)
    scene.publish(3, scene.one, again)
    scene.publish(4, scene.one, again)
    joins = [call for call in scene.calls() if "join" in call]
    assert joins == ["one join 1 1 2", "one join 2 1 3", "two join 2 2 3", "one join 3 1 3", "two join 3 2 3"]


def test_a_probe_that_no_engine_can_take_ends_the_run_and_costs_no_generator(scene: Scene) -> None:
    scene.one.faults = scene.two.faults = {"logprobs": failing(ValueError("sequence 0 needs room for 1 more"))}
    with pytest.raises(ValueError, match="sequence 0 needs room"):
        scene.publish(1)


@pytest.mark.parametrize("method", ["join", "begin", "receive"])
def test_one_that_dies_is_left_out_and_the_others_get_the_version(scene: Scene, method: str) -> None:
    died = failing(RuntimeError("two died"))
    scene.two.faults = {method: died, "abort": died}
    publication = scene.publish(1)
    assert publication.lost.keys() == {"two"}
    assert "two died" in publication.lost["two"]
    assert (scene.one.version, scene.two.version) == (1, 0)
    calls = scene.calls()
    assert "one abort" in calls  # it went back to its old weights in between
    assert "one join 2 1 2" in calls


def test_one_that_dies_while_it_loads_is_lost_without_another_transfer(scene: Scene) -> None:
    scene.two.faults = {"finish": failing(RuntimeError("two died"))}
    publication = scene.publish(1)
    assert publication.lost == {"two": "two failed to load its new weights: two died"}
    assert [call for call in scene.calls() if call.startswith("learner send")] == ["learner send"]
    assert scene.one.version == 1
    scene.publish(2, scene.one)
    assert "one join 2 1 2" in scene.calls()


def test_one_that_hangs_costs_its_deadline_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner.weights.publish, "_MARGIN_S", 0.0)
    scene = Scene(deadline_s=0.2)
    scene.two.faults = {"begin": hang, "abort": hang}
    publication = scene.publish(1)
    assert publication.lost == {
        "two": "two did not go back to its old weights within 0.2 s (after: two did not pause within 0.2 s)"
    }
    assert scene.one.version == 1


def test_nobody_left_is_an_error_that_names_everybody(scene: Scene) -> None:
    for generator in (scene.one, scene.two):
        died = failing(RuntimeError(f"the engine of {generator.name} is dead"))
        generator.faults = {"begin": died, "abort": died}
    with pytest.raises(PublishError, match=r"version 7 reached no generator.*of one is dead.*of two is dead"):
        scene.publish(7)
    with pytest.raises(PublishError, match="there are no generators"):
        asyncio.run(scene.publisher.publish([], 8))


def test_one_that_dies_while_it_is_probed_is_lost_and_the_others_are_not(scene: Scene) -> None:
    scene.two.faults = {"logprobs": failing(RuntimeError("two died"))}
    publication = scene.publish(1)
    assert publication.lost == {"two": "two failed to give log-probabilities: two died"}
    scene.calls()
    scene.publish(2, scene.one)
    assert "one join 2 1 2" in scene.calls()
    scene.one.faults = {"logprobs": failing(RuntimeError("one died"))}
    with pytest.raises(NobodyLeft, match="version 3 reached no generator: one failed to give log-prob") as caught:
        scene.publish(3, scene.one)
    assert caught.value.lost.keys() == {"one"}


def test_keys_and_values_are_made_anew_where_that_is_configured(scene: Scene) -> None:
    scene.publish(1)
    assert "one begin" in scene.calls()
    scene.publisher.config = scene.publisher.config.model_copy(update={"kv_cache": "recompute"})
    scene.publish(2)
    assert {"one begin recompute", "two begin recompute"} < set(scene.calls())


def test_a_transfer_that_fails_by_itself_is_tried_twice(scene: Scene) -> None:
    scene.learner.faults = {"send": failing(RuntimeError("the wire broke"))}
    with pytest.raises(PublishError, match=r"version 1: 2 transfers failed.*learner.*the wire broke"):
        scene.publish(1)
    assert (scene.one.version, scene.two.version) == (0, 0)
    assert [call for call in scene.calls() if "abort" in call] == ["one abort", "two abort"] * 2
    scene.learner.faults = {}
    assert scene.publish(1).lost == {}


def test_a_broken_control_call_ends_the_wait_for_the_data(scene: Scene) -> None:
    scene.learner.faults = {"send": hang}
    scene.two.faults = {"receive": failing(RuntimeError("out of memory"))}

    async def impatient() -> None:
        async with asyncio.timeout(2):
            await scene.publisher.publish([scene.one, scene.two], 1)

    with pytest.raises(PublishError, match="two failed to transfer weights: out of memory"):
        asyncio.run(impatient())


def test_other_bytes_than_were_sent_stop_the_run_before_they_are_loaded(scene: Scene) -> None:
    scene.two.sums = {"a": 11, "b": 23}
    with pytest.raises(StaleWeights, match=r"version 1: 1 of 2 tensors of two are not.*'b' .*learner 22, of two 23"):
        scene.publish(1)
    assert (scene.one.version, scene.two.version) == (0, 0)
    assert {"one abort", "two abort"} < set(scene.calls())


def test_a_tensor_that_never_came_is_named(scene: Scene) -> None:
    scene.one.sums = {"a": 11}
    with pytest.raises(StaleWeights, match=r"'b' \(checksum of the learner 22, of one None\)"):
        scene.publish(1)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ([[-1.0, -2.2], [-3.2]], r"two and the learner .* mean gap 0.1333 nats \(bound 0.1\), largest 0.2 "),
        ([[-1.0, -2.0], [-3.31]], r"mean gap 0.1033 .*largest 0.31 \(bound 0.3\)"),
        ([[-1.0, float("nan")], [-3.0]], "mean gap nan"),
    ],
)
def test_other_log_probabilities_stop_the_run(scene: Scene, answer: list[list[float]], text: str) -> None:
    scene.two.answer = answer
    with pytest.raises(ParityError, match=text):
        scene.publish(1)


def test_the_largest_gap_of_any_generator_is_reported(scene: Scene) -> None:
    scene.one.answer = [[-1.0, -2.03], [-3.0]]
    scene.two.answer = [[-1.0, -2.0], [-3.06]]
    metrics = scene.publish(1).metrics
    assert metrics["parity/mean_gap"] == pytest.approx(0.02)
    assert metrics["parity/max_gap"] == pytest.approx(0.06)


def test_tokens_before_the_first_of_a_probe_do_not_count(scene: Scene) -> None:
    scene.publisher.probes = [Probe(ids=[1, 2, 3], first=2), Probe(ids=[4, 5])]
    scene.one.answer = [[-9.0, -2.0], [-3.1]]
    metrics = scene.publish(1, scene.one).metrics
    assert metrics["parity/mean_gap"] == pytest.approx(0.05)
    assert metrics["parity/max_gap"] == pytest.approx(0.1)


def test_gaps_by_hand() -> None:
    assert log_prob_gaps([[-1.0, -2.0], [-4.0]], [[-1.5, -2.0], [-3.0]]) == (0.5, 1.0)
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        log_prob_gaps([[-1.0, -2.0]], [[-1.0]])
