"""lm-evaluation-harness as a process: its items are verdicts as ours, its failure is told, its answers are kept."""

import asyncio
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.evaluation.task import Metric
from cluster.pipeline.evaluate import Evaluate
from cluster.pipeline.evaluation.harness.run import HarnessFailed, run_harness
from cluster.pipeline.evaluation.harness.tasks import HarnessTask
from reward_server.encoding import ChatEncoding
from tests.fakes import FakeFleet
from tests.hf_generator import HfGenerator
from tests.stage_runs import make_job, rows, run_stage, summary
from tests.tiny_models import tiny_causal_lm

ENDINGS = (["jumps", "the lazy dog", "good", "over that"], ["is bad", "hello", "world, hello", "fox"])
QUESTION = {"Question": "is this good?", "Best Answer": "yes", "Correct Answers": "yes", "Incorrect Answers": "no; bad"}


class Counting(HfGenerator):
    """Counts the sequences that it reads."""

    read = 0

    async def echo(self, sequences):
        self.read += len(sequences)
        return await super().echo(sequences)


@pytest.fixture
def job(tmp_path):
    for seed, name in enumerate(("base", "sft")):
        tiny_causal_lm(tmp_path / "run" / name, seed=seed)
    begin = {"activity_label": "Running", "ctx_a": "the quick brown fox", "ctx_b": ""}
    items = [begin | {"ind": n, "endings": endings, "label": n} for n, endings in enumerate(ENDINGS)]
    benchmarks = {
        "hellaswag": str(rows(tmp_path / "h.jsonl", *items)),
        "truthfulqa": str(rows(tmp_path / "t.jsonl", QUESTION)),
    }

    def make(**evaluation):
        return make_job(
            tmp_path / "run", benchmarks=benchmarks, evaluation=evaluation, generator={"max_model_len": 1024}
        )

    return make


def expected(model: Path, gold: int, endings: list[str]) -> dict[str, float]:
    """acc and acc_norm of a HellaSwag item, by transformers alone."""
    network, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    totals = []
    for ending in endings:
        context, whole = (tokenizer(text).input_ids for text in (QUERY, f"{QUERY} {ending}"))
        with torch.no_grad():
            rows = network(torch.tensor([whole])).logits[0].log_softmax(-1)
        totals.append(sum(float(rows[at - 1, whole[at]]) for at in range(len(context), len(whole))))
    normed = [total / len(ending) for total, ending in zip(totals, endings, strict=True)]
    return {name: float(max(some) == some[gold]) for name, some in (("acc", totals), ("acc_norm", normed))}


QUERY = "Running: the quick brown fox "


@pytest.mark.slow
def test_a_task_of_the_harness_stands_beside_ours_with_what_transformers_says(job, capsys):
    pytest.importorskip("lm_eval")
    one = job(lm_eval="hellaswag,truthfulqa_mc2", suite="hellaswag")
    generator = Counting(one.run_dir / "base")
    run_stage(Evaluate(one), generators=[generator])
    told = summary(one)["suite"]
    for label in ("base", "sft"):
        found = told[label]["figures"]
        assert found.keys() == {"hellaswag", "lm_eval/hellaswag", "lm_eval/truthfulqa_mc2"}
        assert found["lm_eval/truthfulqa_mc2"]["acc"]["n"] == 1
        items = [expected(one.run_dir / "base", gold, endings) for gold, endings in enumerate(ENDINGS)]
        for name in ("acc", "acc_norm"):
            assert found["lm_eval/hellaswag"][name]["value"] == pytest.approx(sum(item[name] for item in items) / 2)
        folder = one.run_dir / "evaluations" / label / "lm_eval"
        lines = [json.loads(line) for line in (folder / "hellaswag.jsonl").read_text().splitlines()]
        assert [line["id"] for line in lines] == ["hellaswag/0", "hellaswag/1"]
        assert [{name: value for name, (value, _) in line["verdict"].items()} for line in lines] == items
        assert "task version 3.0" in told[label]["versions"]["lm_eval/truthfulqa_mc2"]
        assert sorted(path.name for path in folder.iterdir()) == [
            "config.yaml",
            "hellaswag.jsonl",
            "truthfulqa_mc2.jsonl",
        ]
    assert told["sft"]["difference"]["lm_eval/hellaswag"]["acc"]["value"] == 0.0, "one generator answered for both"
    assert "lm-evaluation-harness" in capsys.readouterr().out
    asked = generator.read
    run_stage(Evaluate(job(lm_eval="hellaswag,truthfulqa_mc2", suite="hellaswag")), generators=[generator])
    assert generator.read == asked > 0, "what was answered is not asked again"


TASK = HarnessTask(
    name="lm_eval/copa",
    claim="lm-evaluation-harness",
    spec="copa",
    path="copa",
    version="1",
    metrics={"acc": Metric()},
    documents={"copa": [0]},
)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (
            "echo the tokenizer is odd; exit 3",
            r"status 3 and without results; .*lm-eval-sft\.log:\nthe tokenizer is odd",
        ),
        ("exit 0", "status 0 and without results"),
        ("exec sleep 60", r"asked and said nothing for 2 s"),
    ],
)
def test_a_process_that_fails_or_says_nothing_ends_the_evaluation_with_its_log(
    job, tmp_path, monkeypatch, script, said
):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    one = job()
    config = one.config.model_copy(update={"cluster": one.config.cluster.model_copy(update={"step_deadline_s": 2.0})})
    model = one.run_dir / "sft"

    async def ready():
        return FakeFleet()

    one = make_job(one.run_dir, **config.model_dump(exclude_defaults=True))
    with pytest.raises(HarnessFailed, match=said):
        asyncio.run(run_harness(one, [TASK], ChatEncoding.load(model), "sft", model, 128, ready))
    assert not list(one.run_dir.rglob("copa.jsonl"))
