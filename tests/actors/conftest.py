"""One real engine for all tests of this folder: it takes most of a minute to start."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from actors.config import GeneratorConfig
from actors.generator import Generator
from tests.tiny_models import tiny_causal_lm

ENGINE = GeneratorConfig(dtype="float32", max_model_len=256, max_num_seqs=32, kv_cache_gib=0.25, threads=1)
STOP_IDS = [2, 40]  # a response ends with either: the tokenizer's EOS, and one of generation_config.json


@dataclass
class Served:
    """A generator, the model whose weights it started with, and the loop that it runs in."""

    generator: Generator
    model: PreTrainedModel
    folder: Path
    runner: asyncio.Runner


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A generator of a tiny Llama with tied embeddings in float32, on one thread, started as version 0."""
    folder = tmp_path_factory.mktemp("tied")
    model = tiny_causal_lm(folder, tied=True, hidden=128)  # attention on a CPU wants heads of 32
    GenerationConfig(eos_token_id=STOP_IDS[1:]).save_pretrained(str(folder))
    torch.set_num_threads(1)
    with asyncio.Runner() as runner:
        generator = Generator(ENGINE, folder, "generator-0")
        runner.run(generator.start())
        yield Served(generator, model, folder, runner)
        runner.run(generator.stop())
