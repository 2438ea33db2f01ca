"""The reward service as one object that a process of its own can hold: a source behind the HTTP app."""

from pathlib import Path

import torch

from reward_server.address import own_address
from reward_server.app import ScoreServer, serve
from reward_server.batching import PROBE
from reward_server.bearer import bearer_token
from reward_server.config import UNTRUSTED, LoadingConfig, SourceConfig
from reward_server.sources import build_source


class RewardService:
    """Loads the configured sources and serves them for as long as its process lives."""

    def __init__(
        self, config: SourceConfig, model_path: Path | None, threads: int, loading: LoadingConfig = UNTRUSTED
    ) -> None:
        self.config = config
        self.model_path = model_path
        self.threads = threads
        self.loading = loading
        self._server: ScoreServer | None = None

    def start(self, loopback: bool, token: str | None = None) -> str:
        """Load, score a probe, and listen on a free port; returns the URL.

        Clients must send `token`, else that of the environment; off the loopback one is needed.

        Raises ValueError for a source that cannot load, or a missing token, and what the source raises: a function that
        fails is told at once, not by a client that tries again for minutes.
        """
        torch.set_num_threads(self.threads)
        source = build_source(self.config, self.model_path, self.loading)
        source.score([PROBE])
        self._server = serve(source, host=own_address(loopback), token=token or bearer_token())
        return self._server.url

    def stats(self) -> dict[str, float]:
        """What a run's status shows, once it serves: see ScoreServer."""
        return self._server.stats() if self._server else {}
