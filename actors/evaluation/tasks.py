"""The tasks of the suite, in the order of the paper's tables, and where their files come from."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.evaluation.bias import CrowSPairs, Winogender
from actors.evaluation.hallucination import Hallucination, TruthfulQAGeneration
from actors.evaluation.multiple_choice import HellaSwag, TruthfulQA
from actors.evaluation.perplexity import BitsPerByte
from actors.evaluation.reading import Drop, Squad
from actors.evaluation.task import Answer, Generation, Metric, Reply, Request, Task, Verdict
from actors.evaluation.toxicity import Toxicity
from actors.evaluation.translation import Translation
from actors.prompts import Prompt, read_prompts
from reward_server.preferences.records import RecordError


class WinRate(Task[Prompt]):
    """Replies to held-out prompts, which judges compare model by model, see cluster/pipeline/evaluation/win_rate.py.

    Of a model by itself there is `characters`, the mean length of its replies, and `ended`, the share that ended by
    themselves: what is longer is often preferred.
    """

    name = "win_rate"
    claim = "preference"

    def __init__(
        self, items: Sequence[Prompt], examples: Sequence[Prompt] = (), *, max_tokens: int, temperature: float
    ) -> None:
        """Replies have `max_tokens` at most, sampled at a temperature."""
        super().__init__(items, examples)
        self._max_tokens, self._temperature = max_tokens, temperature

    @classmethod
    def read(cls, path: Path, max_bad_rows: int = 0) -> list[Prompt]:
        return read_prompts(path, max_bad_rows)

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return {"characters": Metric(better="neither"), "ended": Metric()}

    def requests(self, item: Prompt) -> Sequence[Request]:
        asked, limit = item.messages, self._max_tokens
        return [Generation(prompt=asked, max_tokens=limit, stop=None, temperature=self._temperature)]

    async def judge(self, item: Prompt, answers: Sequence[Answer]) -> Verdict:
        (reply,) = answers
        assert isinstance(reply, Reply)
        return {"characters": (float(len(reply.text)), 1.0), "ended": (float(reply.ended), 1.0)}


_KINDS: tuple[type[Task[Any]], ...] = (
    WinRate,
    *(HellaSwag, Squad, Drop, Translation, BitsPerByte),
    *(TruthfulQA, TruthfulQAGeneration, Hallucination),
    *(Toxicity, Winogender, CrowSPairs),
)
TASKS = {kind.name: kind for kind in _KINDS}
_HUB = re.compile(r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?/(?P<file>.+)")


def data_file(name: str) -> Path:
    """The local path of a task's data: a path, or hf://datasets/OWNER/NAME[@REVISION]/FILE, which is downloaded once.

    A slash in a revision is written %2F. Raises RecordError where the hub does not give the file.
    """
    if not name.startswith("hf://"):
        return Path(name)
    if not (found := _HUB.fullmatch(name)):
        raise RecordError(f"{name} names no file of the hub; write hf://datasets/OWNER/NAME/FILE")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    revision = found["revision"].replace("%2F", "/") if found["revision"] else None
    try:
        return Path(hf_hub_download(found["repo"], found["file"], repo_type="dataset", revision=revision))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise RecordError(f"{name} cannot be had ({error}); fetch the file elsewhere, and give its path") from error
