"""The suite: benchmarks asked of several models, item by item, and the figures that come of it.

Every answer is a line of RUN/evaluations/<model>/<task>.jsonl, written when its item is judged; a second command asks
only what is not there yet, of the same weights in the same words.
"""

import json
import logging
import shutil
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.evaluation.task import Item, Request, Task, Verdict
from cluster.pipeline.job import Job
from cluster.rundir.files import read_rows
from cluster.rundir.lineage import digest
from reward_server.preferences.records import read_all, write_whole

if TYPE_CHECKING:
    from actors.evaluation.asking import Asked
    from actors.sampling import Fleet
    from cluster.fleet.pool import ProcessPool
    from cluster.pipeline.evaluation.harness.tasks import HarnessTask, Measured
    from cluster.pipeline.evaluation.judges import Judge
    from reward_server.encoding import ChatEncoding
    from reward_server.preferences.judges import ChatJudge

PAPER = "paper"
"""Stands for every task whose data is there."""
_OWN = ("sft", "baseline", "policy", "policy-noptx")  # the models of a run, after its base
_OWN_DATA = {"win_rate": "prompts_heldout", "bits_per_byte": "pretraining_valid"}  # of the run
_OF_OTHERS = {"truthfulqa_generation": "truthfulqa", "hallucination": "squad"}  # tasks on the data of others
_JUDGED = ("truthfulqa_generation", "hallucination")  # by a chat model, where one is a judge
log = logging.getLogger(__name__)

Verdicts = Mapping[str, Verdict]
"""by item id, in the order of the items"""
Results = Mapping[str, Mapping[str, Verdicts]]
"""by model and task"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """What is asked of whom."""

    tasks: Sequence[Task[Any]]
    models: Mapping[str, Path]
    """folders by label; others are compared with the first"""
    encodings: "Mapping[str, ChatEncoding]"
    """by label"""
    harness: "Sequence[HarnessTask]"
    """tasks of lm-evaluation-harness"""
    longest: int
    """tokens of the longest request with its answer"""
    judges: "Sequence[Judge]" = ()
    """who compare the replies of win_rate, and judge other tasks"""

    @property
    def measured(self) -> "Sequence[Measured]":
        """All that has figures."""
        return [*self.tasks, *self.harness]


def read_suite(job: Job) -> Suite:
    """Read and check all items, for every model. Raises ValueError that says all that is wrong."""
    from cluster.pipeline.evaluation.harness.tasks import read_harness
    from cluster.pipeline.evaluation.judges import chat_model, read_judges, ready
    from reward_server.encoding import ChatEncoding

    chosen = dict(_chosen(job))
    judges = read_judges(job) if chosen.keys() & {"win_rate", *_JUDGED} else []
    tasks, harness = read_all(lambda: _tasks(job, chosen, chat_model(judges)), lambda: read_harness(job))
    models = labels(job.run_dir, job.config.evaluation.models or _models_of_run(job))
    for task in [task for task in tasks if task.name == "win_rate"]:
        if len(models) > 1:
            ready(judges, job, task.items, models)
        elif PAPER in job.config.evaluation.suite:
            log.warning("not measured, as there is one model only: %s", task.name)
            tasks.remove(task)
        else:
            raise ValueError(
                f"win_rate compares models, and {next(iter(models))} is alone: name others too (evaluation.models)"
            )
    encodings = {label: ChatEncoding.load(path, job.config.models) for label, path in models.items()}
    lengths = read_all(*(partial(_longest, tasks, encoding, job) for encoding in encodings.values()))
    longest, _ = max(lengths)
    if harness:
        longest = max(longest, _room(job, encodings))
    return Suite(tasks=tasks, harness=harness, models=models, encodings=encodings, longest=longest, judges=judges)


def _room(job: Job, encodings: "Mapping[str, ChatEncoding]") -> int:
    """Tokens that lm-evaluation-harness may ask about at once: what it asks is known to it alone."""
    return min([job.config.generator.max_model_len, *(one.positions for one in encodings.values() if one.positions)])


def read_suite_on_the_way(job: Job, encoding: "ChatEncoding") -> Sequence[Task[Any]]:
    """Read and check what PPO measures on the way, () for nothing: of one model, and nothing that a judge is asked.

    Raises ValueError that says all that is wrong.
    """
    if not job.config.evaluation.suite_every:
        return ()
    chosen, room = dict(_chosen(job)), job.config.generator.max_model_len
    if chosen.pop("win_rate", None) and "win_rate" in job.config.evaluation.suite:
        raise ValueError("evaluation.suite has win_rate, which compares models, and PPO measures one: leave it out")
    tasks = _tasks(job, chosen, None)
    longest, where = _longest(tasks, encoding, job)
    if longest > room:
        raise ValueError(
            f"{where} takes {longest} tokens, and generator.max_model_len is {room}: raise it to {longest}, lower "
            "evaluation.shots, or leave that benchmark out of evaluation.suite"
        )
    return tasks


def labels(run_dir: Path, folders: Sequence[Path]) -> dict[str, Path]:
    """A name for each folder: its path in the run directory, else its last parts, as many as tell it from the others.

    Raises ValueError for a folder that is there twice.
    """
    found: dict[str, Path] = {}
    folders = [Path(folder) for folder in folders]
    own = {folder: str(folder.relative_to(run_dir)) for folder in folders if folder.is_relative_to(run_dir)}
    for folder in folders:
        names = ["/".join(folder.parts[-count:]).strip("/") for count in range(1, len(folder.parts) + 1)]
        names = [own[folder]] if folder in own else [name for name in names if name not in own.values()]
        name = next((name for name in names if name not in found), None)
        if name is None or folder in found.values():
            raise ValueError(f"{folder} is to be measured twice: name it once in evaluation.models")
        found[name] = folder
    return found


async def run_suite(job: Job, processes: "ProcessPool", suite: Suite) -> Results:
    """Ask every model what it was not asked yet; the engine is loaded once a model."""
    found = {}
    for label, model in suite.models.items():
        fleet = partial(processes.fresh_generators, model, suite.longest)
        encoding = suite.encodings[label]
        found[label] = await _measure(job, suite.tasks, encoding, label, digest(model), fleet)
        if suite.harness:
            from cluster.pipeline.evaluation.harness.run import run_harness

            room = _room(job, suite.encodings)
            found[label] |= await run_harness(job, suite.harness, encoding, label, model, room, fleet)
    return found


async def measure_on_the_way(
    job: Job, tasks: Sequence[Task[Any]], encoding: "ChatEncoding", stage: str, version: int, fleet: "Fleet"
) -> dict[str, Verdicts]:
    """Ask a fleet everything, whatever weights it has; writes RUN/evaluations/<stage>-<version>/ anew."""
    label = f"{stage}-{version:06d}"
    shutil.rmtree(job.run_dir / "evaluations" / label, ignore_errors=True)  # of a version that is trained once more

    async def ready() -> "Fleet":
        return fleet

    return await _measure(job, tasks, encoding, label, label, ready, stage)


def answers_file(job: Job, label: str, task: "Measured") -> Path:
    """Where a model's answers are."""
    return job.run_dir / "evaluations" / label / f"{task.name}.jsonl"


