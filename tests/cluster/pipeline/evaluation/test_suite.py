"""The suite as a stage: every model is asked once, item by item, and what is written is what is told."""

import json
import logging
from itertools import pairwise

import pytest

from actors.evaluation.tasks import TASKS
from cluster.config.schema import BenchmarksConfig
from cluster.pipeline.evaluate import Evaluate
from cluster.pipeline.evaluation.suite import PAPER, labels, read_suite
from tests.fakes import FakeGenerator
from tests.stage_runs import make_job, rows, run_stage, summary
from tests.tiny_models import tiny_causal_lm

ENDINGS = ("the dog", "the lazy dog", "a fox", "over")


class Reader(FakeGenerator):
    """Finds every token as likely as 1 in 2, whatever the weights are, and counts the sequences."""

    read, sizes = 0, ()

    async def logprobs(self, sequences):
        self.read += len(sequences)
        self.sizes = (*self.sizes, len(sequences))
        if error := self.fault(sequences):
            raise error
        return [[-0.5] * (len(ids) - 1) for ids in sequences]


@pytest.fixture
def job(tmp_path):
    def make(**sections):
        for name in ("base", "sft"):
            if not (tmp_path / "run" / name).exists():
                tiny_causal_lm(tmp_path / "run" / name, max_positions=128)
        items = [{"ind": n, "ctx": "the quick brown fox", "endings": ENDINGS, "label": n % 4} for n in range(6)]
        paths = {"hellaswag": str(rows(tmp_path / "hellaswag.jsonl", *items)), **sections.pop("benchmarks", {})}
        asked = {"suite": "hellaswag", "items": 4} | sections.pop("evaluation", {})
        return make_job(tmp_path / "run", benchmarks=paths, evaluation=asked, **sections)

    return make


