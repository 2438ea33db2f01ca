"""What Prometheus can scrape from the controller: every metric of the run, and of every process what it takes and does.

Ray exports figures of the machines, and the reward service has /metrics of its own; cluster/deploy/grafana.json is a
dashboard over all three.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.runtime.health import Health, Monitor

_COUNTERS = {"tokens": "Tokens sampled", "scored": "Responses scored"}
_FACTS = _COUNTERS | {
    "version": "Version of the weights, of the buffer for the controller",
    "running": "Sequences that are sampled",
    "waiting": "Sequences or posts that wait",
    "most": "Sequences that can be sampled at a time",
    "paused": "1 while it stands still for new weights",
    "out": "Samples under way",
    "ready": "Samples that wait for their batch",
    "iterations": "Iterations in all",
}
"""What processes tell of themselves."""


class Exporter(Collector):
    """What is scraped of one run, in a registry of its own; processes and waits as they are at the moment."""

    def __init__(self, run: str, monitor: Monitor) -> None:
        """`run` labels everything; `monitor` knows the processes."""
        self._run = run
        self._monitor = monitor
        self.registry = registry = CollectorRegistry()
        self._values = Gauge("rayward_metric", "Newest value of a metric", ["run", "stage", "name"], registry=registry)
        self._steps = Gauge("rayward_step", "Newest step", ["run", "stage"], registry=registry)
        self._alerts = Counter("rayward_alerts", "Alerts by kind", ["run", "kind"], registry=registry)
        registry.register(self)

    def step(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Take the newest values."""
        self._steps.labels(self._run, stage).set(step)
        for name, value in metrics.items():
            self._values.labels(self._run, stage, name).set(value)

    def alert(self, kind: str) -> None:
        """Count an alert."""
        self._alerts.labels(self._run, kind).inc()

    def collect(self) -> Iterator[Metric]:
        """Called by the registry at a scrape."""
        found: dict[str, Any] = {}
        for one in self._monitor.processes():
            for name, text, value in _figures(one):
                kind = CounterMetricFamily if name in ("answered", "cpu_seconds", *_COUNTERS) else GaugeMetricFamily
                labels = ["run", "process", "kind"]
                family = found.setdefault(name, kind(f"rayward_process_{name}", text, labels=labels))
                if value is not None:
                    family.add_metric([self._run, one.name, re.sub(r"[-0-9.]+$", "", one.name)], value)
        yield from found.values()
        waits = GaugeMetricFamily("rayward_wait_seconds", "How long it has waited for somebody", labels=["run", "who"])
        for who, seconds in {one.who: one.seconds for one in reversed(self._monitor.waits.open)}.items():
            waits.add_metric([self._run, who], seconds)
        paused = GaugeMetricFamily("rayward_paused", "1 while the run waits for scores", labels=["run"])
        paused.add_metric([self._run], float(self._monitor.paused is not None))
        yield from (waits, paused)


def _figures(one: Health) -> Iterator[tuple[str, str, float | None]]:
    """(name, help, value) of a process."""
    yield "alive", "1 unless it was found dead", 0.0 if one.died else 1.0
    yield "open_calls", "Calls without an answer yet", len(one.waiting)
    oldest = one.waiting[0][1] if one.waiting else 0.0
    yield "oldest_wait_seconds", "Age of the oldest call without an answer", oldest
    yield "answered", "Calls answered", one.answered
    yield "silent_seconds", "For how long it has not said how it is", one.silent_s
    if stats := one.last:
        yield "resident_bytes", "Main memory, with its children's", stats.resident
        yield "gpu_bytes", "Memory in use on its GPUs, by anybody", stats.gpu
        yield "cpu_seconds", "Processor seconds, with those of the children that live", stats.cpu_s
        yield from ((name, _FACTS[name], value) for name, value in stats.facts.items() if name in _FACTS)


@contextlib.contextmanager
def serving(exporter: Exporter, host: str, port: int) -> Iterator[None]:
    """Answer GET /metrics on `host:port` until the block ends. Raises ValueError when the port is taken."""
    try:
        server, thread = start_http_server(port, host, exporter.registry)
    except OSError as error:
        raise ValueError(
            f"tracking.prometheus_port = {port} cannot be opened on {host} ({error.strerror}). Remedy: another port, "
            "or 0 for none"
        ) from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5.0)
