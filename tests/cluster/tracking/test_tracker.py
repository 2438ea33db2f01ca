import io
import json
import logging
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.config.schema import AlertsConfig, TrackingConfig
from cluster.rundir.history import earlier_run
from cluster.runtime.health import Monitor
from cluster.tracking.console import Console
from cluster.tracking.tracker import Tracker
from reward_server.address import free_port
from reward_server.client import Pause, RewardClient
from tests.full_disk import FullDisk


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.axes: list[tuple[str, str]] = []
        self.summary: dict[str, Any] = {}
        self.finished = False

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axes.append((name, step_metric))

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


class FakeWandb:
    """W&B as it should be; tests replace the part that fails."""

    def __init__(self) -> None:
        self.run = FakeRun()
        self.inits: list[dict[str, Any]] = []
        self.Settings = SimpleNamespace
        self.Table = lambda columns, data: (columns, data)
        self.Histogram = lambda values: ("histogram", values)

    def setup(self, settings: Any) -> None:
        pass

    def init(self, **arguments: Any) -> FakeRun:
        self.inits.append(arguments)
        return self.run


def tracker(run_dir: Path, wandb: Any, **config: Any) -> Tracker:
    return Tracker(
        run_dir,
        TrackingConfig(**config),
        "ppo",
        settings={"ppo": {"seed": 0}},
        console=Console(stream=io.StringIO()),
        wandb=wandb,
    )


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_steps_and_phases_are_lines_of_json(tmp_path: Path):
    with tracker(tmp_path, None, mode="disabled") as found:
        found.log("ppo", 1, {"score/mean": 0.5, "loss/policy": float("nan")})
        with found.phase("ppo: 20 iterations", "ppo"):
            time.sleep(0.05)
        with pytest.raises(KeyError), found.phase("save"):
            raise KeyError
    (step,) = rows(tmp_path / "metrics.jsonl")
    assert (step["stage"], step["step"], step["score/mean"]) == ("ppo", 1, 0.5)
    assert step["loss/policy"] != step["loss/policy"]
    assert abs(step["time"] - time.time()) < 60
    first, second = rows(tmp_path / "phases.jsonl")
    assert (first["phase"], first["stage"]) == ("ppo: 20 iterations", "ppo")
    assert 0.05 <= first["seconds"] < 5
    assert (second["phase"], second["stage"]) == ("save", "save")


def test_a_step_is_written_before_log_returns(tmp_path: Path):
    with tracker(tmp_path, None, mode="disabled") as found:
        found.log("sft", 1, {"sft/loss": 1.0})
        assert len(rows(tmp_path / "metrics.jsonl")) == 1


