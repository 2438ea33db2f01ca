"""What can be an item or a setting, and what is refused with the reason."""

from typing import Any

import pytest
from pydantic import ValidationError

from reward_server.labeling.config import FLAGS, LabelConfig
from reward_server.labeling.items import Answer, Item
from reward_server.preferences.labeling import Comparison
from reward_server.schema import Message
from tests.labeling import item

PROMPT = (Message(role="user", content="hi"),)


def comparison(*ranks: int) -> Comparison:
    return Comparison(
        id="c",
        prompt=PROMPT,
        responses=("a", "b", "c")[: len(ranks)],
        ended=(True, False, True)[: len(ranks)],
        ranks=ranks,
        labeler="x",
        use_case="chat",
        group="talk",
    )


def test_a_comparison_becomes_an_item_and_only_measures_know_its_ranks():
    work = Item.of(comparison(4, 0, 4), control=False, priority=0.5)
    assert (work.ranks, work.control, work.priority, work.use_case, work.group) == (None, False, 0.5, "chat", "talk")
    assert (work.responses, work.ended) == (("a", "b", "c"), (True, False, True))
    gold = Item.of(comparison(4, 0, 4), "gold", id="gold-c", explanation="why")
    assert (gold.id, gold.ranks, gold.explanation) == ("gold-c", (1, 0, 1), "why")


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"responses": ("a",), "ended": (True,)}, "'i' has 1 completions; 2 to 9 can be ranked"),
        ({"responses": ("a",) * 10, "ended": (True,) * 10}, "'i' has 10 completions"),
        ({"ended": (True,)}, "give each one rank and one flag"),
        ({"ranks": (0, 1)}, "give each one rank and one flag"),
        ({"use": "gold"}, "'i' is for gold, and has no ranks"),
        ({"task": "demonstration"}, "'i' asks for a demonstration: it has a prompt and nothing else"),
        ({"id": "x" * 91}, "at most 90 characters"),
    ],
)
def test_an_item_that_nobody_could_label_is_refused(more: dict[str, Any], reason: str):
    with pytest.raises(ValidationError, match=reason):
        item("i").model_validate(item("i").model_dump() | more)


@pytest.mark.parametrize(
    "answer",
    [{"ranks": [0]}, {"ranks": [10]}, {"ratings": [{"quality": 8}]}, {"ranks": [1] * 10}, {"x": 1}],
)
def test_an_answer_that_nobody_can_give_is_refused(answer: dict[str, Any]):
    with pytest.raises(ValidationError):
        Answer.model_validate(answer)


def test_flags_can_be_changed_or_left_out_and_have_words():
    assert len(LabelConfig().flags) == 11
    assert LabelConfig().flag_words == FLAGS
    mine = LabelConfig.model_validate({"flags": "harm,too_long"})
    assert mine.flag_words == {"harm": FLAGS["harm"], "too_long": "Too long"}
    assert LabelConfig.model_validate({"flags": ""}).flags == ()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"flags": "Bad name"}, "flags has 'Bad name'"),
        ({"flags": "harm,harm"}, "flags has 'harm'"),
        ({"tasks": ""}, "tasks is empty"),
        ({"tasks": "rank,rank"}, "name rank, demonstration or both, once"),
        ({"tasks": "rank,demonstration"}, "go together: set both"),
        ({"demonstrations": "p.jsonl"}, "go together: set both"),
        ({"gold_share": 0.5, "repeat_share": 0.5}, "leave no room for work"),
        ({"overlap": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], reason: str):
    with pytest.raises(ValidationError, match=reason):
        LabelConfig.model_validate(settings)


def test_commands_are_no_part_of_a_saved_configuration():
    told = LabelConfig(invite="Anna", invite_admin=True, revoke="Bo", export_to="argilla:x", import_from="potato:y")
    assert told.model_dump() == LabelConfig().model_dump()
