"""What a model does on prompts and text that it was not trained on: `rayward evaluate`, and the curves of PPO."""

import asyncio
import logging
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from actors.prompts import Prompt, fitting, read_prompts
from actors.trajectory import Completion, SampleKey, Trajectory
from actors.waits import together
from cluster.config.schema import Config
from cluster.pipeline.evaluation.suite import Suite, read_suite, run_suite
from cluster.pipeline.evaluation.win_rate import win_rate
from cluster.pipeline.job import Job
from cluster.pipeline.sft import packed_text
from cluster.pipeline.stage import SAMPLING, SECTIONS, Stage
from cluster.rundir.files import Run, number, read_run
from cluster.runtime.resources import KINDS
from learner.config import PPOConfig
from reward_server.preferences.labeling import Labeler, load_labeler
from reward_server.preferences.records import json_lines, read_all, write_whole

if TYPE_CHECKING:
    from actors.chat import ChatExample
    from cluster.fleet.fleet import Fleet
    from cluster.fleet.pool import ProcessPool
    from learner.weights.publish import Probe
    from learner.worker.group import LearnerGroup
    from reward_server.client import RewardClient
    from reward_server.encoding import ChatEncoding

_PROBES = 8  # replies that the parity probe compares
log = logging.getLogger(__name__)


class Evaluate(Stage):
    """Answers held-out prompts with a model and scores the answers, or measures models on benchmarks."""

    name = "evaluate"
    purpose = "Answer held-out prompts with a model, and score the answers; or measure the paper's claims on models."
    files = (
        "Reads RUN/policy (or models.policy) and data.prompts_heldout. Writes RUN/evaluations/. With evaluation.suite "
        "or evaluation.lm_eval, reads benchmarks and the models of the run (or evaluation.models) instead."
    )
    example = "rayward evaluate --run runs/mine --evaluation.suite paper --benchmarks.truthfulqa TruthfulQA.csv"
    sections = (*(*SECTIONS, "evaluation", "benchmarks", *SAMPLING, "scoring", "labeler", "tracking"),)
    reads = ("models.policy", "models.sft", "models.reward", "data.prompts_heldout", "data.pretraining_valid")
    processes = KINDS
    resumes = False

    @classmethod
    def models(cls, config: Config) -> tuple[str, ...]:
        return () if config.evaluation.on_benchmarks else super().models(config)

    @classmethod
    def data(cls, config: Config) -> tuple[str, ...]:
        return () if config.evaluation.on_benchmarks else super().data(config)

    @classmethod
    def looked_at(cls, config: Config) -> tuple[str, ...]:
        return () if config.evaluation.on_benchmarks else super().looked_at(config)

    def check(self) -> "EvaluationSet | Suite":
        if self.job.config.evaluation.on_benchmarks:
            return read_suite(self.job)
        self.job.model("policy")
        return read_evaluation_set(self.job)

    async def run(self, processes: "ProcessPool", inputs: "EvaluationSet | Suite") -> None:
        """Responses, their scores and KL to the SFT model; the loss of held-out text. Or the suite."""
        if isinstance(inputs, Suite):
            from cluster.pipeline.evaluation.comparison import compare
            from cluster.pipeline.evaluation.judges import attending
            from cluster.pipeline.evaluation.results import tell

            async with attending(inputs.judges):
                tell(self.job, inputs, await run_suite(self.job, processes, inputs))
                await compare(self.job, processes, inputs)
            return
        job, config = self.job, self.job.config.ppo
        policy = job.model("policy")
        learner, fleet, rewards = await processes.all(policy, job.reward_to_serve, fresh=True)
        for name, path in (("policy", policy), ("reference", job.model("sft"))):
            await learner.load(name, "policy", path, config.network, config.policy_optimizer, frozen=True)
        evaluator = Evaluator(
            job=job, held_out=inputs, learner=learner, fleet=fleet, rewards=rewards, apart=processes.plan.apart
        )
        evaluator.summarise(policy.name, await evaluator.measure(policy.name, config))
        written = job.run_dir / "evaluations" / f"{policy.name}.jsonl"
        job.made("evaluation", written, policy, job.file("prompts_heldout"))

    def conclude(self) -> None:
        from cluster.report.report import write_report

        write_report(self.job.run_dir)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSet:
    """The held-out prompts and text of a run, and who judges the responses."""

    prompts: Sequence[Prompt]
    """as many of the file as are answered"""
    text: "Sequence[ChatExample]"
    """packed held-out pretraining text"""
    encoding: "ChatEncoding"
    """of the SFT model"""
    labeler: Labeler
    """whose verdicts are called gold"""
    reply_tokens: int
    """longest response that engine and learner have room for behind any prompt, with one that follows it"""

    def probes(self) -> "list[Probe]":
        """Human replies to held-out prompts, on whose log-probs actors and learner must agree."""
        from learner.weights.publish import Probe

        prompts = self.prompts[:_PROBES]
        queries = [self.encoding.prompt(prompt.messages) for prompt in prompts]
        replies = [self.encoding.response(prompt.reference or "Yes, I do.", ended=True) for prompt in prompts]
        if cut := [one.id for one, reply in zip(prompts, replies, strict=True) if len(reply) > self.reply_tokens]:
            log.warning("the probe compares the first %d tokens of the references of %s", self.reply_tokens, cut)
        replies = [reply[: self.reply_tokens] for reply in replies]
        return [Probe(ids=query + reply, first=len(query)) for query, reply in zip(queries, replies, strict=True)]


