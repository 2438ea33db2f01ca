"""What one GPU gives: the learner beside plain PyTorch and the device's peak, memory beside the plan, and decoding.

    python benchmarks/one_gpu.py [--minutes 10] [--models 0.5b 1.5b] [--json one_gpu.json]

Models of Qwen2.5's shapes with random weights are made on the spot, and nothing is downloaded. The learner needs torch,
transformers, peft, deepspeed, pydantic and jaxtyping; the plan also rich, prometheus-client and tomli-w; decoding vLLM.
Rows come in the order of their worth. One that fails says why and the others go on. The time that is given is kept, and
what it had no room for is named.

`plain` is transformers and Adam (fused, all in bfloat16) on the same micro-batches, packed as transformers packs them:
it has no float32 gradients and master weights, which the learner keeps. MFU is operations a second beside those of a
large matrix product in the same run. Operations of T tokens in sequences of S, of which a head of h numbers reads R,
where the other matrices have n numbers:

    forward    2 n T + 2 h R + 2 layers heads head_dim sum(S^2)            (causal attention: half of the square)
    training   three times that; once less of what is frozen (with LoRA of all matrices but the adapters)

What is computed twice, such as the head's logits in the backward pass, counts once. Decoding a token of each of B
sequences reads N weights, and the keys and values of the context c: t >= max((2 N + B c kv) / W, 2 N B / F), where W is
what a large copy reads and writes a second, and F the matrix product's operations.
"""

import argparse
import asyncio
import contextlib
import gc
import json
import math
import os
import platform
import random
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel, Qwen2Config
from transformers.utils.import_utils import is_flash_attn_2_available

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tiny models of the tests are in no package

from learner.config import NetworkConfig, OptimizerConfig
from learner.data.batch import collate, microbatches
from learner.worker import ppo_steps
from learner.worker.ppo_steps import PPOStep, Targets
from learner.worker.worker import LearnerWorker
from reward_server.address import free_port
from reward_server.encoding import ChatEncoding
from reward_server.model import Normalisation, new_reward_model, set_normalisation
from tests.tiny_batches import trajectory
from tests.tiny_models import save_reward_model, tiny_tokenizer

if TYPE_CHECKING:
    from actors.engine import Engine

REPEATS = 5
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
ATTENTION = "flash_attention_2" if CUDA and is_flash_attn_2_available() else "sdpa"
VARIANTS: dict[str, dict[str, Any]] = {"LoRA": {"lora_rank": 16}}
"""What the learner is told beside the defaults, whose rows are called packed and padded."""
if CUDA:  # on a CPU compiling takes minutes and gains nothing, and Liger has no kernels
    VARIANTS |= {"compiled": {"compile": True}, "Liger": {"liger": True}}
