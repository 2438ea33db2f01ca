"""Which completions people see first: those on whose order reward models differ or are unsure; and a random share."""

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from actors.prompts import stable_hash
from cluster.pipeline.job import Job
from cluster.rundir.lineage import digest
from reward_server.config import PartConfig
from reward_server.labeling.items import Item
from reward_server.schema import ScoreRequest

if TYPE_CHECKING:
    from cluster.fleet.pool import ProcessPool


def uncertainty(scores: Sequence[Sequence[float]]) -> float:
    """How unsure models are of the order of K completions: 0 for sure and of one mind, 1 for a coin flip on each pair.

    scores: of each model the raw outputs for the K completions, whose differences are log-odds (the paper's loss). The
    mean over pairs i < j of 4 p (1 - p), where p is the mean over models of sigmoid(score_i - score_j).
    """
    pairs = combinations(range(len(scores[0])), 2)
    likely = (fmean(_sigmoid(one[i] - one[j]) for one in scores) for i, j in pairs)
    return fmean(4 * p * (1 - p) for p in likely)


def ordered(items: Sequence[Item], uncertainties: Mapping[str, float], control_share: float) -> list[Item]:
    """The same items, the control drawn by a hash of the ids alone, the others with their uncertainty as priority.

    Controls are given priorities that spread them evenly, so that whenever people stop, the share of them holds.
    """
    drawn = sorted(items, key=lambda one: stable_hash("control", one.id))
    control = drawn[: round(control_share * len(items))]
    others = sorted((uncertainties[one.id] for one in drawn[len(control) :]), reverse=True)
    places = {one.id: int((n + 0.5) * len(others) / len(control)) for n, one in enumerate(control)}
    priorities = {name: others[place] if others else 0.0 for name, place in places.items()}
    return [
        one.model_copy(update={"control": one.id in places, "priority": priorities.get(one.id, uncertainties[one.id])})
        for one in items
    ]


def scorers(job: Job) -> list[Path]:
    """Folders of the reward models that are asked: label.scorers, else the run's own, those of its rounds included.

    Raises ValueError for one that is no reward model's folder.
    """
    from reward_server.model import check_model

    root = job.root or job.run_dir
    own = (folder for folder in (root / "reward", *sorted(root.glob("round-*/reward"))) if folder.is_dir())
    folders = [*(job.config.label.scorers or own)]
    for folder in folders:
        try:
            check_model(folder, "raw_value", job.config.models)
        except ValueError as error:
            raise ValueError(f"label.scorers: {folder} is no reward model ({error})") from error
    return folders


async def unsure(
    job: Job, processes: "ProcessPool | None", items: Sequence[Item], folders: Sequence[Path]
) -> dict[str, float]:
    """The uncertainty of each item by its id, in RUN/labeling/priority.json; what is there is not scored again.

    processes: whose reward service scores; without one, this process does.
    """
    file = job.run_dir / "labeling" / "priority.json"
    made_of = {str(path): digest(path) for path in (job.file("completions"), *folders)}
    if file.is_file():
        known = json.loads(file.read_text(encoding="utf-8"))
        if known["made_of"] == made_of:
            return known["priorities"]
    requests = [
        ScoreRequest(id=f"{row}-{place}", prompt=one.prompt, response=text, ended=ended)
        for row, one in enumerate(items)
        for place, (text, ended) in enumerate(zip(one.responses, one.ended, strict=True))
    ]
    with job.tracker.phase(f"score {len(requests)} completions by {len(folders)} reward models", "label"):
        scores = [iter(await _scores(job, processes, folder, requests)) for folder in folders]
    found = {one.id: uncertainty([[next(score) for _ in one.responses] for score in scores]) for one in items}
    file.parent.mkdir(exist_ok=True)
    job.write(file, json.dumps({"made_of": made_of, "priorities": found}, indent=1) + "\n")
    return found


async def _scores(job: Job, processes: "ProcessPool | None", folder: Path, requests: list[ScoreRequest]) -> list[float]:
    part = PartConfig(name="scorer", kind="model", target=str(folder), raw=True)
    scoring = job.config.scoring.model_copy(update={"parts": (part,), "truncate_prompt": True})
    if processes is not None:
        client = await processes.rewards(None, scoring)
        return [one.score for one in await client.score(requests)]
    from reward_server.sources import build_source

    source = await asyncio.to_thread(build_source, scoring, None, job.config.models)
    return [one.score for one in await asyncio.to_thread(source.score, requests)]


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
