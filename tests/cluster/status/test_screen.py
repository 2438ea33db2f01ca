import io
import math
import time
from typing import Any

import pytest
from rich.console import Console

from cluster.status.screen import load, render, screen, sparkline


def process(name: str, state: str = "working", facts: dict[str, float] | None = None, **more: Any) -> dict[str, Any]:
    vitals = {"at": 1.0, "pid": 7, "node": more.pop("node", "box"), "resident": 812 * 2**20, "cpu_s": 3.0}
    vitals |= {"gpu": more.pop("gpu", None), "doing": more.pop("doing", ""), "doing_s": 12.3, "facts": facts or {}}
    shown = {"name": name, "state": state, "vitals": vitals, "waiting": [], "answered": 3, "died": "", "silent_s": 0.0}
    return {**shown, "cores": 1.25, "rates": {}, **more}


def generator(number: int, state: str = "working", **more: Any) -> dict[str, Any]:
    facts = {"version": 7.0, "running": 17.0, "waiting": 0.0, "most": 64.0, "tokens": 9.0, "paused": 0.0}
    return process(f"generator-{number}", state, facts, rates={"tokens": 310.2}, **more)


def status(*processes: dict[str, Any], **changes: Any) -> dict[str, Any]:
    found = {
        "time": time.time(),
        "started": time.time() - 125,
        "command": "ppo",
        "host": "box",
        "pid": 4242,
        "state": "running",
        "silent_s": 1.0,
        "phases": [{"phase": "ppo: 50 iterations", "stage": "ppo"}],
        "processes": list(processes),
        "waits": [
            {"who": "the learner", "for": "batch 7: 12 of its 64 prompts: 12 at generator-1 for 9 s", "seconds": 9}
        ],
        "alerts": [{"time": time.time() - 300, "kind": "kl", "text": "the KL is 61 nats"}],
        "curves": {"ppo": {"score/mean": {i: math.sin(i / 5) for i in range(40)}, "kl/mean": {1: 0.5, 2: 2.5}}},
        "progress": {"stage": "ppo", "step": 7, "total": 50, "step_s": 9.3, "left_s": 400.0},
    }
    return {**found, **changes}


CONTROLLER = process("controller", "idle", {"version": 7.0, "iterations": 50.0, "out": 64.0, "ready": 128.0})
LEARNER = process("learner-0", "working", {"version": 7.0}, doing="update", waiting=[["update", 12.3]])
REWARD = process("reward-0", "working", {"waiting": 2.0, "scored": 40.0}, rates={"scored": 33.0})
USUAL = (CONTROLLER, LEARNER, generator(0), generator(1), REWARD)


def lines(shown: Any, width: int) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(shown)
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_a_status_says_of_each_process_what_it_does_and_takes_and_who_waits_for_whom():
    shown = lines(render(status(*USUAL), "runs/mine", 100), 100)
    assert shown[0] == "rayward ppo  runs/mine: running on box (pid 4242) for 2 min 05 s"
    assert shown[1] == "ppo: iteration 7 of 50, 9.3 s each, about 6 min 40 s left"
    rows = {line.split()[0]: line.split() for line in shown[4:9]}
    assert rows["controller"][2:] == ["7", "64", "samples", "out,", "128", "ready", "812", "MiB", "1.2"]
    assert rows["learner-0"] == [
        "learner-0",
        "working",
        "7",
        "update",
        "12",
        "s",
        "812",
        "MiB",
        "1.2",
        "update",
        "12",
        "s",
    ]
    assert rows["generator-1"][1:] == ["working", "7", "17", "of", "64,", "310", "tok/s", "812", "MiB", "1.2"]
    assert rows["reward-0"][1:] == ["working", "2", "posts,", "33", "scores/s", "812", "MiB", "1.2"]
    assert shown[10] == "the learner waits for batch 7: 12 of its 64 prompts: 12 at generator-1 for 9 s (9 s)"


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("begun", [True, False])
def test_a_screen_begins_with_what_asks_for_attention(width: int, begun: bool):
    many = (CONTROLLER, LEARNER, *(generator(i) for i in range(40)), generator(41, "silent", silent_s=34.0), REWARD)
    found = status(*many, generator(42, "dead", died="out of memory"))
    if not begun:
        found |= {"processes": [], "waits": [], "alerts": [], "curves": {}, "progress": None, "phases": []}
    shown = lines(screen(found, "runs/mine", width), width)
    assert shown[0].startswith("rayward ppo  runs/mine: running")
    assert max(map(len, shown)) <= width
    if begun:
        top = "\n".join(shown[:24])
        parts = ["iteration 7 of 50", "the learner waits for batch 7", "61 nats", "score/mean", "silent 34 s"]
        assert all(part in top for part in (*parts, "generator-42 is dead: out of memory", "controller")), top
        assert "17 of 64, 310 tok/s" in "\n".join(shown)


def test_gpus_and_machines_are_shown_where_they_tell_something():
    here, there = generator(0, gpu=3 * 2**30), generator(1, gpu=2**29, node="other")
    shown = "\n".join(lines(render(status(here, there), "runs/mine", 120), 120))
    assert "GPU" in shown
    assert "3.0 GiB" in shown
    assert "other" in shown
    alone = "\n".join(lines(render(status(generator(0)), "runs/mine", 120), 120))
    assert "GPU" not in alone
    assert "box" not in alone.split("process", 1)[1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"state": "paused", "paused": {"reason": "HTTP 503", "seconds": 70.0}}, "paused for 1 min 10 s: HTTP 503"),
        ({"state": "killed"}, "the same command with --resume"),
        ({"state": "silent", "silent_s": 90.0}, "silent for 1 min 30 s"),
        ({"progress": None}, "ppo: 50 iterations"),
    ],
)
def test_the_headline_says_how_a_run_stands(changes: dict[str, Any], said: str):
    assert said in "\n".join(lines(render(status(**changes), "runs/mine", 120), 120))


def test_a_load_is_told_in_words():
    waiting = generator(0)
    waiting["vitals"]["facts"] |= {"running": 64.0, "waiting": 8.0}
    assert load(waiting) == "64 of 64 + 8 waiting, 310 tok/s"
    waiting["vitals"]["facts"] |= {"paused": 1.0}
    assert load(waiting) == "72 stand still"
    assert load({**LEARNER, "vitals": None}) == ""


def test_a_sparkline_spans_its_values():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 10) == "▁▂▃▄▅▆▇█"
    assert sparkline([5, 5], 10) == "▁▁"
    assert sparkline([0, 2, 3, 5, 8, 6], 3) == "▁▅█", "means of 1, 4 and 7"