Micro = tuple[Tensor, Tensor, Tensor, Tensor]
"""ids [1, N] and positions [1, N] of packed sequences; places in them [n] that are read, and the tokens after these."""
Piece = tuple[str, Callable[[], Iterator["Row"]]]


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model, and the work that it is given."""

    hidden: int
    inner: int
    layers: int
    heads: int
    vocabulary: int = 151_936
    sequences: int = 32
    """of a batch, half prompt and half response, their lengths log-normal"""
    mean: int = 512
    """tokens of one"""
    budget: int = 8192
    """tokens of a micro-batch"""
    decoded: tuple[int, ...] = (1, 64, 256)
    """sequences at once"""
    prompt: int = 128
    """tokens that are in the cache when decoding begins"""
    tokens: int = 256
    """tokens decoded of each"""

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, always the same."""
        draw = random.Random(0)
        wanted = [round(self.mean * draw.lognormvariate(-0.245, 0.7)) for _ in range(self.sequences)]
        return [min(self.budget, max(8, length)) for length in wanted]

    @property
    def micros(self) -> Iterator[Micro]:
        """The micro-batches that the learner cuts them into, on the device."""
        for micro in microbatches(self.lengths, self.budget, 1, self.hidden)[0]:
            lengths = [self.lengths[index] for index in micro]
            ids = torch.randint(3, 300, (sum(lengths),), generator=torch.Generator().manual_seed(0))
            positions = torch.cat([torch.arange(length) for length in lengths])
            middles = torch.cat([torch.full((length,), length // 2) for length in lengths])
            lasts = torch.cat([torch.full((length,), length - 1) for length in lengths])
            places = ((positions >= middles - 1) & (positions < lasts)).nonzero()[:, 0]
            yield ids[None].to(DEVICE), positions[None].to(DEVICE), places.to(DEVICE), ids[places + 1].to(DEVICE)

    def save(self, folder: Path) -> None:
        """Write a policy and a reward model of random weights."""
        tiny_tokenizer(folder / "policy")
        shape = {"vocab_size": self.vocabulary, "hidden_size": self.hidden, "intermediate_size": self.inner}
        layers = {"num_hidden_layers": self.layers, "num_attention_heads": self.heads, "num_key_value_heads": 2}
        tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": True}
        with DEVICE:
            model = AutoModelForCausalLM.from_config(Qwen2Config(**shape, **layers, **tokens), dtype=torch.bfloat16)
        model.save_pretrained(folder / "policy")
        reward = new_reward_model(folder / "policy", torch.bfloat16, 0)
        set_normalisation(reward, Normalisation(gain=1.0, bias=0.0))
        save_reward_model(reward, ChatEncoding.load(folder / "policy"), folder / "reward")


_TINY: dict[str, Any] = {"vocabulary": 512, "sequences": 4, "mean": 24, "budget": 64, "prompt": 8, "tokens": 32}
SIZES = {
    "0.5b": Size(hidden=896, inner=4864, layers=24, heads=14),
    "1.5b": Size(hidden=1536, inner=8960, layers=28, heads=12),
    "tiny": Size(hidden=64, inner=128, layers=2, heads=2, decoded=(1, 4), **_TINY),
}


@dataclass(slots=True, kw_only=True)
class Row:
    """One figure, or why there is none."""

    name: str
    value: float | None = None
    """the median of all repetitions"""
    unit: str = ""
    least: float | None = None
    most: float | None = None
    ratio: float | None = None
    of: str = ""
    """what the ratio is of"""
    mfu: float | None = None
    wrong: str = ""

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.name:22} {self.wrong}"
        ratio = f"{self.ratio:.3f} of {self.of}" if self.ratio is not None else self.wrong
        mfu = f"MFU {self.mfu:.3f}" if self.mfu is not None else ""
        spread = f"({self.least:,.4g} to {self.most:,.4g})"
        return f"{self.name:22} {self.value:10,.4g} {self.unit:8} {spread:24} {ratio:24} {mfu}".rstrip()


class OutOfTime(BaseException):
    """The minutes are over; no error, so that nothing on the way takes it for one."""


@dataclass(slots=True)
class Bench:
    """What rows are measured with and held against."""

    folder: Path
    """of the models"""
    flops: float = math.nan
    """operations a second of a large matrix product in bfloat16"""
    bandwidth: float = math.nan
    """bytes a second of a large copy"""
    plain_rates: dict[str, float] = field(default_factory=dict)
    """tokens a second, by model and phase"""
    worker: LearnerWorker | None = None

    def pieces(self, names: Sequence[str]) -> Iterator[Piece]:
        """What is measured, in the order of its worth."""
        yield "peaks", self.peaks
        for name in names:
            yield f"{name} plain", lambda name=name: self.plain(name)
            yield f"{name} packed", lambda name=name: self.learner(name, "packed", {})
        yield f"{names[0]} decode", lambda: self.decode(names[0])
        for name in names:
            for variant, changes in VARIANTS.items():
                yield f"{name} {variant}", lambda n=name, v=variant, c=changes: self.learner(n, v, c)
        for name in names[1:]:
            yield f"{name} decode", lambda name=name: self.decode(name)

    def peaks(self) -> Iterator[Row]:
        """The device's matrix product and copy, beside its data sheet where that is known."""
        sheet = _sheet()
        side, moved = (8192, 2**32) if CUDA else (1024, 2**28)
        left, right = (torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        rates = [2 * side**3 / t for t in repeated(lambda: left @ right)]
        self.flops = statistics.median(rates)
        yield _row("matrix product", rates, 1e12, "Tflop/s", sheet and sheet.flops, "data sheet")
        source = torch.randn(moved // 8, device=DEVICE)  # half of the bytes are read, half are written
        target = torch.empty_like(source)
        rates = [moved / t for t in repeated(lambda: target.copy_(source))]
        self.bandwidth = statistics.median(rates)
        yield _row("copy", rates, 1e9, "GB/s", sheet and sheet.bandwidth, "data sheet")

    def plain(self, name: str) -> Iterator[Row]:
        """Evaluation, and training of policy and critic, by transformers and torch alone."""
        micros, folder = list(SIZES[name].micros), self.made(name)
        settings = {"dtype": torch.bfloat16, "attn_implementation": ATTENTION}
        policy = AutoModelForCausalLM.from_pretrained(folder / "policy", **settings).to(DEVICE)
        critic = AutoModelForSequenceClassification.from_pretrained(folder / "reward", **settings).to(DEVICE)

        def evaluate() -> None:
            with torch.no_grad():
                for micro in micros:
                    for model in (policy, policy, critic):
                        answers(model, *micro)

        phases = {"evaluate": (evaluate, [policy, policy, critic])}
        phases |= {"policy": (_training(policy, micros), [policy]), "critic": (_training(critic, micros), [critic])}
        for row in self._phases(name, "plain", phases, None):
            self.plain_rates[row.name.replace(" plain:", "")] = row.value or math.nan
            yield row

    def learner(self, name: str, variant: str, changes: dict[str, Any]) -> Iterator[Row]:
        """The learner's three phases and its memory; with the defaults, the phases on padded batches too."""
        size, folder, network = SIZES[name], self.made(name), NetworkConfig(**changes)
        if self.worker is None:
            self.worker = LearnerWorker(0, 1, torch.get_num_threads())
            self.worker.start("127.0.0.1", free_port("127.0.0.1"), 60.0)
        worker, optimizer, before = self.worker, OptimizerConfig(lr=1e-6), _memory(reset=True)
        compared = None if network.lora_rank else self.plain_rates
        try:
            worker.load("policy", "policy", folder / "policy", network, optimizer, 0.992)
            worker.load("reference", "policy", folder / "policy", NetworkConfig())
            worker.load("critic", "value", folder / "reward", network, optimizer)
            phases = _steps(worker, size)
            yield from self._phases(name, variant, phases, compared)
            used = _memory() - before
            row = _row(f"{name} {variant}: memory", [used], 2**30, "GiB")
            try:
                row.ratio, row.of = used / _planned(folder, size, network), "the plan"
            except ImportError as error:
                row.wrong = f"no plan: {error}"
            yield row
            if not changes:
                for kind in ("policy", "reference", "critic"):
                    worker.networks.module(kind).model.set_attn_implementation("sdpa")
                yield from self._phases(name, "padded", phases, compared)
        finally:
            worker.unload()

    def _phases(
        self, name: str, variant: str, phases: Mapping[str, tuple[Callable[[], Any], list[Any]]], plain: Any
    ) -> Iterator[Row]:
        """A row of each: (what is timed, the models that it goes through). Compared with `plain`, or with the peak."""
        size = SIZES[name]
        read = sum(length - length // 2 for length in size.lengths)
        for phase, (work, models) in phases.items():
            rates = [sum(size.lengths) / t for t in repeated(work)]
            cost = sum(operations(model, size.lengths, read, phase != "evaluate") for model in models)
            mfu = cost / sum(size.lengths) * statistics.median(rates) / self.flops
            other = plain.get(f"{name} {phase}") if plain is not None else None
            row = _row(f"{name} {variant}: {phase}", rates, 1.0, "tokens/s", other, "plain")
            row.mfu = mfu
            if plain is None:
                row.ratio, row.of = mfu, "matrix product"
            yield row

    def decode(self, name: str) -> Iterator[Row]:
        """Tokens a second of a vLLM engine as a run starts it, beside what reading the memory allows."""
        import vllm  # noqa: F401  # where it is missing, that is all this says

        from actors.config import GeneratorConfig
        from actors.engine import Engine

        size, folder = SIZES[name], self.made(name) / "policy"
        config = GeneratorConfig(
            max_model_len=max(256, size.prompt + size.tokens),
            max_num_seqs=max(size.decoded),
            gpu_memory_utilization=0.7,  # this process holds some of it
            enforce_eager=not CUDA,
        )
        engine = Engine(config, folder, "decode", "actors.weights.WeightReceiver")
        with asyncio.Runner() as runner:
            try:
                runner.run(engine.start())
                runner.run(engine.set_version("0"))
                for count in size.decoded:
                    rates = runner.run(decode_rates(engine, count, size.prompt, size.tokens))
                    step = decode_bound(folder, count, size.prompt + size.tokens / 2, self.bandwidth, self.flops)
                    yield _row(f"{name} decode: {count}", rates, 1.0, "tokens/s", count / step, "its bound")
            finally:
                runner.run(engine.stop())

    def made(self, name: str) -> Path:
        """The folder with the models of a size."""
        if not (folder := self.folder / name).exists():
            SIZES[name].save(folder)
        return folder


def _steps(worker: LearnerWorker, size: Size) -> dict[str, tuple[Callable[[], Any], list[Any]]]:
    """The learner's three phases, and the models that each goes through."""
    networks = worker.networks
    made = [trajectory(length // 2, length - length // 2, i, 0.5) for i, length in enumerate(size.lengths)]
    batch, rows = collate(made, pad_id=0), list(range(len(made)))
    step = PPOStep(
        clip=0.2,
        value_clip=0.2,
        pretraining_coef=0.0,
        temperature=1.0,
        max_tokens=size.budget,
        pretraining_max_tokens=size.budget,
        pretraining_normaliser="tokens",
        policy_lr=1e-6,
        critic_lr=1e-6,
    )
    found = worker.evaluate(batch, [rows], size.budget, 1.0)
    targets = Targets(evaluation=found, advantages=batch.mask.float(), returns=found.values, weights=None)
    policy, reference, critic = (networks.module(name).model for name in ("policy", "reference", "critic"))
    return {
        "evaluate": (lambda: worker.evaluate(batch, [rows], size.budget, 1.0), [policy, reference, critic]),
        "policy": (lambda: ppo_steps.policy_step(networks, batch, targets, rows, [], step), [policy]),
        "critic": (lambda: ppo_steps.critic_step(networks, batch, targets, rows, step), [critic]),
    }


def _training(model: nn.Module, micros: Sequence[Micro]) -> Callable[[], None]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        for micro in micros:
            answers(model, *micro).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def answers(model: Any, ids: Tensor, positions: Tensor, places: Tensor, targets: Tensor) -> Tensor:
    """Negative log-probs of the targets by a policy, values by a critic: f32 [n]."""
    hidden = model.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[0, places]
    if hasattr(model, "score"):
        return model.score(hidden).float()[:, 0]
    return nn.functional.cross_entropy(model.lm_head(hidden).float(), targets, reduction="none")


def operations(model: PreTrainedModel, lengths: Sequence[int], read: int, training: bool) -> float:
    """Multiplications and additions of sequences of so many tokens, whose head is read at `read` of them."""
    config, output = model.config.get_text_config(), model.get_output_embeddings()
    head = model.get_parameter("score.weight") if output is None else output.weight
    apart = {id(head), id(model.get_input_embeddings().weight)}
    matrices = [(p, sum(lengths)) for p in model.parameters() if p.ndim > 1 and id(p) not in apart] + [(head, read)]
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * width * sum(n**2 for n in lengths)
    forward = sum(2 * matrix.numel() * tokens for matrix, tokens in matrices) + attention
    learned = sum(2 * matrix.numel() * tokens for matrix, tokens in matrices if matrix.requires_grad) + attention
    return 2 * forward + learned if training else forward


async def decode_rates(engine: "Engine", count: int, prompt: int, tokens: int) -> list[float]:
    """Tokens a second that an engine decodes of `count` sequences, in their last three quarters of `tokens`.

    Each from two calls of different length, so that prompts and the start of a call are not in it.
    """
    prompts = [[3 + (7 * number + place) % 290 for place in range(prompt)] for number in range(count)]
    rates = list[float]()
    for _ in range(REPEATS + 1):  # the first warms up
        taken, sampled = list[float](), list[int]()
        for length in (tokens // 4, tokens):
            began = time.perf_counter()
            responses = await engine.sample(prompts, list(range(count)), length, 1.0, ())
            taken.append(time.perf_counter() - began)
            sampled.append(sum(len(response.ids) for response in responses))  # random weights may sample an EOS, too
        rates.append((sampled[1] - sampled[0]) / (taken[1] - taken[0]))
    return rates[1:]


def decode_bound(folder: Path, count: int, context: float, bandwidth: float, flops: float) -> float:
    """Seconds that decoding a token of each of `count` sequences takes at least, with weights in bfloat16."""
    config = Qwen2Config.from_pretrained(folder)
    with torch.device("meta"):
        numbers = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    keys = config.num_hidden_layers * config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    return max((2 * numbers + count * context * 2 * 2 * keys) / bandwidth, 2 * numbers * count / flops)


def repeated(work: Callable[[], Any]) -> list[float]:
    """Seconds of each of `REPEATS` calls, after one that warms up."""
    taken = []
    for _ in range(REPEATS + 1):
        torch.cuda.synchronize() if CUDA else None
        began = time.perf_counter()
        work()
        torch.cuda.synchronize() if CUDA else None
        taken.append(time.perf_counter() - began)
    return taken[1:]


def _planned(folder: Path, size: Size, network: NetworkConfig) -> float:
    """Bytes that `rayward plan` expects on the device, without the process."""
    from cluster.config.schema import Config
    from cluster.pipeline.stages import STAGES
    from cluster.plan.memory import learner_memory, total
    from cluster.plan.shapes import Models, shape_of

    ppo = {"network": network, "max_tokens_per_microbatch": size.budget, "pretraining": {"coef": 0.0}}
    lengths = {"max_prompt_tokens": max(size.lengths) // 2, "max_new_tokens": max(size.lengths) // 2}
    config = Config.model_validate({"ppo": ppo, "rollout": lengths, "cluster": {"learner_ranks": 1}})
    models = Models(policy=shape_of(folder / "policy"), reward=shape_of(folder / "reward"))
    return total({k: v for k, v in learner_memory(config, models, STAGES["ppo"]).items() if k != "process"}).device


def _memory(reset: bool = False) -> int:
    """Bytes held at most since the last `reset`; with it, those held now. On a CPU of the whole process."""
    if CUDA:
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() if reset else torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(rf"{'VmRSS' if reset else 'VmHWM'}:\s+(\d+)", status)[0])


def _sheet() -> Any:
    """What the vendor says of this GPU; None where that is not known."""
    with contextlib.suppress(ImportError, ValueError):
        from cluster.plan.machines import gpu_named

        return gpu_named(torch.cuda.get_device_name()) if CUDA else None


def _row(name: str, values: Sequence[float], scale: float, unit: str, other: float | None = None, of: str = "") -> Row:
    """The median of values in units of `scale`, and its ratio to another where there is one."""
    found = [value / scale for value in values]
    row = Row(name=name, value=statistics.median(found), unit=unit, least=min(found), most=max(found))
    if other:
        row.ratio, row.of = statistics.median(values) / other, of
    return row


def _reason(error: BaseException) -> str:
    kind = "out of memory" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
    return f"{kind}: {(str(error) or 'no reason given').splitlines()[0]}"


def measure(pieces: Iterable[Piece], minutes: float, save: Callable[[list[Row]], None]) -> list[Row]:
    """All rows, each saved as it comes. The clock ends the piece that it meets, and those after it are not begun."""
    rows, end = list[Row](), time.monotonic() + 60 * minutes

    def ring(*_: Any) -> None:
        raise OutOfTime

    def add(row: Row) -> None:
        rows.append(row)
        print(f"{time.monotonic() - end + 60 * minutes:5.0f} s  {row}", file=sys.stderr, flush=True)
        save(rows)

    signal.signal(signal.SIGALRM, ring)
    for name, piece in pieces:
        try:
            if (left := end - time.monotonic()) <= 0:
                raise OutOfTime
            signal.setitimer(signal.ITIMER_REAL, left, 10.0)  # and again, for waits on the way out
            for row in piece():
                add(row)
        except OutOfTime:
            add(Row(name=name, wrong=f"not run, or not to its end: {minutes:g} minutes were over"))
        except Exception as error:
            add(Row(name=name, wrong=_reason(error)))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            gc.collect()
            torch.cuda.empty_cache() if CUDA else None
    return rows


def main() -> None:
    """Measure, print a table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="when to stop (default: 10)")
    parser.add_argument("--models", nargs="+", choices=SIZES, default=["0.5b", "1.5b"], help="of which sizes")
    parser.add_argument("--json", type=Path, default=Path("one_gpu.json"), help="where the rows go")
    given = parser.parse_args()
    about = {
        "device": torch.cuda.get_device_name() if CUDA else f"no GPU ({platform.machine()})",
        "date": str(date.today()),
        "attention": ATTENTION,
        "torch": torch.__version__,
    }

    def save(rows: list[Row]) -> None:
        given.json.write_text(json.dumps(about | {"rows": [asdict(row) for row in rows]}, indent=2) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Bench(Path(folder)).pieces(given.models), given.minutes, save)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print("\n".join(str(row) for row in rows), flush=True)
    os._exit(0)  # an engine that was still starting would be waited for


if __name__ == "__main__":
    main()
