"""A stage: what one command reads, writes, checks and runs. Everything that goes through stages is here.

A stage is a class of one file and one line in stages.py. Its attributes are what help, checks and plans ask; so nothing
heavy (torch, Ray, transformers) is imported at the top of a stage's file.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from cluster.config.load import ConfigError
from cluster.config.schema import Config
from cluster.pipeline.job import Job
from cluster.rundir.inputs import KINDS, Model, common_prompts
from cluster.rundir.record import StageRecord, made_of
from cluster.runtime.resources import Kind, plan_run
from cluster.runtime.signals import unbroken
from learner.config import LoopConfig, NetworkConfig, OptimizerConfig
from reward_server.config import LoadingConfig
from reward_server.preferences.records import read_all

if TYPE_CHECKING:
    from cluster.fleet.pool import ProcessPool
    from learner.progress import Progress

log = logging.getLogger(__name__)
SECTIONS = ("models", "data", "cluster")
"""Sections of every stage that trains."""
SAMPLING = ("rollout", "generator")
"""Sections of every stage that samples."""
MadeOf = tuple[Mapping[str, Any], Mapping[str, str | Path]]
"""Tables of settings; files, folders and hub ids by dotted key."""
Trained = Mapping[str, tuple[NetworkConfig, OptimizerConfig]]
"""What a stage trains, by the key of its optimizer."""


class Stage:
    """One stage of one job. What a subclass does not say holds for a stage that reads, writes and starts nothing."""

    name: ClassVar[str]
    """The command, and the name under which its metrics and its record are kept."""
    group: ClassVar[str] = "train"
    """Under which heading the help lists it."""
    purpose: ClassVar[str]
    """What it is for, on one line."""
    files: ClassVar[str]
    """What it reads and writes, in words."""
    example: ClassVar[str]
    """A complete command line."""
    sections: ClassVar[tuple[str, ...]]
    """Sections of the configuration that it takes."""
    processes: ClassVar[tuple[Kind, ...]] = ()
    """Kinds of processes that it starts; without any, Ray is not started."""
    resumes: ClassVar[bool] = True
    """Whether --resume and --restart are for it."""
    parts: ClassVar[tuple[str, ...]] = ()
    """Stages that it is made of."""
    reads: ClassVar[tuple[str, ...]] = ()
    """Models and data files that it reads, by dotted key."""
    writes: ClassVar[tuple[str, ...]] = ()
    """Models that it writes: folders of the run directory."""
    results: ClassVar[tuple[str, ...]] = ()
    """What it makes in the run directory, the result proper first; without any, it is done anew each time."""
    traces: ClassVar[tuple[str, ...]] = ()
    """What only this stage leaves in the run directory on the way; removed when it starts over."""
    default_run: ClassVar[str] = "runs/rlhf"
    """Run directory when none is named."""
    preset: ClassVar[str | None] = None
    """Preset when neither a preset nor a file is named."""
    variants: ClassVar[Mapping[str, str]] = {}
    """Flags that each stand for another preset, and a run directory of that name: flag -> meaning."""

    def __init__(self, job: Job) -> None:
        self.job = job

    @classmethod
    def models(cls, config: Config) -> tuple[str, ...]:
        """Keys of `models` that it reads: the reward model where scoring uses it."""
        return cls._read("models.", "reward" if not config.scoring.uses_own_model else None)

    @classmethod
    def data(cls, config: Config) -> tuple[str, ...]:
        """Keys of `data` that it reads: the pretraining text where it is mixed in."""
        return cls._read("data.", "pretraining" if not cls.mixes(config) else None)

    @classmethod
    def mixes(cls, config: Config) -> bool:
        """Whether pretraining text is mixed in."""
        return bool(config.ppo.pretraining.coef)

    @classmethod
    def _read(cls, table: str, without: str | None) -> tuple[str, ...]:
        names = (key.removeprefix(table) for key in cls.reads if key.startswith(table))
        return tuple(name for name in names if name != without)

    @classmethod
    def looked_at(cls, config: Config) -> tuple[str, ...]:
        """Keys of `models` that it reads, and those of other stages that are configured: unless it makes its own."""
        wanted, others = cls.models(config), ("sft", "init", "reward", "critic", "policy")
        set_too = [name for name in others if getattr(config.models, name) is not None and name not in wanted]
        return (*wanted, *(set_too if "models" in cls.sections and not cls.variants else ()))

    @classmethod
    def trained(cls, config: Config) -> Trained:
        """What it trains."""
        return {}

    def weights(self) -> Iterator[tuple[str, str | Path, str]]:
        """The models whose weights have to be right: the key, the folder or hub id, and what they are loaded as."""
        config = self.job.config
        for name in self.looked_at(config):
            path = Path(config.models.base or "") if name == "base" else self.job.model(name)
            yield f"models.{name}", path, Model(name=name, path=path).kind
        for part in config.scoring.parts if "scoring" in self.sections else ():
            if part.kind == "model" and part.target:
                yield f"scoring.parts ({part.name})", part.target, "raw_value" if part.raw else "value"

    @classmethod
    def aside(cls, config: Config, run_dir: Path) -> bool:
        """Do what is asked for beside whoever works in the run directory, if it is; whether that was all.

        Raises ConfigError.
        """
        return False

    @property
    def reach(self) -> Mapping[str, float]:
        """Figures that it has to be finished with at least to be complete."""
        return {}

    def made_of(self) -> MadeOf:
        """What its results depend on: tables of settings; files, folders and hub ids by dotted key."""
        return {}, {}

    @property
    def record(self) -> StageRecord | None:
        """How far it is; None for one that is done anew each time."""
        if not self.results:
            return None
        job = self.job
        return StageRecord(
            run_dir=job.run_dir,
            name=self.name,
            start=job.start,
            made_of=self._made_of,
            results=tuple(job.run_dir / result for result in self.results),
            traces=(*(job.run_dir / trace for trace in self.traces), self._checkpoints),
            reach=self.reach,
            round_of=job.root,
        )

    def _made_of(self) -> dict[str, Any]:
        settings, contents = self.made_of()
        dated = self.job.config.models.model_dump(mode="json", include={"chat_date"}, exclude_defaults=True)
        models = {**settings.get("models", {}), **dated}
        return made_of({**settings, "models": models, "data": {"max_bad_rows": self.job.max_bad_rows}}, contents)

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do. Raises ResumeRefused, see `StageRecord.progress`."""
        record = self.record
        return record is not None and record.progress == "complete"

    def pending(self) -> bool:
        """Whether there is something to do now; why not is said. Raises ResumeRefused."""
        if not self.complete:
            return True
        self.job.tracker.console.line(f"{self.name}: complete, and left as it is")
        return False

    @property
    def _checkpoints(self) -> Path:
        return self.job.run_dir / "checkpoints" / self.name

    def progress(self, config: LoopConfig, step: str = "step") -> "Progress":
        """Where its loop goes on after a stop, which is said; what was logged beyond that is forgotten.

        Raises ValueError, see `Checkpoints.newest`.
        """
        from learner.progress import Progress
        from learner.weights.checkpoint import Checkpoints

        tracker, checkpoints = self.job.tracker, Checkpoints(self._checkpoints, config.checkpoints_kept)
        progress = Progress(self.name, tracker.log, checkpoints, unbroken)
        again = tracker.go_on(self.name, progress.done if progress.newest else -1)
        if progress.newest:
            tracker.console.line(f"{self.name}: goes on after {step} {progress.done}, from {progress.newest.folder}")
        elif again:
            tracker.console.line(f"{self.name}: there is no checkpoint, so it starts over")
        return progress

    def check(self) -> Any:
        """Read and check all that it reads, before anything heavy starts: what `run` is given. Raises ValueError."""

    async def run(self, processes: "ProcessPool", inputs: Any) -> Mapping[str, Any] | None:
        """Do it; returns the figures that its record keeps."""
        raise AssertionError(f"{self.name} does nothing")

    def conclude(self) -> None:
        """What follows when nothing is left to do."""


