"""Jobs of a real Ray cluster with token authentication, started by `ray start` as people do."""

import io
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest

from cluster.cli.main import main
from cluster.config.load import ConfigError
from cluster.jobs import submit
from cluster.jobs.package import SETTINGS
from cluster.jobs.submit import JobError, Order, check, connect, follow, job, jobs, logs, stop
from cluster.runtime.health import Monitor
from cluster.runtime.orphans import kill_marked
from cluster.status.snapshot import reporting
from reward_server.address import free_port
from reward_server.preferences.labeling import read_comparisons

ROOT = Path(__file__).parents[3]


CANARIES = {
    name: f"canary-{name.lower()}-{secrets.token_hex(8)}"
    for name in ("WANDB_API_KEY", "HF_TOKEN", "RAYWARD_REWARD_TOKEN", "LABELS_PASSWORD")
}


def rayward(*words: str | Path) -> int:
    return main([*map(str, words)])


def test_a_run_directory_that_the_job_would_lose_is_refused():
    with pytest.raises(ConfigError, match="an absolute path"):
        check(Order(words=("ppo",), run_dir=Path("runs/mine")))


def test_a_secret_in_what_a_job_is_told_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", CANARIES["HF_TOKEN"])
    with pytest.raises(ConfigError, match=r"is told the value of HF_TOKEN.*Remedy: set it in the environment") as error:
        check(Order(words=("scale", "--run", "/runs", CANARIES["HF_TOKEN"]), run_dir=Path("/runs")))
    assert CANARIES["HF_TOKEN"] not in str(error.value)


def test_a_job_finds_what_is_sent_along_in_its_folder_and_other_paths_where_they_are(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(submit, "connect", lambda address: None)
    monkeypatch.setattr(submit, "submit", lambda client, order: sent.append(order))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "data").mkdir(parents=True)
    (tmp_path / "my.toml").write_text('[data]\nprompts = "mine/data/p.jsonl"\npretraining = "t.jsonl"\n')
    options = ("--run", "/runs/1", "--data.prompts_heldout=mine/data/h.jsonl", "--models.sft=sft")
    rayward("submit", "--detach", "--include", "mine", "ppo", *options)
    rayward("submit", "--detach", "--include", "mine", "ppo", *options, "--config", "my.toml")
    first, second = sent
    assert first.words[3:7] == ("--data.prompts_heldout", "mine/data/h.jsonl", "--models.sft", str(tmp_path / "sft"))
    data = second.settings.data
    assert [str(one) for one in (data.prompts, data.prompts_heldout, data.pretraining, second.settings.models.sft)] == [
        *("mine/data/p.jsonl", "mine/data/h.jsonl"),
        *(str(tmp_path / name) for name in ("t.jsonl", "sft")),
    ]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("ppo --resume --ppo.seed 3", "ppo --run {run} --resume --ppo.seed 3 --cluster.address auto"),
        (
            "quickstart --tiny --restart",
            f"quickstart --run {{run}} --restart --tiny --cluster.address auto --config {SETTINGS}",
        ),
        ("scale 4", "scale --run {run} 4"),
        ("status {run} --json", "status {run} --json"),
    ],
)
def test_all_that_a_command_is_told_is_told_to_the_job(tmp_path, monkeypatch, capfd, words, told):
    sent = []

    class Client:
        def submit_job(self, **order):
            sent.append(order)
            return "raysubmit_1"

    monkeypatch.setattr(submit, "connect", lambda address: Client())
    name, *rest = words.format(run=tmp_path).split()
    run = [] if name == "status" else ["--run", str(tmp_path)]
    assert rayward("submit", "--detach", "--id", "mine", "--cpus", "0.5", name, *run, *rest) == 0
    (order,) = sent
    assert order["entrypoint"] == f"python -m cluster.cli.main {told.format(run=tmp_path)}"
    assert order["metadata"] == {"rayward_command": name, "rayward_run": str(tmp_path)}
    assert (order["submission_id"], order["entrypoint_num_cpus"]) == ("mine", 0.5)
    assert capfd.readouterr().out.startswith("raysubmit_1\n")


