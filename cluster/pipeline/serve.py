"""The reward service on its own: one copy under uvicorn, or replicas on Ray Serve."""

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.pipeline.stage import Stage
from reward_server.address import free_port, is_loopback
from reward_server.bearer import FILE_VARIABLE, TOKEN_VARIABLE, bearer_token
from reward_server.config import LoadingConfig, ServeConfig, SourceConfig

_APP = "rewards"


class Serve(Stage):
    """Serves scores over HTTP until Ctrl-C or SIGTERM."""

    name = "serve"
    group = "operate"
    purpose = "Serve scores over HTTP to others, from a reward model, a function, rules, or a mix of them."
    files = "Reads RUN/reward, or what scoring.parts names. Answers /score, /health, /metrics and /docs."
    example = "rayward serve --run runs/mine --serve.port 8700 --serve.replicas 2"
    sections = ("models", "cluster", "scoring", "serve", "tracking")
    reads = ("models.reward",)
    resumes = False

    def check(self) -> Path | None:
        """Raises ValueError for a token that cannot be used, off the loopback without one, and without the model."""
        check_token(self.job.config.serve)
        return self.job.reward_to_serve

    async def run(self, processes: Any, inputs: Path | None) -> None:
        from cluster.runtime.session import start_ray

        config, job = self.job.config.serve, self.job
        with contextlib.ExitStack() as stack:
            if config.on_ray:
                cpus = max(config.replicas, config.max_replicas or 1) * config.threads
                stack.enter_context(start_ray(job.config.cluster.address, cpus=cpus, log_dir=job.run_dir / "logs"))
                url = stack.enter_context(replicas(config, job.config.scoring, inputs, job.config.models))
            else:
                url = stack.enter_context(_alone(config, job.config.scoring, inputs, job.config.models))
            job.tracker.console.line(
                f"scores are served at {url}/score; {url}/docs describes it; /health and /metrics say how it is"
            )
            job.tracker.console.line("Ctrl-C ends it")
            await asyncio.Event().wait()


def check_token(config: ServeConfig) -> None:
    """Raise ValueError for a token that cannot be used, and off the loopback without one."""
    if bearer_token() is None and not is_loopback(config.host):
        raise ValueError(
            f"serve.host = {config.host!r} can be reached by others and {TOKEN_VARIABLE} is not set. Remedy: set it to "
            f"a secret, or {FILE_VARIABLE} to a file with it, where the cluster's machines start Ray too, or serve on "
            "127.0.0.1"
        )


@contextlib.contextmanager
def replicas(
    config: ServeConfig, source: SourceConfig, reward_model: Path | None, loading: LoadingConfig
) -> Iterator[str]:
    """Copies of the service behind one URL, on the Ray session that is there.

    Raises RuntimeError when the copies do not start.
    """
    import torch
    from ray import serve

    from cluster.runtime.actor import python_path
    from reward_server.app import create_app
    from reward_server.sources import build_source

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    port = config.port or free_port(config.host)

    def app() -> Any:
        """Runs in each copy: the token is that machine's, and travels nowhere."""
        torch.set_num_threads(config.threads)
        return create_app(build_source(source, reward_model, loading), bearer_token(), config.limits)

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
def _alone(
    config: ServeConfig, source: SourceConfig, reward_model: Path | None, loading: LoadingConfig
) -> Iterator[str]:
    import torch

    from reward_server.app import serve
    from reward_server.sources import build_source

    torch.set_num_threads(config.threads)
    built = build_source(source, reward_model, loading)
    server = serve(built, config.host, config.port, token=bearer_token(), limits=config.limits)
    try:
        yield server.url
    finally:
        server.close()
