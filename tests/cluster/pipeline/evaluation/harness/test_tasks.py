"""Tasks of lm-evaluation-harness are found and checked before anything starts, over local files where it has a hub."""

import sys

import numpy as np
import pytest

from cluster.pipeline.evaluate import Evaluate
from cluster.pipeline.evaluation.harness.tasks import read_harness
from tests.stage_runs import make_job, rows

QUESTION = {
    "Question": "Can pigs fly?",
    "Best Answer": "No",
    "Correct Answers": "No; Pigs cannot fly",
    "Incorrect Answers": "Yes; On Tuesdays.",
}
ITEM = {
    "ind": 0,
    "activity_label": "Cooking",
    "ctx_a": "A man [step] boils an egg.",
    "ctx_b": "the Man",
    "endings": ["eats it.", "runs [title] away.", "sings.", "sleeps."],
    "label": 1,
}


def job(tmp_path, *items, **evaluation):
    hellaswag = rows(tmp_path / "h.jsonl", *(items or [ITEM | {"ind": n} for n in range(8)]))
    truthfulqa = rows(tmp_path / "t.jsonl", QUESTION)
    benchmarks = {"hellaswag": str(hellaswag), "truthfulqa": str(truthfulqa)}
    return make_job(tmp_path / "run", evaluation=evaluation, benchmarks=benchmarks)


def test_without_the_package_it_is_said_what_to_install(tmp_path, monkeypatch):
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"not installed .*: pip install 'rayward\[eval\]'"):
        Evaluate(job(tmp_path, lm_eval="hellaswag")).check()


@pytest.mark.slow
def test_a_task_reads_the_local_file_and_asks_as_many_items_as_the_suite(tmp_path):
    pytest.importorskip("lm_eval")
    (found,) = read_harness(job(tmp_path, lm_eval="hellaswag,hellaswag", items=4))
    assert (found.name, found.spec.split("/")[-1]) == ("lm_eval/hellaswag", "hellaswag.yaml")
    assert found.ids == ["hellaswag/0", "hellaswag/2", "hellaswag/4", "hellaswag/6"]
    assert found.metrics.keys() == {"acc", "acc_norm"}
    assert "task version 1.0" in found.version
    assert found.version in found.metrics["acc"].note


@pytest.mark.slow
def test_all_that_cannot_be_run_is_refused_by_name(tmp_path):
    pytest.importorskip("lm_eval")
    short = {key: value for key, value in ITEM.items() if key != "activity_label"} | {"ind": 1}
    asked = "nonsense,squadv2,truthfulqa_mc1,realtoxicityprompts,hellaswag"
    with pytest.raises(ValueError, match=r"lm_eval has nonsense, which lm-eval \S+ does not know") as told:
        read_harness(job(tmp_path, ITEM, short, lm_eval=asked))
    _, *others = str(told.value).splitlines()
    assert len(others) == 3
    assert "squadv2, which is not run here: its metric is loaded from the hub" in others[0]
    assert "realtoxicityprompts, which is not run here: it asks the Perspective API" in others[1]
    assert "h.jsonl:2: " in others[2]
    assert "activity_label" in others[2]


@pytest.mark.slow
def test_local_rows_make_the_prompts_and_choices_of_the_harness_itself(tmp_path):
    harness = pytest.importorskip("lm_eval.tasks")
    from lm_eval.tasks._yaml_loader import load_yaml  # pyright: ignore[reportMissingImports]
    from lm_eval.utils import apply_template  # pyright: ignore[reportMissingImports]

    from cluster.pipeline.evaluation.harness.tasks import told

    found = job(tmp_path, lm_eval="hellaswag,truthfulqa_mc1,truthfulqa_mc2")
    ours = harness.TaskManager(metadata=told(found)).load([task.spec for task in read_harness(found)])["tasks"]
    theirs = harness.TaskManager()
    doc = ours["hellaswag"].eval_docs[0]
    assert ours["hellaswag"].doc_to_text(doc) == "Cooking: A man boils an egg. The man"
    assert ours["hellaswag"].doc_to_choice(doc) == ["eats it.", "runs. away.", "sings.", "sleeps."]
    assert str(ours["hellaswag"].doc_to_target(doc)) == "1"
    for name, choices in (
        ("truthfulqa_mc1", ["No.", "Yes.", "On Tuesdays."]),
        ("truthfulqa_mc2", ["No.", "Pigs cannot fly.", "Yes.", "On Tuesdays."]),
    ):
        doc = ours[name].eval_docs[0]
        entry = theirs.task_index[name]
        template = load_yaml(entry.yaml_path, resolve_func=False, recursive=True)["doc_to_text"]
        assert ours[name].doc_to_text(doc) == apply_template(template, {"question": QUESTION["Question"]})
        assert ours[name].doc_to_choice(doc) == choices
    likely = np.log([0.4, 0.2, 0.3, 0.1])
    doc = ours["truthfulqa_mc2"].eval_docs[0]
    scored = ours["truthfulqa_mc2"].process_results(doc, [(one, False) for one in likely])
    assert scored["acc"] == pytest.approx(0.6)
