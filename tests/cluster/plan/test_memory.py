"""What a learner rank holds and how long its phases take, beside a real one in a process of its own.

Both are measured in one run of each mode: the peak of the rank's memory above the bare process, and the processor's
seconds of its one thread, which are those of the clock where nothing else runs.
"""

import asyncio
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from cluster.config.schema import Config
from cluster.plan.batches import batches_of
from cluster.plan.counts import Lengths
from cluster.plan.estimates import MEMORY_TOLERANCE, TIME_FACTOR
from cluster.plan.hardware import GIB, Machine, measured_cores
from cluster.plan.memory import Models, learner_memory
from cluster.plan.pace import _shares, pace_of
from cluster.plan.remedies import changed
from cluster.plan.roofline import Clock
from cluster.plan.shapes import shape_of
from cluster.runtime.resources import Process, machine_cores
from learner.config import OptimizerConfig
from learner.data.batch import collate
from learner.worker.ppo_steps import PPOStep, Targets
from tests.model_sizes import save_policy_and_reward
from tests.ranks import RankProcess
from tests.tiny_batches import example, trajectory

EPISODES, TOKENS, BUDGET = 8, 128, 512
MODES = {  # (dtype, stage, gradient checkpointing, LoRA rank)
    "bfloat16, ZeRO-1": ("bfloat16", 1, False, 0),
    "float32, no ZeRO": ("float32", 0, False, 0),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy_and_reward(tmp_path_factory.mktemp("models"))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One rank that has been through PPO's phases."""

    config: Config
    models: Models
    peak: int
    """bytes above the bare process"""
    evaluate: float
    """seconds"""
    update: float
    """seconds of an iteration's optimizer steps of policy and critic"""


@pytest.fixture(scope="module", params=MODES)
def measured(folders: Path, request: pytest.FixtureRequest) -> Iterator[Measured]:
    rank = RankProcess(0, 1)
    address, port = asyncio.run(rank.meeting_point(True))
    asyncio.run(rank.start(address, port, 60.0))
    config, bare = config_of(*MODES[request.param]), peak(rank)
    try:
        evaluate, update = asyncio.run(one_iteration(config, rank, folders))
        yield Measured(
            config=config,
            models=Models(policy=shape_of(folders / "policy"), reward=shape_of(folders / "reward")),
            peak=peak(rank) - bare,
            evaluate=evaluate,
            update=update,
        )
    finally:
        rank.close()


def peak(process: RankProcess) -> int:
    """Bytes of main memory that the process had at most."""
    status = Path(f"/proc/{process._process.pid}/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) * 1024


def seconds(process: RankProcess) -> float:
    """Of the processor that the process has had."""
    user, system = Path(f"/proc/{process._process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def config_of(dtype: str, stage: int, checkpointing: bool, lora: int) -> Config:
    optimizer = OptimizerConfig(lr=1e-4, zero_stage=stage)  # pyright: ignore[reportArgumentType]
    values = {
        "ppo.policy_optimizer": optimizer,
        "ppo.critic_optimizer": optimizer,
        "ppo.network.dtype": dtype,
        "ppo.network.gradient_checkpointing": checkpointing,
        "ppo.network.lora_rank": lora,
        "ppo.network.logprob_chunk": 256,
        "ppo.max_tokens_per_microbatch": BUDGET,
        "ppo.minibatch_size": EPISODES,
        "ppo.prompts_per_batch": EPISODES,
        "ppo.pretraining.sequence_tokens": TOKENS,
        "ppo.pretraining.sequences_per_episode": 1.0,
        "rollout.max_prompt_tokens": TOKENS // 2,
        "rollout.max_new_tokens": TOKENS // 2,
    }
    return changed(Config(), values)


@pytest.mark.slow
def test_the_memory_of_a_rank_is_near_its_estimate(measured: Measured):
    held = learner_memory(measured.config, measured.models, "ppo", gpu=False)
    estimate = sum(size.host for name, size in held.items() if name != "process")
    told = {name: round(size.host / 2**20) for name, size in held.items()}
    assert measured.peak == pytest.approx(estimate, rel=MEMORY_TOLERANCE), told


@pytest.mark.slow
def test_the_seconds_of_a_rank_are_near_what_is_expected(measured: Measured):
    machine = Machine(name="a", cpus=machine_cores(), memory=GIB, gpus=0, device=measured_cores())
    alone = {
        name: (Process(name=name, threads=1, cpus=1), machine) for name in ("generator-0", "learner-0", "reward-0")
    }
    lengths = Lengths(prompt=TOKENS // 2, response=TOKENS // 2, longest=TOKENS // 2)
    clock = Clock(measured.config, measured.models, lengths, alone, 10**6, pace_of(measured.config))
    batches = batches_of(measured.config, "ppo", lengths, Path("nowhere"))
    assert batches is not None
    tries = []
    for _ in range(3):  # what else the machine does can only slow a layer down
        _shares.cache_clear()
        tries.append({phase.name: phase.expected for phase in clock.phases("ppo", batches)})
    expected = min(tries, key=lambda phases: sum(phases.values()))
    for phase, took in (
        (expected["evaluate"], measured.evaluate),
        (expected["update policy"] + expected["update critic"], measured.update),
    ):
        assert took / TIME_FACTOR < phase < took * TIME_FACTOR, (expected, measured)


async def one_iteration(config: Config, rank: RankProcess, folders: Path) -> tuple[float, float]:
    """What PPO does: load, evaluate, and update twice, as Adam's states appear with the first; seconds of the last."""
    ppo = config.ppo
    await rank.load("policy", "policy", folders / "policy", ppo.network, ppo.policy_optimizer, 0.99)
    await rank.load("reference", "policy", folders / "policy", ppo.network)
    await rank.load("critic", "value", folders / "reward", ppo.network, ppo.critic_optimizer)
    batch = collate([trajectory(TOKENS // 2, TOKENS // 2, i, 0.5) for i in range(EPISODES)], 0)
    rows = [list(range(EPISODES))]
    await rank.evaluate(batch, rows, BUDGET, 1.0)  # the first pass makes what later ones reuse
    started = seconds(rank)
    found = await rank.evaluate(batch, rows, BUDGET, 1.0)
    evaluate = seconds(rank) - started
    noise = torch.randn(found.logprobs.shape)
    targets = Targets(evaluation=found, advantages=noise, returns=noise, weights=None)
    text = [[example(TOKENS, 1, i) for i in range(EPISODES)]]
    step = PPOStep(
        clip=0.2,
        value_clip=0.2,
        pretraining_coef=1.0,
        temperature=1.0,
        max_tokens=BUDGET,
        pretraining_max_tokens=BUDGET,
        pretraining_normaliser="tokens",
        policy_lr=1e-4,
        critic_lr=1e-4,
    )
    update = 0.0
    for _ in range(2):
        started = seconds(rank)
        await rank.update(batch, targets, rows, text, step)
        update = seconds(rank) - started
    return evaluate, update
