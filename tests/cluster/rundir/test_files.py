import json
from pathlib import Path

import pytest

from cluster.rundir.files import number, read_run
from tests.synthetic_run import evaluation, write_rows, write_run


def test_a_whole_run_is_read(tmp_path: Path):
    run = read_run(write_run(tmp_path, arms=("ppo-noptx", "ppo")))
    assert run.arms == ("ppo", "ppo-noptx")
    assert list(run.series("ppo", "gold/mean")) == list(range(1, 25))
    assert run.series("sft", "sft/valid_loss") == {0: 4.21, 75: 3.34}
    assert run.figures("ppo", "ppo")["kl"] == 6.4
    assert run.phases[0][1] == "prepare conversations and model"
    assert [sample.id for sample in run.evaluations["ppo"]][:2] == ["chat-000", "chat-001"]
    assert run.unreadable == ()


def test_what_was_measured_on_the_way_is_no_model_of_its_own(tmp_path: Path):
    run = write_run(tmp_path)
    write_rows(run / "evaluations" / "ppo-000010.jsonl", evaluation("ppo-000010", 96, 0.4, 0))
    assert read_run(run).evaluations.keys() == {"sft", "ppo"}
    assert read_run(run).arms == ("ppo",)


def test_a_step_logged_twice_counts_as_it_was_logged_last(tmp_path: Path):
    rows = [
        {"stage": "sft", "step": 2, "sft/loss": 5.0},
        {"stage": "sft", "step": 1, "sft/loss": 4.0},
        {"stage": "sft", "step": 2, "sft/loss": 3.0},
        {"stage": "sft", "step": 2, "sft/valid_loss": 3.5},
    ]
    write_rows(tmp_path / "metrics.jsonl", rows)
    run = read_run(tmp_path)
    assert list(run.series("sft", "sft/loss").items()) == [(1, 4.0), (2, 3.0)]
    assert run.series("sft", "sft/valid_loss") == {2: 3.5}


def test_what_cannot_be_read_is_left_out_and_told(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"stage": "sft", "step": 1, "sft/loss": NaN, "sft/lr": 0.1}\n[1]\n{"stage": "sft", "step": 2, "sf'
    )
    (tmp_path / "summary.json").write_text("{")
    (tmp_path / "config.toml").write_text("a = ")
    (tmp_path / "environment.json").write_bytes(b"\xff\xfe")
    run = read_run(tmp_path)
    assert run.metrics == {"sft": {"sft/lr": {1: 0.1}}}
    assert run.summary == run.config == run.environment == {}
    told = "\n".join(run.unreadable)
    for part in (
        "metrics.jsonl:2",
        "metrics.jsonl:3",
        "summary.json: ",
        "config.toml: ",
        "environment.json: ",
    ):
        assert part in told


def test_values_of_the_wrong_kind_are_no_figures(tmp_path: Path):
    (tmp_path / "summary.json").write_text('{"ppo": {"ppo": {"gold_before": "0.1", "gold_after": true}}, "sft": 3}')
    run = read_run(tmp_path)
    assert run.change("ppo", "gold") is None
    assert run.figures("sft") == {}
    assert [number(value) for value in (1, 0.5, True, "1", None, float("inf"))] == [
        1.0,
        0.5,
        None,
        None,
        None,
        None,
    ]


@pytest.mark.parametrize(("made", "reason"), [(True, "holds no run"), (False, "does not exist")])
def test_a_directory_that_is_no_run_is_refused(tmp_path: Path, made: bool, reason: str):
    path = tmp_path / "other"
    if made:
        path.mkdir()
        (path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=f"other {reason}: expected a directory with at least one of config.toml"):
        read_run(path)


def rows(golds: list[float | None]) -> list[dict[str, object]]:
    return [{"id": str(number), "prompt": "?", "response": "!", "gold": gold} for number, gold in enumerate(golds)]


def test_a_change_is_measured_on_the_prompts_that_both_models_answered(tmp_path: Path):
    write_rows(tmp_path / "evaluations" / "sft.jsonl", rows([0.0, 0.0, 0.5, 0.9, None]))
    write_rows(tmp_path / "evaluations" / "ppo.jsonl", rows([1.0, 0.5, 0.5, None, 0.9]))
    change = read_run(tmp_path).change("ppo", "gold")
    assert change is not None
    assert change.interval is not None
    assert (change.before, change.after) == pytest.approx((0.5 / 3, 2 / 3))
    # gains 1, 0.5, 0: mean 0.5, standard deviation 0.5, error 0.5 / sqrt(3) = 0.288675, half width 0.565803
    assert change.interval == pytest.approx((-0.065803, 1.065803), abs=1e-6)
    assert (change.difference, change.count) == (pytest.approx(0.5), 3)


def test_each_arm_is_compared_with_what_was_measured_at_its_own_start(tmp_path: Path):
    for label, gold in (("sft", 0.0), ("ppo", 0.5), ("ppo-noptx-start", 0.2), ("ppo-noptx", 0.6)):
        write_rows(tmp_path / "evaluations" / f"{label}.jsonl", rows([gold, gold]))
    run = read_run(tmp_path)
    assert run.arms == ("ppo", "ppo-noptx")
    first, second = run.change("ppo", "gold"), run.change("ppo-noptx", "gold")
    assert first is not None
    assert second is not None
    assert (first.before, second.before) == (0.0, 0.2)


def test_without_samples_the_summary_tells_the_change(tmp_path: Path):
    table = {
        "gold_before": 0.1,
        "gold_after": 0.4,
        "pretraining_loss_before": 3.0,
        "pretraining_loss_after": 3.2,
    }
    (tmp_path / "summary.json").write_text(json.dumps({"ppo": {"ppo": table}}))
    run = read_run(tmp_path)
    gold, loss = run.change("ppo", "gold"), run.change("ppo", "pretraining_loss")
    assert gold is not None
    assert loss is not None
    assert (gold.before, gold.after, gold.interval) == (0.1, 0.4, None)
    assert loss.difference == pytest.approx(0.2)
    assert run.change("ppo", "score") is None


@pytest.mark.parametrize(
    ("config", "summary", "caption"),
    [
        ('[labeler]\nname = "simulated:vader"', "{}", "simulated labeler (VADER)"),
        ('[labeler]\nname = "mine:score"', "{}", "simulated labeler (mine:score)"),
        ('[labeler]\nname = "simulated:vader"', '{"labeler": "five people"}', "five people"),
        ("", "{}", "labeler (not recorded)"),
    ],
)
def test_the_labeler_is_named_by_the_summary_or_else_by_the_configuration(
    tmp_path: Path, config: str, summary: str, caption: str
):
    (tmp_path / "config.toml").write_text(config)
    (tmp_path / "summary.json").write_text(summary)
    assert read_run(tmp_path).labeler == caption


def test_samples_become_visible_text_in_the_order_of_their_ids(tmp_path: Path):
    sample = {
        "id": "b",
        "prompt": [{"role": "user", "content": "hi\x00"}, "?"],
        "response": "a\u202eb\x1b[31m",
    }
    write_rows(tmp_path / "evaluations" / "sft.jsonl", [sample, evaluation("sft", 1, 0.0, 0)[0] | {"id": "a"}])
    first, second = read_run(tmp_path).evaluations["sft"]
    assert (first.id, second.id) == ("a", "b")
    assert second.prompt == (("user", "hi\\x00"),)
    assert second.response == "a\\u202eb\\x1b[31m"
    assert (second.gold, second.ended) == (None, True)