def test_a_dry_run_says_what_would_be_sent_and_asks_nobody(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(submit, "connect", lambda address: pytest.fail("nobody may be asked"))
    (tmp_path / "mine.py").write_text("x = 1")
    words = ("--dry-run", "--include", tmp_path / "mine.py", "rank", "--run", tmp_path / "run", "--labeler.name", "a:b")
    assert rayward("submit", "--json", *words) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["entrypoint"] == f"python -m cluster.cli.main rank --run {tmp_path}/run --labeler.name a:b"
    assert told["metadata"]["rayward_run"] == f"{tmp_path}/run"
    assert told["files"]["mine.py"] == 5
    assert told["bytes"] == sum(told["files"].values())
    assert rayward("submit", *words) == 0
    shown = capfd.readouterr().out
    assert f"rank --run {tmp_path}/run" in shown
    assert "nothing was sent" in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pppo"], "'pppo' cannot be submitted. Did you mean ppo?"),
        (["top", "/runs/mine"], "'top' cannot be submitted. "),
        (["WANDB_API_KEY=0123456789abcdef", "ppo"], "WANDB_API_KEY is a secret, and a job carries none. Remedy: "),
        (["--cpus", "many", "ppo"], "Error parsing --cpus: could not convert string to float: 'many'"),
        (["--include", "absent.py", "rank", "--run", "/runs/mine"], "'absent.py' does not exist"),
        (
            ["--address", "head:8265", "rank", "--run", "/runs/mine"],
            "'head:8265' is no address of a dashboard. Remedy:",
        ),
        (["--cpus", "-1", "ppo"], "--cpus is -1.0. Remedy"),
        ([], "COMMAND is one of plan, "),
    ],
)
def test_what_cannot_be_submitted_is_told_before_anybody_is_asked(words, said, capsys):
    assert rayward("submit", *words) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert "0123456789abcdef" not in shown.err
    assert shown.out == ""


def test_where_no_cluster_answers_the_address_and_the_remedy_are_told():
    port = free_port("127.0.0.1")
    with pytest.raises(JobError, match=rf"no Ray job server answers at http://127.0.0.1:{port}.*--address"):
        connect(f"http://127.0.0.1:{port}")


class Flaky:
    """A job server whose connection breaks in the middle of a log, and which then is away for a while."""

    def __init__(self, *, away: int, log: str = "one\ntwo\nthree\n") -> None:
        self.away, self.log, self.connections = away, log, 0

    def get_job_info(self, name):
        if self.connections and self.away > 0:
            self.away -= 1
            raise ConnectionError("away")
        status = "SUCCEEDED" if self.connections > 1 else "RUNNING"
        return SimpleNamespace(
            submission_id=name,
            status=status,
            start_time=1,
            end_time=2,
            metadata={},
            entrypoint="",
            message="\x1b[2J",
        )

    async def tail_job_logs(self, name):
        self.connections += 1
        yield self.log[:6]
        if self.connections == 1:
            raise RuntimeError("WebSocket connection closed unexpectedly")
        yield self.log[6:]


def test_a_lost_connection_costs_no_line_and_repeats_none(monkeypatch):
    monkeypatch.setattr("cluster.jobs.submit._POLL_S", 0.01)
    text = io.StringIO()
    assert follow(cast(Any, Flaky(away=3)), "mine", text).status == "SUCCEEDED"
    assert text.getvalue() == "one\ntwo\nthree\n"


def test_a_terminal_obeys_no_job(monkeypatch):
    monkeypatch.setattr("cluster.jobs.submit._POLL_S", 0.01)
    text = io.StringIO()
    last = follow(cast(Any, Flaky(away=0, log="one\n\x1b[2J\rtwo\n")), "mine", text)
    assert text.getvalue() == "one\n\\x1b[2J\\rtwo\n"
    assert last.message == "\\x1b[2J"