def test_threads_do_not_mix_their_lines(tmp_path: Path):
    with tracker(tmp_path, None, mode="disabled") as found:
        threads = [
            threading.Thread(target=lambda n=n: [found.log("ppo", step, {f"area/{n}": step}) for step in range(50)])
            for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(rows(tmp_path / "metrics.jsonl")) == 200


def test_wandb_gets_every_step_on_the_axis_of_its_stage(tmp_path: Path):
    fake = FakeWandb()
    with tracker(tmp_path / "mine", fake, project="p", tags=("t",)) as found:
        found.log("sft", 7, {"sft/loss": 2.0})
        found.log("ppo", 1, {"score/mean": 0.5})
        found.log("ppo", 2, {"score/mean": 0.6, "staleness/age_0": 0.25, "staleness/age_2": 0.75})
        found.samples("ppo", 2, [{"prompt": "hi", "gold": 1.0}], {"gold": [1.0, 0.5]})
    (start,) = fake.inits
    assert (start["mode"], start["project"], start["tags"]) == ("offline", "p", ["t"])
    assert (start["group"], start["job_type"], start["dir"]) == ("mine", "ppo", str(tmp_path / "mine"))
    assert (start["config"], start["id"]) == ({"ppo": {"seed": 0}}, found.run_id)
    assert start["settings"].silent
    assert fake.run.axes == [("sft/*", "sft/step"), ("ppo/*", "ppo/step")]
    assert fake.run.logged == [
        {"sft/step": 7, "sft/loss": 2.0},
        {"ppo/step": 1, "ppo/score/mean": 0.5},
        {
            "ppo/step": 2,
            "ppo/score/mean": 0.6,
            "ppo/staleness/age_0": 0.25,
            "ppo/staleness/age_2": 0.75,
        },
        {
            "ppo/step": 2,
            "ppo/heldout/samples": (["prompt", "gold"], [["hi", 1.0]]),
            "ppo/heldout/gold_histogram": ("histogram", [1.0, 0.5]),
        },
    ]
    assert fake.run.finished


def test_disabled_does_not_touch_wandb(tmp_path: Path):
    fake = FakeWandb()
    with tracker(tmp_path, fake, mode="disabled") as found:
        found.log("ppo", 1, {"score/mean": 0.5})
    assert fake.inits == []


def test_wandb_that_raises_costs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    fake = FakeWandb()

    def log(values: dict[str, Any]) -> None:
        raise ConnectionError("no route\nto host")

    fake.run.log = log
    with caplog.at_level(logging.WARNING), tracker(tmp_path, fake) as found:
        for step in range(5):
            found.log("ppo", step, {"score/mean": 0.5})
    assert len(rows(tmp_path / "metrics.jsonl")) == 5
    assert [record.message for record in caplog.records] == [
        "W&B failed (ConnectionError: no route). The run goes on, with every step in metrics.jsonl",
        "5 records are not in W&B; metrics.jsonl has every step",
    ]


@pytest.mark.parametrize("error", [RuntimeError("broken"), SystemExit(1), ImportError("no wandb")])
def test_wandb_that_does_not_start_costs_one_warning(
    error: BaseException, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    fake = FakeWandb()

    def init(**arguments: Any) -> FakeRun:
        raise error

    fake.init = init
    with caplog.at_level(logging.WARNING), tracker(tmp_path, fake) as found:
        found.log("ppo", 1, {"score/mean": 0.5})
    first, second = (record.message for record in caplog.records)
    assert first.startswith(f"W&B could not be started ({type(error).__name__}: ")
    assert second == "1 records are not in W&B; metrics.jsonl has every step"


def test_unreachable_wandb_is_offline_under_another_id(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    fake = FakeWandb()
    tried: list[tuple[str, str]] = []

    def init(**arguments: Any) -> FakeRun:
        tried.append((arguments["mode"], arguments["id"]))
        if arguments["mode"] == "online":
            raise TimeoutError("connection refused")
        return fake.run

    fake.init = init
    with caplog.at_level(logging.WARNING), tracker(tmp_path, fake, mode="online") as found:
        found.log("ppo", 1, {"score/mean": 0.5})
    assert [mode for mode, _ in tried] == ["online", "offline"]
    assert tried[0][1] != tried[1][1] == found.run_id
    assert fake.run.logged == [{"ppo/step": 1, "ppo/score/mean": 0.5}]
    (record,) = caplog.records
    assert record.message.startswith("W&B is offline for this run (TimeoutError: connection refused)")


def test_wandb_that_hangs_neither_slows_nor_stops_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    fake = FakeWandb()
    released = threading.Event()

    def log(values: dict[str, Any]) -> None:
        released.wait(20)

    fake.run.log = log
    started = time.monotonic()
    with (
        caplog.at_level(logging.WARNING),
        tracker(tmp_path, fake, queue_size=3, close_deadline_s=0.3) as found,
    ):
        for step in range(100):
            found.log("ppo", step, {"score/mean": 0.5})
        assert time.monotonic() - started < 5
    assert 0.3 <= time.monotonic() - started < 10
    assert len(rows(tmp_path / "metrics.jsonl")) == 100
    first, *_, last = (record.message for record in caplog.records)
    assert first == "W&B is 3 steps behind. The run goes on, with every step in metrics.jsonl"
    # one step hangs, three wait, and the rest is left out
    assert last in (
        "96 records are not in W&B; metrics.jsonl has every step",
        "97 records are not in W&B; metrics.jsonl has every step",
    )
    assert any("did not finish within 0.3 s" in record.message for record in caplog.records)
    released.set()


def test_the_real_wandb_keeps_an_offline_run_without_secrets_and_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    canary = "c0ffee" * 6 + "cafe"
    monkeypatch.setenv("WANDB_API_KEY", canary)
    monkeypatch.delitem(sys.modules, "openai", raising=False)  # vLLM's import of it makes W&B recommend a product
    with tracker(tmp_path, None) as found:
        found.log("ppo", 1, {"score/mean": 0.5})
        found.samples("ppo", 1, [{"prompt": "hi", "gold": 1.0}], {"gold": [1.0]})
    shown = capfd.readouterr()
    assert shown.out + shown.err == ""
    (run,) = (tmp_path / "wandb").glob(f"offline-run-*-{found.run_id}/run-{found.run_id}.wandb")
    end = time.monotonic() + 20
    while b"score/mean" not in run.read_bytes() and time.monotonic() < end:
        time.sleep(0.1)  # W&B's own process writes the last block a moment after it has said that it is done
    assert b"score/mean" in run.read_bytes()
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or canary.encode() not in file.read_bytes(), file


def test_an_alert_goes_to_the_console_a_file_and_wandb(tmp_path: Path):
    fake, alerted = FakeWandb(), []
    fake.run.alert = lambda *told: alerted.append(told)  # pyright: ignore[reportAttributeAccessIssue]
    shown = io.StringIO()
    config = TrackingConfig(alerts=AlertsConfig(kl_above=1.0))
    with Tracker(tmp_path, config, "ppo", console=Console(stream=shown), wandb=fake) as found:
        for step, kl in enumerate((2.0, 0.5, 0.5, 0.5), start=4):
            found.log("ppo", step, {"kl/mean": kl})
    row, over = rows(tmp_path / "alerts.jsonl")
    assert (row["kind"], row["text"][:13], row["over"], over["over"]) == ("kl", "step 4 of ppo", False, True)
    assert "warning: step 4 of ppo: the KL" in shown.getvalue()
    assert "\nstep 7 of ppo: kl is within its bounds again" in shown.getvalue()
    name = f"{tmp_path.name} ppo: kl"
    assert alerted == [(name, row["text"], "WARN"), (f"{name} is over", over["text"], "INFO")]


def test_a_run_that_waits_for_scores_alerts_everywhere_without_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_TOKEN", "canary-0123456789abcdef")
    fake, alerted, stream = FakeWandb(), [], io.StringIO()
    fake.run.alert = lambda *told: alerted.append(told)  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr("cluster.tracking.tracker._TICK_S", 0.02)
    monitor, client = Monitor(), RewardClient("http://127.0.0.1:1")
    monitor.reward_clients.add(client)
    client.paused = Pause(since=time.time(), reason="canary-0123456789abcdef\x1b[2J")
    file, end = tmp_path / "alerts.jsonl", time.monotonic() + 10
    told: dict[str, Any] = {"console": Console(stream=stream), "wandb": fake}
    with told["console"], Tracker(tmp_path, TrackingConfig(), "ppo", monitor=monitor, **told):
        while not file.exists() or not file.read_text().endswith("\n"):
            assert time.monotonic() < end
            time.sleep(0.01)
    (row,) = rows(file)
    assert (row["kind"], row["text"].endswith("gives no scores: [HF_TOKEN]\\x1b[2J")) == ("paused", True)
    assert [text for _, text, _ in alerted] == [row["text"]]
    assert f"warning: {row['text']}" in stream.getvalue()


def test_what_is_logged_after_steps_were_taken_out_is_there(tmp_path: Path):
    with tracker(tmp_path, None, mode="disabled") as found:
        for step in (1, 2, 3):
            found.log("sft", step, {"sft/loss": 1.0})
        assert found.go_on("sft", 2)
        found.log("sft", 3, {"sft/loss": 2.0})
    assert [(row["step"], row["sft/loss"]) for row in rows(tmp_path / "metrics.jsonl")] == [
        (1, 1.0),
        (2, 1.0),
        (3, 2.0),
    ]


def test_metrics_of_a_full_disk_wait_for_room_and_the_run_alerts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    disk, monitor, stream = FullDisk(monkeypatch), Monitor(), io.StringIO()
    monitor.disk.retry_s = 0.02
    monkeypatch.setattr("cluster.tracking.tracker._TICK_S", 0.02)
    told: dict[str, Any] = {"console": Console(stream=stream), "monitor": monitor}
    with told["console"], Tracker(tmp_path, TrackingConfig(mode="disabled"), "ppo", **told) as found:
        found.log("ppo", 1, {"score/mean": 0.25})
        disk.full = True
        found.log("ppo", 2, {"score/mean": 0.5})
        end = time.monotonic() + 10
        while "warning: the run has been paused since" not in stream.getvalue():
            assert time.monotonic() < end
            time.sleep(0.01)
        assert f"{tmp_path}/metrics.jsonl cannot be written (No space left on device)" in stream.getvalue()
        disk.full = False
        while "no longer paused" not in stream.getvalue():
            assert time.monotonic() < end
            time.sleep(0.01)
        found.forget("sft")
        found.log("ppo", 3, {"score/mean": 0.75})
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert [row["over"] for row in rows(tmp_path / "alerts.jsonl")] == [False, True]


def test_prometheus_can_scrape_a_run_while_it_works(tmp_path: Path):
    port = free_port("127.0.0.1")
    with tracker(tmp_path / "mine", None, mode="disabled", prometheus_port=port) as found:
        found.log("ppo", 3, {"score/mean": 0.25})
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            page = answer.read().decode()
    assert 'rayward_metric{name="score/mean",run="mine",stage="ppo"} 0.25' in page


def test_a_sink_that_raises_stops_neither_the_run_nor_the_others(tmp_path: Path):
    with tracker(tmp_path, None, mode="disabled") as found:

        def broken(stage: str, step: int, metrics: Any) -> None:
            raise OSError("gone")

        seen: list[int] = []
        found._sinks[:] = [broken, lambda stage, step, metrics: seen.append(step)]
        found.log("ppo", 1, {"score/mean": 1.0})
        found.log("ppo", 2, {"score/mean": 1.0})
    assert seen == [1, 2]
    assert len(rows(tmp_path / "metrics.jsonl")) == 2


def test_a_resumed_run_goes_on_in_wandb_and_sends_no_step_twice(tmp_path: Path):
    with tracker(tmp_path, FakeWandb()) as found:
        for step in (1, 2, 3):
            found.log("ppo", step, {"score/mean": float(step)})
    known = earlier_run(tmp_path, "ppo")
    assert known == found.run_id
    wandb = FakeWandb()
    with Tracker(tmp_path, TrackingConfig(), "ppo", run_id=known, wandb=wandb) as again:
        for step in (2, 3, 4):  # from the checkpoint of iteration 1
            again.log("ppo", step, {"score/mean": float(step)})
        again.log("ppo-noptx", 1, {"score/mean": 0.0})
    (begun,) = wandb.inits
    assert (begun["id"], begun["resume"]) == (known, "allow")
    assert [(row.get("ppo/step"), row.get("ppo-noptx/step")) for row in wandb.run.logged] == [(4, None), (None, 1)]
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 2, 3, 4, 1]


def test_a_run_that_is_stopped_or_killed_before_it_is_as_far_as_it_was_sends_no_step_twice(tmp_path: Path):
    with tracker(tmp_path, FakeWandb()) as found:
        (tmp_path / "round-1").mkdir()
        for step in (1, 2, 3):
            found.log("ppo", step, {"score/mean": 0.0})
            found.part("round-1").log("ppo", step, {"score/mean": 0.0})
    for last, killed, sent in ((2, False, []), (2, True, []), (4, False, [4])):
        wandb = FakeWandb()
        with Tracker(tmp_path, TrackingConfig(), "ppo", run_id=found.run_id, wandb=wandb) as again:
            if killed:
                again._wandb._remember = lambda sent: None
            assert again.go_on("ppo", 0)
            for step in range(1, last + 1):
                again.log("ppo", step, {"score/mean": 0.0})
                again.part("round-1").log("ppo", step, {"score/mean": 0.0})
        for stage in ("ppo", "round-1/ppo"):
            assert [row[f"{stage}/step"] for row in wandb.run.logged if f"{stage}/step" in row] == sent
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_stage_that_starts_over_is_sent_again(tmp_path: Path):
    with tracker(tmp_path, FakeWandb()) as found:
        found.log("ppo", 1, {"score/mean": 1.0})
    wandb = FakeWandb()
    with Tracker(tmp_path, TrackingConfig(), "ppo", run_id=found.run_id, wandb=wandb) as again:
        again.forget("ppo")
        again.log("ppo", 1, {"score/mean": 2.0})
    assert len(wandb.run.logged) == 1
    assert [row["score/mean"] for row in rows(tmp_path / "metrics.jsonl")] == [2.0]


def test_what_was_not_sent_before_a_stop_is_sent_after_it(tmp_path: Path):
    with tracker(tmp_path, FakeWandb()) as found:
        found.log("ppo", 1, {"score/mean": 1.0, "kl/mean": 0.5})
    wandb = FakeWandb()
    with Tracker(tmp_path, TrackingConfig(), "ppo", run_id=found.run_id, wandb=wandb) as again:
        again.log("ppo", 1, {"score/mean": 1.0, "heldout/gold": 0.5})
        again.samples("ppo", 1, [], {})
    assert [row.keys() for row in wandb.run.logged] == [
        {"ppo/step", "ppo/heldout/gold"},
        {"ppo/step", "ppo/heldout/samples"},
    ]


def test_the_seconds_of_stages_are_columns_to_compare(tmp_path: Path):
    fake = FakeWandb()
    with tracker(tmp_path, fake) as found:
        for phase in ("ppo: load", "ppo: 20 iterations"):
            with found.phase(phase, "ppo"):
                time.sleep(0.05)
        (tmp_path / "round-1").mkdir()
        with found.part("round-1").phase("rank"):
            pass
    assert fake.run.summary.keys() == {"seconds/ppo", "seconds/round-1/rank"}
    assert 0.1 <= fake.run.summary["seconds/ppo"] < 5


def test_an_offline_run_ends_with_the_command_that_sends_it(tmp_path: Path):
    run_dir, shown = tmp_path / "my run", io.StringIO()
    with Tracker(run_dir, TrackingConfig(), "ppo", console=Console(stream=shown)) as found:
        found.log("ppo", 1, {"score/mean": 0.5})
    told = shown.getvalue().splitlines()[-1]
    start, command = told.split(": ", 1)
    assert start == "To send this run to W&B"
    # the shell and W&B read it as it stands there
    command = f"{Path(sys.executable).parent}/{command} --dry-run"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, "offline-run-" in done.stdout + done.stderr) == (0, True), done
    assert found.run_id in done.stdout + done.stderr


def test_an_online_run_that_is_sent_needs_no_command(tmp_path: Path):
    shown = io.StringIO()
    with Tracker(tmp_path, TrackingConfig(mode="online"), "ppo", console=Console(stream=shown), wandb=FakeWandb()):
        pass
    assert shown.getvalue() == ""
