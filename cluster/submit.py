"""Rayward's commands as Ray jobs: submit one to a running cluster, list, follow and stop jobs.

What travels is the code of this installation and the resolved configuration. The job's driver runs on the cluster, so
files and the run directory must be where the cluster's machines see them. Secrets never travel: the job finds
WANDB_API_KEY, HF_TOKEN and the like in the environment that the cluster's machines were started with.
"""

import asyncio
import contextlib
import logging
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from pydantic import BaseModel
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray.job_submission import JobStatus, JobSubmissionClient

from cluster.settings import save_toml

PACKAGES = ("reward_server", "actors", "learner", "cluster")
SETTINGS = "submitted.toml"
"""The resolved configuration, in the job's working directory."""
_ROOT = Path(__file__).resolve().parents[1]
_DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_ENDED = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)
_POLL_S = 1.0
_STOP_S = 60.0
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")


class JobError(RuntimeError):
    """The cluster does not answer, refuses, or does not know the job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRow:
    """One job, as lists show it."""

    id: str
    """what the other commands take"""
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED"""
    started: str
    """ISO time in UTC; empty before it started"""
    seconds: float
    """how long it has run, or ran"""
    command: str
    """which of rayward's commands it is; the whole command line of a job that is none"""
    run: str
    """its run directory"""
    entrypoint: str
    """its command line"""
    message: str
    """why it stands as it does, in Ray's words"""


def connect(address: str | None) -> JobSubmissionClient:
    """A client of the cluster's job server: `address`, else RAY_API_SERVER_ADDRESS, else port 8265 of this machine.

    Raises JobError when nobody answers there, or the token is refused.
    """
    with _quiet():
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # as the `ray` command does
    url = address or os.environ.get("RAY_API_SERVER_ADDRESS") or _DEFAULT_ADDRESS
    try:
        return JobSubmissionClient(url)
    except Exception as error:  # requests, Ray and its authentication each raise their own
        raise JobError(_no_answer(url, error)) from error


def _no_answer(url: str, error: Exception) -> str:
    text = str(error)
    if "401" in text or "403" in text or "uthenticat" in text:
        return (
            f"the cluster at {url} refuses this token. Remedy: have the cluster's token in ~/.ray/auth_token (0600) "
            "or in RAY_AUTH_TOKEN"
        )
    return (
        f"no Ray job server answers at {url} ({type(error).__name__}). Remedy: name the dashboard of a running "
        "cluster, --address http://HOST:8265, or start one with `ray start --head`"
    )


@contextlib.contextmanager
def shipment(settings: BaseModel | None, include: Sequence[Path]) -> Iterator[Path]:
    """A folder with the four packages, the settings if there are any, and `include`: the job's working directory.

    Bytecode, caches and hidden files stay behind. Raises JobError for an included path that does not exist or has a
    name that is taken.
    """
    with tempfile.TemporaryDirectory(prefix="rayward-job-") as name:
        folder = Path(name)
        for package in PACKAGES:
            shutil.copytree(_ROOT / package, folder / package, ignore=_LEFT_OUT)
        if settings is not None:
            save_toml(settings, folder / SETTINGS)
        for path in include:
            target = folder / path.name
            if not path.exists() or target.exists():
                reason = "is taken by rayward's own code" if path.exists() else "does not exist"
                raise JobError(f"--include {path}: {path.name} {reason}. Remedy: name another file or folder")
            if path.is_dir():
                shutil.copytree(path, target, ignore=_LEFT_OUT)
            else:
                shutil.copy2(path, target)
        yield folder


def submit(
    client: JobSubmissionClient,
    words: Sequence[str],
    run_dir: Path,
    settings: BaseModel | None = None,
    include: Sequence[Path] = (),
) -> str:
    """Start `rayward words` on the cluster and return the job's id.

    `settings` is a configuration for the job to read. Raises JobError for a run directory that the job would
    lose, and what the cluster says when it does not take the job.
    """
    if not run_dir.is_absolute():
        raise JobError(
            f"--run {run_dir} is relative, and a job's own folder is deleted with the job. Remedy: name an absolute "
            "path on storage that every machine of the cluster sees"
        )
    # The run directory first: a command without settings takes the first word that stands alone for one.
    command = ["python", "-m", "cluster.cli", words[0], "--run", str(run_dir), *words[1:]]
    if settings is not None:
        command += ["--config", SETTINGS]
    metadata = {"rayward_command": words[0], "rayward_run": str(run_dir)}
    with shipment(settings, include) as folder, _quiet():
        try:
            return client.submit_job(
                entrypoint=shlex.join(command), runtime_env={"working_dir": str(folder)}, metadata=metadata
            )
        except Exception as error:
            raise JobError(f"the cluster did not take the job: {error}") from error


def jobs(client: JobSubmissionClient) -> list[JobRow]:
    """Every submitted job that the cluster remembers, newest first."""
    found = [row(job) for job in client.list_jobs() if job.submission_id]
    return sorted(found, key=lambda job: job.started, reverse=True)


def job(client: JobSubmissionClient, name: str) -> JobRow:
    """One job. Raises JobError for an id that the cluster does not know."""
    try:
        return row(client.get_job_info(name))
    except RuntimeError as error:
        known = ", ".join(one.id for one in jobs(client)[:5]) or "none"
        raise JobError(f"the cluster knows no job {name!r}. Its newest jobs: {known}") from error


def row(details: Any) -> JobRow:
    """A job as lists show it, of Ray's JobDetails (times in milliseconds)."""
    start, end = details.start_time, details.end_time
    seconds = ((end or time.time() * 1000) - start) / 1000 if start else 0.0
    started = datetime.fromtimestamp(start / 1000, UTC).isoformat(timespec="seconds") if start else ""
    return JobRow(
        id=details.submission_id,
        status=str(details.status),
        started=started,
        seconds=max(seconds, 0.0),
        command=(details.metadata or {}).get("rayward_command", details.entrypoint),
        run=(details.metadata or {}).get("rayward_run", ""),
        entrypoint=details.entrypoint,
        message=(details.message or "").strip(),
    )


def follow(client: JobSubmissionClient, name: str, out: TextIO = sys.stdout) -> JobRow:
    """Print a job's log until the job ends; Ctrl-C ends the following, not the job."""
    job(client, name)

    async def tail() -> None:
        async for text in client.tail_job_logs(name):
            out.write(text)
            out.flush()

    with _quiet():
        asyncio.run(tail())
    end = time.monotonic() + _STOP_S
    while (last := job(client, name)).status not in _ENDED and time.monotonic() < end:
        time.sleep(_POLL_S)  # the log ends a moment before the status says so
    return last


def logs(client: JobSubmissionClient, name: str) -> str:
    """What a job has printed so far."""
    job(client, name)
    return client.get_job_logs(name)


def stop(client: JobSubmissionClient, name: str, deadline_s: float = _STOP_S) -> JobRow:
    """Ask a job to stop (SIGTERM, so that it leaves nothing behind) and wait until it has.

    Raises JobError when it has not within `deadline_s` seconds.
    """
    if job(client, name).status in _ENDED:
        return job(client, name)
    client.stop_job(name)
    end = time.monotonic() + deadline_s
    while (last := job(client, name)).status not in _ENDED:
        if time.monotonic() > end:
            raise JobError(f"job {name} was asked to stop {deadline_s:g} s ago and is still {last.status}")
        time.sleep(_POLL_S)
    return last


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Ray's client logs uploads, connections and its token to the console; keep its errors only."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
