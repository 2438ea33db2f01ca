"""lm-evaluation-harness as a process of its own, asking a model's generators; its items become verdicts as ours."""

import asyncio
import json
import logging
import os
import shutil
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.pipeline.evaluation.harness.endpoint import LANES, Endpoint, serving
from cluster.pipeline.evaluation.harness.tasks import HarnessTask, told
from cluster.pipeline.evaluation.suite import Verdicts, answers_file, known
from cluster.pipeline.job import Job
from cluster.rundir.files import read_rows
from cluster.rundir.lineage import digest
from reward_server.preferences.records import json_lines

if TYPE_CHECKING:
    from actors.sampling import Fleet
    from reward_server.encoding import ChatEncoding

_LOG_LINES = 8  # that an error shows
_LOOK_S = 1.0
log = logging.getLogger(__name__)


class HarnessFailed(RuntimeError):
    """lm-eval ended without results; the text says why, and where its log is."""


async def run_harness(
    job: Job,
    tasks: Sequence[HarnessTask],
    encoding: "ChatEncoding",
    label: str,
    model: Path,
    room: int,
    ready: "Callable[[], Awaitable[Fleet]]",
) -> dict[str, Verdicts]:
    """Ask a model what it was not asked yet, with at most `room` tokens at a time; every item is a line of
    RUN/evaluations/<label>/lm_eval/<task>.jsonl.

    Answers of a command that was interrupted are kept in a file beside those, as lm-eval caches them. Raises
    HarnessFailed, and what the fleet fails with.
    """
    keys = {task.name: dict.fromkeys(task.ids, _key(job, task, digest(model))) for task in tasks}
    paths = {task.name: answers_file(job, label, task) for task in tasks}
    found = {name: known(path, keys[name]) for name, path in paths.items()}
    if left := [task for task in tasks if len(found[task.name]) < len(task.ids)]:
        folder = paths[left[0].name].parent
        folder.mkdir(parents=True, exist_ok=True)
        fleet = await ready()
        title = f"{label}: {', '.join(task.name for task in left)}"
        with job.tracker.phase(title, "evaluate"):
            async with serving(fleet, encoding, job.config.rollout) as endpoint:
                out = await _ask(job, left, encoding, label, model, room, folder, endpoint)
        for task in left:
            rows = _items(out, task, keys[task.name])
            job.write(paths[task.name], json_lines(rows.values()))
            found[task.name] = {item: row["verdict"] for item, row in rows.items()}
        shutil.rmtree(out)
        for cache in folder.glob("cache-*"):
            cache.unlink()
    return {task.name: {item: found[task.name][item] for item in task.ids} for task in tasks}


async def _ask(
    job: Job,
    tasks: Sequence[HarnessTask],
    encoding: "ChatEncoding",
    label: str,
    model: Path,
    room: int,
    folder: Path,
    endpoint: Endpoint,
) -> Path:
    """The folder of what lm-eval wrote."""
    config, out = job.config, folder / "results"
    shutil.rmtree(out, ignore_errors=True)
    arguments = {
        "model": label,
        "base_url": endpoint.url,
        "tokenizer": str(model),
        "tokenizer_backend": "huggingface",
        "trust_remote_code": config.models.trust_remote_code,
        "add_bos_token": encoding.bos_id is not None,
        "max_length": room,
        "num_concurrent": max(2, LANES * config.rollout.prompts_per_wave * config.cluster.generators),
        "max_retries": 1,  # the fleet has tried again before it says no
        "timeout": int(2 * config.rollout.wave_deadline_s * config.rollout.max_attempts),
    }
    settings = {
        "model": "local-completions",
        "model_args": arguments,
        "tasks": [task.spec for task in tasks],
        "num_fewshot": config.evaluation.shots or None,
        "samples": {leaf: list(numbers) for task in tasks for leaf, numbers in task.documents.items()},
        "seed": [config.evaluation.seed] * 4,
        "apply_chat_template": config.evaluation.chat,
        "metadata": told(job),
        "use_cache": str(folder / f"cache-{digest(model)[:16]}"),
        "log_samples": True,
        "output_path": str(out / "results.json"),
    }
    asked = folder / "config.yaml"
    asked.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    shown = job.run_dir / "logs" / f"lm-eval-{label.replace('/', '-')}.log"
    shown.parent.mkdir(exist_ok=True)
    own = {"OPENAI_API_KEY": endpoint.token, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with shown.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "lm_eval", "run", "--config", str(asked)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=asyncio.subprocess.STDOUT,
            env=os.environ | own,
        )
        try:
            status = await _end(process, endpoint, shown, config.cluster.step_deadline_s)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    text = shown.read_text(encoding="utf-8", errors="replace")
    if status or not list(out.glob("results_*.json")):
        last = "\n".join(text.splitlines()[-_LOG_LINES:])
        raise HarnessFailed(f"lm-eval ended with status {status} and without results; all of it is in {shown}:\n{last}")
    if cut := sum("truncat" in line for line in text.splitlines()):
        log.warning("%s: lm-eval says of %d prompts that they were cut to %d tokens: see %s", label, cut, room, shown)
    return out


async def _end(process: asyncio.subprocess.Process, endpoint: Endpoint, shown: Path, silence_s: float) -> int:
    """Wait for its end, as long as the fleet lives and something happens; its status."""
    ended, loop = asyncio.ensure_future(process.wait()), asyncio.get_running_loop()
    signs, since = (0, 0), loop.time()
    try:
        while not ended.done():
            await asyncio.wait([ended, endpoint.desk.complete], timeout=_LOOK_S, return_when=asyncio.FIRST_COMPLETED)
            if endpoint.desk.complete.done():
                endpoint.desk.complete.result()
            if (now := (endpoint.desk.answered, shown.stat().st_size)) != signs:
                signs, since = now, loop.time()
            elif loop.time() - since > silence_s:
                raise HarnessFailed(f"lm-eval asked and said nothing for {silence_s:g} s; its log is {shown}")
        return ended.result()
    finally:
        ended.cancel()


def _items(out: Path, task: HarnessTask, keys: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The items of a task as our lines are, by id. Raises HarnessFailed where some are missing."""
    found: dict[str, dict[str, Any]] = {}
    for leaf in task.documents:
        rows = [row for file in out.glob(f"samples_{leaf}_[0-9]*T*.jsonl") for row in read_rows(file)]
        several = len({row["filter"] for row in rows}) > 1
        for row in rows:
            item = f"{leaf}/{row['doc_id']}"
            kept = {"requests": row["arguments"], "answers": row["filtered_resps"]}
            one = found.setdefault(item, {"id": item, "key": keys.get(item), **kept, "verdict": {}})
            for metric in row["metrics"]:
                name = f"{metric}/{row['filter']}" if several else metric
                if name in task.metrics:
                    one["verdict"][name] = _vector(row[metric])
    if missing := [item for item in keys if item not in found]:
        raise HarnessFailed(f"lm-eval wrote {len(found)} items of {task.name}; {missing[0]} is not among them")
    return found


def _vector(value: Any) -> tuple[float, float]:
    """A number, or what a weighted mean is made of."""
    if isinstance(value, list):
        total, weight = map(float, value)
        return total, weight
    return float(value), 1.0


def _key(job: Job, task: HarnessTask, weights: str) -> str:
    """What the answers depend on, as a hash."""
    from actors.prompts import stable_hash

    config = job.config.evaluation
    data = digest(Path(task.path)) if Path(task.path).is_file() else ""
    return f"{stable_hash(weights, task.version, task.name, data, config.shots, config.chat, config.seed):016x}"
