"""The whole of InstructGPT on one machine: real conversations, a simulated labeler, and a report."""

import contextlib
from pathlib import Path

from cluster.alignment import Alignment
from cluster.build import Processes, plan_run
from cluster.quickstart_data import ChatFiles, ChatSizes, chat_files, smollm2, tiny_tokenizer_and_model
from cluster.steps import Job, SFTData, packed_text, run_rank, run_reward, run_sample, run_sft, sft_data
from learner.corpora import read_texts
from learner.engine import OptimizerConfig
from learner.sft import SFTConfig
from reward_server.encoding import ChatEncoding

SIZES = ChatSizes(demonstrations=1000, preference_prompts=256, prompts=1200, pretraining=500)
TINY_SIZES = ChatSizes(pretraining=1800, demonstrations=1000, preference_prompts=256)


async def quickstart(job: Job, tiny: bool) -> None:
    """SFT, reward model, PPO-ptx; the tiny run pretrains its own model first and repeats PPO without the mix."""
    base = prepare_tiny(job) if tiny else prepare(job)
    plan = plan_run(job.config.cluster, job.config.ppo.max_staleness, job.config.rollout.waves_in_flight)
    processes = Processes(job.config.cluster, plan, job.run_dir / "logs")
    async with contextlib.AsyncExitStack() as stack:
        with job.tracker.phase("start the learner"):
            learner = await stack.enter_async_context(processes.learner())
        if tiny:
            await pretrain(job, learner, base)
            base = job.run_dir / "base"
        await run_sft(job, learner, base, sft_data(job, base), job.config.sft)
        sft_model = job.model("sft")
        with job.tracker.phase("start the vLLM actors"):
            generators = await stack.enter_async_context(processes.generators(job.config.generator, sft_model))
        await run_sample(job, generators, sft_model)
        run_rank(job)
        await run_reward(job, learner, sft_model)
        with job.tracker.phase("start the reward service"):
            rewards = await stack.enter_async_context(processes.reward(job.config.scoring, job.model("reward")))
        alignment = Alignment(job, learner, generators, rewards)
        await alignment.run(job.config.ppo)
        if tiny:
            mix = job.config.ppo.pretraining.model_copy(update={"coef": 0.0})
            await alignment.run(job.config.ppo.model_copy(update={"pretraining": mix}), stage="ppo-noptx")


def prepare(job: Job) -> Path:
    """The files and the model of the main run; the model is converted once and cached."""
    with job.tracker.phase("prepare conversations and model", "data"):
        chat_files(job.run_dir / "data", seed=0, sizes=SIZES)
        return smollm2(progress=job.tracker.console.line)


def prepare_tiny(job: Job) -> Path:
    """The files and an untrained model of the tiny run."""
    with job.tracker.phase("prepare conversations and model", "data"):
        files: ChatFiles = chat_files(job.run_dir / "data", seed=0, sizes=TINY_SIZES)
        return tiny_tokenizer_and_model(read_texts(files.pretraining), job.run_dir / "untrained", seed=0)


async def pretrain(job: Job, learner, untrained: Path) -> None:
    """Language-model pretraining of the tiny model on whole chats; writes RUN/base."""
    encoding = ChatEncoding.load(untrained)
    data = SFTData(
        demonstrations=packed_text(job, "pretraining", encoding, 128),
        valid=packed_text(job, "pretraining_valid", encoding, 128),
        pretraining=[],
    )
    config = SFTConfig(
        epochs=1,
        batch_size=16,
        pretraining_share=0.0,
        max_tokens_per_microbatch=4096,
        network=job.config.sft.network,
        optimizer=OptimizerConfig(lr=3e-3),
    )
    await run_sft(job, learner, untrained, data, config, stage="pretraining", out="base")
