"""The page at work: served until people have given all the answers that are wanted, and their log made comparisons."""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.pipeline.job import Job
from cluster.pipeline.labeling.items import read_items
from cluster.pipeline.labeling.priority import ordered, scorers, unsure
from cluster.pipeline.labeling.sheets import record_rankings
from cluster.pipeline.preferences import Rank
from cluster.pipeline.stage import MadeOf, Stage
from reward_server.address import is_loopback
from reward_server.labeling.config import LabelConfig
from reward_server.labeling.items import Item
from reward_server.labeling.log import FILE, read_events
from reward_server.labeling.page.files import version
from reward_server.labeling.people import FILE as PEOPLE
from reward_server.labeling.people import People
from reward_server.preferences.labeling import Comparison
from reward_server.preferences.records import json_lines
from reward_server.preferences.sheets import Rankings

if TYPE_CHECKING:
    from cluster.fleet.pool import ProcessPool
    from reward_server.labeling.export import Export
    from reward_server.labeling.project import Project

_LOOK_S = 2.0  # between two looks at how far people are
_SPARING = 20.0  # times as long as such a look took: it goes over all answers, and labelers are not to feel it
_REMIND_S = 3600.0  # between two lines that say that people are waited for


class RankOnPage(Stage):
    """People rank a round's completions on the page; the command waits for them, and goes on."""

    name = Rank.name
    results = Rank.results

    def made_of(self) -> MadeOf:
        return {}, self.job.files("completions")

    def check(self) -> list[Item]:
        return read_items(self.job)

    async def run(self, processes: "ProcessPool", inputs: list[Item]) -> None:
        """Raises TimeoutError when people are not done in time, ValueError when nothing of theirs can be used."""
        await serve(self.job, processes, inputs, self.job.config.label.wait_s)
        if not write_rankings(self.job).comparisons:
            raise ValueError(
                f"none of the answers in {log_of(self.job)} is a ranking that can be used; left_out.jsonl and "
                "unranked.jsonl in the folder exports beside it say why. Remedy: change the label settings that left "
                "them out, and give the same command again"
            )


def people_of(job: Job) -> Path:
    """Who may label: the same people in all rounds of a run."""
    return (job.root or job.run_dir) / "labeling" / PEOPLE


def log_of(job: Job) -> Path:
    """All that labelers did."""
    return job.run_dir / "labeling" / FILE


def check_page(job: Job) -> None:
    """Raise ValueError where nobody could rank: nobody is asked or invited, a file cannot be read, a port is taken."""
    from reward_server.labeling.project import read_guidelines

    config, people = job.config.label, people_of(job)
    if "rank" not in config.tasks:
        raise ValueError(
            f"label.tasks = {','.join(config.tasks)} has no rank, and a round waits for rankings. Remedy: add it"
        )
    if not People(people).labelers:
        raise ValueError(
            f"{people} has no labeler, so nobody could rank on the page. Remedy: rayward label --run "
            f"{job.root or job.run_dir} --invite NAME prints a link for NAME; once for each labeler"
        )
    read_guidelines(config)
    check_port(config)


def check_port(config: LabelConfig) -> None:
    """Raise ValueError where the page cannot listen."""
    try:
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        socket.create_server((config.host, config.port), family=family).close()
    except OSError as error:
        raise ValueError(
            f"label.host = {config.host} and label.port = {config.port} cannot be listened on "
            f"({os.strerror(error.errno or 0)}). Remedy: set label.port to another one, or end who has it"
        ) from error


async def serve(job: Job, processes: "ProcessPool | None", items: Sequence[Item], deadline_s: float | None) -> None:
    """Serve the page until all answers that are wanted are there. Raises TimeoutError after `deadline_s` seconds."""
    from reward_server.labeling.project import Project

    project = Project(log_of(job).parent, job.config.label, await _ordered(job, processes, items), page=version())
    try:
        if not project.quota_reached:
            await _wait(job, project, deadline_s)
    finally:
        project.close()


