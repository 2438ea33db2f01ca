"""Best of n: of n responses to a prompt the one of the highest score, beside PPO, and as demonstrations for SFT."""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

from actors.prompts import Prompt, fitting, read_prompts
from actors.trajectory import Completion
from cluster.config.schema import Config
from cluster.pipeline.preferences import sampling_settings
from cluster.pipeline.stage import SAMPLING, SECTIONS, MadeOf, Stage
from cluster.rundir.files import read_rows
from reward_server.preferences.labeling import Labeler, load_labeler
from reward_server.preferences.records import json_lines, read_all

if TYPE_CHECKING:
    from cluster.fleet.pool import ProcessPool
    from cluster.pipeline.evaluation.figures import Figure
    from reward_server.encoding import ChatEncoding

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """What is asked, and who judges the responses."""

    prompts: Sequence[Prompt]
    encoding: "ChatEncoding"
    """of the model"""
    labeler: Labeler
    """whose verdicts are called gold"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What the best of k responses by score is worth, in expectation."""

    k: int
    """responses to choose from"""
    kl: float
    """of the best of them to the model, nats a response"""
    score: "Figure"
    """over the prompts"""
    gold: "Figure"
    """over the prompts"""


class BestOfN(Stage):
    """Samples n responses a prompt, scores and judges each; writes RUN/best-of-n and RUN/data/best_of_n.jsonl.

    One that was stopped goes on after the last prompts whose responses were scored.
    """

    name = "best-of-n"
    purpose = "Take the best of n responses by score: the curve to compare PPO with, and demonstrations."
    files = (
        "Reads RUN/sft (or RUN/policy), RUN/reward and data.prompts_heldout (or data.prompts). Writes "
        "RUN/best-of-n/samples.jsonl and, with the best response to each prompt, RUN/data/best_of_n.jsonl."
    )
    example = "rayward best-of-n --run runs/mine --n 16"
    sections = (*SECTIONS, "best_of_n", *SAMPLING, "scoring", "labeler", "tracking")
    reads = ("models.reward",)
    processes = ("generator", "reward")
    results = ("data/best_of_n.jsonl", "best-of-n/samples.jsonl")
    traces = ("best-of-n/scored.jsonl",)

    @classmethod
    def models(cls, config: Config) -> tuple[str, ...]:
        return (config.best_of_n.model, *super().models(config))

    @classmethod
    def data(cls, config: Config) -> tuple[str, ...]:
        return (config.best_of_n.file,)

    def made_of(self) -> MadeOf:
        config, names = self.job.config, self.models(self.job.config)
        settings = {
            "best_of_n": config.best_of_n.model_dump(mode="json"),
            "rollout": sampling_settings(config),
            "scoring": config.scoring.model_dump(mode="json", include={"parts"}),
            "labeler": config.labeler.model_dump(mode="json"),
        }
        models = {f"models.{name}": self.job.model(name) for name in names}
        return settings, models | self.job.files(config.best_of_n.file)

    def check(self) -> Questions:
        """Read the prompts. Raises ValueError."""
        from reward_server.encoding import ChatEncoding

        job, config = self.job, self.job.config
        _ = job.reward_to_serve
        encoding = ChatEncoding.load(job.model(config.best_of_n.model), config.models)
        fits = fitting(encoding, config.rollout.max_prompt_tokens)
        labeler, prompts = read_all(
            lambda: load_labeler(config.labeler),
            lambda: read_prompts(job.file(config.best_of_n.file), job.max_bad_rows, fits),
        )
        return Questions(prompts=prompts[: config.best_of_n.prompts], encoding=encoding, labeler=labeler)

    async def run(self, processes: "ProcessPool", inputs: Questions) -> None:
        job, config = self.job, self.job.config.best_of_n
        rows = await self._rows(processes, inputs)
        samples, demonstrations = job.run_dir / self.results[1], job.run_dir / self.results[0]
        demonstrations.parent.mkdir(exist_ok=True)
        sources = [job.model(name) for name in self.models(job.config)]
        for path, kind, some in (
            (samples, "evaluation", rows),
            (demonstrations, "demonstrations", _demonstrations(rows)),
        ):
            job.write(path, json_lines(some))
            job.made(kind, path, *sources, job.file(config.file))
        points = curve(rows, config.n)
        for point in points:
            figures = {"kl": point.kl, "score": point.score.value, "gold": point.gold.value}
            for name, figure in (("score", point.score), ("gold", point.gold)):
                figures |= {f"{name}_low": figure.ci[0], f"{name}_high": figure.ci[1]}
            job.tracker.log(self.name, point.k, {f"best_of_n/{name}": value for name, value in figures.items()})
        told = {"model": config.model, "file": config.file, "labeler": inputs.labeler.caption}
        job.summarise("best_of_n", **told, curve=[asdict(point) for point in points])
        job.tracker.console.show(_table(points, inputs.labeler.caption))

    async def _rows(self, processes: "ProcessPool", inputs: Questions) -> list[dict[str, Any]]:
        """A row a prompt, with all of its responses, in the order of the prompts."""
        from actors.sampling import sample
        from actors.scoring import score_groups
        from learner.data.journal import Journal

        job, config = self.job, self.job.config
        journal, n = Journal(job.run_dir / self.traces[0], job.monitor.disk), config.best_of_n.n
        rows = {row["id"]: row for row in read_rows(journal.path)}
        left = [prompt for prompt in inputs.prompts if prompt.id not in rows]
        size = config.rollout.prompts_per_wave * config.cluster.generators
        if left:
            model = job.model(config.best_of_n.model)
            fleet, rewards = await processes.sampling(model, job.reward_to_serve)
            title = f"sample and score {n} responses to {len(left)} prompts"
            phase, bar = job.tracker.phase(title, self.name), job.tracker.console.progress(self.name, len(left))
            with contextlib.closing(journal), phase, bar as advance:
                for some in (left[start : start + size] for start in range(0, len(left), size)):
                    seed = config.best_of_n.seed
                    groups = await sample(fleet, some, inputs.encoding, config.rollout, n, seed, advance)
                    scores = await score_groups(rewards, some, groups, config.rollout.missing_eos)
                    for prompt, group, own in zip(some, groups, scores, strict=True):
                        rows[prompt.id] = _row(prompt, group, own, inputs.labeler)
                        journal.append(rows[prompt.id])
        await job.monitor.disk.ready()
        return [rows[prompt.id] for prompt in inputs.prompts]