async def _measure(
    job: Job,
    tasks: Sequence[Task[Any]],
    encoding: "ChatEncoding",
    label: str,
    weights: str,
    ready: "Callable[[], Awaitable[Fleet]]",
    stage: str = "evaluate",
) -> dict[str, Verdicts]:
    """Ask the fleet that is `ready` what is not answered yet by these `weights`."""
    from actors.evaluation.asking import ask
    from actors.prompts import stable_hash
    from learner.data.journal import Journal

    config = job.config.evaluation
    settings = {"model": weights, "chat": config.chat, "seed": config.seed}
    verdicts: dict[str, dict[str, Verdict]] = {task.name: {} for task in tasks}
    left: list[tuple[Task[Any], Item]] = []
    journals: dict[str, Journal] = {}
    keys: dict[tuple[str, str], str] = {}
    for task in tasks:
        path = answers_file(job, label, task)
        path.parent.mkdir(parents=True, exist_ok=True)
        journals[task.name] = Journal(path, job.monitor.disk)
        keys |= {(task.name, item.id): _key(task, item, settings) for item in task.items}
        verdicts[task.name] = known(path, {item.id: keys[task.name, item.id] for item in task.items})
        left += [(task, item) for item in task.items if item.id not in verdicts[task.name]]

    def took(one: "Asked") -> None:
        name, item = one.task.name, one.item.id
        verdicts[name][item] = one.verdict
        journals[name].append(
            {
                "id": item,
                "key": keys[name, item],
                "requests": [_row(request) for request in one.requests],
                "answers": [one if isinstance(one, str) else asdict(one) for one in one.answers],
                "verdict": one.verdict,
            }
        )
        advance()

    # Mixed, as the generators take items by number: those of one benchmark may take a hundred times those of another.
    left.sort(key=lambda one: stable_hash(one[0].name, one[1].id))
    try:
        if left:
            title = f"{label}: {len(left)} items of {len({task.name for task, _ in left})} benchmarks"
            fleet = await ready()
            with job.tracker.phase(title, stage), job.tracker.console.progress(label, len(left)) as advance:
                rollout = job.config.rollout
                await ask(fleet, encoding, left, rollout, took, chat=config.chat, seed=config.seed)
    finally:
        for journal in journals.values():
            journal.close()
    await job.monitor.disk.ready()
    return {task.name: {item.id: verdicts[task.name][item.id] for item in task.items} for task in tasks}


