"""A run's processes on several machines: raylets with addresses of their own on this one, with token authentication."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray

from actors.config import GeneratorConfig, RolloutConfig
from actors.prompts import PromptStream
from actors.rollout import rollout
from actors.trajectory import Completion
from actors.transfer import Manifest, Rendezvous
from cluster.config.schema import ClusterConfig, Config, FleetConfig
from cluster.doctor.cluster import machines as diagnosed
from cluster.fleet import processes as build
from cluster.fleet.processes import Processes
from cluster.runtime.placement import place, plan_live
from cluster.runtime.resources import KINDS, Plan, Process, ResourceError
from cluster.runtime.session import start_ray
from learner.config import NetworkConfig, OptimizerConfig, ParityConfig, PublishConfig
from learner.data.buffer import Buffer
from learner.data.ledger import Ledger, audit
from learner.weights.publish import Probe, Publisher
from reward_server.address import own_address
from reward_server.bearer import TOKEN_VARIABLE
from reward_server.config import LoadingConfig, PartConfig, SourceConfig
from reward_server.schema import Message, ScoreRequest
from tests.clusters import Machines, machines
from tests.fakes import FakeEncoding, FakeGenerator, FakeScorer, prompts
from tests.fleet_fakes import LOGPROBS, FakeSource
from tests.tiny_models import tiny_causal_lm

HEAD, OTHER, LARGE = "127.0.0.2", "127.0.0.3", "127.0.0.4"
TAKEN = Process(name="taken", threads=1, cpus=3)  # by others, who hold the third machine
pytestmark = pytest.mark.slow


class Sampler:
    """A generator without an engine."""

    def __init__(
        self, config: GeneratorConfig, model_path: Path, name: str, direct: bool, loading: LoadingConfig
    ) -> None:
        self.tokens = 0
        self.inner = FakeGenerator()

    def start(self) -> None: ...

    async def address(self) -> str:
        return own_address(loopback=False)

    async def generate(
        self, query_ids: list[list[int]], seeds: list[int], max_new_tokens: int, temperature: float
    ) -> list[Completion]:
        await asyncio.sleep(0.05)
        self.tokens += len(seeds)
        return await self.inner.generate(query_ids, seeds, max_new_tokens, temperature)

    async def progress(self) -> int:
        return self.tokens

    async def join(self, rendezvous: Rendezvous, rank: int) -> None: ...

    async def begin_update(self, recompute: bool = False) -> None: ...

    async def receive(self, manifest: Manifest) -> dict[str, int]:
        return {"w": 7}

    async def finish_update(self, version: int) -> None:
        self.inner.version = version

    async def abort_update(self) -> None: ...

    async def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return LOGPROBS

    async def stop(self) -> None: ...


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """Machines of 2, 2 and 3 CPUs, to which this process is connected."""
    folder = tmp_path_factory.mktemp("cluster")
    with machines(folder) as found:
        assert [found.add(cpus) for cpus in (2, 2, 3)] == [HEAD, OTHER, LARGE]
        with start_ray(found.address, cpus=0, log_dir=folder):
            yield found


def config(cluster: Machines, **counts: int) -> ClusterConfig:
    fleet = FleetConfig(backoff_s=0.1, watch_s=0.2)
    return ClusterConfig(address=cluster.address, start_deadline_s=90, step_deadline_s=60, fleet=fleet, **counts)


def processes(**cpus: float) -> Plan:
    """Processes of one thread, by hand; `cpus` by name, "_" being "-"."""
    found = [Process(name=name.replace("_", "-"), threads=1, cpus=each) for name, each in cpus.items()]
    return Plan(processes=tuple(found), concurrent={})


@pytest.mark.slow
def test_every_machine_is_looked_at(cluster: Machines, tmp_path: Path) -> None:
    found = list(diagnosed(tmp_path))
    assert {one.what for one in found} >= {f"at {name}" for name in (HEAD, OTHER, LARGE)}
    assert not [one for one in found if one.state == "fail"]
    assert not [one for one in found if "the run directory is not there" in one.says]
    elsewhere = [one.what for one in diagnosed(tmp_path / "elsewhere") if "the run directory is not there" in one.says]
    assert elsewhere == [f"at {name}" for name in (HEAD, OTHER, LARGE)]


def test_a_plan_gives_every_process_cores_of_its_own_for_all_machines(cluster: Machines) -> None:
    plan = plan_live(Config(cluster=config(cluster, learner_ranks=2)))
    names = ("generator-0", "learner-0", "learner-1", "reward-0")
    assert {p.name: (p.threads, p.cpus, p.pin) for p in plan.processes} == dict.fromkeys(names, (1, 1, None))
    with place(plan.first(KINDS, 1), deadline_s=30):
        until_free(3.0)
    until_free(7.0)


def test_a_bundle_without_room_is_named_by_the_deadline_and_nothing_stays_reserved(cluster: Machines) -> None:
    with place([TAKEN, *processes(learner_0=1.5).processes], deadline_s=30):
        started = time.monotonic()
        with pytest.raises(ResourceError, match=r"the bundle of 'generator-1' needs 0 GPUs and 1.5 CPUs") as refused:
            place(processes(generator_0=1.5, generator_1=1.5).processes, deadline_s=1)
        assert time.monotonic() - started < 5
        assert f"{OTHER}: 2 CPUs" in str(refused.value)
        until_free(2.5)
        with pytest.raises(ResourceError, match=r"'generator-0' needs 0 GPUs and 4 CPUs on one machine"):
            place(processes(generator_0=4).processes, deadline_s=30)
    until_free(7.0)


def test_ranks_and_reward_service_of_different_machines_meet_at_their_addresses(
    cluster: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in (TOKEN_VARIABLE, "LD_PRELOAD"):  # vLLM may have set the second in this process; it would be kept
        monkeypatch.delenv(variable, raising=False)
    made: list[str] = []
    monkeypatch.setattr(build.secrets, "token_urlsafe", lambda size: made.append("canary" * 8) or made[-1])
    tiny_causal_lm(tmp_path / "model")
    source = SourceConfig(parts=(PartConfig(kind="length"),))
    plan = processes(learner_0=1.5, learner_1=1.5, reward_0=0.5)

    async def scenario(placement: Any) -> None:
        run = Processes(config(cluster, learner_ranks=2), plan, tmp_path / "logs", placement)
        async with run.learner() as learner, run.reward(source, None) as rewards:
            at = [(await rank.meeting_point(False))[0] for rank in learner.ranks]
            assert sorted(at) == [HEAD, OTHER]
            pids = [await rank.ready(5.0) for rank in learner.ranks]
            assert all("/libjemalloc.so" in Path(f"/proc/{pid}/maps").read_text() for pid in pids)
            assert (
                await learner.load("policy", "policy", tmp_path / "model", NetworkConfig(), OptimizerConfig(lr=1e-3))
                > 0
            )
            assert await learner.probe_logprobs([[1, 2, 3]])
            ask = ScoreRequest(
                id="a", prompt=(Message(role="user", content="Hi"),), response="one two three", ended=True
            )
            assert [reply.score for reply in await rewards.score([ask])] == [3.0]
            host = httpx.URL(rewards.urls[0]).host
            assert host in (HEAD, OTHER)
            assert httpx.get(f"{rewards.urls[0]}/health").status_code == 401

    with place([TAKEN], deadline_s=30), place(plan.processes, deadline_s=30) as placement:
        asyncio.run(scenario(placement))
    assert made
    assert not [path for path in (tmp_path / "logs").iterdir() if "canary" in path.read_text()]
    until_free(7.0)


def test_a_machine_that_is_lost_costs_its_generators_waves_and_the_next_machine_gets_its_bundle(
    cluster: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "Generator", Sampler)
    plan = processes(generator_0=1.5, generator_1=1.5)
    stream = PromptStream(prompts(9), seed=3)
    waves = RolloutConfig(prompts_per_wave=2, max_new_tokens=6)
    sizes: list[float] = []
    trained = Counter()

    async def scenario(placement: Any) -> None:
        run = Processes(config(cluster, generators=2), plan, tmp_path / "logs", placement)
        async with run.generators(GeneratorConfig(), Path("nowhere")) as fleet:
            parity = ParityConfig(mean_bound=0.1, max_bound=0.3)
            fleet.publisher = Publisher(
                FakeSource(), PublishConfig(deadline_s=5, parity=parity), [Probe(ids=[1, 2, 3])]
            )
            await fleet.publish(0)
            buffer = Buffer(8, 1, 0, ledger=Ledger(tmp_path / "ledger.jsonl", stream), waiting=fleet.joining)

            async def addresses() -> list[str]:
                return sorted([await worker.handle.address() for worker in fleet.serving])  # pyright: ignore

            def work(generator: Any, leave: asyncio.Event) -> Any:
                return rollout(generator, FakeScorer(), stream, buffer, FakeEncoding(), waves, 11, leave)

            async with fleet.working(work, buffer.fail):
                for version in range(8):
                    if version == 2:
                        assert await addresses() == [HEAD, OTHER]
                        cluster.remove(OTHER)
                    if version == 5:
                        assert len(fleet.serving) == 1
                        taken.release()
                    trained.update(str(t.key) for t in await buffer.take(60))
                    if version == 6:
                        await until(lambda: any(p.worker and not p.serving for p in fleet._seats.values()))
                    sizes.append((await fleet.publish(version + 1))["fleet/size"])
                    buffer.advance()
            assert await addresses() == [HEAD, LARGE]
            assert fleet.metrics()["fleet/restarts"] >= 1
            buffer.close()

    taken = place([TAKEN], deadline_s=30)
    with place(plan.processes, deadline_s=30) as placement:
        asyncio.run(scenario(placement))
    assert sizes[0] == 2
    assert sizes[4] == 1
    assert sizes[-1] == 2
    assert len(trained) == 64
    assert set(trained.values()) == {1}
    assert audit(tmp_path / "ledger.jsonl").dropped["generator lost"] <= 4


def until_free(cpus: float) -> None:
    """Wait until Ray tells so many, which it does some time after a reservation is made or given back."""
    end = time.monotonic() + 10
    while (free := ray.available_resources().get("CPU", 0.0)) != cpus:
        assert time.monotonic() < end, free
        time.sleep(0.05)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.05)
