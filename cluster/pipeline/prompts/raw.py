"""Raw prompts from a data file: plain, few-shot and user-based ones (InstructGPT, section 3.2 and appendix A)."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.prompts import row_origin, stable_hash
from cluster.config.schema import PromptsConfig
from reward_server.preferences.forms import row_prompt, row_reference, row_text
from reward_server.preferences.records import read_records, row_id, row_names
from reward_server.schema import Message

KINDS = ("plain", "few-shot", "user-based")


@dataclass(frozen=True, slots=True, kw_only=True)
class RawPrompt:
    """A prompt before it is known which set it is in, if any."""

    line: int
    """number of its row in the file"""
    id: str
    """unique in the file"""
    messages: tuple[Message, ...]
    """the conversation, which ends with a user message"""
    reference: str | None
    """a person's reply to it, where one is known"""
    user: str | None
    """who wrote it, where the row says so"""
    use_case: str | None
    """what it is for, where the row says so"""
    kind: str
    """one of KINDS"""
    group: str | None
    """the instruction that it was made of, where its row has pairs"""
    text: str
    """what it is compared by: without system messages, each run of white space one space; the instruction alone where
    its row has pairs, as all prompts of one begin alike"""

    @property
    def owner(self) -> tuple[str, str]:
        """Its user; a prompt without one is a user of its own, whatever its place in the file."""
        return ("row", self.text) if self.user is None else ("user", self.user)


def read_raw(
    path: Path, max_bad_rows: int, config: PromptsConfig, skipped: Callable[[int, str], object]
) -> list[RawPrompt]:
    """Read rows {"prompt": text or messages} or {"instruction": text, "instances": [{"input", "output"}, ..]}.

    Both may have "id", "user", "use_case" and "kind"; other forms of a prompt are in forms.py. `skipped` is told the
    line and reason of each bad row that was left out. Raises RecordError as `read_records` does.
    """
    name = row_names()

    def parse(row: dict[str, Any], line: int) -> list[RawPrompt]:
        kind = row.get("kind")
        if kind not in (None, *KINDS):
            raise ValueError(f'"kind" is one of {", ".join(KINDS)}, not {kind!r:.60}')
        user, use_case = row_origin(row)
        if "instances" in row:
            own, found = row_id(row, line), list(_of_pairs(row, config))
        else:
            own, found = None, [(row, row_reference(row), "plain")]
        prompts = []
        for number, (asked, reference, made) in enumerate(found, start=1):
            messages = row_prompt(asked)
            several = {"id": f"{own}.{number}"} if len(found) > 1 else {}
            prompts.append(
                RawPrompt(
                    line=line,
                    id=name(row | several, line),
                    messages=messages,
                    reference=reference,
                    user=user,
                    use_case=use_case,
                    kind=kind or made,
                    group=own,
                    text=_plain(row["instruction"]) if made == "few-shot" else _plain(_said(messages)),
                )
            )
        return prompts

    return [prompt for row in read_records(path, parse, max_bad_rows, skipped=skipped) for prompt in row]


def _of_pairs(row: dict[str, Any], config: PromptsConfig) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Rows that each ask for the output of one pair, with others as examples; that output; and the kind.

    Which pairs is a function of the instruction and the seed. One pair by itself makes a plain prompt.
    """
    instruction, pairs = row_text(row, "instruction"), row["instances"]
    if not isinstance(pairs, list) or not pairs or not all(isinstance(pair, dict) for pair in pairs):
        raise ValueError(f'"instances" must be a list of {{"input", "output"}}, not {pairs!r:.60}')
    if len(pairs) == 1:
        given = pairs[0].get("input", "")
        yield {**row, "input": given}, row_text(pairs[0], "output"), "plain"
        return
    said = [(row_text(pair, "input"), row_text(pair, "output")) for pair in pairs]
    draw = random.Random(stable_hash("few-shot", config.seed, instruction))
    for asked in draw.sample(range(len(said)), min(config.draws, len(said))):
        others = [pair for number, pair in enumerate(said) if number != asked]
        examples = draw.sample(others, min(config.shots, len(others)))
        parts = [f"Input: {given}\nOutput: {wanted}" for given, wanted in examples]
        text = "\n\n".join([instruction, *parts, f"Input: {said[asked][0]}\nOutput:"])
        yield {**row, "prompt": text}, said[asked][1], "few-shot"


def _said(messages: tuple[Message, ...]) -> str:
    return " ".join(message.content for message in messages if message.role != "system")


def _plain(text: str) -> str:
    return " ".join(text.split())
