"""The formulas by hand, beside what torch keeps, and beside a real learner rank in a process of its own."""

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.config.schema import Config
from cluster.pipeline.stages import STAGES
from cluster.plan.machines import GPUS, Machine
from cluster.plan.memory import (
    Bytes,
    Network,
    activation_bytes,
    learner_memory,
    misfits,
    network_memory,
    networks,
    on_cpu,
    total,
)
from cluster.plan.shapes import Models, Shape, shape_of
from cluster.runtime.fitting import place_processes
from cluster.runtime.resources import GIB, Process
from learner.config import NetworkConfig, OptimizerConfig
from learner.data.batch import collate
from learner.worker.networks import load_network
from learner.worker.ppo_steps import PPOStep, Targets
from tests.model_sizes import save_policy_and_reward
from tests.ranks import RankProcess
from tests.settings import settings
from tests.tiny_batches import example, trajectory
from tests.tiny_models import tiny_causal_lm, tiny_reward_model

TOLERANCE = 0.25
"""How far a rank's memory on a CPU may be from its estimate, as a part of it."""
SEVEN_B = 7_500_000_000


def network(stage: Any = 0, ema: bool = False, trained: int = SEVEN_B, **offload: Any) -> dict[str, Bytes]:
    optimizer = OptimizerConfig(lr=1e-4, zero_stage=stage, **offload)
    return network_memory(SEVEN_B, trained, 2, optimizer, 64, ema)


def device(**changes: Any) -> float:
    return total(network(**changes)).device / 1e9


def test_sharding_is_that_of_the_zero_paper_with_gradients_in_float32():
    # Rajbhandari et al. 2020, figure 1: 7.5 B parameters, 64 ranks, K = 12; gradients of 2 bytes there, of 4 here.
    assert device() == pytest.approx(7.5 * (2 + 4 + 12))
    assert device(stage=1) == pytest.approx(7.5 * (2 + 4 + 2 + 12 / 64))  # gradients of the last pass in bfloat16
    assert device(stage=2) == pytest.approx(7.5 * (2 + 16 / 64))
    assert device(stage=3) == pytest.approx(7.5 * 18 / 64 + 2)  # and a billion gathered parameters
    assert device(ema=True) - device() == pytest.approx(30)
    assert device(stage=1, ema=True) - device(stage=1) == pytest.approx(30 / 64)
    assert network(trained=0) == {"weights": Bytes(device=15e9)}


def test_what_is_offloaded_is_in_main_memory():
    found = network(stage=3, ema=True, offload_optimizer="cpu", offload_param="cpu")
    assert found["optimizer"] == Bytes(host=7.5e9 * 12 / 64)
    assert found["weights"] == Bytes(host=7.5e9 * 2 / 64)
    assert found["gathered weights"] == Bytes(device=2e9)
    assert found["moving average"].device == found["gradients"].device == 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["policy", "value"])
@pytest.mark.parametrize(("lora", "last"), [(0, 0), (4, 0), (0, 1), (4, 1)])
def test_trained_parameters_are_those_of_the_network(tmp_path: Path, family: str, kind, lora: int, last: int):
    (tiny_causal_lm if kind == "policy" else tiny_reward_model)(tmp_path, family=family)
    config = NetworkConfig(dtype="float32", lora_rank=lora, last_layers=last)
    made = load_network(kind, tmp_path, config)
    counts = [sum(p.numel() for p in made.parameters() if p.requires_grad or every) for every in (True, False)]
    name = "critic" if kind == "value" else "policy"
    found = Network(name=name, shape=shape_of(tmp_path), config=config, optimizer=OptimizerConfig(lr=1e-4))
    assert [found.parameters, found.trained] == counts


def test_the_networks_of_each_stage():
    models = Models(policy=shape_of("smollm2-135m"), reward=shape_of("qwen2.5-0.5b"))
    told = {
        name: [(one.name, one.frozen, one.shape.name) for one in networks(Config(), models, stage)]
        for name, stage in STAGES.items()
    }
    small, large = models.policy.name, models.reward.name
    assert told["sft"] == [("policy", False, small)]
    assert told["reward"] == [("reward", False, small)]
    assert told["ppo"] == [("policy", False, small), ("reference", True, small), ("critic", False, large)]
    assert told["evaluate"] == [("policy", True, small), ("reference", True, small)]
    assert told["sample"] == []


def test_activations_by_hand():
    shape = Shape(name="x", layers=10, hidden=4, heads=2, head_dim=2, inner=8)
    layer = 2 * (6 * 4 + 2 * 4) + 4 * 2 * 4 + 4 * 2 * 8  # two norms with their results, attention, feed-forward block
    assert activation_bytes(shape, 3, 2, False, 10) == 3 * (10 * layer + 6 * 4)
    assert activation_bytes(shape, 3, 2, False, 2) == 3 * (2 * layer + 6 * 4)
    assert activation_bytes(shape, 3, 2, True, 10) == 3 * (10 * 2 * 4 + layer + 6 * 4)