async def _ordered(job: Job, processes: "ProcessPool | None", items: Sequence[Item]) -> Sequence[Item]:
    """The items with what label.order says of the completions among them."""
    work = [one for one in items if one.task == "rank" and one.use == "work"]
    if job.config.label.order == "random" or not work:
        return items
    if not (folders := scorers(job)):
        job.tracker.console.line("label.order: there is no reward model yet, so the order is random")
        return items
    found = ordered(work, await unsure(job, processes, work, folders), job.config.label.control_share)
    return [*found, *(one for one in items if one.task != "rank" or one.use != "work")]


async def _wait(job: Job, project: "Project", deadline_s: float | None) -> None:
    from reward_server.labeling.page.server import serve_labeling

    config, console = job.config.label, job.tracker.console
    if not (is_loopback(config.host) or (config.url or "").startswith("https:")):
        console.warning(
            f"label.host = {config.host} can be reached by others, and links travel in the clear: put a proxy with TLS "
            "before it, and set label.url to its https address"
        )
    server = serve_labeling(project, People(people_of(job)), config, log_of(job).with_name("audit.jsonl"))
    url, found = config.url or server.url, project.progress()
    who = job.run_dir.name if job.root else "rayward label"

    def far() -> str:
        return f"people: {found.given} of {found.wanted} answers are there, at {url}"

    try:
        console.line(f"waits for {far()}; progress is at /admin. Ctrl-C ends it, and nothing is lost")
        with job.monitor.waits.reported(who, far, _REMIND_S), console.progress("answers", found.wanted) as advance:
            advance(found.given)
            async with asyncio.timeout(deadline_s):
                while not project.quota_reached:
                    started, before = time.monotonic(), found.given
                    found = project.progress()
                    if found.given != before:
                        advance(found.given - before)
                    with contextlib.suppress(TimeoutError):
                        await project.wait_quota(max(_LOOK_S, _SPARING * (time.monotonic() - started)))
    except TimeoutError:
        found = project.progress()
        raise TimeoutError(
            f"waited {deadline_s:g} s for {far()}. Remedy: give the same command again, which waits on, or raise "
            "label.wait_s"
        ) from None
    finally:
        server.close()


def write_rankings(job: Job) -> "Export":
    """Make RUN/data/comparisons.jsonl and RUN/labeling/exports of the log alone; the same whenever they are made."""
    from reward_server.labeling.export import exported

    found, folder = exported(read_events(log_of(job)), job.config.label), log_of(job).with_name("exports")
    folder.mkdir(parents=True, exist_ok=True)
    rows = {"demonstrations": found.demonstrations, "left_out": map(asdict, found.left_out)}
    for name, of in (rows | {"unranked": map(asdict, found.unranked)}).items():
        job.write(folder / f"{name}.jsonl", json_lines(of))
    if found.comparisons:
        independent = [one for one in found.comparisons if one.id not in found.adjudications]
        write_people(job, found.comparisons, independent, job.file("completions"), log_of(job))
        job.summarise(labelers_alpha=found.alpha)
    if found.demonstrations:
        job.made("demonstrations", folder / "demonstrations.jsonl", log_of(job))
    return found


def write_people(
    job: Job, comparisons: Sequence[Comparison], independent: Sequence[Comparison], *made_of: Path
) -> None:
    """See `record_rankings`. independent: those whose agreement counts, so none asked for because others disagree."""
    who = sorted({one.labeler for one in comparisons if one.labeler})
    record_rankings(job, comparisons, who, _rankings(independent), *made_of)


def _rankings(comparisons: Sequence[Comparison]) -> list[Rankings]:
    """The same by labeler and item."""
    from reward_server.preferences.exchange import item_id

    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for one in comparisons:
        if one.labeler and one.ranks:
            found.setdefault(one.labeler, {})[item_id(one)] = one.ranks
    return [Rankings(labeler=name, ranks=ranks, partial=()) for name, ranks in sorted(found.items())]