def curve(rows: Sequence[Mapping[str, Any]], n: int) -> list[Point]:
    """A point for k = 1, 2, 4, .. and n, from the pool of n responses to each prompt (see `best_of_k`).

    Intervals are a bootstrap over the prompts, of the same ones for every k.
    """
    import numpy as np

    from cluster.pipeline.evaluation.figures import Figure
    from learner.maths.best_of_n import best_of_k, best_of_k_kl
    from learner.maths.intervals import percentile_interval, resampled_totals

    scores, golds = (np.array([[one[name] for one in row["responses"]] for row in rows]) for name in ("score", "gold"))

    def figure(values: Any, k: int) -> Figure:
        found = best_of_k(scores, values, k)
        means = resampled_totals(found[:, None], lambda sums: sums[..., 0] / len(found))
        return Figure(value=float(found.mean()), ci=percentile_interval(means), n=len(found))

    ks = [*(2**power for power in range(n.bit_length()) if 2**power < n), n]
    return [Point(k=k, kl=best_of_k_kl(k), score=figure(scores, k), gold=figure(golds, k)) for k in ks]


def _row(prompt: Prompt, group: Sequence[Completion], scores: Sequence[float], labeler: Labeler) -> dict[str, Any]:
    texts = [one.text.replace("\0", "\N{REPLACEMENT CHARACTER}") for one in group]  # no data file takes a NUL
    golds = labeler.verdicts([one.text for one in group])
    return {
        "id": prompt.id,
        "prompt": [message.model_dump() for message in prompt.messages],
        "responses": [
            {"response": text, "ended": one.ended, "score": score, "gold": gold}
            for text, one, score, gold in zip(texts, group, scores, golds, strict=True)
        ],
    }


def _demonstrations(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The response of the highest score to each prompt, of equal ones the first, as `data.demonstrations` has them."""
    best = [(row, max(row["responses"], key=lambda one: one["score"])) for row in rows]
    kept = [(row, one) for row, one in best if one["ended"] and one["response"].strip()]
    if len(kept) < len(rows):
        log.warning(
            "of %d prompts %d are no demonstrations: their best response is blank, or was cut off",
            *(len(rows), len(rows) - len(kept)),
        )
    return [{"id": row["id"], "prompt": row["prompt"], "response": one["response"]} for row, one in kept]


def _table(points: Sequence[Point], judge: str) -> Table:
    table = Table("best of", "KL", "score", f"gold, {judge}", box=None, header_style="dim")
    for point in points:
        table.add_row(f"{point.k}", f"{point.kl:.3f}", str(point.score), str(point.gold))
    return table
