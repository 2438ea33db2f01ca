"""Raw prompts as they are read, and few-shot ones as they are made."""

import re
from typing import Any

import pytest

from cluster.config.schema import PromptsConfig
from cluster.pipeline.prompts.raw import RawPrompt, read_raw
from reward_server.preferences.records import RecordError
from tests.stage_runs import rows as write_rows

PAIRS = [{"input": f"in {n}", "output": f"out {n}"} for n in range(5)]


def read(tmp_path: Any, *rows: dict[str, Any], config: PromptsConfig | None = None, bad: int = 0) -> list[RawPrompt]:
    file = write_rows(tmp_path / "raw.jsonl", *rows)
    return read_raw(file, bad, config or PromptsConfig(), lambda line, why: None)


def test_a_row_has_its_user_use_case_and_kind_and_the_reply_where_there_is_one(tmp_path: Any):
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    found = read(
        tmp_path,
        {"id": "a", "prompt": "  one\n\n two ", "user": 7, "use_case": "chat", "kind": "user-based", "reference": "r"},
        {"instruction": "Sum up", "context": "a text", "response": "short", "user": None},
        {"messages": talk},
        {"prompt": "hi", "system": "be brief"},
    )
    assert [(p.id, p.user, p.use_case, p.kind, p.reference, p.text) for p in found] == [
        ("a", "7", "chat", "user-based", "r", "one two"),
        ("row-2", None, None, "plain", "short", "Sum up a text"),
        ("row-3", None, None, "plain", "hello", "hi"),
        ("row-4", None, None, "plain", None, "hi"),
    ]
    assert [message.role for message in found[3].messages] == ["system", "user"], "kept, though not compared by"


def test_a_few_shot_prompt_shows_pairs_and_asks_for_the_output_of_another(tmp_path: Any):
    row = {"id": "t", "instruction": "Do it.", "instances": PAIRS, "user": "u", "use_case": "extract"}
    (one,) = read(tmp_path, row, config=PromptsConfig(shots=2))
    assert (one.id, one.kind, one.group, one.user, one.use_case, one.text) == (
        *("t", "few-shot", "t", "u", "extract"),
        "Do it.",
    )
    (message,) = one.messages
    parts = message.content.split("\n\n")
    assert parts[0] == "Do it."
    shown = [re.fullmatch(r"Input: in (\d)\nOutput: out (\d)", part) for part in parts[1:-1]]
    asked = re.fullmatch(r"Input: in (\d)\nOutput:", parts[-1])
    assert asked
    assert one.reference == f"out {asked[1]}"
    numbers = [match[1] for match in shown if match and match[1] == match[2]]
    assert len(numbers) == len({*numbers, asked[1]}) - 1 == 2


def test_several_draws_ask_for_different_outputs_and_fewer_pairs_make_shorter_prompts(tmp_path: Any):
    row = {"instruction": "Do it.", "instances": PAIRS}
    found = read(tmp_path, row, config=PromptsConfig(draws=9))
    assert [one.id for one in found] == [f"row-1.{n}" for n in range(1, 6)]
    assert {one.reference for one in found} == {f"out {n}" for n in range(5)}
    assert found == read(tmp_path, row, config=PromptsConfig(draws=9))
    (two,) = read(tmp_path, row | {"instances": PAIRS[:2]})
    assert two.messages[0].content.count("Output:") == 2
    (single,) = read(tmp_path, row | {"instances": [{"input": "", "output": "out"}]})
    assert (single.messages[0].content, single.reference, single.kind) == ("Do it.", "out", "plain")


def test_rows_that_cannot_be_used_are_all_told(tmp_path: Any):
    rows: list[dict[str, Any]] = [
        {"prompt": "x", "kind": "zero-shot"},
        {"prompt": "x", "user": {"name": "u"}},
        {"prompt": "x", "use_case": " "},
        {"instruction": "x", "instances": "y"},
        {"instruction": "x", "instances": [{"input": "a", "output": "b"}, {"input": "a"}]},
        {"instances": PAIRS},
        {"id": "t.1", "prompt": "x"},
        {"id": "t", "instruction": "x", "instances": PAIRS},
    ]
    with pytest.raises(RecordError) as caught:
        read(tmp_path, *rows, config=PromptsConfig(draws=2))
    said = str(caught.value).splitlines()
    wanted = (
        *('"kind" is one of plain, few-shot, user-based', '"user" must be a string', '"use_case" is blank'),
        *(
            '"instances" must be a list',
            '"output" is missing',
            '"instruction" is missing',
            "id 't.1' was used in line 7",
        ),
    )
    for line, (text, one) in zip((1, 2, 3, 4, 5, 6, 8), zip(said, wanted, strict=False), strict=True):
        assert f"raw.jsonl:{line}: " in text
        assert one in text
