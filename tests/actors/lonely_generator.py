"""A program: a generator of an untied model takes one update, prints how close it is, and waits to be killed."""

import asyncio
import json
import multiprocessing
import sys

import torch

from actors.generator import Generator
from learner.config import ParityConfig, PublishConfig
from learner.weights.publish import Probe, Publisher
from tests.actors.conftest import ENGINE
from tests.hf_learner import HfLearner
from tests.tiny_models import tiny_causal_lm


async def main(folder: str) -> None:
    torch.set_num_threads(1)
    model = tiny_causal_lm(folder, tied=False, hidden=128)
    generator = Generator(ENGINE, folder, "lonely")
    await generator.start()
    config = PublishConfig(parity=ParityConfig(mean_bound=1e-3, max_bound=1e-2))
    learner = HfLearner(model, config)
    learner.train()
    publication = await Publisher(learner, config, [Probe(ids=list(range(3, 60)))]).publish([generator], 1)
    children = [child.pid for child in multiprocessing.active_children()]
    sys.stdout.write(json.dumps({"gap": publication.metrics["parity/max_gap"], "children": children}) + "\n")
    sys.stdout.flush()
    await asyncio.sleep(600)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
