"""What a model does on prompts and text that it was not trained on."""

import json
import logging
import random
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Self

import torch

from actors.prompts import Prompt
from actors.sampling import GeneratorFailed, sample
from actors.trajectory import Completion, SampleKey, Trajectory
from cluster.fleet.fleet import Fleet
from cluster.pipeline.job import Job, heldout_prompts, packed_text
from learner.config import PPOConfig
from learner.data.batch import collate
from learner.maths.intervals import bootstrap_interval
from learner.maths.kl import kl_per_response
from learner.weights.publish import Probe
from learner.worker.group import LearnerGroup
from reward_server.client import RewardClient
from reward_server.encoding import ChatEncoding
from reward_server.preferences.labeling import Labeler, load_labeler
from reward_server.preferences.records import write_whole
from reward_server.schema import ScoreRequest

_PROBES = 8  # replies that the parity probe compares
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What a model did on the held-out prompts and text."""

    gold: float
    """mean verdict of the labeler"""
    gold_ci: tuple[float, float]
    """95 % bootstrap interval of it over the prompts"""
    score: float
    """mean score of the reward model"""
    kl: float
    """mean KL to the SFT model, nats a response"""
    pretraining_loss: float
    """of held-out text, nats a token"""
    length: float
    """mean length of the responses, tokens"""
    eos_rate: float
    """share of the responses that ended by themselves"""
    seconds: float
    """that the measurement took"""

    def metrics(self) -> dict[str, float]:
        """A point of the held-out curves."""
        low, high = self.gold_ci
        return {
            "heldout/gold": self.gold,
            "heldout/gold_low": low,
            "heldout/gold_high": high,
            "heldout/score": self.score,
            "heldout/kl": self.kl,
            "heldout/pretraining_loss": self.pretraining_loss,
            "heldout/length": self.length,
            "heldout/eos_rate": self.eos_rate,
            "heldout/seconds": self.seconds,
        }


class HeldOut:
    """The held-out prompts and text of a run, and the measurements on them."""

    learner: LearnerGroup
    fleet: Fleet
    rewards: RewardClient

    def __init__(self, job: Job) -> None:
        """Read and check the files, before anything heavy starts."""
        self.job = job
        self.encoding = ChatEncoding.load(job.model("sft"))
        self.labeler: Labeler = load_labeler(job.config.labeler)
        self.prompts = heldout_prompts(job, self.encoding)
        tokens = job.config.ppo.pretraining.sequence_tokens
        self.text = packed_text(job, "pretraining_valid", self.encoding, tokens)

    def connect(self, learner: LearnerGroup, fleet: Fleet, rewards: RewardClient) -> Self:
        """Take the processes to work with."""
        self.learner, self.fleet, self.rewards = learner, fleet, rewards
        return self

    def probes(self) -> list[Probe]:
        """Human replies to held-out prompts, on whose log-probs actors and learner must agree."""
        prompts = self.prompts[:_PROBES]
        queries = [self.encoding.prompt(prompt.messages) for prompt in prompts]
        replies = [self.encoding.response(prompt.reference or "Yes, I do.", ended=True) for prompt in prompts]
        return [Probe(ids=query + reply, first=len(query)) for query, reply in zip(queries, replies, strict=True)]

    async def measure(self, name: str, config: PPOConfig, stage: str | None = None, step: int = 0) -> Held:
        """Answer the held-out prompts with the present weights; writes RUN/evaluations/<name>.jsonl.

        `stage` and `step` are where on the curves of a stage it belongs; None for a model by itself.
        """
        job, evaluation, started = self.job, self.job.config.evaluation, time.monotonic()
        completions = await self._answers()
        golds = self.labeler.verdicts([c.text for c in completions])
        scores = await self._scores(name, self.prompts, completions)
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
            for prompt, completion, gold, score, kl in zip(self.prompts, completions, golds, scores, kls, strict=True)
        ]
        path = job.run_dir / "evaluations" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        shown = telling(rows, evaluation.shown, evaluation.seed)
        table = [{**row, "prompt": row["prompt"][-1]["content"]} for row in shown]
        figures = {"gold": golds, "score": scores, "kl": kls}
        job.tracker.samples(stage or name, step, table, figures)
        loss = await self.learner.language_model_loss("policy", self.text, config.max_tokens_per_microbatch)
        return Held(
            gold=fmean(golds),
            gold_ci=bootstrap_interval(torch.tensor(golds), torch.ones(len(golds), dtype=torch.long), 1000, seed=0),
            score=fmean(scores),
            kl=fmean(kls),
            pretraining_loss=loss,
            length=fmean(len(c.response_ids) for c in completions),
            eos_rate=fmean(c.ended for c in completions),
            seconds=time.monotonic() - started,
        )

    async def _answers(self) -> list[Completion]:
        """A response to each prompt. Generators that are lost meanwhile are waited for, as the fleet does."""
        rollout, seed = self.job.config.rollout, self.job.config.evaluation.seed
        while True:
            generators = await self.fleet.wait_serving()
            try:
                groups = await sample(generators, self.prompts, self.encoding, rollout, samples=1, seed=seed)
            except GeneratorFailed as error:
                log.warning("the held-out prompts are answered anew: %s", error)
            else:
                return [group[0] for group in groups]

    async def _scores(self, name: str, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
        nonce = secrets.token_hex(6)  # a server that lives longer than this process must not know the ids
        requests = [
            ScoreRequest(id=f"{nonce}/{name}/{p.id}", prompt=p.messages, response=c.text, ended=c.ended)
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


def telling(rows: Sequence[dict[str, Any]], each: int, seed: int) -> list[dict[str, Any]]:
    """The samples worth reading: `each` of the highest and of the lowest score, and as many at random of the rest."""
    order = sorted(rows, key=lambda row: row["score"], reverse=True)
    lowest = order[max(each, len(order) - each) :]
    rest = order[each : max(each, len(order) - each)]
    chosen = random.Random(seed).sample(rest, min(each, len(rest)))
    picks = {"highest": order[:each], "lowest": lowest[::-1], "random": chosen}
    return [{"shown for": why, **row} for why, rows in picks.items() for row in rows]
