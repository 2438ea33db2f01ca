"""Step 3: PPO between the processes. The algorithm itself is `learner/ppo.py`; here is what it works with."""

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

from actors.prompts import Prompt, PromptStream, fitting, read_prompts
from actors.waits import together
from cluster.config.schema import Config
from cluster.pipeline.evaluate import Evaluation, EvaluationSet, Evaluator, read_evaluation_set
from cluster.pipeline.evaluation.best_policy import BestPolicy
from cluster.pipeline.evaluation.suite import measure_on_the_way, read_suite_on_the_way
from cluster.pipeline.preferences import sampling_settings
from cluster.pipeline.stage import SAMPLING, SECTIONS, MadeOf, Stage, Trained
from cluster.rundir.inputs import Model
from cluster.rundir.record import ResumeRefused
from cluster.runtime.resources import KINDS
from learner.config import PPOConfig
from reward_server.preferences.records import read_all

if TYPE_CHECKING:
    from actors.evaluation.task import Task
    from actors.sampling import Generator
    from actors.trajectory import Trajectory
    from cluster.fleet.fleet import Fleet
    from cluster.fleet.pool import ProcessPool
    from learner.data.buffer import Buffer
    from learner.data.corpora import TextStream
    from learner.data.ledger import Ledger
    from learner.progress import Progress
    from learner.worker.group import LearnerGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What PPO reads."""

    held_out: EvaluationSet
    prompts: Sequence[Prompt]
    """what it samples from"""
    text: "TextStream | None"
    """the pretraining mix; None without one"""
    suite: "Sequence[Task[Any]]"
    """benchmarks that are measured on the way"""


class PPO(Stage):
    """Trains the SFT model against the reward model; writes RUN/policy, RUN/policy_ema and RUN/policy_best.

    It measures held-out prompts before, on the way and after. One that was stopped goes on from its newest checkpoint.
    """

    name = "ppo"
    purpose = "Step 3: train the SFT model against the reward model by PPO-ptx."
    files = (
        "Reads RUN/sft, RUN/reward, data.prompts, data.pretraining. Writes RUN/policy, its moving average "
        "RUN/policy_ema and, of the held-out measurement with the most gold, RUN/policy_best."
    )
    example = "rayward ppo --run runs/mine --data.prompts prompts.jsonl --ppo.kl.coef 0.05"
    sections = (
        *(*SECTIONS, "ppo", *SAMPLING, "scoring", "publish", "evaluation", "benchmarks", "labeler", "tracking"),
    )
    reads = (
        *("models.sft", "models.critic", "models.reward"),
        *("data.prompts", "data.prompts_heldout", "data.pretraining", "data.pretraining_valid"),
    )
    processes = KINDS
    writes = ("policy", "policy_ema", "policy_best")
    results = ("policy", "policy_ema", "evaluations/ppo.jsonl")
    traces = ("ledger-ppo.jsonl",)

    @classmethod
    def trained(cls, config: Config) -> Trained:
        ppo = config.ppo
        return {
            "ppo.policy_optimizer": (ppo.network, ppo.policy_optimizer),
            "ppo.critic_optimizer": (ppo.critic, ppo.critic_optimizer),
        }

    @property
    def config(self) -> PPOConfig:
        """Its section."""
        return self.job.config.ppo

    @cached_property
    def inputs(self) -> Inputs:
        """Its files, read and checked. Raises ValueError."""
        from learner.data.corpora import TextStream, pack, read_texts
        from reward_server.encoding import ChatEncoding

        job, mix, bad = self.job, self.job.config.ppo.pretraining, self.job.max_bad_rows
        encoding = ChatEncoding.load(job.model("sft"), job.config.models)
        fits = fitting(encoding, job.config.rollout.max_prompt_tokens)
        held_out, prompts, texts, suite = read_all(
            lambda: read_evaluation_set(job),
            lambda: read_prompts(job.file("prompts"), bad, fits),
            lambda: read_texts(job.file("pretraining"), bad) if mix.coef else [],
            lambda: read_suite_on_the_way(job, encoding),
        )
        packed = pack(texts, held_out.encoding, mix.sequence_tokens) if mix.coef else None
        text = None if packed is None else TextStream(packed, job.config.ppo.seed)
        return Inputs(held_out=held_out, prompts=prompts, text=text, suite=suite)

    def check(self) -> Inputs:
        return self.inputs

    @property
    def reach(self) -> Mapping[str, float]:
        return {"iterations": self.config.iterations}

    def made_of(self) -> MadeOf:
        job, config, inputs = self.job, self.job.config, self.inputs
        made_with = {
            "ppo": self.config.model_dump(mode="json"),
            "rollout": sampling_settings(config),
            "scoring": config.scoring.model_dump(mode="json", include={"parts"}),
            "labeler": config.labeler.model_dump(mode="json"),
            "evaluation": config.evaluation.model_dump(mode="json", include={"prompts", "seed", "shown"}),
            "order of prompts": PromptStream(inputs.prompts, self.config.seed).fingerprint,
            "order of pretraining": inputs.text.fingerprint if inputs.text else None,
        }
        models = {f"models.{model}": job.model(model) for model in ("init", "sft", "reward", "critic")}
        files = job.files("prompts", "prompts_heldout", "pretraining", "pretraining_valid")
        return made_with, models | files

    async def run(self, processes: "ProcessPool", inputs: Inputs) -> Mapping[str, Any]:
        from learner.weights.publish import Publisher

        job, config, name, tracker = self.job, self.config, self.name, self.job.tracker
        progress = self.progress(config, "iteration")
        if (newest := progress.newest) and newest.version > config.iterations:
            raise ResumeRefused(
                f"ppo.iterations is {config.iterations}, but {newest.folder} has done {newest.version} already. "
                f"Remedy: at least {newest.version}, or remove the newer checkpoints"
            )
        learner, fleet, rewards = await processes.all(job.model("init"), job.reward_to_serve)
        held_out, plan = inputs.held_out, processes.plan
        evaluator = Evaluator(
            job=job, held_out=held_out, learner=learner, fleet=fleet, rewards=rewards, apart=plan.apart
        )
        with tracker.phase(f"{name}: load networks and hand the weights to the actors", name):
            await self._load(learner)
            await progress.load(learner)
            workers, probes = job.config.generator.tensor_parallel_size, held_out.probes()
            fleet.publisher = Publisher(learner, job.config.publish, probes, workers, job.monitor.waits)
            await learner.open_sender(job.config.publish)
            await fleet.publish(progress.done)
        start = "sft" if name == "ppo" and job.config.models.init is None else f"{name}-start"
        if not progress.done:
            with tracker.phase(f"{name}: held-out responses before", name):
                before = await self._measure(evaluator, start, 0)
                job.summarise("ppo", name, **_figures(before, "before"))
                evaluator.summarise(start, before)
        keeps, folder = job.config.evaluation.keep_best, job.run_dir / f"{self.results[0]}_best"
        best = BestPolicy(job, name, folder, progress.done) if keeps else None
        iterations = f"{name}: {config.iterations - progress.done} iterations"
        with tracker.phase(iterations, name):
            # A score is rounded by the batch it is computed in: what is complete at the same time is no function of
            # the weights, and a synchronous run that was stopped goes on bit for bit as one that was not.
            await self._train(evaluator, inputs, progress, best, plan.scores_beside and config.max_staleness > 0)
        with tracker.phase(f"{name}: held-out responses after", name):
            last = self._measure(evaluator, name, config.iterations)
            after, policy = await together(last, self._export(learner, fleet), at_once=plan.apart)
            if best:
                await best.offer(config.iterations, after, lambda to: asyncio.to_thread(job.install, policy, to.name))
        await learner.unload()
        processes.weights = policy
        job.summarise("ppo", name, iterations=config.iterations, kl=after.kl, **_figures(after, "after"))
        evaluator.summarise(name, after)
        self._record_lineage(start, best)
        return {"iterations": config.iterations}

    def conclude(self) -> None:
        from cluster.report.report import write_report

        write_report(self.job.run_dir)

    async def _load(self, learner: "LearnerGroup") -> None:
        job, config = self.job, self.config
        init, sft, critic = job.model("init"), job.model("sft"), Model(name="critic", path=job.model("critic"))
        await learner.load("policy", "policy", init, config.network, config.policy_optimizer, config.ema_decay)
        await learner.load("reference", "policy", sft, config.network, config.policy_optimizer, frozen=True)
        await learner.load("critic", critic.kind, critic.path, config.critic, config.critic_optimizer)

    async def _measure(self, evaluator: Evaluator, label: str, version: int) -> Evaluation:
        """A point of the held-out curves."""
        found = await evaluator.measure(label, self.config, self.name, version)
        suite = await self._suite(evaluator.fleet, version)
        self.job.tracker.log(self.name, version, found.metrics() | suite)
        return found

    async def _suite(self, fleet: "Fleet", version: int) -> dict[str, float]:
        """A point of the curves of the suite, where there is one."""
        if not (tasks := self.inputs.suite):
            return {}
        from cluster.pipeline.evaluation.figures import figures
        from cluster.pipeline.evaluation.results import curves

        found = await measure_on_the_way(self.job, tasks, self.inputs.held_out.encoding, self.name, version, fleet)
        return curves({task.name: figures(task, found[task.name]) for task in tasks})

    async def _export(self, learner: "LearnerGroup", fleet: "Fleet") -> Path:
        """Write the policy and its moving average; the folder of the former."""
        policy, ema, _ = (self.job.run_dir / result for result in self.results)
        async with fleet.occupied():
            await self.job.export(learner, "policy", policy)
            await self.job.export(learner, "policy", ema, ema=True)
        return policy

    def _record_lineage(self, start: str, best: BestPolicy | None) -> None:
        """What the policy was made of, and what was measured on."""
        job, run_dir = self.job, self.job.run_dir
        scores = [part.target or job.model("reward") for part in job.config.scoring.parts if part.kind == "model"]
        models = [job.model("init"), job.model("sft"), job.model("critic"), *scores]
        texts = [job.file("prompts"), *([job.file("pretraining")] if self.inputs.text else [])]
        heldout = job.file("prompts_heldout")
        for kind, folder in zip(("policy", "policy_ema"), self.results, strict=False):
            job.made(kind, run_dir / folder, *dict.fromkeys(models), *texts)
        if best:
            job.made("policy_best", best.folder, *dict.fromkeys(models), *texts, heldout)
        for label, model in ((start, job.model("init")), (self.name, run_dir / self.results[0])):
            job.made("evaluation", run_dir / "evaluations" / f"{label}.jsonl", model, heldout)

    async def _train(
        self, evaluator: Evaluator, inputs: Inputs, progress: "Progress", best: BestPolicy | None, beside: bool
    ) -> None:
        """The loop of `learner/ppo.py`, with actors that sample for it."""
        from actors.rollout import rollout
        from cluster.fleet.scale import obeying
        from learner.data.buffer import Buffer
        from learner.data.ledger import Ledger
        from learner.ppo import Parts, ppo

        job, config, name, fleet, rewards = self.job, self.config, self.name, evaluator.fleet, evaluator.rewards
        stream, encoding = PromptStream(inputs.prompts, seed=config.seed), inputs.held_out.encoding
        disk, waits = job.monitor.disk, job.monitor.waits
        ledger = Ledger(self._ledger_file, stream, disk)
        buffer = Buffer(
            config.prompts_per_batch,
            job.config.rollout.samples_per_prompt,
            config.max_staleness,
            progress.done,
            ledger=ledger,
            batches=config.iterations,
            waiting=fleet.joining,
            paused_s=lambda: rewards.paused_s + disk.paused_s,
            waits=waits,
        )
        self._restore(progress, buffer, ledger)

        def work(generator: "Generator", leave: asyncio.Event) -> Coroutine[Any, Any, None]:
            sampling = job.config.rollout
            return rollout(generator, rewards, stream, buffer, encoding, sampling, config.seed, leave, waits, beside)

        async def measure(version: int) -> dict[str, float]:
            every, suite_every = job.config.evaluation.every, job.config.evaluation.suite_every
            metrics: dict[str, float] = {}
            if version == config.iterations:  # measured after PPO
                return metrics
            if every and not version % every:
                found = await evaluator.measure(f"{name}-{version:06d}", config, name, version)
                if best:
                    async with fleet.occupied():
                        await best.offer(version, found, lambda to: job.export(evaluator.learner, "policy", to))
                metrics |= found.metrics()
            if suite_every and not version % suite_every:
                metrics |= await self._suite(fleet, version)
            return metrics

        parts = Parts(
            buffer=buffer,
            learner=evaluator.learner,
            publish=fleet.publish,
            pretraining=self._text,
            observe=self._observe,
            measure=measure,
            save=lambda version, beta: self._save(progress, version, beta, buffer, ledger, evaluator.learner),
            beta=progress.state.get("beta", config.kl.coef),
            temperature=job.config.rollout.temperature,
        )
        total = {"progress/total": float(config.iterations)}
        job.monitor.sources.add(buffer)
        try:
            async with obeying(fleet, job.run_dir), fleet.working(work, buffer.fail):
                await ppo(parts, config, lambda _, step, metrics: job.tracker.log(name, step, {**metrics, **total}))
        finally:
            job.monitor.sources.discard(buffer)
            buffer.close()

    @property
    def _ledger_file(self) -> Path:
        return self.job.run_dir / self.traces[0]

    def _restore(self, progress: "Progress", buffer: "Buffer", ledger: "Ledger") -> None:
        """Have the buffer, and the ledger, go on where the checkpoint was written."""
        if progress.newest:
            buffer.restore(progress.newest.state["buffer"])
        elif self._ledger_file.exists():
            ledger.resumed(0, kept=())

    async def _save(
        self, progress: "Progress", version: int, beta: float, buffer: "Buffer", ledger: "Ledger", learner: Any
    ) -> None:
        """Write a checkpoint, with the ledger as far as it is."""

        async def save_networks(folder: Path) -> None:
            ledger.sync()
            await learner.save_state(folder)

        # taken before anything else can run: what is under way now is not in it, and is sampled again
        if await progress.save(version, {"beta": beta, "buffer": buffer.snapshot()}, save_networks):
            ledger.committed(version)

    def _text(self, iteration: int, minibatches: int) -> Any:
        assert self.inputs.text is not None, "asked for with a coefficient only"
        sequences = max(1, round(self.config.pretraining.sequences_per_episode * self.config.minibatch_size))
        return self.inputs.text.iteration(iteration, minibatches, sequences)

    def _observe(self, trajectories: "Sequence[Trajectory]") -> dict[str, float]:
        from learner.metrics import part_means

        verdicts = self.inputs.held_out.labeler.verdicts([t.completion.text for t in trajectories])
        return {"gold/mean": fmean(verdicts), "gold/std": pstdev(verdicts), **part_means(trajectories)}


def _figures(found: Evaluation, when: str) -> dict[str, float]:
    return {f"{field}_{when}": getattr(found, field) for field in ("gold", "score", "pretraining_loss")}