def execute(stage: Stage, begin: Callable[[], object] = lambda: None) -> None:
    """The command: run a stage, unless it is complete, with the processes that it needs.

    `begin` is called when all is read. Raises ConfigError for what is wrong with that.
    """
    try:
        inputs = _read(stage) if (pending := stage.pending()) else None
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    begin()
    if pending:
        with _pool(stage) as pool:
            asyncio.run(_work(stage, pool, inputs, pool or nullcontext()))
    stage.conclude()


async def advance(stage: Stage, processes: "ProcessPool") -> None:
    """Run a stage that is part of another one, unless it is complete."""
    if stage.pending():
        await _work(stage, processes, stage.check(), nullcontext())


def preflight(stage: Stage) -> None:
    """What would stop a stage before it starts; reads only. Raises ValueError."""
    if stage.record is not None:
        _ = stage.record.progress
    _read(stage)


def _read(stage: Stage) -> Any:
    """Its models and files, read and checked; what files have in common and should not is told. Raises ValueError."""
    job = stage.job
    *_, inputs = read_all(*(partial(_look, *one, job.config.models) for one in stage.weights()), stage.check)
    if "data" in stage.sections:
        files = {key.removeprefix("data."): path for key, path in job.files(*KINDS).items()}
        for warning in common_prompts(files, stage.data(job.config) or files):
            log.warning("%s", warning)
    return inputs


def _look(key: str, path: str | Path, kind: Any, loading: LoadingConfig) -> None:
    from reward_server.model import check_model

    try:
        check_model(path, kind, loading)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


async def _work(stage: Stage, pool: Any, inputs: Any, while_open: AbstractAsyncContextManager[Any]) -> None:
    async with while_open:
        record, disk = stage.record, stage.job.monitor.disk
        if record is not None and disk.written(record.begin):
            stage.job.tracker.forget(stage.name)
        figures = await stage.run(pool, inputs)
        await disk.ready()  # for its metrics and its ledger
        if record is not None:
            disk.written(lambda: record.finish(figures or {}))


@contextmanager
def _pool(stage: Stage) -> "Iterator[ProcessPool | None]":
    """Ray with a bundle reserved for each process that a stage starts; nothing for one that starts none."""
    if not stage.processes:
        yield None
        return
    from cluster.fleet.pool import ProcessPool
    from cluster.fleet.processes import Processes
    from cluster.runtime.placement import place, plan_live
    from cluster.runtime.session import start_ray

    job, config, logs = stage.job, stage.job.config.cluster, stage.job.run_dir / "logs"
    here = plan_run(job.config) if config.address == "local" else None
    with start_ray(config.address, cpus=here.cpus if here else 0, log_dir=logs):
        plan = here or plan_live(job.config)
        first = plan.first(stage.processes, config.generators)
        with place(first, deadline_s=config.start_deadline_s) as placement:
            processes = Processes(config, plan, logs, placement, job.monitor, job.config.models)
            yield ProcessPool(processes, job.config, job.tracker.phase)
