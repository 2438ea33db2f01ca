import asyncio
import contextlib
import io
import json
import os
import subprocess
import time

import pytest
from rich.console import Console

from cluster.runtime.health import ActorDied, Health, Monitor, measure
from cluster.runtime.signals import Stopped
from cluster.status.screen import render, screen
from cluster.status.snapshot import FILE, read, reporting, snapshot
from reward_server.client import Pause, RewardClient
from tests.full_disk import fill, small_disk


async def well():
    return measure(None, family=False)


def processes(monitor):
    return snapshot("ppo", monitor)["processes"]


def shown(run_dir, curves=False):
    console = Console(width=120, record=True, file=io.StringIO())
    found = read(run_dir)
    console.print(screen(found, "mine", 120) if curves else render(found, "mine", 120))
    return console.export_text()


def test_a_call_without_an_answer_is_what_the_run_waits_for():
    monitor, health = Monitor(), Health("learner-0", well)
    monitor.health.add(health)
    with health.call("update"):
        time.sleep(0.05)
        (during,) = processes(monitor)
    (after,) = processes(monitor)
    ((method, seconds),) = during["waiting"]
    assert (during["name"], during["state"], method, during["answered"]) == ("learner-0", "working", "update", 0)
    assert 0.04 < seconds < 5
    assert (after["state"], after["waiting"], after["answered"]) == ("idle", [], 1)


def test_a_process_that_is_found_dead_says_why():
    monitor, health = Monitor(), Health("learner-0", well)
    monitor.health.add(health)
    with pytest.raises(ActorDied), health.call("update"):
        raise ActorDied("learner-0", "out of memory")
    (one,) = processes(monitor)
    assert (one["state"], one["died"]) == ("dead", "out of memory")


def test_what_a_run_says_of_itself_has_no_secrets_nor_what_a_terminal_obeys(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "canary-0123456789abcdef")
    monitor, client = Monitor(), RewardClient("http://127.0.0.1:1")
    monitor.reward_clients.add(client)
    client.paused = Pause(since=time.time(), reason="canary-0123456789abcdef\x1b[2J")
    with reporting(tmp_path, "ppo", monitor):
        assert "canary" not in (tmp_path / FILE).read_text()
        (tmp_path / "alerts.jsonl").write_text(json.dumps({"time": time.time(), "text": "odd\x1b\u202e"}) + "\n")
        for curves in (False, True):
            assert "[HF_TOKEN]\\x1b[2J" in shown(tmp_path, curves)
        assert "odd\\x1b\\u202e" in shown(tmp_path, curves=True)


@pytest.mark.parametrize(
    ("error", "ended"),
    [(None, "done"), (ValueError(), "failed"), (Stopped(143, "SIGTERM"), "stopped"), (Stopped(1, "no Ray"), "failed")],
)
def test_the_file_says_how_the_run_ended(tmp_path, error, ended):
    expected = pytest.raises(type(error)) if error else contextlib.nullcontext()
    with expected, reporting(tmp_path, "ppo", Monitor()):
        assert read(tmp_path)["state"] == "running"
        if error:
            raise error
    assert read(tmp_path)["state"] == ended
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_the_file_is_kept_up_to_date(tmp_path):
    with reporting(tmp_path, "ppo", Monitor(), interval_s=0.02):
        first = read(tmp_path)["time"]
        end = time.monotonic() + 10
        while read(tmp_path)["time"] == first:
            assert time.monotonic() < end
            time.sleep(0.01)


def write(run_dir, monitor=None, **changes):
    (run_dir / FILE).write_text(json.dumps(snapshot("ppo", monitor or Monitor()) | changes))


def test_a_run_whose_process_is_gone_was_killed(tmp_path):
    child = subprocess.Popen(["true"])
    child.wait()
    write(tmp_path, pid=child.pid)
    assert read(tmp_path)["state"] == "killed"
    assert "--resume" in shown(tmp_path)


def test_a_run_on_another_machine_that_says_nothing_is_silent(tmp_path):
    write(tmp_path, host="elsewhere", time=time.time() - 90)
    assert read(tmp_path)["state"] == "silent"
    assert "silent for 1 min 30 s" in shown(tmp_path)


def test_a_full_disk_does_not_stop_the_run(tmp_path):
    folder = tmp_path / "gone"
    with reporting(folder, "ppo", Monitor()):  # the folder does not exist, so nothing can be written
        pass


def test_what_is_no_run_directory_is_told(tmp_path):
    with pytest.raises(ValueError, match="no command has run in"):
        read(tmp_path)