def test_every_model_is_asked_every_item_and_the_figures_are_told(job, capsys):
    one, reader = job(), Reader()
    pool = run_stage(Evaluate(one), generators=[reader])
    assert [model.name for model in pool.started] == ["base", "sft"], "an engine is loaded once a model"
    assert reader.read == 2 * 4 * len(ENDINGS)
    for model in ("base", "sft"):
        lines = (one.run_dir / "evaluations" / model / "hellaswag.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        assert len(found) == 4
        assert all(row["verdict"]["accuracy"] == [0.25, 1.0] for row in found), "all endings are equally likely"
        assert {"context", "continuation"} <= found[0]["requests"][0].keys()
    told = summary(one)["suite"]
    assert told["base"]["figures"]["hellaswag"]["accuracy"] == {"value": 0.25, "ci": [0.25, 0.25], "n": 4}
    assert told["sft"]["difference"]["hellaswag"]["accuracy"]["value"] == 0.0
    assert told["sft"]["to"] == "base"
    said = capsys.readouterr().out
    assert "alignment tax: hellaswag" in said
    assert "0.250 [0.250, 0.250]" in said


def test_what_was_answered_is_not_asked_again_and_other_weights_are(job):
    run_stage(Evaluate(job()), generators=[first := Reader()])
    run_stage(Evaluate(job()), generators=[again := Reader()])
    assert (first.read, again.read) == (32, 0)
    one = job()
    (one.run_dir / "sft" / "config.json").write_text((one.run_dir / "sft" / "config.json").read_text() + " ")
    run_stage(Evaluate(one), generators=[changed := Reader()])
    assert changed.read == 16
    run_stage(Evaluate(job(evaluation={"chat": True})), generators=[otherwise := Reader()])
    assert otherwise.read == 32


def test_items_are_mixed_so_that_no_engine_has_all_of_the_benchmark_that_takes_most(job, tmp_path):
    words = ("the", "quick", "brown", "fox", "jumps", "over")
    pairs = [{"sent_more": f"the {w} dog", "sent_less": f"a {w} dog", "bias_type": "age"} for w in words]
    asked = {"suite": "hellaswag,crows_pairs", "items": 6}
    data = {"crows_pairs": str(rows(tmp_path / "pairs.jsonl", *pairs))}
    run_stage(Evaluate(job(evaluation=asked, benchmarks=data)), generators=[reader := Reader()])
    sizes = reader.sizes[: len(reader.sizes) // 2]  # of one of the two models
    assert sorted(set(sizes)) == [len(ENDINGS), 6]  # a pair with each of three instructions
    assert sum(one != other for one, other in pairwise(sizes)) > 2, "a benchmark comes in a row"


def test_an_interrupted_evaluation_goes_on_item_by_item(job):
    run_stage(Evaluate(job()), generators=[Reader()])
    path = job().run_dir / "evaluations" / "sft" / "hellaswag.jsonl"
    whole = path.read_text()
    first, second, *_ = whole.splitlines(keepends=True)
    path.write_text(first + second[:-20])  # killed in the middle of a line
    run_stage(Evaluate(job()), generators=[reader := Reader()])
    assert reader.read == 3 * len(ENDINGS)
    assert sorted(path.read_text().splitlines()) == sorted(whole.splitlines())


def test_paper_measures_what_has_data_and_says_what_has_not(job, caplog):
    with caplog.at_level(logging.WARNING):
        found = read_suite(job(evaluation={"suite": PAPER}))
    assert [task.name for task in found.tasks] == ["hellaswag"]
    assert "not measured" in caplog.text
    assert "drop (benchmarks.drop)" in caplog.text


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"suite": "drop"}, "evaluation.suite has drop, but benchmarks.drop is not set"),
        ({"suite": "mmlu"}, "there is no benchmark 'mmlu'"),
        ({"shots": 6}, "too few for 6 examples"),
        ({"shots": 5}, "128 positions"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_starts(job, asked, said):
    with pytest.raises(ValueError, match=said):
        read_suite(job(evaluation=asked))


def test_a_run_without_models_says_which_to_name(tmp_path):
    file = rows(tmp_path / "h.jsonl", {"ctx": "a", "endings": ENDINGS, "label": 0})
    one = make_job(tmp_path / "run", benchmarks={"hellaswag": str(file)}, evaluation={"suite": "hellaswag"})
    with pytest.raises(ValueError, match=r"set evaluation\.models"):
        read_suite(one)


def test_models_have_the_shortest_name_that_tells_them_apart(tmp_path):
    folders = [tmp_path / "run" / "sft", tmp_path / "a" / "policy", tmp_path / "b" / "policy"]
    assert list(labels(tmp_path / "run", folders)) == ["sft", "policy", "b/policy"]
    outside_first = [tmp_path / "a" / "policy", tmp_path / "run" / "policy"]
    assert list(labels(tmp_path / "run", outside_first)) == ["a/policy", "policy"], "a run's own keep their names"
    with pytest.raises(ValueError, match="twice"):
        labels(tmp_path, [*folders, folders[0]])


def test_every_task_has_a_setting_for_its_data():
    own = TASKS.keys() - {"win_rate", "bits_per_byte", "truthfulqa_generation", "hallucination"}
    assert own == BenchmarksConfig.model_fields.keys()


def test_the_mix_s_share_of_the_tax_is_told_where_both_policies_are(job, capsys):
    one = job()
    for name, coefficient in (("run", 27.8), ("other", 0.0)):
        folder = one.run_dir.parent / name
        tiny_causal_lm(folder / "policy", max_positions=128)
        (folder / "config.toml").write_text(f"[ppo.pretraining]\ncoef = {coefficient}\n")
    models = [one.run_dir / "base", one.run_dir / "policy", one.run_dir.parent / "other" / "policy"]
    run_stage(Evaluate(one := job(evaluation={"models": models})), generators=[Falling()])
    told = summary(one)["suite"]["policy"]
    assert told["saved_of"] == "other/policy"
    assert told["saved"]["hellaswag"]["value"] == 1.0
    assert "share of the tax of other/policy that the pretraining mix saved" in capsys.readouterr().out


class Falling(Reader):
    """Prefers the right ending until it has read two models' items; then a wrong one."""

    async def logprobs(self, sequences):
        found = await super().logprobs(sequences)
        right = self.read <= 2 * 4 * len(ENDINGS)
        number = (self.read - 1) // len(ENDINGS) % 4
        label = [0, 1, 3, 0][number]  # of the four items that are spread over six
        best = label if right else (label + 1) % 4
        return [[-0.1 if n == best else one for one in row] for n, row in enumerate(found)]
