"""Rayward's commands as Ray jobs: submit one to a running cluster, list, follow and stop jobs.

What travels is in `cluster.jobs.package`. The job's driver runs on the cluster, so files and the run directory must be
where the cluster's machines see them. Secrets never travel: the job finds WANDB_API_KEY, HF_TOKEN and the like in the
environment that the cluster's machines were started with.
"""

import asyncio
import contextlib
import logging
import os
import re
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO
from urllib.parse import urlsplit

from pydantic import BaseModel
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from cluster.config.load import ConfigError
from cluster.jobs.package import SETTINGS, contents, sizes, working_dir
from reward_server.redaction import holder, visible

_VARIABLE = "RAY_API_SERVER_ADDRESS"
_DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_CONNECT_S = 10.0
_RECONNECT_S = 120.0
_ENDED = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)
_POLL_S = 1.0
_STOP_S = 60.0


class JobError(RuntimeError):
    """The cluster does not answer, refuses, or does not know the job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRow:
    """One job, as lists show it."""

    id: str
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


def _row(details: JobDetails) -> JobRow:
    """A job of which Ray tells the times in milliseconds."""
    start, end = (details.start_time or 0) / 1000, (details.end_time or 0) / 1000 or time.time()
    metadata = details.metadata or {}
    return JobRow(
        id=visible(details.submission_id or ""),
        status=str(details.status),
        started=datetime.fromtimestamp(start, UTC).isoformat(timespec="seconds") if start else "",
        seconds=max(end - start, 0.0) if start else 0.0,
        command=visible(metadata.get("rayward_command", details.entrypoint)),
        run=visible(metadata.get("rayward_run", "")),
        entrypoint=visible(details.entrypoint),
        message=visible((details.message or "").strip()),
    )


def connect(address: str | None) -> JobSubmissionClient:
    """A client of the cluster's job server: `address`, else RAY_API_SERVER_ADDRESS, else port 8265 of this machine.

    Raises ConfigError for what is no address, JobError when nobody answers there or the token is refused.
    """
    url = address or os.environ.get(_VARIABLE) or _DEFAULT_ADDRESS
    parts = urlsplit(url)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"{url!r} is no address of a dashboard. Remedy: http://HOST:8265, or https:// where it is behind a proxy"
        ) from None
    before = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = url  # Ray's client would take this one, or RAY_ADDRESS, whatever it is told
    try:
        with _quiet():
            maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # as the `ray` command does
            socket.create_connection((parts.hostname, port), timeout=_CONNECT_S).close()
            return JobSubmissionClient(url)
    except Exception as error:  # requests, Ray and its authentication each raise their own
        if re.search("401|403|uthenticat", str(error)):
            raise JobError(
                f"the cluster at {url} refuses this token. Remedy: have the cluster's token in ~/.ray/auth_token "
                "(0600) or in RAY_AUTH_TOKEN"
            ) from error
        raise JobError(
            f"no Ray job server answers at {url} ({type(error).__name__}). Remedy: name the dashboard of a running "
            "cluster, --address http://HOST:8265, or start one with `ray start --head`"
        ) from error
    finally:
        del os.environ[_VARIABLE]
        os.environ.update({} if before is None else {_VARIABLE: before})


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A job before it is submitted."""

    words: tuple[str, ...]
    """the command of rayward and all that it is told"""
    run_dir: Path
    settings: BaseModel | None = None
    """a configuration for it to read"""
    include: tuple[Path, ...] = ()
    """files and folders to send along"""
    id: str | None = None
    """what it shall be called; the cluster makes a name where there is none"""
    cpus: float = 0.0
    """to reserve for the command itself"""

    @property
    def entrypoint(self) -> str:
        """The command line that the cluster runs, in the folder of what was sent."""
        settings = [] if self.settings is None else ["--config", SETTINGS]
        return shlex.join(["python", "-m", "cluster.cli.main", *self.words, *settings])

    @property
    def metadata(self) -> dict[str, str]:
        """What the cluster keeps with the job."""
        return {"rayward_command": self.words[0], "rayward_run": str(self.run_dir)}