def test_a_cluster_that_stays_away_is_told_with_how_to_come_back(monkeypatch):
    monkeypatch.setattr("cluster.jobs.submit._POLL_S", 0.01)
    monkeypatch.setattr("cluster.jobs.submit._RECONNECT_S", 0.1)
    with pytest.raises(JobError, match=r"has not answered for 0\.1 s \(.*\).*rayward logs mine --follow"):
        follow(cast(Any, Flaky(away=10**6)), "mine", io.StringIO())


def test_ctrl_c_leaves_the_job_running_and_says_how_to_come_back(monkeypatch, capfd):
    def interrupted(client, name, out):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(submit, "connect", lambda address: None)
    monkeypatch.setattr(submit, "follow", interrupted)
    assert rayward("logs", "mine", "--follow") == 130
    assert capfd.readouterr().err == ("mine goes on: rayward logs mine --follow shows it, rayward stop mine ends it\n")


class Head(NamedTuple):
    """A cluster of one machine."""

    url: str
    temp_dir: Path


@pytest.fixture(scope="module")
def head():
    """A cluster of one machine that asks for a token, and whose environment has secrets."""
    port, mark = free_port("127.0.0.1"), f"RAYWARD_TEST_CLUSTER={secrets.token_hex(8)}"
    name, value = mark.split("=")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # a job's "python" is the cluster's
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "PYTHONPATH": "", "PATH": path, name: value, **CANARIES}
    start = ["start", "--head", "--disable-usage-stats", "--num-cpus", "2", "--port", "0"]
    start += ["--dashboard-port", str(port), "--temp-dir", f"/tmp/r{value[:8]}"]
    # another Ray of this machine may have the agent's default port, and without it no job is taken
    start += ["--dashboard-agent-listen-port", str(free_port("127.0.0.1"))]
    try:
        for words in (["get-auth-token", "--generate"], start):  # the user's own token, made where there is none
            done = subprocess.run(
                [sys.executable, "-m", "ray.scripts.scripts", *words],
                env=environment,
                capture_output=True,
                text=True,
                timeout=90,
            )
            assert done.returncode == 0, done.stdout + done.stderr
        yield Head(url=f"http://127.0.0.1:{port}", temp_dir=Path(f"/tmp/r{value[:8]}"))
    finally:
        kill_marked(mark, within_s=20)


@pytest.fixture
def cluster(head):
    """Its address."""
    return head.url


@pytest.fixture
def completions(tmp_path):
    path = tmp_path / "completions.jsonl"
    path.write_text(
        json.dumps({"id": "c1", "prompt": "Hi!", "completions": [{"text": "bad"}, {"text": "I love it!"}]}) + "\n"
    )
    return path


@pytest.mark.slow
def test_a_command_runs_on_the_cluster_with_its_settings(cluster, completions, tmp_path, capfd):
    settings = tmp_path / "mine.toml"
    settings.write_text(f'[data]\ncompletions = "{completions}"\n[tracking]\nmode = "disabled"\n')
    words = ["rank", "--run", tmp_path / "run", "--config", settings]
    with pytest.MonkeyPatch.context() as environment:  # what is named on the command line goes before it
        environment.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
        environment.setenv("RAY_ADDRESS", "127.0.0.1:1")
        assert rayward("submit", "--address", cluster, "--cpus", "0.5", *words) == 0
    out = capfd.readouterr().out
    assert "rayward rank: everything goes to" in out  # the job's own log, followed
    assert "SUCCEEDED" in out
    (ranked,) = read_comparisons(tmp_path / "run" / "data" / "comparisons.jsonl")
    assert ranked.ranks == (1, 0)
    (newest, *_) = jobs(connect(cluster))
    assert (newest.command, newest.run, newest.status) == ("rank", str(tmp_path / "run"), "SUCCEEDED")
    assert rayward("jobs", "--address", cluster, "--json") == 0
    assert json.loads(capfd.readouterr().out)[0]["id"] == newest.id
    assert rayward("logs", "--address", cluster, "--json", newest.id) == 0
    assert "everything goes to" in json.loads(capfd.readouterr().out)["log"]
    assert "everything goes to" in logs(connect(cluster), newest.id)