def test_the_curves_are_of_the_newest_stage_and_of_the_last_try_of_a_step(tmp_path):
    write(tmp_path)
    rows = [
        {"stage": "sft", "step": 1, "sft/loss": 3.0},
        *({"stage": "ppo", "step": step, "score/mean": float(step), "progress/total": 9.0} for step in (1, 2, 3)),
        {"stage": "ppo", "step": 3, "score/mean": 8.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"stage": "pp')
    assert read(tmp_path)["curves"]["ppo"]["score/mean"] == {1: 1.0, 2: 2.0, 3: 8.0}
    text = shown(tmp_path, curves=True)
    assert "▁▂█" in text
    assert "of 9" in text
    assert "sft" not in text


def test_how_far_it_is_comes_of_the_buffer_or_of_the_metrics_and_the_time_left_of_the_last_steps(tmp_path):
    def row(step, when, stage="ppo"):
        return {"stage": stage, "step": step, "time": when, "score/mean": 1.0, "progress/total": 9.0}

    write(tmp_path, processes=[])
    rows = [row(5, 0.0, "sft"), row(1, 100.0), row(2, 110.0), row(2, 111.0), row(3, 500.0), row(4, 510.0)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = {"stage": "ppo", "step": 4, "total": 9, "step_s": 10.0, "left_s": 50.0}  # a pause is no step
    assert read(tmp_path)["progress"] == expected
    buffer = {"name": "controller", "vitals": {"facts": {"version": 0.0, "iterations": 7.0}}}
    write(tmp_path, processes=[buffer], phases=[{"phase": "x", "stage": "ppo-noptx"}])
    assert read(tmp_path)["progress"] == {
        "stage": "ppo-noptx",
        "step": 0,
        "total": 7,
        "step_s": None,
        "left_s": None,
    }


def test_a_phase_and_a_wait_are_told_while_they_last():
    monitor = Monitor()

    async def scenario():
        with monitor.phase("load networks", "ppo"), monitor.waits.reported("the learner", lambda: "batch 3"):
            return snapshot("ppo", monitor)

    during, after = asyncio.run(scenario()), snapshot("ppo", monitor)
    assert during["phases"] == [{"phase": "load networks", "stage": "ppo"}]
    assert [(wait["who"], wait["for"]) for wait in during["waits"]] == [("the learner", "batch 3")]
    assert (after["phases"], after["waits"], after["paused"]) == ([], [], None)


def test_a_run_without_scores_is_paused(tmp_path):
    monitor, client = Monitor(), RewardClient("http://127.0.0.1:1")
    monitor.reward_clients.add(client)
    client.paused = Pause(since=time.time() - 70, reason="HTTP 503")
    write(tmp_path, monitor)
    found = read(tmp_path)
    assert found["state"] == "paused"
    assert found["paused"]["reason"] == "HTTP 503"
    assert 69 < found["paused"]["seconds"] < 75


class Stuck(Health):
    """Of a process that answers nothing about itself from some time on."""

    def __init__(self, name):
        super().__init__(name, self.say)
        self.answers = 2

    async def say(self):
        self.answers -= 1
        if self.answers < 0:
            await asyncio.sleep(3600)
        return await well()


def test_every_process_is_asked_again_and_again_and_one_that_falls_silent_is_told(monkeypatch):
    monkeypatch.setattr("cluster.runtime.health.SILENT_S", 0.3)
    monitor, busy = Monitor(), Health("generator-10", well)
    monitor.health |= {busy, Stuck("generator-9")}

    async def scenario():
        async with monitor.attending(every_s=0.05):
            with busy.call("update"):
                await asyncio.sleep(0.15)
                early = processes(monitor)
                await asyncio.sleep(0.6)
                return early, processes(monitor)

    early, late = asyncio.run(scenario())
    assert json.loads(json.dumps(late)) is not None
    assert [one["name"] for one in late] == ["controller", "generator-9", "generator-10"]
    assert [one["state"] for one in late] == ["idle", "silent", "working"]
    assert "silent" not in [one["state"] for one in early]
    silent, talking = late[1:]
    assert 0.3 < silent["silent_s"] < 5
    assert (talking["silent_s"], talking["vitals"]["pid"]) == (0.0, os.getpid())
    assert talking["cores"] is not None
    assert [one["name"] for one in processes(monitor)] == ["generator-9", "generator-10"]


def test_a_full_disk_does_not_hide_that_the_run_is_paused(tmp_path):
    with small_disk(tmp_path):
        monitor = Monitor()
        with reporting(tmp_path, "ppo", monitor, interval_s=0.02):
            fill(tmp_path / "rest")
            monitor.disk.lacks_room(monitor, OSError("the disk is full"))
            end = time.monotonic() + 10
            while not (paused := read(tmp_path)["paused"]):
                assert time.monotonic() < end
                time.sleep(0.05)
        assert paused["reason"] == "the disk is full"
        assert read(tmp_path)["state"] == "done"
