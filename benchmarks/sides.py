"""What the ratios are made of. Each side runs in a process of its own and prints its figures as a line of JSON:

    .venv/bin/python -m benchmarks.sides NAME FOLDER

FOLDER holds the workload. The system's sides are `rayward ppo` as anybody would run it, timed by its own metrics; the
others are what the same work takes without the system.
"""

import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks import parts, workload
from benchmarks.workload import EPISODES, PROMPT_TOKENS, RESPONSE_TOKENS, TOKENS_PER_PASS

Figures = dict[str, float]
WARM_UP, STEPS, DEADLINE_S = 2, 6, 600
SETTINGS: dict[str, Any] = {
    "ppo.iterations": WARM_UP + STEPS,
    "ppo.prompts_per_batch": EPISODES,
    "ppo.minibatch_size": EPISODES,
    "ppo.warmup_iterations": 0,
    "ppo.checkpoint_every": 0,
    "ppo.kl.coef": workload.BETA,
    "ppo.pretraining.coef": 0,
    "ppo.pretraining.sequence_tokens": PROMPT_TOKENS,
    "ppo.policy_optimizer.lr": workload.POLICY_LR,
    "ppo.critic_optimizer.lr": workload.CRITIC_LR,
    "ppo.max_tokens_per_microbatch": TOKENS_PER_PASS,
    "rollout.prompts_per_wave": EPISODES // 2,
    "rollout.max_prompt_tokens": PROMPT_TOKENS,
    "rollout.max_new_tokens": RESPONSE_TOKENS,
    "rollout.missing_eos.rule": "none",
    "generator.max_model_len": 256,
    "generator.max_num_seqs": EPISODES,
    "generator.kv_cache_gib": 0.5,
    "evaluation.every": 0,
    "evaluation.prompts": 1,
    "tracking.mode": "disabled",
}

TWO = {"cluster.generators": 2, "cluster.reward_replicas": 2}
"""one of each to a core"""


def ppo(folder: Path, kill: bool = False, cores: Sequence[int] = (), **settings: Any) -> Figures:
    """Medians of the metrics of `rayward ppo` after its warm-up, and the wall clock of its first step.

    kill: SIGKILL an actor in the middle. cores: all that it may use.
    """
    run = Path(tempfile.mkdtemp(dir=folder, prefix="run-"))
    files = {"prompts": "prompts", "prompts_heldout": "heldout", "pretraining_valid": "text"}
    given = {f"data.{key}": folder / f"{name}.jsonl" for key, name in files.items()}
    given |= {"models.sft": folder / "policy", "models.reward": folder / "reward", **SETTINGS, **settings}
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "cluster.cli.main", "ppo", "--run", str(run), *words]
    started = time.time()
    with (run / "console.log").open("w") as console:
        process = subprocess.Popen(
            command,
            stdout=console,
            stderr=subprocess.STDOUT,
            preexec_fn=(lambda: os.sched_setaffinity(0, cores)) if cores else None,
        )
        killed = parts.kill_actor(process, run, DEADLINE_S) if kill else {}
        code = process.wait(DEADLINE_S)
    if code:
        raise RuntimeError(f"rayward ppo failed ({code}):\n{(run / 'console.log').read_text()[-3000:]}")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "time/iteration" in row]
    saved = {row["step"] for row in rows if "checkpoint/seconds" in row}  # after that step, in the next one's time
    after = [row for row in rows if row["step"] > WARM_UP and row["step"] - 1 not in saved]
    names = dict.fromkeys(
        name for row in after for name in row if name.startswith(("time/", "publish/", "checkpoint/"))
    )
    found = {name: statistics.median(row[name] for row in after if name in row) for name in names}
    first = steps[0]["time"] - steps[0]["time/publish"] - started
    lasted: dict[str, list[float]] = {}
    for before, one in pairwise(steps[WARM_UP - 1 :]):
        lasted.setdefault("step_saving" if before["step"] in saved else "step", []).append(one["time"] - before["time"])
    found |= {name: statistics.median(seconds) for name, seconds in lasted.items()}
    shutil.rmtree(run)
    return {**found, **killed, "first_update": first}


def vllm(folder: Path, cores: Sequence[tuple[int, ...]]) -> Figures:
    """Seconds in which bare engines, each on its cores, answer a share of the prompts each; and to start one."""
    context = multiprocessing.get_context("spawn")
    together, results = context.Barrier(len(cores)), context.SimpleQueue()
    share = EPISODES // len(cores)
    arguments = [(folder, own, index * share, share, together, results) for index, own in enumerate(cores)]
    engines = [context.Process(target=_engine, args=one) for one in arguments]
    for engine in engines:
        engine.start()
    for engine in engines:
        engine.join(DEADLINE_S)
    if any(engine.exitcode for engine in engines):
        raise RuntimeError(f"a bare engine failed or took too long: {[engine.exitcode for engine in engines]}")
    found = [results.get() for _ in engines]
    slowest = [max(seconds) for seconds in zip(*(one["seconds"] for one in found), strict=True)]
    return {"seconds": statistics.median(slowest), "start": max(one["start"] for one in found)}


