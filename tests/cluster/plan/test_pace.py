"""What an engine and a reward model reach beside what is expected of them, on one thread of this machine."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from actors.config import GeneratorConfig
from actors.generator import Generator
from cluster.config.schema import Config
from cluster.plan.counts import Lengths, SamplingPlan
from cluster.plan.estimates import TIME_FACTOR
from cluster.plan.hardware import GIB, GPUS, Device, Machine, measured_cores
from cluster.plan.memory import Models
from cluster.plan.pace import _shares, pace_of
from cluster.plan.remedies import changed
from cluster.plan.roofline import Clock, Phase
from cluster.plan.shapes import Shape, shape_of
from cluster.runtime.resources import Process, machine_cores
from reward_server.encoding import ChatEncoding
from reward_server.schema import Message, ScoreRequest
from reward_server.scorer import RewardModelSource, encode_request
from tests.model_sizes import save_policy_and_reward

SEQUENCES, PROMPT, RESPONSE = 32, 32, 32


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy_and_reward(tmp_path_factory.mktemp("models"))


def clock(shape: Shape, config: Config, response: int = RESPONSE) -> Clock:
    machine = Machine(name="a", cpus=machine_cores(), memory=GIB, gpus=0, device=measured_cores())
    names = ("generator-0", "learner-0", "reward-0")
    alone = {name: (Process(name=name, threads=1, cpus=1), machine) for name in names}
    lengths = Lengths(prompt=PROMPT, response=response, longest=response)
    return Clock(config, Models(policy=shape, reward=shape), lengths, alone, 10**6, pace_of(config))


def expected(folders: Path, step: str, name: str, sequence_tokens: int = SEQUENCES * (PROMPT + RESPONSE)) -> Phase:
    plan = SamplingPlan(
        prompts=SEQUENCES,
        samples=1,
        waves=1,
        response_tokens=SEQUENCES * RESPONSE,
        sequence_tokens=sequence_tokens,
    )
    tries = []
    for _ in range(3):  # what else the machine does can only slow a layer down
        _shares.cache_clear()
        found = clock(shape_of(folders / "policy"), Config()).phases(step, plan)
        tries += [phase for phase in found if phase.name == name]
    return min(tries, key=lambda phase: phase.expected)


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as found:
        yield found


def engine_seconds() -> float:
    """Of the processor, of the engine and its front, which share the cores that a generator is pinned to."""
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(one.user + one.system for one in times)


@pytest.mark.slow
def test_decoding_takes_about_as_long_as_expected(folders: Path, runner: asyncio.Runner):
    torch.set_num_threads(1)
    config = GeneratorConfig(max_model_len=128, max_num_seqs=SEQUENCES, kv_cache_gib=0.25, threads=1)
    generator = Generator(config, folders / "policy")
    runner.run(generator.start())
    try:
        took = []
        for turn in range(3):  # the first makes what later ones reuse
            queries = [[3 + (row * 7 + place + turn) % 200 for place in range(PROMPT)] for row in range(SEQUENCES)]
            started = engine_seconds()
            found = runner.run(generator.generate(queries, list(range(SEQUENCES)), RESPONSE, 1.0))
            took.append(engine_seconds() - started)
            assert sum(len(one.response_ids) for one in found) > 0.9 * SEQUENCES * RESPONSE
    finally:
        runner.run(generator.stop())
    phase = expected(folders, "sample", "generate")
    assert min(took) / TIME_FACTOR < phase.expected < min(took) * TIME_FACTOR, (phase, took)


@pytest.mark.slow
def test_scoring_takes_about_as_long_as_expected(folders: Path):
    torch.set_num_threads(1)
    source = RewardModelSource(folders / "reward", dtype="bfloat16")
    source.load()
    words = " ".join(["word"] * PROMPT)
    asked = [
        ScoreRequest(id=str(i), prompt=(Message(role="user", content=words),), response=words, ended=True)
        for i in range(SEQUENCES)
    ]
    took, process = [], psutil.Process()
    for _ in range(3):
        before = process.cpu_times()
        source.score(asked)
        after = process.cpu_times()
        took.append(after.user + after.system - before.user - before.system)
    encoding = ChatEncoding.load(folders / "reward")
    phase = expected(folders, "select", "score", sum(len(encode_request(encoding, one, 256)) for one in asked))
    assert min(took) / TIME_FACTOR < phase.expected < min(took) * TIME_FACTOR, (phase, took)


def test_a_gpu_is_expected_to_reach_what_is_stated_and_to_pay_for_launches():
    node = Machine(name="a", cpus=8, memory=GIB, gpus=1, device=GPUS["H100"])
    who = (shape_of("llama-3.1-8b"), Process(name="generator-0", threads=8, cpus=8, gpus=1), node, False)
    eager = pace_of(Config())(*who)
    compiled = pace_of(changed(Config(), {"generator.enforce_eager": False, "plan.efficiency": 0.5}))(*who)
    assert (eager.forward, compiled.training) == (0.4, 0.5)
    assert eager.step_s(1) - compiled.step_s(1) == pytest.approx(32 * 3e-4)


def test_cores_that_are_not_here_are_expected_to_reach_what_others_have():
    described = Device(name="8 cores", flops=1e12, bandwidth=1e11, memory=GIB, link=1e10, source="given")
    away = Machine(name="a", cpus=8, memory=GIB, gpus=0, device=described)
    who = (shape_of("smollm2-135m"), Process(name="learner-0", threads=8, cpus=8), away, False)
    rates = pace_of(Config())(*who)
    assert (rates.forward, rates.training, rates.decode) == (0.7, 0.6, 0.4)
    assert rates.step_s(10) == pytest.approx(30 * 9e-4 + 10 * (3e-4 + 49_152 * 1.2e-8))


def test_measuring_leaves_the_threads_as_they_were():
    here = Machine(name="a", cpus=machine_cores(), memory=GIB, gpus=0, device=measured_cores(0.01))
    before = torch.get_num_threads()
    rates = pace_of(Config())(shape_of("smollm2-135m"), Process(name="p", threads=1, cpus=1), here, False)
    assert torch.get_num_threads() == before
    assert rates.decode > 0
    assert 0 < rates.training < rates.forward