LABELS = """
import os

def verdicts(texts):
    raise RuntimeError(f"401 for user:{os.environ['LABELS_PASSWORD']} at http://user:open-sesame-open@labels/rank")
"""


@pytest.mark.slow
def test_a_job_that_fails_says_why_without_the_secrets_in_it(head, completions, tmp_path, capfd):
    (tmp_path / "my_labels.py").write_text(LABELS)
    words = [
        "rank",
        "--run",
        tmp_path / "run",
        "--data.completions",
        completions,
        "--labeler.name",
        "my_labels:verdicts",
    ]
    include = ["--id", "labels", "--include", tmp_path / "my_labels.py"]
    assert rayward("submit", "--address", head.url, *include, *words) == 1
    out = capfd.readouterr().out
    assert "401 for user:[LABELS_PASSWORD] at http://[hidden]@labels/rank" in out
    assert "FAILED" in out
    assert "[LABELS_PASSWORD]" in (tmp_path / "run" / "logs" / "error.log").read_text()
    assert rayward("submit", "--address", head.url, *include, *words) == 1
    assert "has a job 'labels' already. Remedy: another --id" in capfd.readouterr().err


@pytest.mark.slow
def test_how_a_run_stands_can_be_asked_there(cluster, tmp_path, capfd):
    with reporting(tmp_path, "ppo", Monitor()):
        pass
    assert rayward("submit", "--address", cluster, "status", tmp_path) == 0
    assert f"rayward ppo {tmp_path}: done" in " ".join(capfd.readouterr().out.split())


@pytest.mark.slow
def test_nothing_that_the_cluster_tells_or_keeps_holds_a_secret(head, tmp_path_factory):
    """After the jobs above, which had the secrets in their environment and one of them in an error."""
    token = (Path.home() / ".ray" / "auth_token").read_text().strip()
    canaries = [*(value.encode() for value in CANARIES.values()), token.encode(), b"open-sesame-open"]
    told = repr([vars(one) for one in connect(head.url).list_jobs()]).encode()
    assert b"rayward_run" in told
    lines = b"".join(process.read_bytes() for process in Path("/proc").glob("[0-9]*/cmdline") if process.exists())
    assert b"raylet" in lines
    for canary in canaries:
        assert canary not in told
        assert canary not in lines
    places = (head.temp_dir, tmp_path_factory.getbasetemp())
    files = [path for place in places for path in place.rglob("*") if path.is_file() and path.name != "my_labels.py"]
    assert any("job-driver-labels" in path.name for path in files)
    for path in files:
        content = path.read_bytes()
        assert not [canary for canary in canaries if canary in content], path


@pytest.mark.slow
def test_a_job_is_stopped_and_its_log_can_be_followed_to_the_end(cluster):
    client = connect(cluster)
    name = client.submit_job(entrypoint="echo begun; exec sleep 600")
    end = time.monotonic() + 60
    while "begun" not in logs(client, name):
        assert time.monotonic() < end
        time.sleep(0.2)
    assert stop(client, name).status == "STOPPED"
    text = io.StringIO()
    assert follow(client, name, text).status == "STOPPED"
    assert "begun" in text.getvalue().splitlines()
    assert stop(client, name).status == "STOPPED"  # once more does no harm


@pytest.mark.slow
def test_without_the_token_nothing_is_told(cluster, monkeypatch, tmp_path):
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    done = subprocess.run(
        [sys.executable, "-m", "cluster.cli.main", "jobs", "--address", cluster],
        env={**os.environ, "RAY_AUTH_TOKEN_PATH": str(wrong), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "refuses this token" in done.stderr
    assert done.stdout == ""


@pytest.mark.slow
def test_an_unknown_job_is_told_with_those_that_are_known(cluster):
    with pytest.raises(JobError, match=r"knows no job 'nobody'. Its newest jobs: "):
        job(connect(cluster), "nobody")