def _row(request: Request) -> dict[str, Any]:
    row = asdict(request)
    if isinstance(messages := row.get("prompt"), tuple):
        row["prompt"] = [message.model_dump() for message in messages]
    return row


def known(path: Path, keys: Mapping[str, str]) -> dict[str, Verdict]:
    """The verdicts that are there already; what else is in the file is taken out of it."""
    lines = path.read_text("utf-8").splitlines(keepends=True) if path.is_file() else []
    kept = {row["id"]: row for row in read_rows(path) if "key" in row and keys.get(str(row.get("id"))) == row["key"]}
    if len(kept) < len(lines):
        write_whole(path, "".join(json.dumps(row) + "\n" for row in kept.values()))
    return {item: {name: tuple(vector) for name, vector in row["verdict"].items()} for item, row in kept.items()}


def _key(task: Task[Any], item: Item, settings: Mapping[str, Any]) -> str:
    """What an answer depends on, as a hash."""
    from actors.prompts import stable_hash

    asked = (task.name, task.version, task.judged_by, *task.requests(item))
    return f"{stable_hash(sorted(settings.items()), *asked):016x}"


def _chosen(job: Job) -> Iterator[tuple[str, str]]:
    """The tasks that are wanted, with their data. Raises ValueError for one without."""
    from actors.evaluation.tasks import TASKS

    if not (asked := job.config.evaluation.suite):
        return
    missing = list[str]()
    if unknown := [name for name in asked if name not in (PAPER, *TASKS)]:
        names = ", ".join((PAPER, *TASKS))
        raise ValueError(f"evaluation.suite: there is no benchmark {unknown[0]!r}; those that there are: {names}")
    for name in TASKS if PAPER in asked else asked:
        if own := _OWN_DATA.get(name):
            key, data = f"data.{own}", next(iter(job.files(own).values()), None)
        else:
            own = _OF_OTHERS.get(name, name)
            key, data = f"benchmarks.{own}", getattr(job.config.benchmarks, own)
        if data is not None:
            yield name, str(data)
        elif name in asked:
            raise ValueError(f"evaluation.suite has {name}, but {key} is not set: docs/evaluation.md has its source")
        else:
            missing.append(f"{name} ({key})")
    if len(missing) == len(TASKS):
        raise ValueError("evaluation.suite: no benchmark has its data; docs/evaluation.md says where to get each")
    if missing:
        log.warning("not measured, as their data is not set: %s", ", ".join(missing))


def _tasks(job: Job, chosen: Mapping[str, str], judge: "ChatJudge | None") -> list[Task[Any]]:
    return read_all(*(partial(_load, job, *one, judge) for one in chosen.items()))


def _load(job: Job, name: str, data: str, judge: "ChatJudge | None") -> Task[Any]:
    from actors.evaluation.classifiers import load_classifier
    from actors.evaluation.tasks import TASKS, data_file

    config, kind, settings = job.config.evaluation, TASKS[name], dict[str, Any]()
    if name == "toxicity":
        settings["classifier"] = load_classifier(config.classifier, loading=job.config.models)
    if name in _JUDGED:
        settings["judge"] = judge
    if name == "win_rate":
        rollout = job.config.rollout
        settings |= {"max_tokens": rollout.max_new_tokens, "temperature": rollout.temperature}
    shots = config.shots if kind.paper_shots else 0
    return kind.load(data_file(data), config.items, shots, job.max_bad_rows, **settings)


def _models_of_run(job: Job) -> list[Path]:
    base = [Path(job.config.models.base)] if job.config.models.base else []
    own = [job.run_dir / name for name in ("base", *_OWN)]
    found = [path for path in (*base, *own) if (path / "config.json").is_file()]
    if not found:
        raise ValueError(f"{job.run_dir} holds no model to measure: set evaluation.models to Hugging Face folders")
    return list(dict.fromkeys(found))


def _longest(tasks: Sequence[Task[Any]], encoding: "ChatEncoding", job: Job) -> tuple[int, str]:
    """Tokens of the longest request with its answer, and whose it is. Raises ValueError for one beyond the model."""
    from actors.evaluation.asking import encode

    longest, where = 0, ""
    for task in tasks:
        for item in task.items:
            for request in task.requests(item):
                try:
                    one = encode(request, encoding, job.config.evaluation.chat)
                except ValueError as error:
                    raise ValueError(f"{task.name}/{item.id}: {error}") from error
                if (length := len(one.ids) + max(one.room, 1)) > longest:
                    longest, where = length, f"{task.name}/{item.id}"
    if encoding.positions is not None and longest > encoding.positions:
        raise ValueError(
            f"{where} takes {longest} tokens, and {encoding.name} has {encoding.positions} positions: lower "
            "evaluation.shots, or leave that benchmark out of evaluation.suite"
        )
    return longest, where