def read_evaluation_set(job: Job) -> EvaluationSet:
    """Read and check the files, before anything heavy starts. Raises ValueError."""
    from reward_server.encoding import ChatEncoding

    encoding, labeler, rollout = (
        ChatEncoding.load(job.model("sft"), job.config.models),
        load_labeler(job.config.labeler),
        job.config.rollout,
    )
    tokens = job.config.ppo.pretraining.sequence_tokens
    prompts, text = read_all(
        lambda: read_prompts(
            job.file("prompts_heldout"), job.max_bad_rows, fitting(encoding, rollout.max_prompt_tokens)
        ),
        lambda: packed_text(job, "pretraining_valid", encoding, min(tokens, encoding.positions or tokens)),
    )
    return EvaluationSet(
        prompts=prompts[: job.config.evaluation.prompts],
        text=text,
        encoding=encoding,
        labeler=labeler,
        reply_tokens=max(rollout.max_new_tokens - 1, 1),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
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
    use_cases: Mapping[str, Mapping[str, Any]]
    """by use case, see `by_use_case`"""

    def metrics(self) -> dict[str, float]:
        """A point of the held-out curves."""
        figures = asdict(self)
        del figures["use_cases"]
        low, high = figures.pop("gold_ci")
        return {f"heldout/{name}": value for name, value in (figures | {"gold_low": low, "gold_high": high}).items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluator:
    """Measures whatever weights learner and generators have."""

    job: Job
    held_out: EvaluationSet
    learner: "LearnerGroup"
    """has "policy" and "reference" """
    fleet: "Fleet"
    rewards: "RewardClient"
    apart: bool
    """whether the learner computes while the generators do, see Plan"""

    async def measure(self, name: str, config: PPOConfig, stage: str | None = None, step: int = 0) -> Evaluation:
        """Answer the held-out prompts with the present weights; writes RUN/evaluations/<name>.jsonl.

        `stage` and `step` are where on the curves of a stage it belongs; None for a model by itself.
        """
        import torch

        from actors.scoring import score_groups
        from learner.maths.intervals import bootstrap_interval

        job, evaluation, held_out, started = self.job, self.job.config.evaluation, self.held_out, time.monotonic()
        completions, loss = await together(self._answers(), self._text_loss(config), at_once=self.apart)
        golds = held_out.labeler.verdicts([c.text for c in completions])
        groups = [[one] for one in completions]
        scored = await score_groups(self.rewards, held_out.prompts, groups, job.config.rollout.missing_eos)
        scores = [score for (score,) in scored]
        token_kls = await self._kl(completions, config)
        kls = [sum(nats) for nats in token_kls]
        pieces = [held_out.encoding.pieces(completion.response_ids) for completion in completions]
        cases = any(prompt.use_case for prompt in held_out.prompts)
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
                "tokens": [[text, round(nats, 3)] for text, nats in zip(told, by_token, strict=False)],
            }
            | ({"use_case": prompt.use_case} if cases else {})
            for prompt, completion, gold, score, kl, told, by_token in zip(
                held_out.prompts, completions, golds, scores, kls, pieces, token_kls, strict=True
            )
        ]
        path = job.run_dir / "evaluations" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        text = json_lines(rows)
        await job.monitor.disk.saved(lambda: asyncio.to_thread(write_whole, path, text))
        shown = samples_to_show(rows, evaluation.shown, evaluation.seed)
        table = [{**row, "prompt": row["prompt"][-1]["content"]} for row in shown]
        for row in table:
            del row["tokens"]  # W&B shows texts and numbers
        job.tracker.samples(stage or name, step, table, {"gold": golds, "score": scores, "kl": kls})
        return Evaluation(
            gold=fmean(golds),
            gold_ci=bootstrap_interval(torch.tensor(golds), torch.ones(len(golds), dtype=torch.long), 1000, seed=0),
            score=fmean(scores),
            kl=fmean(kls),
            pretraining_loss=loss,
            length=fmean(len(c.response_ids) for c in completions),
            eos_rate=fmean(c.ended for c in completions),
            seconds=time.monotonic() - started,
            use_cases=by_use_case(rows),
        )

    def summarise(self, label: str, found: Evaluation) -> None:
        """Put the figures by use case into RUN/summary.json, where prompts have one."""
        if found.use_cases:
            self.job.summarise("use_cases", **{label: found.use_cases})

    async def _answers(self) -> list[Completion]:
        """A response to each prompt."""
        from actors.sampling import sample

        config, held_out = self.job.config, self.held_out
        groups = await sample(
            self.fleet, held_out.prompts, held_out.encoding, config.rollout, samples=1, seed=config.evaluation.seed
        )
        return [group[0] for group in groups]

    async def _text_loss(self, config: PPOConfig) -> float:
        budget = config.max_tokens_per_microbatch
        async with self.fleet.occupied():
            return await self.learner.language_model_loss("policy", self.held_out.text, budget)

    async def _kl(self, completions: Sequence[Completion], config: PPOConfig) -> list[list[float]]:
        """The KL to the SFT model of each response token, by the estimator k1, nats."""
        from learner.data.batch import collate
        from learner.maths.kl import k1

        key = SampleKey(prompt_id="held out", epoch=0, k=0, attempt=0)
        batch = collate(
            [Trajectory(key=key, prompt=(), completion=c, score=0.0, parts={}) for c in completions], pad_id=0
        )
        budget, temperature = config.max_tokens_per_microbatch, self.job.config.rollout.temperature
        policy, reference = [
            await self.learner.response_logprobs(name, batch, budget, temperature) for name in ("policy", "reference")
        ]
        return [row[keep].tolist() for row, keep in zip(k1(policy, reference), batch.mask, strict=True)]


