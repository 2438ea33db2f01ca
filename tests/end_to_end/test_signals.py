"""Ctrl-C, twice, in a real run: it says so, ends soon, and leaves no process and no file behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.runtime.orphans import SESSION_MARK
from tests.tiny_models import tiny_causal_lm, tiny_reward_model

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "generator.dtype": "float32",
    "generator.max_model_len": 64,
    "generator.kv_cache_gib": 0.05,
    "scoring.dtype": "float32",
    "rollout.max_prompt_tokens": 40,
    "rollout.max_new_tokens": 16,
    "rollout.prompts_per_wave": 8,
    "ppo.network.dtype": "float32",
    "ppo.iterations": 500,
    "ppo.prompts_per_batch": 8,
    "ppo.minibatch_size": 8,
    "ppo.pretraining.sequence_tokens": 32,
    "evaluation.prompts": 4,
    "tracking.mode": "disabled",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_causal_lm(folder / "sft", hidden=128)  # attention on a CPU wants heads of 32
    tiny_reward_model(folder / "reward")
    found: dict[str, object] = {"models.sft": folder / "sft", "models.reward": folder / "reward"}
    for name in ("prompts", "prompts_heldout", "pretraining", "pretraining_valid"):
        row = {"text": "the quick brown fox " * 40} if "pretraining" in name else {"prompt": "hello world"}
        found[f"data.{name}"] = folder / f"{name}.jsonl"
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"id": str(i), **row}) + "\n" for i in range(8)))
    return found


def family(pid: int) -> set[int]:
    """The process, its descendants, and every process that carries the mark of its Ray session."""
    parents: dict[int, int] = {}
    marks: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                variables = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                marks[int(entry.name)] = next((v for v in variables if v.startswith(SESSION_MARK)), "")
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    own = {marks.get(child, "") for child in found} - {""}
    return found | {child for child, mark in marks.items() if mark in own}


def living(pids: set[int]) -> dict[int, str]:
    found = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z":
                found[pid] = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return found


@pytest.fixture
def temporary() -> Iterator[str]:
    """A folder for temporary files with a short path, as Ray's sockets go there."""
    with tempfile.TemporaryDirectory(prefix="rw", dir="/tmp") as folder:
        yield folder


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_ctrl_c_while_processes_start_ends_the_run_and_everything_it_started(
    inputs: dict[str, object], tmp_path: Path, temporary: str
) -> None:
    run = tmp_path / "run"
    options = [part for key, value in {**SETTINGS, **inputs}.items() for part in (f"--{key}", str(value))]
    # A session of its own: a background shell may have told its children to ignore Ctrl-C.
    program = subprocess.Popen(
        [sys.executable, "-m", "cluster.cli.main", "ppo", "--run", str(run), *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": temporary},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + 150
        while not (run / "logs" / "generator-0.log").is_file():
            assert program.poll() is None, program.communicate()
            assert time.monotonic() < end, "no process was started"
            time.sleep(0.02)
        started = family(program.pid)
        assert len(started) > 3, "Ray runs in processes of its own"
        program.send_signal(signal.SIGINT)
        time.sleep(0.5)
        program.send_signal(signal.SIGINT)
        _, said = program.communicate(timeout=40)
    finally:
        program.kill()
    assert program.returncode == 130, said
    assert said.splitlines()[-1].startswith("error: stopped"), said
    assert str(run) in said.splitlines()[-1]
    end = time.monotonic() + 10
    while (left := living(started)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not left
    assert not [path for path in Path(temporary).iterdir() if not path.name.startswith("torchinductor_")]  # a cache
