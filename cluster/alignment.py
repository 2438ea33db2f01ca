"""Step 3 of a run: PPO between the processes, and what is measured before and after it."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Self

from torch import Tensor

from actors.prompts import Prompt, PromptStream, check_prompts, read_prompts
from actors.rollout import rollout, supervise
from actors.sampling import sample
from actors.trajectory import Completion, SampleKey, Trajectory
from cluster.build import Sampler
from cluster.steps import Job, heldout_prompts
from learner.batch import collate
from learner.buffer import Buffer
from learner.corpora import TextStream, pack, read_texts, text_examples
from learner.group import LearnerGroup
from learner.kl import kl_per_response
from learner.ledger import Ledger
from learner.ppo import PPOConfig, ppo
from learner.publish import Probe, Publisher
from reward_server.client import RewardClient
from reward_server.encoding import ChatEncoding
from reward_server.labeling import Labeler, load_labeler
from reward_server.schema import ScoreRequest

_PROBES = 8  # replies that the parity probe compares


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What a model did on the held-out prompts and text."""

    gold: float
    """mean verdict of the labeler"""
    score: float
    """mean score of the reward model"""
    kl: float
    """mean KL to the SFT model, nats a response"""
    pretraining_loss: float
    """of held-out text, nats a token"""


class Alignment:
    """PPO of one run directory. `run` may be called once for each arm, such as with and without pretraining."""

    learner: LearnerGroup
    generators: Sequence[Sampler]
    rewards: RewardClient

    def __init__(self, job: Job, trains: bool = True) -> None:
        """Read and check every file, before anything heavy starts; without `trains`, only what is measured on."""
        self.job = job
        self.encoding = ChatEncoding.load(job.model("sft"))
        self.labeler: Labeler = load_labeler(job.config.labeler)
        self.heldout = heldout_prompts(job, self.encoding)
        self.valid = self._packed("pretraining_valid")
        self.prompts: list[Prompt] = []
        self.text: TextStream | None = None
        if trains:
            self.prompts = read_prompts(job.file("prompts"), job.config.data.max_bad_rows)
            check_prompts(self.prompts, self.encoding, job.config.rollout.max_prompt_tokens)
            if job.config.ppo.pretraining.coef:
                self.text = TextStream(self._packed("pretraining"), job.config.ppo.seed)

    def connect(self, learner: LearnerGroup, generators: Sequence[Sampler], rewards: RewardClient) -> Self:
        """Take the processes to work with."""
        self.learner, self.generators, self.rewards = learner, generators, rewards
        return self

    async def run(self, config: PPOConfig, stage: str = "ppo") -> tuple[Held, Held]:
        """Load the networks, train, measure before and after, and write RUN/policy and RUN/policy_ema."""
        job, tracker = self.job, self.job.tracker
        with tracker.phase(f"{stage}: load networks and hand the weights to the actors", stage):
            await self._load(config)
            publisher = Publisher(
                self.learner,
                job.config.publish,
                probes=self._probes(),
                workers=job.config.generator.tensor_parallel_size,
            )
            await self.learner.open_sender(job.config.publish)
            await publisher.publish(self.generators, 0)
        with tracker.phase(f"{stage}: held-out responses before", stage):
            before = await self.measure("sft" if stage == "ppo" else f"{stage}-start", config)
        with tracker.phase(f"{stage}: {config.iterations} iterations", stage):
            await self._train(config, publisher, stage)
        with tracker.phase(f"{stage}: held-out responses after", stage):
            after = await self.measure(stage, config)
        name = stage.replace("ppo", "policy")
        await self.learner.save("policy", job.run_dir / name)
        await self.learner.save("policy", job.run_dir / f"{name}_ema", ema=True)
        await self.learner.unload()
        job.summarise(
            "ppo",
            stage,
            iterations=config.iterations,
            kl=after.kl,
            **{
                f"{field}_{when}": getattr(held, field)
                for when, held in (("before", before), ("after", after))
                for field in ("gold", "score", "pretraining_loss")
            },
        )
        return before, after

    async def _load(self, config: PPOConfig) -> None:
        policy = self.job.model("sft")
        await self.learner.load("policy", "policy", policy, config.network, config.policy_optimizer, config.ema_decay)
        await self.learner.load("reference", "policy", policy, config.network)
        await self.learner.load("critic", "value", self.job.model("reward"), config.network, config.critic_optimizer)

    async def _train(self, config: PPOConfig, publisher: Publisher, stage: str) -> None:
        job = self.job
        stream = PromptStream(self.prompts, seed=config.seed)
        ledger_file = job.run_dir / f"ledger-{stage}.jsonl"
        ledger_file.unlink(missing_ok=True)  # of an earlier run in this directory, whose policy is replaced too
        ledger = Ledger(ledger_file, stream)
        samples = job.config.rollout.samples_per_prompt
        buffer = Buffer(config.prompts_per_batch, samples, config.max_staleness, ledger=ledger)
        sequences = max(1, round(config.pretraining.sequences_per_episode * config.minibatch_size))

        async def publish(version: int) -> dict[str, float]:
            published = await publisher.publish(self.generators, version)
            if published.lost:
                raise RuntimeError(f"generators were lost while version {version} was published: {published.lost}")
            return published.metrics

        stop = asyncio.Event()
        rollouts = supervise(
            {
                generator.name: rollout(
                    generator, self.rewards, stream, buffer, self.encoding, job.config.rollout, config.seed, stop
                )
                for generator in self.generators
            },
            buffer,
        )
        sampling = asyncio.create_task(rollouts)
        try:
            await ppo(
                config,
                job.config.rollout.temperature,
                buffer,
                self.learner,
                publish,
                lambda i, parts: self.text.iteration(i, parts, sequences) if self.text else [[]] * parts,
                self._observe,
                lambda _stage, step, metrics: job.tracker.log(
                    stage, step, {**metrics, "progress/total": float(config.iterations)}
                ),
            )
        finally:
            stop.set()
            buffer.close()
            await asyncio.gather(sampling, return_exceptions=True)

    def _packed(self, name: str) -> Tensor:
        texts = read_texts(self.job.file(name), self.job.config.data.max_bad_rows)
        return pack(texts, self.encoding, self.job.config.ppo.pretraining.sequence_tokens)

    def _observe(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        verdicts = self.labeler.verdicts([t.completion.text for t in trajectories])
        return {"gold/mean": fmean(verdicts), "gold/std": pstdev(verdicts)}

    def _probes(self) -> list[Probe]:
        """Human replies to held-out prompts, on whose log-probs actors and learner must agree."""
        queries = [self.encoding.prompt(prompt.messages) for prompt in self.heldout[:_PROBES]]
        replies = [self.encoding.response(p.reference or "Yes, I do.", ended=True) for p in self.heldout[:_PROBES]]
        return [Probe(ids=query + reply, first=len(query)) for query, reply in zip(queries, replies, strict=True)]

    async def measure(self, name: str, config: PPOConfig) -> Held:
        """Answer the held-out prompts with the present weights; writes RUN/evaluations/<name>.jsonl."""
        job, evaluation = self.job, self.job.config.evaluation
        groups = await sample(
            self.generators, self.heldout, self.encoding, job.config.rollout, samples=1, seed=evaluation.seed
        )
        completions = [group[0] for group in groups]
        golds = self.labeler.verdicts([c.text for c in completions])
        scores = await self._scores(name, self.heldout, completions)
        kls = await self._kl(completions, config)
        rows = [
            {
                "id": prompt.id,
                "prompt": [message.model_dump() for message in prompt.messages],
                "response": completion.text,
                "ended": completion.ended,
                "gold": gold,
                "score": score,
                "kl": kl,
                "label": name,
            }
            for prompt, completion, gold, score, kl in zip(self.heldout, completions, golds, scores, kls, strict=True)
        ]
        path = job.run_dir / "evaluations" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        job.tracker.table(f"heldout/{name}", [{**row, "prompt": row["prompt"][-1]["content"]} for row in rows])
        valid, budget = text_examples(self.valid), config.max_tokens_per_microbatch
        loss = await self.learner.language_model_loss("policy", valid, budget)
        return Held(gold=fmean(golds), score=fmean(scores), kl=fmean(kls), pretraining_loss=loss)

    async def _scores(self, name: str, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
        requests = [
            ScoreRequest(
                id=f"{self.job.tracker.run_id}/{name}/{p.id}", prompt=p.messages, response=c.text, ended=c.ended
            )
            for p, c in zip(prompts, completions, strict=True)
        ]
        missing_eos = self.job.config.rollout.missing_eos
        replies = await self.rewards.score(requests)
        return [missing_eos.apply(r.score, c.ended) for r, c in zip(replies, completions, strict=True)]

    async def _kl(self, completions: Sequence[Completion], config: PPOConfig) -> list[float]:
        key = SampleKey(prompt_id="held out", epoch=0, k=0, attempt=0)
        batch = collate(
            [Trajectory(key=key, prompt=(), completion=c, score=0.0, parts={}) for c in completions], pad_id=0
        )
        budget, temperature = config.max_tokens_per_microbatch, self.job.config.rollout.temperature
        policy, reference = [
            await self.learner.response_logprobs(name, batch, budget, temperature) for name in ("policy", "reference")
        ]
        return kl_per_response(policy, reference, batch.mask).tolist()
