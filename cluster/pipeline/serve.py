"""The reward service on its own: one copy under uvicorn, or replicas on Ray Serve."""

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from ray import serve

from cluster.pipeline.job import Job
from cluster.runtime.actor import python_path
from cluster.runtime.session import start_ray
from reward_server.address import free_port
from reward_server.app import create_app, is_loopback
from reward_server.app import serve as serve_alone
from reward_server.bearer import FILE_VARIABLE, TOKEN_VARIABLE, bearer_token
from reward_server.config import ServeConfig, SourceConfig
from reward_server.sources import build_source

_APP = "rewards"


def run_serve(job: Job, reward_model: Path | None) -> None:
    """Serve scores until Ctrl-C or SIGTERM."""
    config, console = job.config.serve, job.tracker.console
    check_token(config)
    with contextlib.ExitStack() as stack:
        if config.on_ray:
            cpus = max(config.replicas, config.max_replicas or 1) * config.threads
            stack.enter_context(start_ray(job.config.cluster.address, cpus=cpus, log_dir=job.run_dir / "logs"))
            url = stack.enter_context(replicas(config, job.config.scoring, reward_model))
        else:
            url = stack.enter_context(_alone(config, job.config.scoring, reward_model))
        console.line(f"scores are served at {url}/score; {url}/docs describes it; /health and /metrics say how it is")
        console.line("Ctrl-C ends it")
        _until_told()


def check_token(config: ServeConfig) -> None:
    """Raise ValueError for a token that cannot be used, and off the loopback without one."""
    if bearer_token() is None and not is_loopback(config.host):
        raise ValueError(
            f"serve.host = {config.host!r} can be reached by others and {TOKEN_VARIABLE} is not set. Remedy: set it to "
            f"a secret, or {FILE_VARIABLE} to a file with it, where the cluster's machines start Ray too, or serve on "
            "127.0.0.1"
        )


@contextlib.contextmanager
def replicas(config: ServeConfig, source: SourceConfig, reward_model: Path | None) -> Iterator[str]:
    """Copies of the service behind one URL, on the Ray session that is there.

    Raises RuntimeError when the copies do not start.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    port = config.port or free_port(config.host)

    def app() -> Any:
        """Runs in each copy: the token is that machine's, and travels nowhere."""
        torch.set_num_threads(config.threads)
        token = bearer_token()
        return create_app(build_source(source, reward_model, token), token, config.limits)

    scaling = {
        "min_replicas": config.replicas,
        "max_replicas": config.max_replicas,
        "target_ongoing_requests": config.posts_per_replica,
        "upscale_delay_s": config.upscale_s,
        "downscale_delay_s": config.downscale_s,
        # What is looked at must not be older than the decision, nor rarer than a few times.
        "look_back_period_s": min(30.0, config.upscale_s),
        "metrics_interval_s": min(10.0, config.upscale_s / 3),
    }
    service: Any = serve.deployment(serve.ingress(app)())  # its stubs do not know a builder
    deployment = service.options(
        name="scoring",
        max_ongoing_requests=config.limits.max_waiting,
        ray_actor_options={
            "num_cpus": config.threads,
            "num_gpus": config.gpus,
            "runtime_env": {"env_vars": {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": str(config.threads)}},
        },
        **({"autoscaling_config": scaling} if config.max_replicas else {"num_replicas": config.replicas}),
    )
    serve.start(http_options={"host": config.host, "port": port})
    try:
        serve.run(deployment.bind(), name=_APP, route_prefix="/")
        yield f"http://{config.host}:{port}"
    finally:
        serve.shutdown()


@contextlib.contextmanager
def _alone(config: ServeConfig, source: SourceConfig, reward_model: Path | None) -> Iterator[str]:
    torch.set_num_threads(config.threads)
    token = bearer_token()
    server = serve_alone(
        build_source(source, reward_model, token), config.host, config.port, token=token, limits=config.limits
    )
    try:
        yield server.url
    finally:
        server.close()


def _until_told() -> None:
    """Wait for Ctrl-C; SIGTERM raises SystemExit, as the command line has arranged."""
    if threading.current_thread() is threading.main_thread():
        while True:
            signal.pause()
    threading.Event().wait()