def _engine(folder: Path, cores: tuple[int, ...], first: int, count: int, together: Any, results: Any) -> None:
    started = time.time()
    os.sched_setaffinity(0, cores)
    os.environ |= {
        "OMP_NUM_THREADS": str(len(cores)),
        "TORCH_COMPILE_DISABLE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, where it is fastest
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_PLUGINS": "",
    }
    torch.set_num_threads(len(cores))  # OpenMP has read its variable already, as torch was imported for this function
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(folder / "policy"),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=256,
        max_num_seqs=EPISODES,
        max_num_batched_tokens=4096,
        enable_chunked_prefill=False,
        enable_prefix_caching=False,
        enforce_eager=True,
        generation_config="vllm",
        kv_cache_memory_bytes=2**29,
        logprobs_mode="processed_logprobs",
        distributed_executor_backend="uni",
    )
    start = time.time() - started
    prompts, seconds = workload.queries(folder), []
    for step in range(WARM_UP + STEPS):
        rows = range(step * EPISODES % len(prompts) + first, step * EPISODES % len(prompts) + first + count)
        params = [
            SamplingParams(
                max_tokens=RESPONSE_TOKENS, ignore_eos=True, seed=row, logprobs=0, flat_logprobs=True, detokenize=False
            )
            for row in rows
        ]
        together.wait(DEADLINE_S)
        began = time.monotonic()
        llm.generate([{"prompt_token_ids": prompts[row]} for row in rows], params, use_tqdm=False)
        seconds.append(time.monotonic() - began)
    results.put({"seconds": seconds[WARM_UP:], "start": start})


def bare_torch(folder: Path, threads: int) -> Figures:
    """Seconds of plain PyTorch and transformers for a batch: scoring, evaluate, and update of policy and critic."""
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    torch.set_num_threads(threads)
    load = {"dtype": torch.bfloat16, "attn_implementation": "sdpa"}
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "policy", **load) for _ in range(2))
    critic = AutoModelForTokenClassification.from_pretrained(folder / "policy", num_labels=1, **load)
    reward = AutoModelForTokenClassification.from_pretrained(folder / "policy", num_labels=1, **load)
    optimizers = [
        torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
        for model, lr in ((policy, workload.POLICY_LR), (critic, workload.CRITIC_LR))
    ]
    draw = torch.Generator().manual_seed(0)
    times: dict[str, list[float]] = {"score": [], "evaluate": [], "update": []}

    def logprobs(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = model(ids, logits_to_keep=RESPONSE_TOKENS + 1).logits[:, :-1].float()
        every = logits.log_softmax(-1)
        return every.gather(2, ids[:, PROMPT_TOKENS:, None])[..., 0], -(every.exp() * every).sum(-1)

    def values(ids: torch.Tensor) -> torch.Tensor:
        return critic(ids).logits[:, PROMPT_TOKENS - 1 : -1, 0].float()

    for step in range(WARM_UP + STEPS):
        ids = torch.randint(3, workload.VOCABULARY, (EPISODES, PROMPT_TOKENS + RESPONSE_TOKENS), generator=draw)
        marks = [time.monotonic()]
        with torch.no_grad():
            reward(ids)
            marks.append(time.monotonic())
            (old, _), (ref, _), before = logprobs(policy, ids), logprobs(reference, ids), values(ids)
        marks.append(time.monotonic())
        advantages = torch.randn(old.shape, generator=draw)
        returns = before + advantages - workload.BETA * (old - ref)
        ratio = (logprobs(policy, ids)[0] - old).exp()
        torch.max(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)).mean().backward()
        now = values(ids)
        clipped = before + (now - before).clamp(-0.2, 0.2)
        torch.max((now - returns) ** 2, (clipped - returns) ** 2).mul(0.5).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        marks.append(time.monotonic())
        if step >= WARM_UP:
            for name, began, ended in zip(times, marks, marks[1:], strict=False):
                times[name].append(ended - began)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


SIDES: dict[str, Callable[[Path], Figures]] = {
    "ppo": lambda folder: ppo(folder, **TWO, **{"ppo.checkpoint_every": 2}),
    "ppo_async": lambda folder: ppo(folder, **{"ppo.max_staleness": 1, "rollout.prompts_per_wave": EPISODES}),
    "ppo_half": lambda folder: ppo(
        folder, cores=(0,), **{"ppo.prompts_per_batch": EPISODES // 2, "ppo.minibatch_size": EPISODES // 2}
    ),
    "ppo_killed": lambda folder: ppo(folder, kill=True),
    "vllm": lambda folder: vllm(folder, [(0,), (1,)]),
    "vllm_one": lambda folder: vllm(folder, [(0,)]),
    "torch": lambda folder: bare_torch(folder, 2),
    "torch_one": lambda folder: bare_torch(folder, 1),
    **parts.SIDES,
}


def main() -> None:
    """Measure one side."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    print(json.dumps(SIDES[name](folder)))


if __name__ == "__main__":
    main()
