import asyncio
import json
import re
import urllib.request
from pathlib import Path

import pytest

from cluster.handle import LIVE, ActorDied, local
from cluster.prometheus import Exporter
from reward_server.address import free_port

DASHBOARD = Path(__file__).parents[2] / "cluster" / "grafana.json"


class Worker:
    async def wait(self, release: asyncio.Event) -> None:
        await release.wait()

    async def die(self) -> None:
        raise ActorDied("reward", "gone")


@pytest.fixture
def exporter():
    for handle in list(LIVE):
        LIVE.discard(handle)
    exporter = Exporter("mine", "127.0.0.1", free_port("127.0.0.1"))
    yield exporter
    exporter.close()


def scrape(exporter):
    with urllib.request.urlopen(f"http://127.0.0.1:{exporter.port}/metrics", timeout=10) as answer:
        return answer.read().decode()


def test_a_scrape_has_the_newest_values(exporter):
    exporter.step("ppo", 1, {"kl/mean": 0.5})
    exporter.step("ppo", 2, {"kl/mean": 1.5})
    page = scrape(exporter)
    assert 'rayward_metric{name="kl/mean",run="mine",stage="ppo"} 1.5' in page
    assert 'rayward_step{run="mine",stage="ppo"} 2.0' in page


def test_a_scrape_says_what_each_process_is_doing(exporter):
    async def scenario():
        busy, dead, release = local(Worker(), "generator-1"), local(Worker(), "reward"), asyncio.Event()
        call = asyncio.create_task(busy.wait(release))
        with pytest.raises(ActorDied):
            await dead.die()
        page = await asyncio.to_thread(scrape, exporter)
        release.set()
        await call
        busy.kill()
        dead.kill()
        return page

    page = asyncio.run(scenario())
    labels = '{kind="generator",process="generator-1",run="mine"}'
    assert f"rayward_process_open_calls{labels} 1.0" in page
    assert f"rayward_process_alive{labels} 1.0" in page
    assert float(re.findall(rf"oldest_wait_seconds{re.escape(labels)} (\S+)", page)[0]) > 0
    assert 'rayward_process_alive{kind="reward",process="reward",run="mine"} 0.0' in page
    assert 'rayward_process_answered_total{kind="reward",process="reward",run="mine"} 1.0' in page


def test_a_port_that_is_taken_is_told(exporter):
    with pytest.raises(ValueError, match=rf"tracking.prometheus_port = {exporter.port} cannot be opened"):
        Exporter("other", "127.0.0.1", exporter.port)


def test_the_dashboard_asks_for_what_is_exported(exporter):
    exporter.step("ppo", 1, {"kl/mean": 0.5})
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    asked = set(re.findall(r"\b(rayward_(?:metric|step|process)\w*)", " ".join(expressions)))
    offered = set(re.findall(r"^# TYPE (\S+)", scrape(exporter), re.MULTILINE))
    assert asked <= offered | {"rayward_process_answered_total"}
    assert {"rayward_metric", "rayward_process_oldest_wait_seconds"} <= asked
