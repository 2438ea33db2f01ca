"""What Prometheus can scrape from the controller: every metric of the run, and what each process is doing.

Ray exports the memory and the processor time of every process itself, and the reward service has /metrics of its own;
cluster/grafana.json is a dashboard over all three.
"""

import re
from collections.abc import Iterator, Mapping
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Gauge, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.handle import LIVE


class Exporter:
    """Serves GET /metrics on `host:port` until it is closed."""

    def __init__(self, run: str, host: str, port: int) -> None:
        """`run` labels everything. Raises ValueError when the port is taken."""
        self._run = run
        self._registry = CollectorRegistry()
        self._values = Gauge(
            "rayward_metric", "Newest value of a metric", ["run", "stage", "name"], registry=self._registry
        )
        self._steps = Gauge("rayward_step", "Newest step", ["run", "stage"], registry=self._registry)
        self._registry.register(_Processes(run))
        try:
            self._server: WSGIServer
            self._server, self._thread = start_http_server(port, host, self._registry)
        except OSError as error:
            raise ValueError(
                f"tracking.prometheus_port = {port} cannot be opened on {host} ({error.strerror}). Remedy: another "
                "port, or 0 for none"
            ) from error

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._server.server_port

    def step(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Take the newest values."""
        self._steps.labels(self._run, stage).set(step)
        for name, value in metrics.items():
            self._values.labels(self._run, stage, name).set(value)

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5.0)


class _Processes(Collector):
    """The processes that the controller holds handles of, as they are at the moment of a scrape."""

    def __init__(self, run: str) -> None:
        self._run = run

    def collect(self) -> Iterator[Metric]:
        labels = ["run", "process", "kind"]
        alive = GaugeMetricFamily("rayward_process_alive", "1 unless it was found dead", labels=labels)
        open_calls = GaugeMetricFamily("rayward_process_open_calls", "Calls without an answer yet", labels=labels)
        wait = GaugeMetricFamily(
            "rayward_process_oldest_wait_seconds", "Age of the oldest call without an answer", labels=labels
        )
        answered = CounterMetricFamily("rayward_process_answered", "Calls answered", labels=labels)
        for handle in list(LIVE):
            values = [self._run, handle.name, re.sub(r"[-0-9.]+$", "", handle.name)]
            calls = handle.waiting
            alive.add_metric(values, 0.0 if handle.died else 1.0)
            open_calls.add_metric(values, len(calls))
            wait.add_metric(values, calls[0][1] if calls else 0.0)
            answered.add_metric(values, handle.answered)
        yield from (alive, open_calls, wait, answered)
