"""The batch script between stand-ins for SLURM's and Ray's commands, which write down how they were called."""

import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "cluster" / "deploy" / "slurm" / "rayward.sbatch"
STAND_INS = {
    "scontrol": "printf 'one\\ntwo\\n'",
    # runs what it is given here, without its own options
    "srun": """
        while [[ $1 == --* ]]; do shift 2; done
        [ "$1" = hostname ] && { echo 10.1.2.3 fe80::1; exit; }
        exec "$@"
    """,
    "ray": """
        echo "ray $*" >>"$CALLS"
        stat -c %a "$RAY_AUTH_TOKEN_PATH" >>"$MODES"
        case $1 in
            start) sleep 60 & echo $! >>"$PIDS"; wait $! ;;
            list) printf '[{"node_id": 1, "state": "ALIVE"}, {"node_id": 2, "state": "ALIVE"}]' ;;
            stop) xargs -r kill <"$PIDS" 2>/dev/null; true ;;
        esac
    """,
    "rayward": """
        echo "rayward $*" >>"$CALLS"
        trap 'echo stopped >>"$CALLS"; exit 143' TERM
        if [ -n "${SLOW:-}" ]; then sleep 60 & wait $!; fi
        exit ${CODE:-0}
    """,
}


@pytest.fixture
def script(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, body in STAND_INS.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tools / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "RAYWARD_BIN": str(tools),
        "HOME": str(tmp_path),
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "one,two",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        **{name: str(tmp_path / name.lower()) for name in ("CALLS", "MODES", "PIDS")},
    }
    environment.pop("XDG_RUNTIME_DIR", None)

    def start(*words, **more):
        return subprocess.Popen(
            ["bash", str(SCRIPT), *words], env=environment | more, stderr=subprocess.PIPE, text=True
        )

    return start


def calls(tmp_path):
    return (tmp_path / "calls").read_text().splitlines()


def test_ray_starts_on_every_machine_runs_the_command_and_stops(script, tmp_path):
    process = script("ppo", "--run", "/shared/run with space")
    assert process.wait(60) == 0
    head, worker, *rest = sorted(calls(tmp_path), key=lambda call: ("ray start" not in call, "--head" not in call))
    assert "--head" in head
    assert "--node-ip-address 10.1.2.3 --port 20077 --dashboard-host 127.0.0.1 --dashboard-port 20078" in head
    assert "start --block --disable-usage-stats --address 10.1.2.3:20077" in worker
    assert "rayward ppo --run /shared/run with space --cluster.address 10.1.2.3:20077" in rest
    assert [call for call in rest if call.startswith("ray stop")]


def test_the_token_is_its_owners_alone_and_is_gone_afterwards(script, tmp_path):
    assert script("ppo").wait(60) == 0
    assert set((tmp_path / "modes").read_text().split()) == {"600"}
    assert not list(tmp_path.glob("rayward-77.*"))
    assert not [call for call in calls(tmp_path) if "token" in call.lower()]


def test_the_exit_code_is_the_commands(script):
    assert script("ppo", CODE="3").wait(60) == 3


def test_a_cancelled_job_stops_the_run_and_ray(script, tmp_path):
    process = script("ppo", SLOW="1")
    end = time.monotonic() + 30
    while not (tmp_path / "calls").exists() or "rayward ppo" not in (tmp_path / "calls").read_text():
        assert time.monotonic() < end
        time.sleep(0.1)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) != 0
    assert "stopped" in calls(tmp_path)
    assert any(call.startswith("ray stop") for call in calls(tmp_path))


def test_a_requeued_job_resumes(script, tmp_path):
    assert script("ppo", SLURM_RESTART_COUNT="1").wait(60) == 0
    assert "rayward ppo --cluster.address 10.1.2.3:20077 --resume" in calls(tmp_path)


def test_without_a_command_it_says_what_to_write(script):
    process = script()
    assert process.wait(60) == 2
    assert "no command. Remedy: sbatch" in process.stderr.read()


def test_the_script_can_be_run():
    assert SCRIPT.stat().st_mode & stat.S_IXUSR
