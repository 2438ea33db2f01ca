"""The status of a job's run: read here where its directory can be seen, else fetched through the cluster.

What fetches it is a job itself, without CPUs and with the code of the job that is asked about: it prints the status as
JSON, once or again and again. It is taken off the list of jobs afterwards.
"""

import asyncio
import contextlib
import json
import shlex
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from ray.job_submission import JobSubmissionClient

from cluster.jobs.submit import JobError, JobRow, connect, job
from cluster.status.snapshot import FILE, INTERVAL_S, read

_OUTCOMES = {"SUCCEEDED": "done", "FAILED": "failed", "STOPPED": "stopped"}
_FETCH_S = 120.0  # for a short job to start and print
_END_S = 20.0  # for it to end when it is stopped
_SETTLE_S = 2.5  # Ray looks at a job once a second, and lists one as failed that is deleted before it saw the end
_POLL_S = 0.5


def looks_of_job(address: str | None, name: str, live: bool) -> Generator[dict[str, Any]]:
    """The status of the run of job `name`, with the job's own state under "job"; where `live`, until it ends.

    Raises JobError when the cluster does not answer, knows no such job, or cannot fetch the status.
    """
    client = connect(address)
    row = job(client, name)
    if not row.run:
        raise JobError(
            f"job {name} has no run directory: it runs {row.command!r}. Remedy: one that `rayward submit` made"
        )
    while row.status == "PENDING":
        yield _before(row)
        if not live:
            return
        time.sleep(INTERVAL_S)
        row = job(client, name)
    with contextlib.closing(_from_here(Path(row.run)) if _seen_here(row) else _fetched(client, row, live)) as looks:
        for found in looks:
            row = job(client, name)
            yield _joined(found, row)
            if not live or row.status in _OUTCOMES:
                return


def _before(row: JobRow) -> dict[str, Any]:
    """The status of a job whose run has not begun."""
    state = _OUTCOMES.get(row.status, "pending")
    nothing: dict[str, Any] = {
        "host": "",
        "pid": 0,
        "silent_s": 0.0,
        "processes": [],
        "waits": [],
        "alerts": [],
        "curves": {},
        "progress": None,
    }
    message = {"id": row.id, "status": row.status, "message": row.message}
    return {"time": time.time(), "command": row.command, "state": state, "job": message, **nothing}


def _joined(found: dict[str, Any], row: JobRow) -> dict[str, Any]:
    """A run that fell silent because its job has ended has ended as the job did."""
    gone = found["state"] in ("silent", "killed") and row.status in _OUTCOMES
    state = _OUTCOMES[row.status] if gone else found["state"]
    return {**found, "state": state, "job": {"id": row.id, "status": row.status, "message": row.message}}


def _seen_here(row: JobRow) -> bool:
    return (Path(row.run) / FILE).is_file()


def _from_here(run: Path) -> Generator[dict[str, Any]]:
    while True:
        yield read(run)
        time.sleep(INTERVAL_S / 2)


def _fetched(client: JobSubmissionClient, row: JobRow, live: bool) -> Generator[dict[str, Any]]:
    code = (client.get_job_info(row.id).runtime_env or {}).get("working_dir")
    words = ["python", "-m", "cluster.cli.main", "top" if live else "status", row.run, "--json"]
    metadata = {"rayward_command": words[3], "rayward_run": row.run}
    errand = client.submit_job(
        entrypoint=shlex.join(words),
        runtime_env={"working_dir": code} if code else {},
        metadata=metadata,
        entrypoint_num_cpus=0,
    )
    try:
        yield from _lines(client, errand) if live else (_answer(client, errand),)
    finally:
        _take_back(client, errand)


def _answer(client: JobSubmissionClient, errand: str) -> dict[str, Any]:
    end = time.monotonic() + _FETCH_S
    while client.get_job_status(errand).value not in _OUTCOMES:
        if time.monotonic() > end:
            raise JobError(
                f"the job that was to read the status has not ended within {_FETCH_S:g} s. Remedy: see `rayward jobs`; "
                "the head of the cluster may be busy"
            )
        time.sleep(_POLL_S)
    said = client.get_job_logs(errand)
    if (start := said.find("{")) < 0:
        raise JobError(
            f"the status could not be read on the cluster: {said.strip() or client.get_job_info(errand).message}"
        )
    return json.JSONDecoder().raw_decode(said[start:])[0]


def _lines(client: JobSubmissionClient, errand: str) -> Generator[dict[str, Any]]:
    """Each line of JSON that a job prints, as it comes."""
    with asyncio.Runner() as runner:
        texts: Any = client.tail_job_logs(errand)
        rest = ""
        try:
            while (text := runner.run(_next(texts))) is not None:
                *whole, rest = (rest + text).split("\n")
                yield from (json.loads(line) for line in whole if line.startswith("{"))
        finally:
            runner.run(texts.aclose())


async def _next(texts: Any) -> str | None:
    return await anext(texts, None)


def _take_back(client: JobSubmissionClient, errand: str) -> None:
    """End the errand, and have nobody find it in the list of jobs; what cannot be is left."""
    with contextlib.suppress(Exception):
        if client.get_job_status(errand).value not in _OUTCOMES:
            client.stop_job(errand)
        end = time.monotonic() + _END_S
        while client.get_job_status(errand).value not in _OUTCOMES and time.monotonic() < end:
            time.sleep(_POLL_S)
        time.sleep(_SETTLE_S)
        client.delete_job(errand)
