"""Jobs of a real Ray cluster with token authentication, started by `ray start` as people do."""

import io
import json
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster import jobs as commands
from cluster.config import Config
from cluster.reaping import kill_marked
from cluster.submit import SETTINGS, JobError, connect, follow, job, jobs, logs, shipment, stop, submit
from reward_server.address import free_port
from reward_server.labeling import read_comparisons

ROOT = Path(__file__).parents[2]


def test_a_shipment_is_the_code_the_settings_and_what_is_included(tmp_path):
    (tmp_path / "mine.py").write_text("x = 1")
    (tmp_path / "data" / "__pycache__").mkdir(parents=True)
    (tmp_path / "data" / "a.jsonl").write_text("{}")
    with shipment(Config(), [tmp_path / "mine.py", tmp_path / "data"]) as folder:
        names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert {"cluster/cli.py", "cluster/presets/tiny.toml", "learner/ppo.py", SETTINGS} <= names
        assert {"mine.py", "data/a.jsonl"} <= names
        assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]
        assert {Path(name).parts[0] for name in names} == {
            *("actors", "cluster", "learner", "reward_server"),
            *(SETTINGS, "mine.py", "data"),
        }
    assert not folder.exists()


@pytest.mark.parametrize(("name", "reason"), [("absent.py", "does not exist"), ("learner", "is taken")])
def test_what_cannot_be_included_is_refused(tmp_path, name, reason):
    (tmp_path / "learner").mkdir()
    with pytest.raises(JobError, match=reason), shipment(None, [tmp_path / name]):
        pass


def test_a_run_directory_that_the_job_would_lose_is_refused():
    with pytest.raises(JobError, match="an absolute path"):
        submit(None, ["ppo"], Path("runs/mine"))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("ppo --resume --ppo.seed 3", "ppo --run {run} --resume --ppo.seed 3 --cluster.address auto"),
        (
            "quickstart --tiny --restart",
            f"quickstart --run {{run}} --restart --tiny --cluster.address auto --config {SETTINGS}",
        ),
        ("scale 4", "scale --run {run} 4"),
    ],
)
def test_all_that_a_command_is_told_is_told_to_the_job(tmp_path, monkeypatch, capfd, words, told):
    sent = []

    class Client:
        def submit_job(self, entrypoint, runtime_env, metadata):
            sent.append(entrypoint)
            return "raysubmit_1"

    monkeypatch.setattr(commands, "connect", lambda address: Client())
    name, *rest = words.split()
    assert commands.submit(["--detach", name, "--run", str(tmp_path), *rest]) == 0
    assert sent == [f"python -m cluster.cli {told.format(run=tmp_path)}"]
    assert capfd.readouterr().out.startswith("raysubmit_1\n")


def test_where_no_cluster_answers_the_address_and_the_remedy_are_told():
    port = free_port("127.0.0.1")
    with pytest.raises(JobError, match=rf"no Ray job server answers at http://127.0.0.1:{port}.*--address"):
        connect(f"http://127.0.0.1:{port}")


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster of one machine that asks for a token."""
    port, mark = free_port("127.0.0.1"), f"RAYWARD_TEST_CLUSTER={secrets.token_hex(8)}"
    name, value = mark.split("=")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # a job's "python" is the cluster's
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "PYTHONPATH": "", "PATH": path, name: value}
    start = ["start", "--head", "--disable-usage-stats", "--num-cpus", "2", "--port", "0"]
    start += ["--dashboard-port", str(port), "--temp-dir", f"/tmp/r{value[:8]}"]
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
        yield f"http://127.0.0.1:{port}"
    finally:
        kill_marked(mark, within_s=20)


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
    words = ["--address", cluster, "rank", "--run", str(tmp_path / "run"), "--config", str(settings)]
    assert commands.submit(words) == 0
    out = capfd.readouterr().out
    assert "rayward rank: everything goes to" in out  # the job's own log, followed
    assert "SUCCEEDED" in out
    (ranked,) = read_comparisons(tmp_path / "run" / "data" / "comparisons.jsonl")
    assert ranked.ranks == (1, 0)
    (newest, *_) = jobs(connect(cluster))
    assert (newest.command, newest.run, newest.status) == ("rank", str(tmp_path / "run"), "SUCCEEDED")
    assert commands.jobs(["--address", cluster, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)[0]["id"] == newest.id
    assert "everything goes to" in logs(connect(cluster), newest.id)


@pytest.mark.slow
def test_a_job_that_fails_says_why_and_its_exit_code_is_that_of_a_failure(cluster, tmp_path, capfd):
    missing = tmp_path / "nothing.jsonl"
    words = ["rank", "--run", str(tmp_path / "run"), "--data.completions", str(missing), "--tracking.mode", "disabled"]
    assert commands.submit(["--address", cluster, *words]) == 1
    out = capfd.readouterr().out
    assert f"{missing}: there is no such file" in out
    assert "FAILED" in out


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
        [sys.executable, "-m", "cluster.cli", "jobs", "--address", cluster],
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
