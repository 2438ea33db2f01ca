"""The whole of InstructGPT on one machine: real conversations, a simulated labeler, and a report."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from cluster.config.schema import Config
from cluster.pipeline.job import Job
from cluster.pipeline.ppo import PPO
from cluster.pipeline.preferences import Rank, Sample
from cluster.pipeline.reward_model import RewardModel
from cluster.pipeline.sft import SFT, packed_text
from cluster.pipeline.stage import SAMPLING, SECTIONS, Stage, Trained, advance
from cluster.rundir.record import clear
from cluster.runtime.resources import KINDS
from learner.config import PPOConfig, SFTConfig

if TYPE_CHECKING:
    from cluster.fleet.pool import ProcessPool
    from learner.sft import SFTData

_HELD_OUT = {"prompts_heldout": 128, "demonstrations_valid": 128}


class Quickstart(Stage):
    """SFT, reward model, PPO-ptx; the tiny run pretrains its own model first and repeats PPO without the mix."""

    name = "quickstart"
    purpose = "Run all of it on a small model, and write a report."
    files = "Needs nothing but this installation. Writes models, metrics and report.html into RUN."
    example = "rayward quickstart --tiny"
    sections = (
        *(*SECTIONS, "sft", "sample", "labeler", "reward", "ppo", *SAMPLING),
        *("scoring", "publish", "evaluation", "benchmarks", "tracking", "quickstart"),
    )
    processes = KINDS
    parts = ("sft", "sample", "reward", "ppo")
    default_run = "runs/quickstart"
    preset = "quickstart"
    variants: ClassVar[Mapping[str, str]] = {
        "tiny": "a model of 2 million parameters, pretrained on the spot; PPO with and without the mix"
    }

    @classmethod
    def trained(cls, config: Config) -> Trained:
        return {**SFT.trained(config), **RewardModel.trained(config), **PPO.trained(config)}

    @property
    def tiny(self) -> bool:
        """Whether it is the tiny variant."""
        return self.job.variant == "tiny"

    def pending(self) -> bool:
        """Raises ResumeRefused, see `clear`."""
        clear(self.job.run_dir, self.job.start)
        arms = list(self._arms(replace(self.job, start="resume")))
        if not all((self.job.run_dir / "stages" / f"{arm.name}.json").is_file() for arm in arms):
            return True
        return any(arm.pending() for arm in arms)

    def check(self) -> None:
        """What it reads it makes first. Raises ResumeRefused where it may not begin."""
        if self.job.start == "new":
            clear(self.job.run_dir, "new")

    async def run(self, processes: "ProcessPool", inputs: None) -> None:
        started, job = time.monotonic(), replace(self.job, start="resume")  # `clear` has seen to the stages that were
        base = self._prepare()
        job.summarise(model="Llama of 2 M parameters" if self.tiny else "SmolLM2-135M-Instruct")
        if job.config.models.chat_template is None:  # else a response may end otherwise than the base model's
            processes.prefetch(base)
        if self.tiny:
            await advance(Pretraining(job, base), processes)
            base = job.run_dir / "base"
        for stage in (SFT(job, base), Sample(job), Rank(job), RewardModel(job)):
            await advance(stage, processes)
        for arm in self._arms(job):
            await advance(arm, processes)
        job.summarise(seconds=time.monotonic() - started)

    def conclude(self) -> None:
        from cluster.report.report import show_report

        show_report(self.job.run_dir, self.job.tracker.console)

    def _arms(self, job: Job) -> Iterator[PPO]:
        """The PPO stages."""
        yield PPO(job)
        if self.tiny:
            yield PPOWithoutMix(job)

    def _prepare(self) -> Path:
        """Write the files of the run; the model to start from (the tiny one is untrained as yet)."""
        from cluster.pipeline.quickstart.data import chat_files, smollm2, tiny_tokenizer_and_model
        from learner.data.corpora import read_texts

        job, sizes = self.job, self.job.config.quickstart.model_dump(exclude={"pretrain"})
        with job.tracker.phase("prepare conversations and model", "data"):
            files = chat_files(job.run_dir / "data", seed=0, sizes=_HELD_OUT | sizes)
            for file in files.values():
                job.made("data", file)
            if self.tiny:
                return tiny_tokenizer_and_model(read_texts(files["pretraining"]), job.run_dir / "untrained", seed=0)
            return smollm2(progress=job.tracker.console.line)


class Pretraining(SFT):
    """Language-model pretraining of the tiny model on whole chats; writes RUN/base."""

    name = "pretraining"
    results = ("base",)

    @classmethod
    def settings(cls, config: Config) -> SFTConfig:
        return config.quickstart.pretrain

    def check(self) -> "SFTData":
        from learner.sft import SFTData
        from reward_server.encoding import ChatEncoding

        encoding, tokens = (
            ChatEncoding.load(self.base, self.job.config.models),
            self.settings(self.job.config).max_tokens,
        )
        return SFTData(
            demonstrations=packed_text(self.job, "pretraining", encoding, tokens),
            valid=packed_text(self.job, "pretraining_valid", encoding, tokens),
        )

    def learnt(self, inputs: Any) -> tuple[str, ...]:
        return ("pretraining",)


class PPOWithoutMix(PPO):
    """PPO without pretraining gradients, which shows what the mix is for."""

    name = "ppo-noptx"
    results = ("policy-noptx", "policy-noptx_ema", "evaluations/ppo-noptx.jsonl")
    traces = ("ledger-ppo-noptx.jsonl",)

    @property
    def config(self) -> PPOConfig:
        ppo = self.job.config.ppo
        return ppo.model_copy(update={"pretraining": ppo.pretraining.model_copy(update={"coef": 0.0})})
