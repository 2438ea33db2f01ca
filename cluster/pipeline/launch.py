"""The commands: each starts Ray and the processes that its step needs, runs it, and stops them again."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from json import dumps
from pathlib import Path
from typing import TypeVar

from rich.text import Text

from actors.sampling import Generator
from cluster.cli.audit import run_audit
from cluster.fleet.processes import Processes
from cluster.pipeline.evaluate import HeldOut
from cluster.pipeline.job import (
    Job,
    run_rank,
    run_reward,
    run_sample,
    run_sft,
    sft_data,
)
from cluster.pipeline.ppo import Alignment
from cluster.pipeline.quickstart.stage import complete
from cluster.pipeline.quickstart.stage import quickstart as every_step
from cluster.pipeline.recipes import reward_stage, sample_stage, tuning_stage
from cluster.pipeline.rounds import Rounds
from cluster.pipeline.selection import read_contest, run_select
from cluster.pipeline.workplace import Workplace
from cluster.report.report import summary, write_report
from cluster.rundir.files import read_run
from cluster.rundir.lineage import lineage_json, lineage_tree
from cluster.runtime.placement import place, plan_live
from cluster.runtime.resources import KINDS, Kind, plan_run
from cluster.runtime.session import start_ray
from cluster.tracking.console import Console
from learner.config import SFTConfig

Connected = TypeVar("Connected", Alignment, HeldOut)


def quickstart(job: Job, tiny: bool) -> None:
    """Every step on a small model, and the report."""
    if not complete(job, tiny):
        _on_ray(job, lambda processes: every_step(job, processes, tiny))
    report(job.run_dir, job.tracker.console)


def sft(job: Job) -> None:
    """Step 1."""
    _fine_tune(job, job.config.sft, "sft")


def baseline(job: Job) -> None:
    """Step 1 once more, for the model that the others are compared with."""
    _fine_tune(job, job.config.baseline, "baseline")


def _fine_tune(job: Job, config: SFTConfig, name: str) -> None:
    """Raises ValueError when a model or file is missing or cannot be read."""
    base = job.config.models.base
    if base is None:
        raise ValueError("models.base is not set: name a Hugging Face folder or hub id, --models.base NAME")
    if job.skips(tuning_stage(job, base, config, name, name)):
        return
    data = sft_data(job, base, config)

    async def work(processes: Processes) -> None:
        async with processes.learner() as learner:
            await run_sft(job, learner, Path(base), data, config, stage=name, out=name)

    _on_ray(job, work, "learner")


def sample(job: Job) -> None:
    """Completions for step 2."""
    model = job.model("sft")
    if job.skips(sample_stage(job, model)):
        return

    async def work(processes: Processes) -> None:
        async with processes.generators(job.config.generator, model) as generators:
            await run_sample(job, generators.serving, model)

    _on_ray(job, work, "generator")


def rank(job: Job) -> None:
    """Rankings of the completions."""
    run_rank(job)


def reward(job: Job) -> None:
    """Step 2."""
    model = job.model("sft")
    if job.skips(reward_stage(job, model)):
        return

    async def work(processes: Processes) -> None:
        async with processes.learner() as learner:
            await run_reward(job, learner, model)

    _on_ray(job, work, "learner")


def select(job: Job) -> None:
    """The best epoch of an SFT model, by its score."""
    contest, reward_model = read_contest(job), job.reward_to_serve()

    async def work(processes: Processes) -> None:
        @contextlib.asynccontextmanager
        async def generators(model: Path) -> AsyncIterator[Sequence[Generator]]:
            async with processes.generators(job.config.generator, model) as fleet:
                yield fleet.serving

        async with processes.reward(job.config.scoring, reward_model) as rewards:
            await run_select(job, generators, rewards, contest)

    _on_ray(job, work, "generator", "reward")


def ppo(job: Job) -> None:
    """Step 3."""
    alignment = Alignment(job)
    if not alignment.finished(job.config.ppo):
        _connected(job, alignment, job.model("sft"), lambda alignment: alignment.run(job.config.ppo))


def rounds(job: Job) -> None:
    """Steps 2 and 3, again and again."""
    every = Rounds(job)
    state = every.state()

    async def work(processes: Processes) -> None:
        nonlocal state
        async with Workplace(job, processes) as place:
            state = "done" if await every.run(place) else "wait"

    if state == "work":
        _on_ray(job, work)
    if state == "done":
        report(job.run_dir, job.tracker.console)


def evaluate(job: Job) -> None:
    """Held-out responses of a model, their scores and KL to the SFT model; the loss of held-out text."""
    policy, config = job.model("policy"), job.config.ppo

    async def work(heldout: HeldOut) -> None:
        for name, path in (("policy", policy), ("reference", job.model("sft"))):
            await heldout.learner.load(name, "policy", path, config.network, config.policy_optimizer, frozen=True)
        await heldout.measure(policy.name, config)
        written = job.run_dir / "evaluations" / f"{policy.name}.jsonl"
        job.made("evaluation", written, policy, job.file("prompts_heldout"))

    _connected(job, HeldOut(job), policy, work)


def audit(run_dir: Path, console: Console, json: bool) -> int:
    """Whether every sample of every PPO stage is accounted for; the exit code."""
    return run_audit(run_dir, console, json)


def serve(job: Job) -> None:
    """Scores for others, until Ctrl-C."""
    from cluster.pipeline.serve import run_serve  # Ray Serve takes a second to import, which no other command needs

    run_serve(job, job.reward_to_serve())


def lineage(run_dir: Path, console: Console, json: bool) -> None:
    """Where everything in a run directory comes from."""
    console.show(Text(lineage_json(run_dir)) if json else lineage_tree(run_dir))


def report(run_dir: Path, console: Console, json: bool = False) -> None:
    """The report of a run directory, and its summary in the terminal."""
    path = write_report(run_dir)
    if json:
        console.line(dumps({"report": str(path), "summary": read_run(run_dir).summary}, indent=2))
        return
    console.show(summary(run_dir))
    console.line(f"The report is in {path}")


def _connected(job: Job, what: Connected, model: Path, work: Callable[[Connected], Awaitable[object]]) -> None:
    """Run something that needs the learner, generators of `model`, and the reward service."""
    reward_model = job.reward_to_serve()

    async def start(processes: Processes) -> None:
        async with (
            processes.learner() as learner,
            processes.generators(job.config.generator, model) as generators,
            processes.reward(job.config.scoring, reward_model) as rewards,
        ):
            await work(what.connect(learner, generators, rewards))

    _on_ray(job, start)


def _on_ray(job: Job, work: Callable[[Processes], Awaitable[None]], *kinds: Kind) -> None:
    """Run what starts processes of these kinds, all kinds where none is named, with a bundle reserved for each."""
    config, logs = job.config.cluster, job.run_dir / "logs"
    here = plan_run(job.config) if config.address == "local" else None
    with start_ray(config.address, cpus=here.cpus if here else 0, log_dir=logs):
        plan = here or plan_live(job.config)
        processes = plan.first(kinds or KINDS, config.generators)
        with place(processes, deadline_s=config.start_deadline_s) as placement:
            asyncio.run(_attended(job, work(Processes(config, plan, logs, placement, job.monitor))))


async def _attended(job: Job, work: Awaitable[None]) -> None:
    async with job.monitor.attending():
        await work
