"""The receiving side in a real engine: what a packed head needs, dead engines, and engines whose generator died."""

import asyncio
import base64
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.engine import _arguments
from actors.generator import Generator, GeneratorError, GeneratorTimeout
from actors.transfer import Manifest, Rendezvous, checksum
from learner.config import ParityConfig, PublishConfig
from learner.weights.publish import ParityError, Probe, Publisher
from reward_server.config import LoadingConfig
from tests.actors.conftest import ENGINE, Served
from tests.hf_learner import HfLearner

pytestmark = pytest.mark.slow

CONFIG = PublishConfig(deadline_s=20, parity=ParityConfig(mean_bound=1e-3, max_bound=1e-2))
PROBES = [Probe(ids=[1, *range(50, 100)])]


class StaleHeadGenerator(Generator):
    """A generator whose engine forgets to pack the head again."""

    worker_extension = "tests.actors.stale_head.StaleHead"


@pytest.fixture(scope="module")
def stale(served: Served) -> Iterator[tuple[Generator, int]]:
    """A second engine beside the sound one, and the id of its process."""
    before = {child.pid for child in multiprocessing.active_children()}
    hasty = ENGINE.model_copy(update={"progress_deadline_s": 2.0, "call_deadline_s": 2.0})
    generator = StaleHeadGenerator(hasty, served.folder, "stale")
    served.runner.run(generator.start())
    (engine,) = {child.pid for child in multiprocessing.active_children()} - before
    assert engine is not None
    yield generator, engine
    served.runner.run(generator.stop())


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie has)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def wait_until_gone(pids: list[int], seconds: float) -> None:
    end = time.monotonic() + seconds
    while left := [pid for pid in pids if not gone(pid)]:
        assert time.monotonic() < end, f"processes {left} still live after {seconds} s"
        time.sleep(0.05)


def test_the_parity_probe_notices_a_head_that_was_not_packed_again(
    served: Served, stale: tuple[Generator, int]
) -> None:
    """Two generators get the same weights; all checksums agree; the one without the remedy is named."""
    generator, _ = stale
    learner = HfLearner(served.model, CONFIG)
    learner.train()
    version = served.runner.run(served.generator.version()) + 1
    with pytest.raises(ParityError, match="stale and the learner disagree"):
        served.runner.run(Publisher(learner, CONFIG, PROBES).publish([served.generator, generator], version))
    metrics = served.runner.run(Publisher(learner, CONFIG, PROBES).publish([served.generator], version + 1)).metrics
    assert metrics["parity/max_gap"] < 1e-3


def test_after_its_first_publication_an_engine_gets_the_layers_that_train_alone_and_a_newcomer_all(
    served: Served, stale: tuple[Generator, int]
) -> None:
    """Only the last of two layers trains, so that the head that is never packed again is right all the while."""
    generator, _ = stale
    model = AutoModelForCausalLM.from_pretrained(served.folder, dtype=torch.float32).eval().requires_grad_(False)
    layer = model.model.layers[1].requires_grad_(True)
    every, part = (sum(4 * weight.numel() for weight in module.parameters()) for module in (model, layer))
    learner = HfLearner(model, CONFIG)
    publisher, version = Publisher(learner, CONFIG, PROBES), served.runner.run(served.generator.version())
    one, both = [generator], [served.generator, generator]
    for members, size in ((one, every), (one, part), (both, every), (both, part)):
        learner.train(0.5)
        version += 1
        publication = served.runner.run(publisher.publish(members, version))  # proves checksums and log-probs
        assert publication.metrics["publish/bytes"] == size
    served.runner.run(generator._engine.workers("damage a frozen weight", "damage"))
    with pytest.raises(ParityError, match="stale and the learner disagree"):
        served.runner.run(publisher.publish(both, version + 1))


def test_an_engine_that_hangs_is_found_out_by_its_tokens(served: Served, stale: tuple[Generator, int]) -> None:
    generator, engine = stale
    run = served.runner.run
    os.kill(engine, signal.SIGSTOP)
    try:
        with pytest.raises(GeneratorTimeout, match=r"made no token for \d s, and 2 requests wait"):
            run(generator.generate([[1, 5], [1, 6]], [1, 2], 8, 1.0))
        with pytest.raises(GeneratorTimeout, match="the engine did not tell its version within 2 s"):
            run(generator.version())
    finally:
        os.kill(engine, signal.SIGCONT)
    assert len(run(generator.generate([[1, 5]], [1], 8, 1.0))) == 1


def test_to_stand_still_for_new_weights_is_no_hang(served: Served, stale: tuple[Generator, int]) -> None:
    generator, _ = stale

    async def wait_longer_than_progress_may_take() -> int:
        await generator.begin_update()
        sampling = asyncio.ensure_future(generator.generate([[1, 5]], [1], 8, 1.0))
        await asyncio.sleep(generator.config.progress_deadline_s + 1.5)
        await generator.abort_update()
        return len(await sampling)

    assert served.runner.run(wait_longer_than_progress_may_take()) == 1