def check(order: Order) -> dict[str, int]:
    """The files that the job would carry, with their bytes.

    Raises ConfigError for a run directory that the job would lose, a secret, or more than Ray takes.
    """
    if not order.run_dir.is_absolute():
        raise ConfigError(
            f"--run {order.run_dir} is relative, and a job's own folder is deleted with the job. Remedy: name an "
            "absolute path on storage that every machine of the cluster sees"
        )
    if secret := holder(f"{order.entrypoint} {order.id}"):
        raise ConfigError(
            f"the job is told {secret}, and everybody who may list the cluster's jobs could read it. "
            "Remedy: set it in the environment in which the cluster's machines start Ray"
        )
    return sizes(contents(order.include), order.settings)


def submit(client: JobSubmissionClient, order: Order) -> str:
    """Start a job that `check` has passed on the cluster and return its id.

    Raises JobError with what the cluster says when it does not take the job.
    """
    with working_dir(order.settings, order.include) as folder, _quiet():
        try:
            return client.submit_job(
                entrypoint=order.entrypoint,
                runtime_env={"working_dir": str(folder)},
                metadata=order.metadata,
                submission_id=order.id,
                entrypoint_num_cpus=order.cpus or None,
            )
        except Exception as error:
            if order.id and "already exists" in str(error):
                raise JobError(
                    f"the cluster has a job {order.id!r} already. Remedy: another --id, or `rayward logs {order.id}`"
                ) from error
            raise JobError(f"the cluster did not take the job: {_said(error)}") from error


def _said(error: Exception) -> str:
    """An error of Ray's in a line, without the traceback of the server."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).rstrip(".")


def jobs(client: JobSubmissionClient) -> list[JobRow]:
    """Every submitted job that the cluster remembers, newest first."""
    found = (_row(job) for job in client.list_jobs() if job.submission_id)
    return sorted(found, key=lambda job: job.started, reverse=True)


def job(client: JobSubmissionClient, name: str) -> JobRow:
    """One job. Raises JobError for an id that the cluster does not know."""
    try:
        return _row(client.get_job_info(name))
    except RuntimeError as error:
        if "404" not in str(error) and "does not exist" not in str(error):
            raise JobError(f"the cluster did not say how job {name!r} stands: {_said(error)}") from error
        known = ", ".join(one.id for one in jobs(client)[:5]) or "none"
        raise JobError(f"the cluster knows no job {name!r}. Its newest jobs: {known}") from error


def follow(client: JobSubmissionClient, name: str, out: TextIO = sys.stdout) -> JobRow:
    """Print a job's log until the job ends, over lost connections too; Ctrl-C ends the following, not the job.

    Raises JobError when the cluster has not answered for two minutes.
    """
    job(client, name)
    printed, lost = 0, None

    async def tail() -> None:
        nonlocal printed, lost
        seen = 0  # each connection tells the log from its beginning
        async for text in client.tail_job_logs(name):
            seen += len(text)
            if seen > printed:
                out.write(visible(text[printed - seen :]))
                out.flush()
                printed, lost = seen, None

    while True:
        try:
            with _quiet():
                asyncio.run(tail())
            last, lost = job(client, name), None
            if last.status in _ENDED:
                return last
        except Exception as error:  # aiohttp, requests and Ray each raise their own
            lost = lost or time.monotonic()
            if time.monotonic() - lost > _RECONNECT_S:
                raise JobError(
                    f"the cluster has not answered for {_RECONNECT_S:g} s ({_said(error)}); the job goes on if the "
                    f"cluster does. Remedy: `rayward logs {name} --follow`, once it can be reached"
                ) from error
        time.sleep(_POLL_S)  # the log ends a moment before the status says so


def logs(client: JobSubmissionClient, name: str) -> str:
    """What a job has printed so far."""
    job(client, name)
    return visible(client.get_job_logs(name))


def stop(client: JobSubmissionClient, name: str, deadline_s: float = _STOP_S) -> JobRow:
    """Ask a job to stop (SIGTERM, so that it leaves nothing behind) and wait until it has.

    Raises JobError when it has not within `deadline_s` seconds.
    """
    if job(client, name).status not in _ENDED:
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
