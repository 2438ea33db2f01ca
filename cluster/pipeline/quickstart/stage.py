"""The whole of InstructGPT on one machine: real conversations, a simulated labeler, and a report."""

import contextlib
import time
from dataclasses import astuple
from pathlib import Path

from cluster.fleet.processes import Processes
from cluster.pipeline.job import Job, packed_text, run_rank, run_reward, run_sample, run_sft, sft_data
from cluster.pipeline.ppo import Alignment
from cluster.pipeline.quickstart.data import ChatSizes, chat_files, smollm2, tiny_tokenizer_and_model
from cluster.rundir.stages import clear
from learner.config import PPOConfig
from learner.data.corpora import read_texts
from learner.sft import SFTData
from learner.worker.group import LearnerGroup
from reward_server.encoding import ChatEncoding


async def quickstart(job: Job, processes: Processes, tiny: bool) -> None:
    """SFT, reward model, PPO-ptx; the tiny run pretrains its own model first and repeats PPO without the mix."""
    started = time.monotonic()
    base = prepare(job, tiny)
    job.summarise(model="a Llama of 2 M parameters, pretrained here" if tiny else "SmolLM2-135M-Instruct")
    async with contextlib.AsyncExitStack() as stack:
        with job.tracker.phase("start the learner"):
            learner = await stack.enter_async_context(processes.learner())
        if tiny:
            await pretrain(job, learner, base)
            base = job.run_dir / "base"
        await run_sft(job, learner, base, sft_data(job, base, job.config.sft), job.config.sft)
        sft_model = job.model("sft")
        with job.tracker.phase("start the vLLM actors"):
            generators = await stack.enter_async_context(processes.generators(job.config.generator, sft_model))
        await run_sample(job, generators.serving, sft_model)
        run_rank(job)
        await run_reward(job, learner, sft_model)
        with job.tracker.phase("start the reward service"):
            rewards = await stack.enter_async_context(processes.reward(job.config.scoring, job.model("reward")))
        alignment = Alignment(job).connect(learner, generators, rewards)
        for name, config in arms(job, tiny).items():
            await alignment.run(config, name)
    job.summarise(seconds=time.monotonic() - started)


def arms(job: Job, tiny: bool) -> dict[str, PPOConfig]:
    """The PPO stages, by name."""
    config = job.config.ppo
    without = config.model_copy(update={"pretraining": config.pretraining.model_copy(update={"coef": 0.0})})
    return {"ppo": config, "ppo-noptx": without} if tiny else {"ppo": config}


def complete(job: Job, tiny: bool) -> bool:
    """Whether there is nothing left to do, which is said then. Raises ResumeRefused, see `clear`."""
    clear(job.run_dir, job.start)
    if not all((job.run_dir / "stages" / f"{name}.json").is_file() for name in arms(job, tiny)):
        return False
    alignment = Alignment(job)
    return all(alignment.finished(config, name) for name, config in arms(job, tiny).items())


def prepare(job: Job, tiny: bool) -> Path:
    """Write the files of the run; return the model to start from (the tiny one is untrained as yet)."""
    sizes = job.config.quickstart.model_dump(exclude={"pretrain"})
    with job.tracker.phase("prepare conversations and model", "data"):
        files = chat_files(job.run_dir / "data", seed=0, sizes=ChatSizes(**sizes))
        for file in astuple(files):
            job.made("data", file)
        if tiny:
            return tiny_tokenizer_and_model(read_texts(files.pretraining), job.run_dir / "untrained", seed=0)
        return smollm2(progress=job.tracker.console.line)


async def pretrain(job: Job, learner: LearnerGroup, untrained: Path) -> None:
    """Language-model pretraining of the tiny model on whole chats; writes RUN/base."""
    encoding, config = ChatEncoding.load(untrained), job.config.quickstart.pretrain
    data = SFTData(
        demonstrations=packed_text(job, "pretraining", encoding, config.max_tokens),
        valid=packed_text(job, "pretraining_valid", encoding, config.max_tokens),
    )
    await run_sft(job, learner, untrained, data, config, stage="pretraining", out="base")
