"""A rollout generator: vLLM's engine in this process's children, with weights that a learner can replace while it runs."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field

from actors.trajectory import Completion
from actors.transfer import Manifest, Rendezvous
from reward_server.encoding import ChatEncoding

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

T = TypeVar("T")
_WATCH_S = 1.0  # how often progress is looked at
_STREAM_INTERVAL = 16  # tokens between two signs of life of a request
_MARGIN_S = 5.0  # what a wait gets beyond the deadline of the transfer group, whose own error says more


class GeneratorError(RuntimeError):
    """The generator cannot go on; the text names it and says what it was doing. It has to be restarted."""


class GeneratorTimeout(GeneratorError, TimeoutError):
    """The engine did not answer, or made no token, within its deadline."""


class GeneratorConfig(BaseModel):
    """One vLLM engine."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the weights; take the learner's, or their log-probabilities drift apart."""
    max_model_len: int = Field(default=1024, ge=2)
    """Longest query plus response, in tokens."""
    max_num_seqs: int = Field(default=64, ge=1)
    """Most sequences that are decoded at once; further ones wait."""
    kv_cache_gib: float = Field(default=1.0, gt=0)
    """Memory for keys and values on a CPU, in GiB; on a GPU, gpu_memory_utilization decides."""
    gpu_memory_utilization: float = Field(default=0.85, gt=0, le=1)
    """Part of a GPU's memory that the engine may take."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """Devices that share one copy of the weights."""
    enforce_eager: bool = True
    """Skip compilation: starts in seconds instead of a minute, decodes some 10 % slower."""
    threads: int = Field(default=1, ge=1)
    """Threads of each engine worker on a CPU; those of all processes that compute at once must not exceed the cores."""
    start_deadline_s: float = Field(default=300.0, gt=0)
    """Seconds that starting the engine may take."""
    call_deadline_s: float = Field(default=60.0, gt=0)
    """Seconds that the engine may take to answer a control call, such as pausing or loading received weights."""
    progress_deadline_s: float = Field(default=120.0, gt=0)
    """Seconds without a single new token, while not paused, after which the engine counts as hung."""


class Generator:
    """Samples responses and hands back the log-probability and weight version of every token.

    All methods run in the event loop that awaited `start`. A weight update is `join` once per membership, then
    `begin_update`, `receive` and `finish_update` (or `abort_update`). Requests may be in flight all the while: they
    stand still from `begin_update` to the end, keep their tokens and cached keys, and go on with the new weights.
    """

    worker_extension: ClassVar[str] = "actors.weights.WeightReceiver"
    """Qualified name of the class that vLLM adds to its workers; its module registers the transfer engines."""

    def __init__(self, config: GeneratorConfig, model_path: str | Path, name: str = "generator") -> None:
        self.config = config
        self.model_path = Path(model_path)
        self.name = name
        self._engine: AsyncLLM | None = None
        self._encoding: ChatEncoding
        self._version = -1
        self._vocabulary = 0
        self._requests = 0
        self._progress = 0.0  # time of the last sign of progress
        self._paused = False
        self._deadline_s = config.call_deadline_s  # of the transfer group, once joined
        self._broken: str | None = None

    async def start(self, version: int = 0) -> None:
        """Load the model folder, whose weights are those of `version`, and start the engine.

        Raises GeneratorError with the engine's words if it cannot start.
        """
        os.environ |= {
            "OMP_NUM_THREADS": str(self.config.threads),
            "RAYWARD_GENERATOR_PID": str(os.getpid()),  # the workers end when this process does
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_PLUGINS": "",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        }
        if self.config.enforce_eager:
            os.environ["TORCH_COMPILE_DISABLE"] = (
                "1"  # else the rank of the first log-prob compiles C++ for 15 s
            )
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would override kv_cache_memory_bytes with whole GiB
        async with self._within(self.config.start_deadline_s, "the engine to start"):
            self._encoding = await asyncio.to_thread(ChatEncoding.load, self.model_path)
            self._engine = await asyncio.to_thread(self._load)
            self._vocabulary = self._engine.model_config.get_vocab_size()
            await self._engine.update_weight_version(str(version))
        self._version = version

    async def stop(self) -> None:
        """End the engine's processes."""
        engine, self._engine = self._engine, None
        self._broken = "it was stopped"
        if engine is not None:
            await asyncio.to_thread(engine.shutdown, 5.0)

    async def version(self) -> int:
        """The version of the weights in use, asked of the engine itself: a sign of life as well."""
        return int(await self._call("to tell its weight version", self._live().get_weight_version()))

    async def generate(
        self,
        query_ids: Sequence[Sequence[int]],
        seeds: Sequence[int],
        max_new_tokens: int,
        temperature: float,
    ) -> list[Completion]:
        """Sample one response to each query (no top-k, top-p or penalties), in the order of the queries.

        `seeds` makes a response independent of whatever else is sampled beside it, up to rounding. Behaviour
        log-probabilities are those of the distribution sampled from, temperature included.
        Raises ValueError for a query that cannot be served, before any is started.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        for index, query in enumerate(query_ids):
            self._check(f"query {index}", query, max_new_tokens)
        stop = sorted(self._encoding.eos_ids)
        outputs = await self._sample(
            query_ids,
            [
                SamplingParams(
                    temperature=temperature,
                    seed=seed,
                    max_tokens=max_new_tokens,
                    stop_token_ids=stop,
                    logprobs=0,  # the sampled token's alone
                    flat_logprobs=True,
                    detokenize=False,
                    output_kind=RequestOutputKind.CUMULATIVE,
                )
                for seed in seeds
            ],
        )
        return [self._completion(query, output) for query, output in zip(query_ids, outputs, strict=True)]

    async def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """log p(x_j | x_<j) at temperature 1 for j = 1 .. len-1 of each sequence, by the weights in use."""
        from vllm import SamplingParams

        for index, sequence in enumerate(sequences):
            self._check(f"sequence {index}", sequence, 1)
        params = SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False
        )
        outputs = await self._sample(sequences, [params] * len(sequences))
        return [list(output.prompt_logprobs.logprobs) for output in outputs]  # pyright: ignore  # flat: one a token

    async def join(self, rendezvous: Rendezvous, rank: int) -> None:
        """Become member `rank` (and the next ones, one a worker) of a transfer group; leaves an earlier one."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        self._deadline_s = rendezvous.deadline_s + _MARGIN_S
        request = WeightTransferInitRequest(init_info={**asdict(rendezvous), "rank_offset": rank})
        await self._call(
            "to join the weight transfer group",
            self._live().init_weight_transfer_engine(request),
            self._deadline_s,
        )

    async def leave(self) -> None:
        """Leave the transfer group."""
        await self._call("to leave the weight transfer group", self._live().shutdown_weight_transfer_engine())

    async def begin_update(self) -> None:
        """Let requests in flight stand still, and get ready to receive."""
        self._paused = True
        await self._call("to pause", self._live().pause_generation(mode="keep", clear_cache=False))
        await self._call("to start a weight update", self._live().start_weight_update())

    async def receive(self, manifest: Manifest) -> dict[str, int]:
        """Receive the tensors of a manifest, and return the checksum of each. On a CPU nothing is loaded yet."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        request = WeightTransferUpdateRequest(update_info=asdict(manifest))
        await self._call("to receive weights", self._live().update_weights(request), self._deadline_s)
        workers = await self._call("for checksums", self._live().collective_rpc("received_checksums"))
        if any(worker != workers[0] for worker in workers):
            raise GeneratorError(f"generator {self.name!r}: its workers received different weights")
        return workers[0]

    async def finish_update(self, version: int) -> None:
        """Load what was received, call it `version`, and let requests go on."""
        try:
            await self._call("to load weights", self._live().finish_weight_update(str(version)))
        except GeneratorError as error:
            self._broken = f"its weights are half replaced, since {error}"
            raise
        self._version = version
        await self._resume()

    async def abort_update(self) -> None:
        """Drop what was received and let requests go on with the old weights.

        Raises GeneratorError, and the generator is of no more use, if the old weights are gone.
        """
        if not self._paused:
            return
        try:
            await self._call("to drop received weights", self._live().collective_rpc("abandon_weight_update"))
        except GeneratorError as error:
            self._broken = f"a broken weight update could not be undone, since {error}"
            raise
        await self._resume()

    async def _resume(self) -> None:
        await self._call("to resume", self._live().resume_generation())
        self._progress = time.monotonic()
        self._paused = False

    def _load(self) -> "AsyncLLM":
        from vllm.config.weight_transfer import WeightTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        config = self.config
        cuda = torch.cuda.is_available()
        return AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(self.model_path),
                skip_tokenizer_init=True,  # tokens in, tokens out; the text is ChatEncoding's
                generation_config="vllm",  # sampling is what the run says, not what a model folder suggests
                dtype=config.dtype,
                max_model_len=config.max_model_len,
                max_num_seqs=config.max_num_seqs,
                tensor_parallel_size=config.tensor_parallel_size,
                enforce_eager=config.enforce_eager,
                gpu_memory_utilization=config.gpu_memory_utilization,
                kv_cache_memory_bytes=None if cuda else int(config.kv_cache_gib * 2**30),
                enable_prefix_caching=False,  # cached keys would outlive the weights that made them
                logprobs_mode="processed_logprobs",
                stream_interval=_STREAM_INTERVAL,
                disable_log_stats=True,
                weight_transfer_config=WeightTransferConfig(
                    backend="rayward_nccl" if cuda else "rayward_gloo"
                ),
                worker_extension_cls=self.worker_extension,
            )
        )

    def _live(self) -> "AsyncLLM":
        if self._broken is not None or self._engine is None:
            reason = self._broken or "it was not started"
            raise GeneratorError(f"generator {self.name!r} cannot be used: {reason}")
        return self._engine

    def _check(self, what: str, ids: Sequence[int], room: int) -> None:
        """Refuse here what would end the engine, or cut a response short without a word."""
        where = f"generator {self.name!r}: {what}"
        if not ids:
            raise ValueError(f"{where} is empty; a first token needs something to follow")
        if len(ids) + room > self.config.max_model_len:
            raise ValueError(
                f"{where} has {len(ids)} tokens and needs room for {room} more, but max_model_len is "
                f"{self.config.max_model_len}; shorten it, or raise max_model_len"
            )
        wrong = next((token for token in ids if not 0 <= token < self._vocabulary), None)
        if wrong is not None:
            raise ValueError(f"{where} holds token id {wrong}, outside the vocabulary of {self._vocabulary}")

    async def _sample(
        self, prompts: Sequence[Sequence[int]], params: "Sequence[SamplingParams]"
    ) -> "list[RequestOutput]":
        """Run requests to their end; watch that the engine makes progress."""
        engine = self._live()
        self._progress = time.monotonic()
        tasks = [
            asyncio.ensure_future(self._one(engine, list(prompt), param))
            for prompt, param in zip(prompts, params, strict=True)
        ]
        everything = asyncio.gather(*tasks)
        try:
            while not everything.done():
                await asyncio.wait([everything], timeout=_WATCH_S)
                silence = time.monotonic() - self._progress
                if silence > self.config.progress_deadline_s and not self._paused and not everything.done():
                    undone = sum(not task.done() for task in tasks)
                    raise GeneratorTimeout(
                        f"generator {self.name!r} made no token for {silence:.0f} s while {undone} of {len(tasks)} "
                        "requests wait"
                    )
            return await everything
        finally:
            everything.cancel()

    async def _one(self, engine: "AsyncLLM", prompt: list[int], params: "SamplingParams") -> "RequestOutput":
        from vllm import TokensPrompt
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        self._requests += 1
        output = None
        try:
            async for output in engine.generate(
                TokensPrompt(prompt_token_ids=prompt), params, f"{self.name}-{self._requests}"
            ):
                self._progress = time.monotonic()
        except (EngineDeadError, EngineGenerateError) as error:
            raise self._failed("to sample", error) from error
        assert output is not None and output.finished, "vLLM ended a request without its last output"
        return output

    def _completion(self, query: Sequence[int], output: "RequestOutput") -> Completion:
        sampled = output.outputs[0]
        ids = tuple(sampled.token_ids)
        versions = [
            int(span.version) for span in sampled.weight_versions or () for _ in range(span.start, span.end)
        ]
        return Completion(
            query_ids=tuple(query),
            response_ids=ids,
            logprobs=tuple(sampled.logprobs.logprobs),  # pyright: ignore  # flat: one a token
            versions=tuple(versions),
            ended=sampled.finish_reason == "stop",
            text=self._encoding.text(ids),
        )

    async def _call(self, what: str, answer: "Coroutine[Any, Any, T]", seconds: float | None = None) -> T:
        async with self._within(seconds or self.config.call_deadline_s, f"the engine {what}"):
            return await answer
        raise AssertionError("unreachable")

    @asynccontextmanager
    async def _within(self, seconds: float, what: str) -> AsyncIterator[None]:
        """Put a deadline on a wait, and the generator's name on every error."""
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError as error:
            raise GeneratorTimeout(f"generator {self.name!r}: waited {seconds:.0f} s for {what}") from error
        except Exception as error:
            raise self._failed(what, error) from error

    def _failed(self, what: str, error: Exception) -> GeneratorError:
        return GeneratorError(
            f"generator {self.name!r}: failed while waiting for {what}: {type(error).__name__}: {error}"
        )
