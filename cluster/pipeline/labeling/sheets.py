"""Sheets that people filled in become a round's comparisons; how far any two people agree."""

import logging
from pathlib import Path
from typing import Any

from cluster.pipeline.preferences import Rank
from cluster.pipeline.stage import MadeOf, Stage
from reward_server.preferences.labeling import Comparison, read_comparisons, write_comparisons
from reward_server.preferences.records import RecordError
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
        rankings = _read_sheets(files, comparisons, job.config.rounds.seed)
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
        path = job.run_dir / "data" / "comparisons.jsonl"
        write_comparisons(path, merged)
        job.summarise(rankings=f"people ({', '.join(one.labeler for one in rankings)})", **agreement_figures(rankings))
        job.made("comparisons", path, job.file("completions"), *self.sheets)


def agreement_figures(rankings: list[Rankings]) -> dict[str, Any]:
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


def _read_sheets(files: list[Path], comparisons: list[Comparison], seed: int) -> list[Rankings]:
    """Every file's rankings. Raises RecordError with the mistakes of all files."""
    found, wrong = [], []
    for file in files:
        try:
            found.append(read_rankings(file, comparisons, seed))
        except RecordError as error:
            wrong.append(str(error))
    if wrong:
        raise RecordError("\n".join(wrong))
    return found