def samples_to_show(rows: Sequence[dict[str, Any]], each: int, seed: int) -> list[dict[str, Any]]:
    """The samples worth reading: `each` of the highest and of the lowest score, and as many at random of the rest."""
    order = sorted(rows, key=lambda row: row["score"], reverse=True)
    lowest = order[max(each, len(order) - each) :]
    rest = order[each : max(each, len(order) - each)]
    chosen = random.Random(seed).sample(rest, min(each, len(rest)))
    picks = {"highest": order[:each], "lowest": lowest[::-1], "random": chosen}
    return [{"shown for": why, **row} for why, rows in picks.items() for row in rows]


def by_use_case(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean gold and score of the samples of each use case, their number n, and from two on a 95 % interval of gold."""
    of_case: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if case := row.get("use_case"):
            of_case.setdefault(case, []).append(row)
    found = {}
    for case, samples in sorted(of_case.items()):
        golds, interval = [row["gold"] for row in samples], _mean_interval([row["gold"] for row in samples])
        figures = {"n": len(samples), "gold": fmean(golds), "score": fmean(row["score"] for row in samples)}
        found[case] = figures | ({"gold_ci": interval} if interval else {})
    return found


def round_figures(job: Job, round_number: int) -> dict[str, Any]:
    """What RUN/summary.json says of a round, read back from the files of its directory and of those before it."""
    runs = [read_run(job.run_dir / f"round-{k}") for k in range(1, round_number + 1)]
    run, margin = runs[-1], job.config.labeler.tie_margin
    ours = _verdicts(run, "ppo")
    sft = next((found for one in runs if (found := _verdicts(one, "sft"))), {})
    before = _verdicts(runs[-2], "ppo") if len(runs) > 1 else {}
    reward = run.figures("reward")
    rates = {"win_rate_sft": win_rate(ours, sft, margin), "win_rate_previous": win_rate(ours, before, margin)}
    figures = {
        "rankings": run.rankings,
        "gold": fmean(ours.values()) if ours else None,
        "gold_ci": _mean_interval(list(ours.values())),
        "gold_sft": fmean(sft.values()) if sft else None,
        "kl": number(run.figures("ppo", "ppo").get("kl")),
        "accuracy": number(reward.get("accuracy")),
        "accuracy_ci": reward.get("accuracy_ci"),
        "labelers_agree": run.summary.get("labelers_agree"),
        "labelers_agree_ci": run.summary.get("labelers_agree_ci"),
        "labelers_alpha": run.summary.get("labelers_alpha"),
        **{name: asdict(rate) for name, rate in rates.items() if rate},
    }
    return {name: value for name, value in figures.items() if value is not None}


def _verdicts(run: Run, label: str) -> dict[str, float]:
    return {one.id: one.gold for one in run.evaluations.get(label, ()) if one.gold is not None}


def _mean_interval(values: list[float]) -> list[float] | None:
    """95 % interval of a mean by the normal approximation."""
    if len(values) < 2:
        return None
    from learner.maths.intervals import Z95

    mean, half = fmean(values), Z95 * stdev(values) / math.sqrt(len(values))
    return [mean - half, mean + half]
