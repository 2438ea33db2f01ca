"""Sheets that people filled in become a round's comparisons; how far any two people agree."""

import logging
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cluster.pipeline.job import Job
from cluster.pipeline.preferences import Rank
from cluster.pipeline.stage import MadeOf, Stage
from reward_server.preferences.labeling import Comparison, read_comparisons, write_comparisons
from reward_server.preferences.records import read_all
from reward_server.preferences.sheets import Rankings, agreement_credit, merge_rankings, read_rankings

_SHOWN = 20  # comparisons without ranks that are listed
log = logging.getLogger(__name__)


class RankByPeople(Stage):
    """The sheets that people filled in become the round's comparisons."""

    name = Rank.name
    results = Rank.results

    @property
    def folder(self) -> Path:
        """Where their sheets are put."""
        folder = self.job.run_dir / "rankings"
        folder.mkdir(exist_ok=True)
        return folder

    @property
    def sheets(self) -> list[Path]:
        """Those that are there."""
        return sorted(file for file in self.folder.iterdir() if file.suffix in (".csv", ".jsonl"))

    def made_of(self) -> MadeOf:
        return {}, self.job.files("completions")

    def check(self) -> tuple[list[Comparison], list[Rankings]]:
        """Every file's rankings, and the comparisons that they rank whole. Raises ValueError with every mistake."""
        job, files = self.job, self.sheets
        comparisons = read_comparisons(job.file("completions"))
        rankings = read_all(*(partial(read_rankings, file, comparisons, job.config.rounds.seed) for file in files))
        merged = merge_rankings(comparisons, rankings)
        ranked = {one.id for one in merged}
        missing = [one.id for one in comparisons if one.id not in ranked]
        told = [note for one in rankings for note in one.partial]
        allowed = job.config.rounds.max_unranked
        if len(missing) > allowed or not merged:
            names = ", ".join(missing[:_SHOWN]) + (", .." if len(missing) > _SHOWN else "")
            told.append(
                f"{len(missing)} of {len(comparisons)} comparisons are not ranked whole in {files[0].parent}: {names}. "
                f"Rank them, or let rounds.max_unranked, now {allowed}, be that many"
            )
            raise ValueError("\n".join(told[-_SHOWN:]))
        for note in told:
            log.warning("%s", note)
        if missing:
            log.warning("%d comparisons of %s are not ranked whole and are left out", len(missing), job.run_dir)
        return merged, rankings

    async def run(self, processes: Any, inputs: tuple[list[Comparison], list[Rankings]]) -> None:
        (merged, rankings), job = inputs, self.job
        who = [one.labeler for one in rankings]
        record_rankings(job, merged, who, rankings, job.file("completions"), *self.sheets)


def record_rankings(
    job: Job, comparisons: Iterable[Comparison], who: Iterable[str], rankings: Sequence[Rankings], *made_of: Path
) -> None:
    """Write RUN/data/comparisons.jsonl, and what the report says of the people behind it.

    rankings: those whose agreement counts, by labeler.
    """
    path = job.run_dir / Rank.results[0]
    write_comparisons(path, comparisons)
    job.summarise(rankings=f"people ({', '.join(who)})", **_agreement_figures(rankings))
    job.made("comparisons", path, *made_of)


def _agreement_figures(rankings: Sequence[Rankings]) -> dict[str, Any]:
    """How often two labelers agree on a pair, with a bootstrap interval over prompts; none without two labelers."""
    credit = agreement_credit(rankings)
    if not credit:
        return {}
    import torch

    from learner.maths.intervals import bootstrap_interval

    agreed, pairs = torch.tensor([one for one, _ in credit]), torch.tensor([count for _, count in credit])
    interval = bootstrap_interval(agreed, pairs, resamples=1000, seed=0)
    rate = float(agreed.sum() / pairs.sum())
    return {"labelers_agree": rate, "labelers_agree_ci": list(interval), "labelers_agree_pairs": int(pairs.sum())}