def test_what_frozen_first_layers_gave_is_kept_for_a_batch_of_each_rank():
    shape, lora = shape_of("smollm2-135m"), NetworkConfig(lora_rank=16, last_layers=12)
    values = {"ppo.network": lora, "ppo.prompts_per_batch": 512, "evaluation.prompts": 64, "cluster.learner_ranks": 2}
    values |= {"rollout.max_prompt_tokens": 100, "rollout.max_new_tokens": 28}
    models, batch = Models(policy=shape, reward=shape), 512 * 128 / 2 * 576 * 2

    def kept(**more: Any) -> Bytes | None:
        found = learner_memory(
            settings(values | {k.replace("__", "."): v for k, v in more.items()}), models, STAGES["ppo"]
        )
        return found.get("trunk output")

    assert kept(reward__network=lora) == Bytes(host=batch)  # the critic's is the policy's
    assert kept() == Bytes(host=2 * batch)
    assert kept(ppo__critic_network=NetworkConfig()) == Bytes(host=batch)
    assert kept(ppo__network=NetworkConfig()) is None


@pytest.mark.parametrize(
    ("device", "host", "said"), [(41, 1, "a/gpu-0 has 79.2 GiB and needs 82.0"), (1, 40, "main memory of a")]
)
def test_what_does_not_fit_is_named_with_its_largest_item(device: int, host: int, said: str):
    names, there = (
        ("generator-0", "learner-0"),
        Machine(name="a", cpus=16, memory=64 * GIB, gpus=1, device=GPUS["A100"]),
    )
    shared = [Process(name=name, threads=1, cpus=1, gpus=0.5) for name in names]
    placed = place_processes(shared, [there], by_cpus=False)
    (text,) = misfits({name: {"weights": Bytes(device=device * GIB, host=host * GIB)} for name in names}, placed, "ppo")
    assert said in text
    assert "generator-0's weights" in text
    cached = {"generator-0": {"keys and values": Bytes(device=-3 * GIB)}}
    assert "3.0 GiB are missing" in next(iter(misfits(cached, placed, "ppo")))


EPISODES, TOKENS, BUDGET = 8, 128, 512


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "stage"), [("bfloat16", 1), ("float32", 0)])
def test_the_memory_of_a_rank_is_near_its_estimate(tmp_path: Path, rank: RankProcess, dtype: str, stage: Any):
    folders = save_policy_and_reward(tmp_path)
    optimizer = OptimizerConfig(lr=1e-4, zero_stage=stage)
    values = {
        "ppo.policy_optimizer": optimizer,
        "ppo.critic_optimizer": optimizer,
        "ppo.network": NetworkConfig(dtype=dtype, logprob_chunk=256),  # pyright: ignore[reportArgumentType]
        "ppo.max_tokens_per_microbatch": BUDGET,
        "ppo.minibatch_size": EPISODES,
        "ppo.prompts_per_batch": EPISODES,
        "ppo.pretraining.sequence_tokens": TOKENS,
        "ppo.pretraining.sequences_per_episode": 1.0,
        "rollout.max_prompt_tokens": TOKENS // 2,
        "rollout.max_new_tokens": TOKENS // 2,
    }
    config = settings(values)
    models = Models(policy=shape_of(folders / "policy"), reward=shape_of(folders / "reward"))
    held = on_cpu(learner_memory(config, models, STAGES["ppo"]))
    del held["process"]
    bare = peak(rank)
    asyncio.run(two_updates(config, rank, folders))
    assert peak(rank) - bare == pytest.approx(total(held).host, rel=TOLERANCE), held


@pytest.fixture
def rank() -> Iterator[RankProcess]:
    found = RankProcess(0, 1)
    address, port = asyncio.run(found.meeting_point(True))
    asyncio.run(found.start(address, port, 60.0))
    yield found
    found.close()


def peak(process: RankProcess) -> int:
    """Bytes of main memory that the process had at most."""
    status = Path(f"/proc/{process._process.pid}/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) * 1024


async def two_updates(config: Config, rank: RankProcess, folders: Path) -> None:
    """What PPO does: load, evaluate, and update twice, as Adam's states appear with the first."""
    ppo = config.ppo
    await rank.load("policy", "policy", folders / "policy", ppo.network, ppo.policy_optimizer, 0.99)
    await rank.load("reference", "policy", folders / "policy", ppo.network)
    await rank.load("critic", "value", folders / "reward", ppo.network, ppo.critic_optimizer)
    batch = collate([trajectory(TOKENS // 2, TOKENS // 2, i, 0.5) for i in range(EPISODES)], 0)
    rows = [list(range(EPISODES))]
    found = await rank.evaluate(batch, rows, BUDGET, 1.0)
    noise = torch.randn(found.logprobs.shape)
    targets = Targets(evaluation=found, advantages=noise, returns=noise, weights=None)
    text = [[example(TOKENS, 1, i) for i in range(EPISODES)]]
    numbers: dict[str, Any] = {"clip": 0.2, "value_clip": 0.2, "pretraining_coef": 1.0, "temperature": 1.0}
    budgets: dict[str, Any] = {"max_tokens": BUDGET, "pretraining_max_tokens": BUDGET}
    rates: dict[str, Any] = {"policy_lr": 1e-4, "critic_lr": 1e-4}
    step = PPOStep(pretraining_normaliser="tokens", **numbers, **budgets, **rates)
    for _ in range(2):
        await rank.update(batch, targets, rows, text, step)
