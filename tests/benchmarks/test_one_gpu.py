"""The benchmark of a GPU on this CPU: what it counts, what it says where something is missing, and its clock."""

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.one_gpu import SIZES, VARIANTS, Row, Size, answers, decode_bound, measure, operations
from learner.config import NetworkConfig
from learner.worker.networks import make_trainable
from reward_server.model import new_reward_model
from reward_server.pretrained import load_weights

ROOT = Path(__file__).parents[2]
TINY = SIZES["tiny"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tiny")
    TINY.save(made)
    return made


@pytest.fixture(autouse=True)
def own_clock() -> Iterator[None]:
    before = signal.getsignal(signal.SIGALRM)  # pytest-timeout's
    yield
    signal.signal(signal.SIGALRM, before)


def counted(model: Any, training: bool) -> tuple[float, list[int], int]:
    """Operations by torch's own count, of a sequence alone in its micro-batch; its length, and what is read of it."""
    model.set_attn_implementation("eager")
    ids, positions, places, targets = next(Size(hidden=64, inner=1, layers=1, heads=1, sequences=1, mean=40).micros)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
        loss = answers(model, ids, positions, places, targets).sum()
        if training:
            loss.backward()
    return counter.get_total_flops(), [ids.shape[1]], len(places)


@pytest.mark.parametrize("kind", ["policy", "critic"])
@pytest.mark.parametrize(("changes", "training", "times"), [({}, False, 1), ({}, True, 3), ({"lora_rank": 4}, True, 3)])
def test_operations_are_those_that_torch_counts(folder: Path, kind: str, changes: dict, training: bool, times: int):
    path = folder / "policy"
    model = (
        load_weights(path, "policy", torch.float32) if kind == "policy" else new_reward_model(path, torch.float32, 0)
    )
    make_trainable(model, NetworkConfig(**changes))
    found, lengths, read = counted(model, training)
    half = 2 * TINY.layers * TINY.hidden * lengths[0] ** 2  # eager attention computes what causality hides, too
    # LoRA: nothing flows into the first layer's queries, keys and values, as the embeddings are frozen.
    inputs = 2 * lengths[0] * 64 * (64 + 2 * 64 + 3 * 4) if changes else 0
    assert operations(model, lengths, read, training) + times * half - inputs == found


def test_the_bound_of_decoding_by_hand(folder: Path):
    layer = 64 * 64 * 4 + 3 * 64 + 3 * 64 * 128 + 2 * 64  # attention with three biases, feed-forward block, two norms
    weights = 512 * 64 + 2 * layer + 64
    reading = 2 * weights + 4 * 24.0 * (
        2 * 2 * 2 * 64
    )  # keys and values of two layers and 64 numbers each, in bfloat16
    assert decode_bound(folder / "policy", 4, 24.0, 1e6, 1e30) == pytest.approx(reading / 1e6)
    assert decode_bound(folder / "policy", 4, 24.0, 1e30, 1e6) == pytest.approx(2 * weights * 4 / 1e6)


def test_what_fails_is_named_and_the_clock_is_kept():
    def full() -> Iterator[Row]:
        yield Row(name="first", value=1.0, least=1.0, most=1.0)
        raise torch.OutOfMemoryError("tried to allocate 80 GiB\nmore")

    def endless() -> Iterator[Row]:
        try:
            time.sleep(60)
        finally:
            cleaned.append(True)
        yield Row(name="never")

    saved, cleaned = list[int](), list[bool]()
    pieces = [("full", full), ("endless", endless), ("after", full)]
    rows = measure(pieces, 0.5 / 60, lambda rows: saved.append(len(rows)))
    over = "not run, or not to its end: 0.00833333 minutes were over"
    assert [(row.name, row.wrong) for row in rows] == [
        ("first", ""),
        ("full", "out of memory: tried to allocate 80 GiB"),
        ("endless", over),
        ("after", over),
    ]
    assert (saved, cleaned) == ([1, 2, 3, 4], [True])


@pytest.mark.slow
def test_every_row_on_a_cpu_without_ray_vllm_and_wandb(tmp_path: Path):
    """The decoding rows alone miss something; their measuring is tested beside the engine's other tests."""
    code = (
        "import runpy, sys\n"
        "for name in ('ray', 'vllm', 'wandb'): sys.modules[name] = None\n"
        f"sys.argv[1:] = ['--models', 'tiny', '--json', {str(tmp_path / 'rows.json')!r}]\n"
        f"runpy.run_path({str(ROOT / 'benchmarks' / 'one_gpu.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    rows = {row.pop("name"): row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    missing = rows.pop("tiny decode")
    assert (missing["value"], missing["wrong"].split(":")[0]) == (None, "ModuleNotFoundError")
    phases = ("evaluate", "policy", "critic")
    expected = [f"tiny {variant}: {phase}" for variant in ("plain", "packed", "padded", *VARIANTS) for phase in phases]
    expected += [f"tiny {variant}: memory" for variant in ("packed", *VARIANTS)]
    assert rows.keys() == {"matrix product", "copy", *expected}
    for name, row in rows.items():
        figures = [row["value"], row["least"], row["most"]] + ([row["ratio"]] if name in expected else [])
        figures += [] if name not in expected or "memory" in name else [row["mfu"]]
        assert all(math.isfinite(figure) and figure > 0 for figure in figures), (name, row)
        assert f"{name} " in done.stdout
