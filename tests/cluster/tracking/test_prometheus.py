import asyncio
import json
import re
import urllib.request
from pathlib import Path

import pytest

from cluster.runtime.health import ActorDied, Health, Monitor, measure
from cluster.tracking.prometheus import Exporter, serving
from reward_server.address import free_port
from reward_server.app import serve
from reward_server.config import PartConfig, SourceConfig
from reward_server.sources import build_source

DASHBOARD = Path(__file__).parents[3] / "cluster" / "deploy" / "grafana.json"


class Worker:
    """Says of itself what generators, reward replicas and the controller do."""

    def stats(self) -> dict[str, float]:
        gauges = dict.fromkeys(("version", "running", "waiting", "most", "paused", "out", "ready", "iterations"), 3.0)
        return {**gauges, "tokens": 640.0, "scored": 12.0}


async def well():
    return measure(Worker())


@pytest.fixture
def monitor():
    return Monitor()


@pytest.fixture
def exporter(monitor):
    return Exporter("mine", monitor)


def scrape(exporter):
    port = free_port("127.0.0.1")
    with (
        serving(exporter, "127.0.0.1", port),
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer,
    ):
        return answer.read().decode()


def test_a_scrape_has_the_newest_values(exporter):
    exporter.step("ppo", 1, {"kl/mean": 0.5})
    exporter.step("ppo", 2, {"kl/mean": 1.5})
    page = scrape(exporter)
    assert 'rayward_metric{name="kl/mean",run="mine",stage="ppo"} 1.5' in page
    assert 'rayward_step{run="mine",stage="ppo"} 2.0' in page


def test_a_scrape_says_what_each_process_is_doing(exporter, monitor):
    async def scenario():
        busy, dead = Health("generator-1", well), Health("reward-0", well)
        monitor.health |= {busy, dead}
        with pytest.raises(ActorDied), dead.call("score"):
            raise ActorDied("reward-0", "gone")
        await busy.attend(5.0)
        with busy.call("generate"), monitor.waits.reported("the learner", lambda: "batch 3"):
            return await asyncio.to_thread(scrape, exporter)

    page = asyncio.run(scenario())
    labels = '{kind="generator",process="generator-1",run="mine"}'
    assert f"rayward_process_open_calls{labels} 1.0" in page
    assert f"rayward_process_alive{labels} 1.0" in page
    assert f"rayward_process_version{labels} 3.0" in page
    assert f"rayward_process_tokens_total{labels} 640.0" in page
    assert float(re.findall(rf"resident_bytes{re.escape(labels)} (\S+)", page)[0]) > 2**20
    assert float(re.findall(rf"cpu_seconds_total{re.escape(labels)} (\S+)", page)[0]) > 0
    assert re.search(r'rayward_wait_seconds{run="mine",who="the learner"} \d', page)
    assert 'rayward_paused{run="mine"} 0.0' in page
    assert float(re.findall(rf"oldest_wait_seconds{re.escape(labels)} (\S+)", page)[0]) > 0
    assert 'rayward_process_alive{kind="reward",process="reward-0",run="mine"} 0.0' in page
    assert 'rayward_process_answered_total{kind="reward",process="reward-0",run="mine"} 1.0' in page


def test_a_port_that_is_taken_is_told(exporter):
    port = free_port("127.0.0.1")
    told = rf"tracking.prometheus_port = {port} cannot be opened"
    with serving(exporter, "127.0.0.1", port), pytest.raises(ValueError, match=told):
        serving(exporter, "127.0.0.1", port).__enter__()


def test_the_dashboard_asks_for_what_is_exported(exporter, monitor):
    exporter.step("ppo", 1, {"kl/mean": 0.5})
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    asked = set(re.findall(r"\b(rayward_\w+)", " ".join(expressions)))
    ours, reward = ({name for name in asked if name.startswith("rayward_reward_") is its} for its in (False, True))

    async def pages():
        one = Health("generator-1", well)
        monitor.health.add(one)
        await one.attend(5.0)
        exporter.alert("kl")
        with monitor.waits.reported("the learner", lambda: "batch 3"):
            ours = await asyncio.to_thread(scrape, exporter)
        server = serve(build_source(SourceConfig(parts=(PartConfig(name="words", kind="length"),))))
        try:
            url = f"{server.url}/metrics"
            return ours, (await asyncio.to_thread(urllib.request.urlopen, url, timeout=10)).read().decode()
        finally:
            server.close()

    page, service = asyncio.run(pages())
    assert ours <= offered(page)
    assert reward <= offered(service)
    never_plotted = {"rayward_process_iterations", "rayward_process_most", "rayward_process_paused"}
    assert offered(page) - ours <= never_plotted, "of what is exported, this is on no panel"


def offered(page):
    """Names of the series of a page, as a query writes them."""
    found = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)", page, re.MULTILINE):
        found |= {f"{name}_{part}" for part in ("bucket", "sum", "count")} if kind == "histogram" else {name}
    return {name for name in found if name.startswith("rayward_") and not name.endswith("_created")}
