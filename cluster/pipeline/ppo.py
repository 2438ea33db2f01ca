"""Step 3 of a run: PPO between the processes."""

import asyncio
from collections.abc import Coroutine, Sequence
from datetime import datetime
from statistics import fmean, pstdev
from typing import Any, Self

from actors.chat import ChatExample
from actors.prompts import PromptStream, check_prompts, read_prompts
from actors.rollout import rollout
from actors.sampling import Generator
from actors.trajectory import Trajectory
from cluster.fleet.fleet import Fleet
from cluster.fleet.scale import obeying
from cluster.pipeline.evaluate import Held, HeldOut
from cluster.pipeline.job import Job
from cluster.pipeline.progress import Progress
from cluster.pipeline.recipes import sampling_settings
from cluster.rundir.inputs import Model
from cluster.rundir.stages import Stage
from learner.config import PPOConfig
from learner.data.buffer import Buffer
from learner.data.corpora import TextStream, pack, read_texts
from learner.data.ledger import Ledger
from learner.metrics import part_means
from learner.ppo import Parts, ppo
from learner.weights.publish import Publisher
from learner.worker.group import LearnerGroup
from reward_server.client import RewardClient


class Alignment:
    """PPO of one run directory. `run` may be called once for each arm, such as with and without pretraining."""

    learner: LearnerGroup
    fleet: Fleet
    rewards: RewardClient

    def __init__(self, job: Job) -> None:
        """Read and check every file, before anything heavy starts."""
        self.job = job
        self.heldout = HeldOut(job)
        self.encoding = self.heldout.encoding
        bad = job.config.data.max_bad_rows
        self.prompts = read_prompts(job.file("prompts"), bad)
        check_prompts(self.prompts, self.encoding, job.config.rollout.max_prompt_tokens)
        self.text: TextStream | None = None
        if (mix := job.config.ppo.pretraining).coef:
            packed = pack(read_texts(job.file("pretraining"), bad), self.encoding, mix.sequence_tokens)
            self.text = TextStream(packed, job.config.ppo.seed)

    def connect(self, learner: LearnerGroup, fleet: Fleet, rewards: RewardClient) -> Self:
        """Take the processes to work with."""
        self.learner, self.fleet, self.rewards = learner, fleet, rewards
        self.heldout.connect(learner, fleet, rewards)
        return self

    def stage(self, config: PPOConfig, name: str) -> Stage:
        """What a PPO stage is made of, apart from what may change on the way: its length, the processes, deadlines."""
        job, settings = self.job, self.job.config
        free = {"iterations", "checkpoint_every", "checkpoints_kept", "rollout_deadline_s", "max_tokens_per_microbatch"}
        made_with = {
            "ppo": config.model_dump(mode="json", exclude=free),
            "rollout": sampling_settings(settings),
            "scoring": settings.scoring.model_dump(mode="json", include={"parts"}),
            "labeler": settings.labeler.model_dump(mode="json"),
            "evaluation": settings.evaluation.model_dump(mode="json", exclude={"every"}),
            "order of prompts": PromptStream(self.prompts, config.seed).fingerprint,
            "order of pretraining": self.text.fingerprint if self.text else None,
        }
        contents = {f"models.{model}": job.model(model) for model in ("init", "sft", "reward", "critic")}
        files = ("prompts", "prompts_heldout", "pretraining", "pretraining_valid")
        traces = (job.run_dir / f"ledger-{name}.jsonl", job.run_dir / "checkpoints" / name)
        return job.stage(name, made_with, contents | job.data(*files), name.replace("ppo", "policy"), traces)

    def finished(self, config: PPOConfig, name: str = "ppo") -> bool:
        """Whether a stage is complete, which is said then. Raises ResumeRefused when it must not be worked on."""
        stage = self.stage(config, name)
        return stage.complete and stage.figures["iterations"] >= config.iterations and self.job.skips(stage)

    async def run(self, config: PPOConfig, name: str = "ppo") -> None:
        """Load the networks, train, measure before and after, and write RUN/policy and RUN/policy_ema.

        A stage that was stopped goes on from its newest checkpoint.
        """
        if self.finished(config, name):
            return
        job, tracker, stage = self.job, self.job.tracker, self.stage(config, name)
        progress = Progress(job, stage, config)
        with tracker.phase(f"{name}: load networks and hand the weights to the actors", name):
            await self._load(config)
            if progress.version:
                await self.learner.load_state(progress.networks, progress.version)
            self.fleet.publisher = Publisher(
                self.learner,
                job.config.publish,
                probes=self.heldout.probes(),
                workers=job.config.generator.tensor_parallel_size,
                waits=job.monitor.waits,
            )
            await self.learner.open_sender(job.config.publish)
            await self.fleet.publish(progress.version)
        start = "sft" if name == "ppo" and job.config.models.init is None else f"{name}-start"
        if not progress.version:
            with tracker.phase(f"{name}: held-out responses before", name):
                before = await self._measure(config, name, start, 0)
                job.summarise("ppo", name, **_figures(before, "before"))
        iterations = f"{name}: {config.iterations - progress.version} iterations"
        with tracker.phase(iterations, name), tracker.alerting("paused", self._pause):
            await self._train(config, name, progress)
        with tracker.phase(f"{name}: held-out responses after", name):
            after = await self._measure(config, name, name, config.iterations)
        await self.learner.save("policy", stage.result)
        await self.learner.save("policy", stage.result.with_name(f"{stage.result.name}_ema"), ema=True)
        await self.learner.unload()
        job.summarise("ppo", name, iterations=config.iterations, kl=after.kl, **_figures(after, "after"))
        self._record(stage.result.name, name, start)
        stage.finish(iterations=config.iterations)

    def _pause(self) -> str | None:
        """What is wrong while nothing is sampled for want of scores."""
        pause = self.rewards.paused
        if pause is None:
            return None
        since = datetime.fromtimestamp(pause.since).strftime("%H:%M:%S")
        return f"the run has been paused since {since}, as the reward service gives no scores: {pause.reason}"

    async def _measure(self, config: PPOConfig, stage: str, label: str, version: int) -> Held:
        """A point of the stage's held-out curves."""
        held = await self.heldout.measure(label, config, stage, version)
        self.job.tracker.log(stage, version, held.metrics())
        return held

    def _record(self, name: str, stage: str, start: str) -> None:
        """What the policy was made of, and what was measured on, in the lineage."""
        job, run_dir = self.job, self.job.run_dir
        scores = [part.target or job.model("reward") for part in job.config.scoring.parts if part.kind == "model"]
        models = [job.model("init"), job.model("sft"), job.model("critic"), *scores]
        texts = [job.file("prompts"), *([job.file("pretraining")] if self.text else [])]
        for folder, kind in ((run_dir / name, "policy"), (run_dir / f"{name}_ema", "policy_ema")):
            job.made(kind, folder, *dict.fromkeys(models), *texts)
        heldout = job.file("prompts_heldout")
        for label, model in ((start, job.model("init")), (stage, run_dir / name)):
            job.made("evaluation", run_dir / "evaluations" / f"{label}.jsonl", model, heldout)

    async def _load(self, config: PPOConfig) -> None:
        init, sft = self.job.model("init"), self.job.model("sft")
        await self.learner.load("policy", "policy", init, config.network, config.policy_optimizer, config.ema_decay)
        await self.learner.load("reference", "policy", sft, config.network, config.policy_optimizer, frozen=True)
        critic = Model(name="critic", path=self.job.model("critic"))
        head = "value" if critic.is_reward_model else "new_value"
        await self.learner.load("critic", head, critic.path, config.critic, config.critic_optimizer)

    async def _train(self, config: PPOConfig, name: str, progress: Progress) -> None:
        job = self.job
        stream = PromptStream(self.prompts, seed=config.seed)
        ledger = Ledger(progress.ledger_file, stream)
        samples, waiting = job.config.rollout.samples_per_prompt, self.fleet.joining
        buffer = Buffer(
            config.prompts_per_batch,
            samples,
            config.max_staleness,
            progress.version,
            ledger=ledger,
            batches=config.iterations,
            waiting=waiting,
            paused_s=lambda: self.rewards.paused_s,
            waits=job.monitor.waits,
        )
        progress.restore(buffer, ledger)
        sequences = max(1, round(config.pretraining.sequences_per_episode * config.minibatch_size))

        def text(iteration: int, parts: int) -> list[list[ChatExample]]:
            assert self.text is not None, "asked for with a coefficient only"
            return self.text.iteration(iteration, parts, sequences)

        def work(generator: Generator, leave: asyncio.Event) -> Coroutine[Any, Any, None]:
            return rollout(
                generator,
                self.rewards,
                stream,
                buffer,
                self.encoding,
                job.config.rollout,
                config.seed,
                leave,
                job.monitor.waits,
            )

        async def save(version: int, beta: float) -> None:
            await progress.save(version, beta, buffer, ledger, self.learner)

        async def measure(version: int) -> dict[str, float]:
            every = job.config.evaluation.every
            if not every or version % every or version == config.iterations:  # the last one is measured after PPO
                return {}
            return (await self.heldout.measure(f"{name}-{version:06d}", config, name, version)).metrics()

        job.monitor.sources.add(buffer)
        try:
            async with obeying(self.fleet, job.run_dir), self.fleet.rollouts(work, buffer.fail):
                await ppo(
                    Parts(
                        buffer=buffer,
                        learner=self.learner,
                        publish=self.fleet.publish,
                        pretraining=text,
                        observe=self._observe,
                        measure=measure,
                        save=save,
                        beta=progress.beta,
                        temperature=job.config.rollout.temperature,
                    ),
                    config,
                    lambda _stage, step, metrics: job.tracker.log(
                        name, step, {**metrics, "progress/total": float(config.iterations)}
                    ),
                )
        finally:
            job.monitor.sources.discard(buffer)
            buffer.close()

    def _observe(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        verdicts = self.heldout.labeler.verdicts([t.completion.text for t in trajectories])
        return {"gold/mean": fmean(verdicts), "gold/std": pstdev(verdicts), **part_means(trajectories)}


def _figures(held: Held, when: str) -> dict[str, float]:
    return {f"{field}_{when}": getattr(held, field) for field in ("gold", "score", "pretraining_loss")}
