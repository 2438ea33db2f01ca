import asyncio
import contextlib
import io
import json
import subprocess
import time

import pytest
from rich.console import Console

from cluster.handle import LIVE, ActorDied, local
from cluster.status import FILE, read, render, reporting, snapshot, sparkline


class Worker:
    """Something to be held by a handle."""

    async def update(self, release: asyncio.Event) -> str:
        await release.wait()
        return "done"

    async def die(self) -> None:
        raise ActorDied("learner-0", "out of memory")


@pytest.fixture(autouse=True)
def no_other_handles():
    for handle in list(LIVE):
        LIVE.discard(handle)


def shown(run_dir, curves=False):
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render(read(run_dir), run_dir, curves))
    return console.export_text()


def test_a_call_without_an_answer_is_what_the_run_waits_for():
    async def scenario():
        handle, release = local(Worker(), name="learner-0"), asyncio.Event()
        call = asyncio.create_task(handle.update(release))
        await asyncio.sleep(0.05)
        (during,) = snapshot("ppo")["processes"]
        release.set()
        await call
        (after,) = snapshot("ppo")["processes"]
        handle.kill()
        return during, after, snapshot("ppo")["processes"]

    during, after, gone = asyncio.run(scenario())
    ((method, seconds),) = during["waiting"]
    assert (during["name"], during["state"], method, during["answered"]) == ("learner-0", "working", "update", 0)
    assert 0.04 < seconds < 5
    assert (after["state"], after["waiting"], after["answered"]) == ("idle", (), 1)
    assert gone == []


def test_a_process_that_is_found_dead_says_why():
    async def scenario():
        handle = local(Worker(), name="learner-0")
        with pytest.raises(ActorDied):
            await handle.die()
        return snapshot("ppo")["processes"]

    (one,) = asyncio.run(scenario())
    assert (one["state"], one["died"]) == ("dead", "out of memory")


@pytest.mark.parametrize(
    ("error", "ended"),
    [(None, "done"), (ValueError, "failed"), (KeyboardInterrupt, "stopped"), (SystemExit, "stopped")],
)
def test_the_file_says_how_the_run_ended(tmp_path, error, ended):
    expected = pytest.raises(error) if error else contextlib.nullcontext()
    with expected, reporting(tmp_path, "ppo"):
        assert read(tmp_path)["state"] == "running"
        if error:
            raise error
    assert read(tmp_path)["state"] == ended
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_the_file_is_kept_up_to_date(tmp_path):
    with reporting(tmp_path, "ppo", interval_s=0.02):
        first = read(tmp_path)["time"]
        end = time.monotonic() + 10
        while read(tmp_path)["time"] == first:
            assert time.monotonic() < end
            time.sleep(0.01)


def write(run_dir, **changes):
    (run_dir / FILE).write_text(json.dumps(snapshot("ppo") | changes))


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
    with reporting(folder, "ppo"):  # the folder does not exist, so nothing can be written
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


def test_a_sparkline_spans_its_values():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([5, 5]) == "▁▁"
