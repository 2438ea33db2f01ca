"""Every family of models between learner and sampler, through the folders that a run writes."""

import asyncio
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.config import GeneratorConfig
from actors.generator import Generator
from actors.transfer import Manifest, Rendezvous
from learner.config import NetworkConfig, ParityConfig, PublishConfig
from learner.weights.publish import Probe, Publisher
from learner.worker.networks import changing_weights
from learner.worker.worker import LearnerWorker
from tests.tiny_models import tiny_causal_lm

pytestmark = pytest.mark.slow

CLOSE = 2e-4  # nats; float32 on both sides, other kernels
ENGINE = GeneratorConfig(dtype="float32", max_model_len=256, max_num_seqs=8, kv_cache_gib=0.1, threads=1)
PUBLISH = PublishConfig(deadline_s=20, bucket_mb=1, parity=ParityConfig(mean_bound=CLOSE, max_bound=CLOSE))
SEQUENCES = [[1, *range(first, first + 60)] for first in (50, 120, 200)]  # longer than a sliding window


@dataclass
class Learner:
    """A rank with a frozen policy, as a Publisher asks for it."""

    rank: LearnerWorker

    async def listen_transfer(self, world_size: int, epoch: int) -> Rendezvous:
        return self.rank.listen_transfer(world_size, epoch)

    async def connect_transfer(self) -> None:
        await asyncio.to_thread(self.rank.connect_transfer)

    async def transfer_manifest(self) -> Manifest:
        return self.rank.transfer_manifest()

    async def send_weights(self) -> dict[str, int]:
        return await asyncio.to_thread(self.rank.send_weights)

    async def probe_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return self.rank.probe_logprobs(sequences)


@pytest.fixture(scope="module", autouse=True)
def forked_engines() -> Iterator[None]:
    """Engines come of a process that has imported vLLM once for all of them. (Those of tests/actors are spawned.)"""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vllm.v1.engine.core", "vllm.v1.worker.cpu_worker", "actors.weights"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm.v1.engine.utils.get_mp_context", lambda: context)
        yield


@pytest.mark.parametrize(
    ("family", "tied"),
    [
        ("qwen2", True),
        ("qwen3", False),
        ("mistral", False),
        ("gemma", True),
        ("gemma2", True),
        ("gemma3_text", True),
        ("gpt_neox", False),
        ("gpt2", True),
    ],
)
def test_sampler_and_learner_agree_before_and_after_new_weights(tmp_path: Path, family: str, tied: bool) -> None:
    """The engine starts from a folder that the learner wrote. (Llama is in tests/actors.)"""
    tiny_causal_lm(tmp_path / "base", tied=tied, family=family, hidden=128)
    rank = LearnerWorker(rank=0, world_size=1, threads=1)
    rank.start(*rank.meeting_point(loopback=True), deadline_s=60)
    rank.load("policy", "policy", tmp_path / "base", NetworkConfig(dtype="float32"))
    rank.save("policy", tmp_path / "saved")
    rank.networks.module("policy").requires_grad_(True)
    rank.open_sender(PUBLISH)
    generator = Generator(ENGINE, tmp_path / "saved", family)
    publisher = Publisher(Learner(rank), PUBLISH, [Probe(ids=ids) for ids in SEQUENCES])
    with asyncio.Runner() as runner:
        runner.run(generator.start())
        try:
            first = torch.tensor(rank.probe_logprobs(SEQUENCES))
            torch.testing.assert_close(
                torch.tensor(runner.run(generator.logprobs(SEQUENCES))), first, rtol=0, atol=CLOSE
            )
            greedy = runner.run(generator.generate([s[:30] for s in SEQUENCES], [0] * 3, 24, 0.0))
            assert [c.response_ids for c in greedy] == [continuation(tmp_path / "saved", s[:30]) for s in SEQUENCES]
            move(rank)
            assert (torch.tensor(rank.probe_logprobs(SEQUENCES)) - first).abs().mean() > 0.1
            publication = runner.run(publisher.publish([generator], 1))  # proves checksums and log-probs
            assert publication.lost == {}
            assert publication.metrics["parity/max_gap"] < CLOSE
            for name, weight in rank.networks.module("policy").model.named_parameters():
                weight.requires_grad_(".1." in name)
            move(rank)
            part = runner.run(publisher.publish([generator], 2)).metrics  # the last of two layers alone
            assert part["publish/bytes"] < publication.metrics["publish/bytes"] / 2
            assert part["parity/max_gap"] < CLOSE
        finally:
            runner.run(generator.stop())


def continuation(folder: Path, prompt: list[int]) -> tuple[int, ...]:
    """What transformers generates greedily from a folder."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    return tuple(output[0, len(prompt) :].tolist())


def move(rank: LearnerWorker) -> None:
    """Change every weight that is not frozen, as training would."""
    generator = torch.Generator().manual_seed(0)
    changing = changing_weights(rank.networks.module("policy").model)
    for _, weight in filter(lambda pair: pair[0] in changing, rank.weights()):
        weight += 0.1 * weight.std() * torch.randn(weight.shape, generator=generator)
