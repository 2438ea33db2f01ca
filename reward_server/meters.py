"""What Prometheus is told of one reward server."""

import os
import socket

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from reward_server.batching import Batching, Turn

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Meters:
    """Counts of one server. Every series carries the label `replica`, since copies answer under one address."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._replica = f"{socket.gethostname()}:{os.getpid()}"
        posts = self._counter("posts", "Posts to /score by HTTP status", "status")
        refused = self._counter("refused", "Posts to /score that got no scores, by reason", "reason")
        self._posts, self._refused = posts, refused
        self._responses = self._counter("responses", "Responses that were scored").labels(self._replica)
        self._tokens = self._counter("tokens", "Tokens that reward models read").labels(self._replica)
        self._computing = self._counter("computing_seconds", "Seconds that the source computed").labels(self._replica)
        self._seconds = self._histogram("seconds", "Seconds from a post to its answer", _SECONDS)
        self._batches = self._histogram(
            "batch_responses", "Responses that were scored at once", [2**n for n in range(0, 13, 2)]
        )

    def watch(self, scoring: Batching) -> None:
        """Tell what waits and what is known whenever it is asked for."""
        self._gauge("waiting_posts", "Posts computed or waiting").set_function(lambda: scoring.waiting)
        self._gauge("waiting_responses", "Responses that wait for their scores").set_function(lambda: scoring.responses)
        self._gauge("known_ids", "Request ids that are answered from memory").set_function(lambda: scoring.known)

    def post(self, status: int, seconds: float, reason: str | None) -> None:
        """Count a post to /score that was answered; `reason` is why it got no scores."""
        self._posts.labels(self._replica, status).inc()
        self._seconds.observe(seconds)
        if reason is not None:
            self._refused.labels(self._replica, reason).inc()

    def turn(self, turn: Turn) -> None:
        """Count what was computed at once."""
        self._responses.inc(turn.responses)
        self._tokens.inc(turn.tokens)
        self._computing.inc(turn.seconds)
        if turn.responses:
            self._batches.observe(turn.responses)

    def page(self) -> bytes:
        """Everything, in Prometheus's text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"rayward_reward_{name}", text, ["replica", *labels], registry=self._registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"rayward_reward_{name}", text, ["replica"], registry=self._registry).labels(self._replica)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] | list[int]) -> Histogram:
        histogram = Histogram(f"rayward_reward_{name}", text, ["replica"], buckets=buckets, registry=self._registry)
        return histogram.labels(self._replica)
