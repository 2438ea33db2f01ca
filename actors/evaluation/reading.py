"""Reading comprehension: SQuAD (version 2, and 1.1 such as XQuAD) and DROP, with their official metrics."""

import math
import re
import string
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.evaluation.task import Answer, Generation, Metric, Request, Task, Verdict
from reward_server.preferences.formats import Found, object_rows
from reward_server.preferences.forms import row_text, row_texts
from reward_server.preferences.records import read_records, row_names

_MAX_TOKENS = 50
_PUNCTUATION = str.maketrans("", "", string.punctuation)
NO_ANSWER = "Not in background."


@dataclass(frozen=True, slots=True, kw_only=True)
class PassageQuestion:
    """A question about a passage."""

    id: str
    title: str
    passage: str
    question: str
    golds: tuple[tuple[str, ...], ...]
    """answers by different people, each one or several texts; none where the passage has no answer"""


class _Reading(Task[PassageQuestion]):
    """What SQuAD and DROP share: one text is generated, and the best of the golds counts, in points of 100."""

    claim = "alignment tax"
    paper_shots = 4
    instruction: str

    def requests(self, item: PassageQuestion) -> Sequence[Request]:
        shots = [f"{self.asked(one)} {self.solution(one)}" for one in self.examples]
        prompt = "\n\n".join([self.instruction, *shots, self.asked(item)])
        return [Generation(prompt=prompt, max_tokens=_MAX_TOKENS)]

    @abstractmethod
    def asked(self, item: PassageQuestion) -> str:
        """The passage and the question, up to where the answer begins."""

    def solution(self, item: PassageQuestion) -> str:
        return ", ".join(item.golds[0]) if item.golds else NO_ANSWER


class Squad(_Reading):
    """Rajpurkar et al. 2018: `f1` and `exact_match` of the official script, also of answerable and unanswerable alone.

    The passage is said to have no answer by nothing, or by what begins with "Not in background".
    """

    name = "squad"
    instruction = (
        "Answer each question using information in the preceding background paragraph. If there is not enough "
        f'information provided, answer with "{NO_ANSWER}"'
    )

    @classmethod
    def read(cls, path: Path, max_bad_rows: int = 0) -> list[PassageQuestion]:
        name = row_names()

        def parse(row: dict[str, Any], line: int) -> PassageQuestion:
            answers = row.get("answers")
            texts = answers.get("text") if isinstance(answers, dict) else answers
            if not isinstance(texts, list):
                raise ValueError('"answers" must be a list of {"text": str}, empty where the passage has no answer')
            texts = [one.get("text") if isinstance(one, dict) else one for one in texts]
            return PassageQuestion(
                id=name(row, line),
                title=str(row.get("title", "")).replace("_", " "),
                passage=row_text(row, "context"),
                question=row_text(row, "question"),
                golds=tuple((one,) for one in row_texts({"answers": texts}, "answers")) if texts else (),
            )

        return read_records(path, parse, max_bad_rows, source=_flattened(_is_squad, _squad_questions))

    def asked(self, item: PassageQuestion) -> str:
        return f"Title: {item.title}\n\nBackground: {item.passage}\n\nQ: {item.question}\n\nA:"

    @property
    def metrics(self) -> Mapping[str, Metric]:
        kinds = {"answerable" if item.golds else "unanswerable" for item in self.items}
        parts = ["", *(f"/{kind}" for kind in sorted(kinds))]
        return {f"{metric}{part}": Metric() for part in parts for metric in ("f1", "exact_match")}

    async def judge(self, item: PassageQuestion, answers: Sequence[Answer]) -> Verdict:
        said = "" if abstains(str(answers[0])) else str(answers[0])
        golds = [gold for (gold,) in item.golds if normalised(gold)] or [""]
        found = {
            "f1": max(100 * squad_f1(said, gold) for gold in golds),
            "exact_match": max(100.0 * (normalised(said) == normalised(gold)) for gold in golds),
        }
        part = "answerable" if item.golds else "unanswerable"
        return {name: (value, 1.0) for key, value in found.items() for name in (key, f"{key}/{part}")}


def abstains(answer: str) -> bool:
    """Whether an answer says nothing, or that the passage does not tell."""
    words = normalised(answer)
    return not words or words.startswith(normalised(NO_ANSWER))