def test_an_engine_that_is_killed_is_lost_and_the_others_get_the_version(
    served: Served, stale: tuple[Generator, int]
) -> None:
    generator, engine = stale
    learner = HfLearner(served.model, CONFIG)
    publisher = Publisher(
        learner, CONFIG.model_copy(update={"parity": ParityConfig(mean_bound=9, max_bound=9)}), PROBES
    )
    version = served.runner.run(served.generator.version()) + 1
    assert served.runner.run(publisher.publish([served.generator, generator], version)).lost == {}

    async def kill_while_it_samples() -> float:
        sampling = asyncio.ensure_future(generator.generate([[1, 5, 9]] * 8, range(8), 240, 1.0))
        await asyncio.sleep(0.2)
        os.kill(engine, signal.SIGKILL)
        killed = time.monotonic()
        with pytest.raises(GeneratorError, match="generator 'stale': the engine failed to sample: EngineDeadError"):
            await sampling
        return time.monotonic() - killed

    assert served.runner.run(kill_while_it_samples()) < 5
    publication = served.runner.run(publisher.publish([served.generator, generator], version + 1))
    assert publication.lost.keys() == {"stale"}
    assert "EngineDeadError" in publication.lost["stale"]
    assert served.runner.run(served.generator.version()) == version + 1


def test_an_untied_model_is_in_parity_and_no_process_outlives_a_killed_generator(tmp_path: Path) -> None:
    """In a process of its own, since it is killed the hard way."""
    root = Path(__file__).parents[2]
    program = Path(__file__).with_name("lonely_generator.py")
    with subprocess.Popen(
        [sys.executable, str(program), str(tmp_path)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        patience = threading.Timer(120, process.kill)  # ends the output, and so the search below
        patience.start()
        try:
            assert process.stdout is not None
            report = next((json.loads(line) for line in process.stdout if line.startswith("{")), None)
            assert report is not None, "the generator did not get its update within 120 s"
            assert report["gap"] < 1e-3
            assert report["children"]
            assert not any(gone(child) for child in report["children"])
        finally:
            patience.cancel()
            process.kill()
    wait_until_gone(report["children"], 5)


@pytest.mark.parametrize(("direct", "backend"), [(False, "rayward_gloo"), (True, "rayward_nccl")])
def test_weights_come_over_nccl_only_where_that_is_said(tmp_path: Path, direct: bool, backend: str) -> None:
    transfer = _arguments(ENGINE, tmp_path, Generator.worker_extension, direct).weight_transfer_config
    assert transfer is not None
    assert transfer.backend == backend


@pytest.mark.parametrize("trusted", [False, True])
def test_the_engine_runs_code_of_a_folder_only_where_that_is_trusted(tmp_path: Path, trusted: bool) -> None:
    loading = LoadingConfig(trust_remote_code=trusted)
    arguments = _arguments(ENGINE, tmp_path, Generator.worker_extension, False, loading)
    assert arguments.trust_remote_code is trusted


def test_vllms_receiver_between_gpus_takes_our_words_and_adds_up_what_it_loads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As far as that goes without a GPU: with vLLM's own receiving method replaced."""
    from vllm.config.weight_transfer import WeightTransferConfig
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    from actors.weights import NcclReceiver, WeightReceiver

    loaded: list[str] = []

    class Model(torch.nn.Module):
        def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
            loaded.extend(name for name, _ in tensors)

    sides: Any = SimpleNamespace(parallel_config=None, model_config=None)
    model: Any = Model()
    receiver = NcclReceiver(WeightTransferConfig(backend="rayward_nccl"), sides, torch.device("cpu"), model)
    secret = base64.b64encode(bytes(range(128))).decode()
    meeting = Rendezvous(host="h", port=0, world_size=3, epoch=1, deadline_s=1, secret=secret)
    init = receiver.parse_init_info({"rendezvous": asdict(meeting), "rank_offset": 2})
    assert (init.nccl_unique_id_bytes, init.world_size, init.rank_offset) == (bytes(range(128)), 3, 2)
    assert init.packed
    tensor = torch.arange(6.0).view(2, 3)
    info = receiver.parse_update_info(asdict(Manifest.of([("w", tensor)], bucket_bytes=99)))
    assert (info.names, info.dtype_names, info.shapes) == (("w",), ("float32",), ((2, 3),))
    assert receiver.packed_buffer_size_bytes == 99

    monkeypatch.setattr(
        NCCLWeightTransferEngine, "receive_weights", lambda self, _: self.model.load_weights(iter([("w", tensor)]))
    )
    receiver.checksums = {}
    receiver.receive_weights(info)
    assert loaded == ["w"]
    assert receiver.checksums == {"w": checksum(tensor)}
    monkeypatch.setattr(NCCLWeightTransferEngine, "init_transfer_engine", lambda self, _: None)
    monkeypatch.setattr(NCCLWeightTransferEngine, "start_weight_update", lambda self: None)
    monkeypatch.setattr(NCCLWeightTransferEngine, "finish_weight_update", lambda self: None)
    for known in ({"w": checksum(tensor)}, {}):  # what was loaded is remembered, until another group is joined
        receiver.init_transfer_engine(init)
        receiver.checksums = known
        receiver.finish_weight_update()
        receiver.start_weight_update()
        assert WeightReceiver.received_checksums(SimpleNamespace(weight_transfer_engine=receiver)) == known  # pyright: ignore[reportArgumentType]
    assert "load_weights" not in vars(model)  # the class's own again
    with pytest.raises(RuntimeError, match="replaced already"):
        receiver.discard()
