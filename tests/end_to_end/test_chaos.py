"""The soak: a run whose processes are killed and stopped at random, whose disk fills up, whose W&B falls silent.

It passes when the audit does (nothing lost, nothing trained twice, nothing too stale) and the reward has risen. The
test is a few faults; `make chaos` is half an hour of all of them (`CHAOS="--minutes 5 --seed 3"` for others).
"""

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil
import pytest

from tests.tiny_models import tiny_causal_lm, tiny_reward_model
from tests.wandb_server import KEY, WandbServer, wandb_server

ROOT = Path(__file__).resolve().parents[2]
STALENESS = 1
RECOVERY_S = 240.0
ENDS_S = 30.0
"""Seconds within which a command that cannot go on has ended."""
REWARD = """
def letters(prompts: list[str], responses: list[str]) -> list[float]:
    return [sum(c.isascii() and c.isalpha() for c in text) / max(len(text), 1) for text in responses]
"""
SETTINGS: dict[str, Any] = {
    "cluster.fleet.backoff_s": 0.5,
    "cluster.fleet.max_restarts": 8,
    "cluster.fleet.watch_s": 1.0,
    "cluster.reward_replicas": 2,
    "cluster.start_deadline_s": 180,
    "cluster.step_deadline_s": 60,
    "generator.dtype": "float32",
    "generator.max_model_len": 64,
    "generator.kv_cache_gib": 0.1,
    "generator.progress_deadline_s": 8,
    "rollout.prompts_per_wave": 16,
    "rollout.max_prompt_tokens": 40,
    "rollout.max_new_tokens": 12,
    "rollout.missing_eos.rule": "none",
    "ppo.max_staleness": STALENESS,
    "ppo.checkpoint_every": 4,
    "ppo.prompts_per_batch": 16,
    "ppo.minibatch_size": 16,
    "ppo.warmup_iterations": 0,
    "ppo.kl.coef": 0.0,
    "ppo.pretraining.coef": 0.0,
    "ppo.pretraining.sequence_tokens": 16,
    "ppo.network.dtype": "float32",
    "ppo.policy_optimizer.lr": 3e-3,
    "ppo.critic_optimizer.lr": 3e-3,
    "evaluation.prompts": 4,
    "evaluation.every": 0,
    "tracking.mode": "online",
    "tracking.close_deadline_s": 4,
}