def normalised(text: str) -> str:
    """SQuAD's: lower case, no punctuation, no articles, single spaces."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split())


def squad_f1(said: str, gold: str) -> float:
    """F1 of two bags of words; of an empty one: 1 if both are, else 0."""
    ours, theirs = normalised(said).split(), normalised(gold).split()
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * (Counter(ours) & Counter(theirs)).total() / (len(ours) + len(theirs))


class Drop(_Reading):
    """Dua et al. 2019: `f1` and `exact_match` of the official script.

    An answer is one text; where a gold has several, what stands between its commas, as the examples are written.
    """

    name = "drop"
    instruction = "Answer each question using information in the preceding passage"

    @classmethod
    def read(cls, path: Path, max_bad_rows: int = 0) -> list[PassageQuestion]:
        name = row_names()

        def parse(row: dict[str, Any], line: int) -> PassageQuestion:
            passage, question = row_text(row, "passage"), row_text(row, "question")
            if not (golds := [gold for gold in _drop_golds(row) if gold]):
                raise ValueError(
                    'neither "answer" nor "answers_spans" holds a number, a date or a text; the test set has none'
                )
            own = name({"id": row.get("query_id", f"row-{line}")}, line)
            return PassageQuestion(id=own, title="", passage=passage, question=question, golds=tuple(golds))

        return read_records(path, parse, max_bad_rows, source=_flattened(_is_drop, _drop_questions))

    def asked(self, item: PassageQuestion) -> str:
        return f"Passage: {item.passage}\nQuestion: {item.question}\nAnswer:"

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return {"f1": Metric(), "exact_match": Metric()}

    async def judge(self, item: PassageQuestion, answers: Sequence[Answer]) -> Verdict:
        scores = [drop_scores(_texts(str(answers[0]), gold), gold) for gold in item.golds]
        return {
            "f1": (100 * max(f1 for f1, _ in scores), 1.0),
            "exact_match": (100 * max(exact for _, exact in scores), 1.0),
        }


def _texts(said: str, gold: Sequence[str]) -> Sequence[str]:
    return [said] if len(gold) == 1 else said.split(", ")


def drop_scores(said: Sequence[str], gold: Sequence[str]) -> tuple[float, float]:
    """(F1, exact match) of two lists of texts: the mean F1 of the pairs in the best matching, a text alone counting 0.

    A pair counts 0 when the gold's text has numbers and none of them is in the other. F1 is rounded to two digits, as
    the official script does.
    """
    import networkx

    ours, theirs = [_drop_words(text) for text in said], [_drop_words(text) for text in gold]
    graph = networkx.Graph()
    for left, one in enumerate(theirs):
        for right, other in enumerate(ours, start=len(theirs)):
            graph.add_edge(left, right, weight=_bag_f1(set(other), set(one)))
    total = math.fsum(graph.edges[pair]["weight"] for pair in networkx.max_weight_matching(graph))
    exact = len(ours) == len(theirs) and set(map(tuple, ours)) == set(map(tuple, theirs))
    return round(total / max(len(ours), len(theirs)), 2), float(exact)


def _drop_words(text: str) -> list[str]:
    """DROP's normalisation: as SQuAD's, word by word, but numbers keep their point and are written alike."""
    found: list[str] = []
    for token in re.split("[ -]", text.lower()):
        word = token if _is_number(token) else token.translate(_PUNCTUATION)
        found += re.sub(r"\b(a|an|the)\b", " ", str(float(word)) if _is_number(word) else word).split()
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _bag_f1(said: set[str], gold: set[str]) -> float:
    numbers = set(filter(_is_number, gold))
    if numbers and not numbers & said:
        return 0.0
    if not said or not gold:  # the official precision, or recall, of nothing is 1
        return float(said == gold)
    return 2 * len(said & gold) / (len(said) + len(gold))


def _flattened(
    nested: Callable[[dict[str, Any]], bool], questions: Callable[[dict[str, Any]], list[dict[str, Any]]]
) -> Callable[[Path], Found]:
    """A reader of rows, or of the published file, an object in which the rows are `nested`."""

    def rows(path: Path) -> Found:
        for number, row in object_rows(path):
            if isinstance(row, ValueError) or not nested(row):
                yield number, row
                continue
            try:
                found = questions(row)
            except (KeyError, TypeError) as error:
                yield number, ValueError(f"its questions are not nested as in the published file ({error!r})")
            else:
                yield from enumerate(found, start=1)

    return rows


def _is_squad(row: dict[str, Any]) -> bool:
    return isinstance(row.get("data"), list)


def _is_drop(row: dict[str, Any]) -> bool:
    return bool(row) and all(isinstance(value, dict) and "qa_pairs" in value for value in row.values())


def _squad_questions(file: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {**question, "title": article.get("title", ""), "context": paragraph["context"]}
        for article in file["data"]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]


def _drop_questions(file: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {**question, "passage": passage["passage"]} for passage in file.values() for question in passage["qa_pairs"]
    ]


def _drop_golds(row: dict[str, Any]) -> list[tuple[str, ...]]:
    """The answer and those of the validators, of the original and the hub's forms."""
    if isinstance(spans := row.get("answers_spans"), dict):  # answers and the texts of one are not told apart there
        return [(text,) for text in row_texts(spans, "spans")]
    more = row.get("validated_answers", [])
    if isinstance(more, dict):  # a table by columns
        count = max((len(column) for column in more.values() if isinstance(column, list)), default=0)
        more = [{key: column[index] for key, column in more.items() if index < len(column)} for index in range(count)]
    return [_drop_gold(one) for one in (row.get("answer"), *more) if isinstance(one, dict)]


def _drop_gold(answer: dict[str, Any]) -> tuple[str, ...]:
    """A number, else texts, else a date, whichever is there; nothing where none is."""
    if number := str(answer.get("number", "")).strip():
        return (number,)
    if answer.get("spans"):
        return tuple(row_texts(answer, "spans"))
    date = answer.get("date", {})
    parts = [str(date.get(part, "")).strip() for part in ("day", "month", "year")] if isinstance(date, dict) else []
    return (" ".join(filter(None, parts)),) if any(parts) else ()
