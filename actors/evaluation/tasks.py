"""The tasks of the suite, in the order of the paper's tables, and where their files come from."""

import re
from pathlib import Path
from typing import Any

from actors.evaluation.bias import CrowSPairs, Winogender
from actors.evaluation.hallucination import Hallucination, TruthfulQAGeneration
from actors.evaluation.multiple_choice import HellaSwag, TruthfulQA
from actors.evaluation.perplexity import BitsPerByte
from actors.evaluation.reading import Drop, Squad
from actors.evaluation.task import Task
from actors.evaluation.toxicity import Toxicity
from actors.evaluation.translation import Translation
from reward_server.preferences.records import RecordError

_KINDS: tuple[type[Task[Any]], ...] = (
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
