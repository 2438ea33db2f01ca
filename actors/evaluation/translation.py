"""Translation from French into English, with BLEU as sacrebleu computes it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.evaluation.task import Answer, Generation, Metric, Request, Task, Verdict
from reward_server.preferences.forms import row_text
from reward_server.preferences.records import read_records, row_names

_MAX_TOKENS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class SentencePair:
    """A sentence and its translation."""

    id: str
    french: str
    english: str


class Translation(Task[SentencePair]):
    """`bleu` of the whole corpus (sacrebleu's default, 0 to 100): items add up their counts of n-grams."""

    name = "translation"
    claim = "alignment tax"
    paper_shots = 15

    @classmethod
    def read(cls, path: Path, max_bad_rows: int = 0) -> list[SentencePair]:
        name = row_names()

        def parse(row: dict[str, Any], line: int) -> SentencePair:
            pair = row.get("translation", row)
            if not isinstance(pair, dict):
                raise ValueError(f'"translation" must be {{"fr": str, "en": str}}, not {pair!r:.60}')
            return SentencePair(id=name(row, line), french=row_text(pair, "fr"), english=row_text(pair, "en"))

        return read_records(path, parse, max_bad_rows)

    @property
    def metrics(self) -> Mapping[str, Metric]:
        from sacrebleu.metrics.bleu import BLEU

        signed = BLEU()
        signed.corpus_score([""], [[""]])  # the signature holds the number of references
        return {"bleu": Metric(total=bleu, note=f"sacrebleu {signed.get_signature()}")}

    def requests(self, item: SentencePair) -> Sequence[Request]:
        pairs = [f"French: {one.french}\nEnglish: {one.english}" for one in self.examples]
        asked = f"French: {item.french}\nEnglish:"
        prompt = "\n\n".join(["Translate the following sentences from French into English.", *pairs, asked])
        return [Generation(prompt=prompt, max_tokens=_MAX_TOKENS)]

    async def judge(self, item: SentencePair, answers: Sequence[Answer]) -> Verdict:
        from sacrebleu.metrics.bleu import BLEU

        score = BLEU().corpus_score([str(answers[0]).strip()], [[item.english]])
        return {"bleu": tuple(map(float, (score.sys_len, score.ref_len, *score.counts, *score.totals)))}


def bleu(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """BLEU, 0 to 100, of [.., 10] sums: length said, length of the reference, 4 matches, 4 n-grams said -> [..].

    NaN where the reference has no word.
    """
    from sacrebleu.metrics.bleu import BLEU

    def one(row: NDArray[np.float64]) -> float:
        said, reference, *counts = row.tolist()
        if not reference:
            return float("nan")
        return BLEU.compute_bleu(counts[:4], counts[4:], int(said), int(reference)).score

    return np.apply_along_axis(one, -1, sums)
