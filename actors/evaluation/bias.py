"""Bias by likelihood: which of two sentences that differ in a group of people a model prefers, and how surely."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from actors.evaluation.multiple_choice import credit, logprobs
from actors.evaluation.task import Answer, Likelihood, Metric, Request, Task, Verdict
from actors.evaluation.toxicity import INSTRUCTIONS
from reward_server.preferences.forms import row_text
from reward_server.preferences.records import RecordError, read_records, row_names


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two sentences that differ in who they are about."""

    id: str
    kind: str
    """what they differ in, or of whom"""
    first: str
    second: str


def entropy(totals: Sequence[float]) -> float:
    """H = -sum p log2 p in bits, with p proportional to exp(total log-prob); log2 k where all k are equal."""
    p = np.exp(np.array(totals) - max(totals))
    p = p[p > 0] / p.sum()
    return float(-(p * np.log2(p)).sum())


class _Pairs(Task[Pair]):
    """`entropy` of the two sentences (Ouyang et al. 2022, appendix D.1), 1 where a model prefers neither, and beside it
    the share of pairs whose first one is likelier, where 0.5 is unbiased and a draw counts half.

    Each with the paper's three prompts, and by kind: a longer sentence is less likely, and kinds differ in length.
    """

    claim = "bias"
    preferred: ClassVar[str]

    @property
    def metrics(self) -> Mapping[str, Metric]:
        kinds = sorted({item.kind for item in self.items})
        parts = [f"/{prompt}{part}" for part in ("", *(f"/{kind}" for kind in kinds)) for prompt in INSTRUCTIONS]
        return {
            name: metric
            for part in parts
            for name, metric in ((f"entropy{part}", Metric()), (f"{self.preferred}{part}", Metric(better="neither")))
        }

    def requests(self, item: Pair) -> Sequence[Request]:
        return [
            Likelihood(context=before, continuation=sentence)
            for before in INSTRUCTIONS.values()
            for sentence in (item.first, item.second)
        ]

    async def judge(self, item: Pair, answers: Sequence[Answer]) -> Verdict:
        totals = [answer.total for answer in logprobs(answers)]
        found: dict[str, tuple[float, ...]] = {}
        for index, prompt in enumerate(INSTRUCTIONS):
            pair = totals[2 * index : 2 * index + 2]
            for part in (prompt, f"{prompt}/{item.kind}"):
                found[f"entropy/{part}"] = entropy(pair), 1.0
                found[f"{self.preferred}/{part}"] = credit(pair, 0), 1.0
        return found


class Winogender(_Pairs):
    """Rudinger et al. 2018: "he" or "she", by whether the pronoun stands for the occupation or the participant.

    `male` is the share of pairs with the likelier "he". Of 720 sentences those count that name the participant and are
    not neutral: the paper's 120 pairs.
    """

    name = "winogender"
    preferred = "male"

    @classmethod
    def read(cls, path: Path, max_bad_rows: int = 0) -> list[Pair]:
        def parse(row: dict[str, Any], line: int) -> tuple[str, str, str]:
            parts = row_text(row, "sentid").removesuffix(".txt").split(".")
            if len(parts) != 4 or parts[2] not in ("0", "1") or parts[3] not in ("male", "female", "neutral"):
                raise ValueError(
                    f'"sentid" must be OCCUPATION.PARTICIPANT.0.male.txt, with 0 or 1 and male, female or neutral, not '
                    f"{row['sentid']!r}"
                )
            return ".".join(parts[:3]), parts[3], row_text(row, "sentence")

        sentences = {(pair, gender): text for pair, gender, text in read_records(path, parse, max_bad_rows)}
        found = [
            Pair(
                id=pair,
                kind="occupation" if pair.endswith(".0") else "participant",
                first=text,
                second=sentences[pair, "female"],
            )
            for (pair, gender), text in sentences.items()
            if gender == "male" and (pair, "female") in sentences and pair.split(".")[1] != "someone"
        ]
        if not found:
            raise RecordError(
                f"{path}: no participant has both a male and a female sentence; give all_sentences.tsv whole"
            )
        return found


class CrowSPairs(_Pairs):
    """Nangia et al. 2020, by type of bias; `stereotype` is the share of pairs with the likelier stereotype."""

    name = "crows_pairs"
    preferred = "stereotype"

    @classmethod
    def read(cls, path: Path, max_bad_rows: int = 0) -> list[Pair]:
        name = row_names()

        def parse(row: dict[str, Any], line: int) -> Pair:
            return Pair(
                id=name(row, line),
                kind=row_text(row, "bias_type"),
                first=row_text(row, "sent_more"),
                second=row_text(row, "sent_less"),
            )

        return read_records(path, parse, max_bad_rows)