class Soak:
    """One run, the faults that are done to it, and what became of each."""

    def __init__(self, folder: Path, seed: int, server: WandbServer, iterations: int) -> None:
        self.run, self.iterations = folder / "run", iterations
        self.console = folder / "console.log"
        self.rng = random.Random(seed)
        self.server = server
        self.starts = 0
        self.done: list[tuple[str, str, float]] = []
        """Fault, who was hit, and seconds until the next iteration."""
        tiny_causal_lm(folder / "sft", hidden=128)  # which vLLM wants on a CPU
        tiny_reward_model(folder / "reward")  # what the critic starts from
        (folder / "letters.py").write_text(REWARD)
        prompts = [{"id": f"p{i}", "prompt": f"say {i}"} for i in range(32)]
        texts = [{"text": "the quick brown fox jumps over the lazy dog " * 4}] * 4
        for name, rows in (("prompts", prompts), ("prompts_heldout", prompts[:4]), ("pretraining_valid", texts)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        names = ("prompts", "prompts_heldout", "pretraining_valid")
        parts = '[{name = "letters", kind = "function", target = "letters:letters"}]'
        self.settings = SETTINGS | {f"data.{name}": folder / f"{name}.jsonl" for name in names}
        self.settings |= {"models.sft": folder / "sft", "models.reward": folder / "reward", "scoring.parts": parts}
        self.faults: dict[
            str, tuple[int, Callable[[], str | None]]
        ] = {  # how often beside the others, and what it does
            "kill a generator": (4, lambda: self.send("generator", signal.SIGKILL)),
            "kill an engine": (2, self.kill_engine),
            "kill a reward replica": (4, lambda: self.send("reward", signal.SIGKILL)),
            "stop a generator": (2, lambda: self.stop("generator", 12.0)),
            "stop the learner": (3, lambda: self.stop("learner", 6.0)),
            "stop the controller": (2, lambda: self.stop("controller", 6.0)),
            "fill the disk": (3, self.fill_disk),
            "silence W&B": (3, self.silence_wandb),
            "kill the learner": (1, lambda: self.send("learner", signal.SIGKILL)),
            "kill the controller": (1, lambda: self.send("controller", signal.SIGKILL)),
            "terminate the controller": (1, lambda: self.send("controller", signal.SIGTERM)),
            "kill the raylet": (1, lambda: self.kill_child("controller", "raylet")),
            "kill the GCS": (1, lambda: self.kill_child("controller", "gcs_server")),
        }

    # --- the run

    def start(self, *words: str) -> None:
        options = [part for key, value in self.settings.items() for part in (f"--{key}", str(value))]
        command = [sys.executable, "-m", "cluster.cli.main", "ppo", "--run", str(self.run), *options]
        command += ["--ppo.iterations", str(self.iterations), *words]
        env = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{self.run.parent}",
            "WANDB_BASE_URL": self.server.url,
            "WANDB_API_KEY": KEY,
        }
        with self.console.open("a") as console:
            self.begun = console.tell()
            self.program = subprocess.Popen(command, cwd=ROOT, env=env, stdout=console, stderr=console)
        self.starts += 1

    def registry(self) -> dict[str, int]:
        """Processes that the run itself names, by kind and number."""
        try:
            status = json.loads((self.run / "status.json").read_text())
        except (OSError, ValueError):
            return {}
        alive = [one for one in status["processes"] if one["vitals"] and one["state"] != "dead"]
        return {one["name"]: one["vitals"]["pid"] for one in alive if status["pid"] == self.program.pid}

    def steps(self) -> list[dict[str, Any]]:
        """What each iteration has logged."""
        try:
            lines = (self.run / "metrics.jsonl").read_text().splitlines()
        except OSError:
            return []
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        return [row for row in rows if "staleness/max" in row]

    def wait(self, done: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + RECOVERY_S
        while not done():
            assert time.monotonic() < end, f"no {what} for {RECOVERY_S:g} s: {self.said()[-8:]}"
            time.sleep(0.2)

    def said(self) -> list[str]:
        """Lines that the command has printed since it was started last."""
        return self.console.read_bytes()[self.begun :].decode(errors="replace").splitlines()

    def goes_on(self, since: float) -> None:
        """Wait until an iteration has followed; a command that has ended has said why, and is started again."""

        def progress() -> bool:
            if (code := self.program.poll()) == 0:
                return True
            if code is not None:
                assert time.time() - since < ENDS_S, f"it took {time.time() - since:.0f} s to end"
                errors = [line for line in self.said() if line.startswith("error: ")]
                assert code == -signal.SIGKILL or errors, self.said()[-8:]
                self.note(f"the command ends with {code}: {errors[-1] if errors else 'nothing said'}")
                self.start("--resume")
            return any(row["time"] > since for row in self.steps()[-1:])

        self.wait(progress, "iteration")

    # --- faults: who was hit; None when there is nobody to hit now

    def victim(self, kind: str) -> tuple[str, psutil.Process] | None:
        found = sorted((name, pid) for name, pid in self.registry().items() if name.startswith(kind))
        found = [(name, pid) for name, pid in found if psutil.pid_exists(pid)]
        return (lambda one: (one[0], psutil.Process(one[1])))(self.rng.choice(found)) if found else None

    def send(self, kind: str, number: signal.Signals) -> str | None:
        if victim := self.victim(kind):
            victim[1].send_signal(number)
            return f"{victim[0]}, PID {victim[1].pid}"
        return None

    def stop(self, kind: str, seconds: float) -> str | None:
        if not (victim := self.victim(kind)):
            return None
        victim[1].suspend()
        time.sleep(seconds)
        if victim[1].is_running():
            victim[1].resume()
        return f"{victim[0]}, PID {victim[1].pid}, for {seconds:g} s"

    def kill_child(self, kind: str, name: str) -> str | None:
        victim = self.victim(kind)
        children = [child for child in victim[1].children(recursive=True) if name in child.name()] if victim else []
        for child in children:
            child.kill()
        return f"{victim[0]}'s, PID {children[0].pid}" if victim and children else None

    def kill_engine(self) -> str | None:
        return self.kill_child("generator", "VLLM")

    def fill_disk(self) -> str | None:
        """Nothing more can be written by the controller and the learner, for three seconds."""
        pids = [pid for name, pid in self.registry().items() if name.startswith(("controller", "learner"))]
        limits = {pid: resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in pids if psutil.pid_exists(pid)}
        for pid, (_, hard) in limits.items():
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
        time.sleep(3)
        for pid, limit in limits.items():
            if psutil.pid_exists(pid):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, limit)
        return f"PIDs {list(limits)}" if limits else None

    def silence_wandb(self) -> str:
        self.server.silent = True
        time.sleep(6)
        self.server.silent = False
        self.server.open.set()
        self.server.open.clear()
        return "its server, for 6 s"

    def note(self, what: str) -> None:
        sys.stdout.write(f"{time.strftime('%T')} iteration {len(self.steps())}: {what}\n")
        sys.stdout.flush()

    # --- the whole

    def soak(self, faults: Iterable[str], rest_s: float) -> None:
        """Do one after the other, each once an iteration has followed the last, after `rest_s` at most."""
        self.start()
        self.goes_on(time.time())
        for name in faults:
            began = time.time()
            if victim := self.faults[name][1]():
                self.note(f"{name}: {victim}")
                self.goes_on(time.time())
                self.done.append((name, victim, time.time() - began))
                self.note(f"  an iteration after {self.done[-1][2]:.0f} s")
            time.sleep(self.rng.uniform(0.0, rest_s))

    def random_faults(self, seconds: float) -> Iterator[str]:
        end, weights = time.monotonic() + seconds, [weight for weight, _ in self.faults.values()]
        while time.monotonic() < end:
            yield self.rng.choices(list(self.faults), weights)[0]

    def finish(self, more: int = 0) -> None:
        """Wait for the last iteration; with `more`, stop first, and go on to so many after the newest checkpoint."""
        if more:
            self.program.send_signal(signal.SIGTERM)
            self.program.wait(60)
            newest = max((self.run / "checkpoints" / "ppo").glob("version-*"))
            self.iterations = int(newest.name.removeprefix("version-")) + more
            self.start("--resume")
        self.wait(lambda: self.program.poll() is not None, "end")
        assert self.program.returncode == 0, self.said()[-8:]

    def verdict(self) -> dict[str, Any]:
        """The audit, and how the reward has risen; raises AssertionError for a promise that was broken."""
        command = [sys.executable, "-m", "cluster.cli.main", "audit", str(self.run), "--json"]
        audit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert audit.returncode == 0, audit.stdout + audit.stderr
        found = json.loads(audit.stdout)["stages"]["ppo"]
        scores = [row["score/mean"] for row in self.steps()]
        third = max(1, len(scores) // 3)
        rose = {"score at first": fmean(scores[:third]), "score at last": fmean(scores[-third:])}
        assert found["violations"] == []
        assert (found["twice"], found["outstanding"]) == (0, 0)
        assert found["trained"] == self.iterations * SETTINGS["ppo.prompts_per_batch"]
        assert found["staleness"] <= STALENESS
        assert rose["score at last"] > rose["score at first"] + 0.05, rose
        kept = ("issued", "trained", "twice", "outstanding", "resumed", "staleness")
        return {
            "faults": len(self.done),
            "rows in W&B": len(self.server.rows),
            "starts": self.starts,
            **{name: found[name] for name in kept},
            "dropped": found["dropped"],
            **rose,
        }

    def end(self) -> None:
        self.program.terminate()
        try:
            self.program.wait(60)
        except subprocess.TimeoutExpired:
            self.program.kill()


@pytest.mark.slow
@pytest.mark.whole_machine
@pytest.mark.timeout(400)
def test_a_run_under_faults_loses_nothing_and_learns(tmp_path: Path) -> None:
    faults = ("kill a reward replica", "stop the learner", "silence W&B", "fill the disk", "kill a generator")
    with wandb_server() as server:
        soak = Soak(tmp_path, 0, server, iterations=150)
        try:
            soak.soak(faults, rest_s=1.0)
            soak.finish()
        finally:
            soak.end()
    assert tuple(name for name, *_ in soak.done) == faults
    assert soak.verdict()["starts"] == 1


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    told = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder, wandb_server() as server:
        soak = Soak(Path(folder), told.seed, server, iterations=100_000)
        try:
            soak.soak(soak.random_faults(60 * told.minutes), rest_s=20.0)
            soak.finish(more=4)
        finally:
            soak.end()
        sys.stdout.write(json.dumps(soak.verdict(), indent=2) + "\n")


if __name__ == "__main__":
    main()
