"""A real run whose vLLM generators are killed while they sample and while they are given weights, come and go."""

import asyncio
import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cluster.config.schema import Config, TrackingConfig
from cluster.fleet.fleet import Fleet
from cluster.fleet.processes import Processes
from cluster.pipeline.job import Job
from cluster.pipeline.ppo import PPO
from cluster.pipeline.stage import advance
from cluster.runtime.actor import Handle
from cluster.runtime.resources import plan_machine
from cluster.runtime.session import start_ray
from cluster.tracking.tracker import Tracker
from learner.data.ledger import audit
from learner.weights.publish import Publisher
from tests.fake_pool import FakePool
from tests.fakes import FakeScorer
from tests.tiny_models import CORPUS, tiny_causal_lm, tiny_reward_model

pytestmark = pytest.mark.slow

ITERATIONS = 10
PROMPTS = 16
SETTINGS: dict[str, Any] = {
    "cluster": {"generators": 2, "fleet": {"backoff_s": 0.1, "watch_s": 1.0}, "start_deadline_s": 120},
    "generator": {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 16, "kv_cache_gib": 0.25},
    "rollout": {"prompts_per_wave": 8, "max_new_tokens": 96, "max_prompt_tokens": 64, "missing_eos": {"rule": "none"}},
    "ppo": {
        "iterations": ITERATIONS,
        "prompts_per_batch": PROMPTS,
        "minibatch_size": PROMPTS,
        "max_staleness": 1,
        "pretraining": {"coef": 0.0, "sequence_tokens": 32},
        "network": {"dtype": "float32"},
        "policy_optimizer": {"lr": 1e-3},
        "critic_optimizer": {"lr": 1e-3},
        "warmup_iterations": 0,
    },
    "publish": {"deadline_s": 20.0, "parity": {"mean_bound": 1e-3, "max_bound": 1e-2}},
    "evaluation": {"prompts": 4},
}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("fleet")
    tiny_causal_lm(folder / "sft", hidden=128)
    tiny_reward_model(folder / "reward")
    asked = [{"id": f"p{i}", "prompt": f"is {i} good"} for i in range(40)]
    data = {
        "prompts": write(folder / "prompts.jsonl", asked),
        "prompts_heldout": write(folder / "heldout.jsonl", asked[:4]),
        "pretraining_valid": write(folder / "text.jsonl", [{"text": " ".join(CORPUS)}] * 4),
    }
    models = {"sft": folder / "sft", "reward": folder / "reward"}
    config = Config.model_validate({**SETTINGS, "data": data, "models": models})
    run_dir = folder / "run"
    run_dir.mkdir()
    return Job(config=config, run_dir=run_dir, tracker=Tracker(run_dir, TrackingConfig(mode="disabled"), "ppo"))


class Chaos:
    """What is done to the fleet before each version is published."""

    def __init__(self, fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fleet = fleet
        self.armed: int | None = None
        self.killed: list[int] = []
        self.hunt: asyncio.Task[None]
        publish, phase = fleet.publish, Publisher._run

        async def disturbed(version: int) -> dict[str, float]:
            await self.before(version)
            return await publish(version)

        async def deadly(publisher: Publisher, name: str, *rest: Any) -> Any:
            if name == "transfer weights" and self.armed is not None:
                self.kill(self.armed)
                self.armed = None
            return await phase(publisher, name, *rest)

        monkeypatch.setattr(fleet, "publish", disturbed)
        monkeypatch.setattr(Publisher, "_run", deadly)

    def kill(self, pid: int) -> None:
        self.killed.append(pid)
        os.kill(pid, signal.SIGKILL)

    async def pid(self, name: str) -> int:
        worker = self.fleet._seats[name].worker
        assert worker is not None
        assert isinstance(worker.handle, Handle)
        return await worker.handle.ready(5.0)

    async def until(self, condition: Any, seconds: float = 60.0) -> None:
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.02)

    async def kill_while_it_decodes(self, name: str) -> None:
        victim, pid = self.fleet._seats[name].worker, await self.pid(name)
        assert victim is not None
        await self.until(lambda: victim._calls > 0)
        self.kill(pid)
        await self.until(lambda: victim.gone, 10.0)

    async def before(self, version: int) -> None:
        places = self.fleet._seats
        started = lambda name: name in places and places[name].worker is not None  # noqa: E731
        if version == 1:
            self.hunt = asyncio.create_task(self.kill_while_it_decodes("generator-0"))
        if version == 2:
            await self.hunt
        if version == 4:
            await self.until(lambda: started("generator-0"))
        if version == 5:  # an engine's process, while weights are on their way
            self.armed = engine_of(await self.pid("generator-1"))
        if version == 6:
            self.fleet.scale(1)
        if version == 7:
            self.fleet.scale(2)
            await self.until(lambda: started("generator-1"))
        if version == 9:
            self.fleet.scale(1)


def engine_of(actor: int) -> int:
    """The process of vLLM's engine core, a child of the actor's."""
    children = [c for t in Path(f"/proc/{actor}/task").iterdir() for c in (t / "children").read_text().split()]
    names = {int(child): Path(f"/proc/{child}/comm").read_text().strip() for child in children}
    (engine,) = [child for child, name in names.items() if "EngineCor" in name] or [names]
    assert isinstance(engine, int), names
    return engine


@pytest.mark.whole_machine
@pytest.mark.timeout(400)
def test_the_run_goes_on_when_generators_die_come_and_go(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_machine(job.config, cores=2, gpus=0)

    async def work() -> tuple[list[int], int]:
        processes = Processes(job.config.cluster, plan, job.run_dir / "logs")
        async with (
            processes.learner() as learner,
            processes.generators(job.config.generator, job.model("sft")) as fleet,
        ):
            chaos = Chaos(fleet, monkeypatch)
            pool: Any = FakePool(learner, fleet, FakeScorer())
            await advance(PPO(job), pool)
            return chaos.killed, len(fleet.serving)

    with start_ray("local", cpus=plan.cpus, log_dir=job.run_dir / "logs"):
        killed, left = asyncio.run(work())

    logged = [json.loads(line) for line in (job.run_dir / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in logged if "fleet/size" in row]  # a checkpoint's row has its own metrics alone
    sizes = {row["step"]: row["fleet/size"] for row in rows}
    assert len(rows) == ITERATIONS
    # A death is found during the publication that it falls into or after it; these sizes are the same either way.
    assert {step: sizes[step] for step in (2, 3, 4, 6, 7, 10)} == {2: 1, 3: 1, 4: 2, 6: 1, 7: 2, 10: 1}, sizes
    assert rows[-1]["fleet/restarts"] == 2
    assert (len(killed), left) == (2, 1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in killed)
    for row in rows:  # the newcomers too
        assert row["parity/max_gap"] < 1e-2
        assert row["staleness/max"] <= 1
        assert row["ratio/first_minibatch"] == pytest.approx(1, abs=1e-4)
    found = audit(job.run_dir / "ledger-ppo.jsonl")
    assert found.trained == ITERATIONS * PROMPTS
    assert 0 < found.dropped["generator lost"] <= 16, "a wave each time"
    lines = [json.loads(line) for line in (job.run_dir / "ledger-ppo.jsonl").read_text().splitlines()]
    issued = Counter(line["ticket"] for line in lines if line["state"] == "issued")
    assert max(issued.values()) <= 3
