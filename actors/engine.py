"""vLLM's engine behind deadlines and errors that name it: the one place that starts vLLM and samples."""

import asyncio
import gc
import os
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from actors.config import GeneratorConfig
from reward_server.config import UNTRUSTED, LoadingConfig

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

T = TypeVar("T")
GENERATOR_PID = "RAYWARD_GENERATOR_PID"
"""Environment variable with the id of the process that an engine works for."""
_WATCH_S = 1.0  # how often progress is looked at
_CPU_BATCH_TOKENS = 4096  # prompt tokens of one step of the engine on a CPU
_STREAM_INTERVAL = 16  # tokens between two signs of life of a request


class GeneratorError(RuntimeError):
    """The generator cannot go on; the text names it and what it was doing. It has to be restarted."""


class GeneratorTimeout(GeneratorError, TimeoutError):
    """The engine did not answer, or made no token, within its deadline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What the engine says of one response."""

    ids: tuple[int, ...]
    """[L] sampled token ids, with the one that stopped it."""
    logprobs: tuple[float, ...]
    """[L] log-probability of each under the distribution that it was sampled from."""
    versions: tuple[int, ...]
    """[L] version of the weights that sampled each."""
    stopped: bool
    """True when a stop id ended it, False when it reached its length."""


class Engine:
    """vLLM's asynchronous engine, in child processes; used from the event loop that awaited `start`."""

    def __init__(
        self,
        config: GeneratorConfig,
        model_path: Path,
        name: str,
        worker_extension: str,
        direct: bool = False,
        loading: LoadingConfig = UNTRUSTED,
    ) -> None:
        """`worker_extension`: qualified name of a class that vLLM adds to its workers; `direct`: see Generator."""
        self.config = config
        self.model_path = model_path
        self.name = name
        self.worker_extension = worker_extension
        self.direct = direct
        self.loading = loading
        self.vocabulary = 0
        self._llm: AsyncLLM | None = None
        self._unusable = "it was not started"
        self._requests = 0
        self._under_way = 0
        self._version = 0.0
        self._progress = 0.0  # time of the last sign of progress
        self._tokens = 0
        self.paused = False

    async def start(self) -> None:
        """Load the model. Raises GeneratorError, with the engine's words, if it cannot start."""
        os.environ |= {
            "OMP_NUM_THREADS": str(self.config.threads),
            GENERATOR_PID: str(os.getpid()),  # the engine's processes end when this one does
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_PLUGINS": "",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        }
        if self.config.enforce_eager and not torch.cuda.is_available():
            os.environ["TORCH_COMPILE_DISABLE"] = "1"  # else the first log-prob compiles C++ for 15 s
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would override kv_cache_memory_bytes
        async with self._within(self.config.start_deadline_s, "start"):
            await asyncio.to_thread(self._load)
        self._unusable = ""

    async def stop(self) -> None:
        """End the engine's processes."""
        llm, self._llm = self._llm, None
        self._unusable = "it was stopped"
        if llm is not None:
            if llm.output_handler is not None:
                llm.output_handler.cancel()  # it would report the end as a failure
            await asyncio.to_thread(llm.shutdown, 5.0)
            del llm
            gc.collect()  # vLLM's objects refer to each other, and complain if they live to the end of Python

    def give_up(self, reason: str) -> None:
        """Refuse any further use."""
        self._unusable = reason

    async def version(self, seconds: float | None = None) -> str:
        """The version of the weights in use, within `seconds` (or call_deadline_s)."""
        return await self._call("tell its version", self._live().get_weight_version(), seconds)

    async def set_version(self, version: str) -> None:
        """Name the weights in use; tokens sampled from here on carry it."""
        await self._call("take a version", self._live().update_weight_version(version))
        self._version = float(version)

    def tokens(self) -> int:
        """Tokens handed out so far: a sign of progress. Raises GeneratorError when the engine is dead."""
        if self._live().errored:
            raise GeneratorError(f"generator {self.name!r}: the engine's process is dead")
        return self._tokens

    def stats(self) -> dict[str, float]:
        """Version, requests that run and wait by vLLM's bound on them, tokens sampled; without asking the engine."""
        running = min(self._under_way, self.config.max_num_seqs)
        return {
            "version": self._version,
            "running": float(running),
            "waiting": float(self._under_way - running),
            "most": float(self.config.max_num_seqs),
            "tokens": float(self._tokens),
            "paused": float(self.paused),
        }

    async def pause(self, recompute: bool = False) -> None:
        """Let requests in flight stand still with their tokens; new ones wait.

        Their cached keys and values stay too, or with `recompute` are made anew from the tokens when they go on.
        """
        self.paused = True
        await self._call("pause", self._live().pause_generation(mode="keep", clear_cache=recompute))

    async def resume(self) -> None:
        """Let requests go on."""
        await self._call("resume", self._live().resume_generation())
        self._progress = time.monotonic()
        self.paused = False

    async def workers(self, what: str, method: str, seconds: float | None = None, **arguments: Any) -> list[Any]:
        """Call a method of every worker, for `seconds` at most (or call_deadline_s); one answer each."""
        return await self._call(what, self._live().collective_rpc(method, kwargs=arguments), seconds)

    async def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        max_tokens: int,
        temperature: float,
        stop_ids: Sequence[int],
    ) -> list[Sampled]:
        """Sample a response to each prompt, from the whole distribution (no top-k, top-p or penalties)."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        outputs = await self._run(
            prompts,
            [
                SamplingParams(
                    temperature=temperature,
                    seed=seed,
                    max_tokens=max_tokens,
                    stop_token_ids=list(stop_ids),
                    logprobs=0,  # the sampled token's alone
                    flat_logprobs=True,
                    detokenize=False,
                    output_kind=RequestOutputKind.CUMULATIVE,  # every few tokens: signs of progress
                )
                for seed in seeds
            ],
        )
        return [self._sampled(output) for output in outputs]

    async def prompt_logprobs(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """log p(x_j | x_<j) at temperature 1, j = 1 .. len-1 of each prompt."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False)
        outputs = await self._run(prompts, [params] * len(prompts))
        return [_flat(output.prompt_logprobs) for output in outputs]

    async def echo(self, prompts: Sequence[Sequence[int]]) -> list[tuple[list[float], list[float]]]:
        """(log p(x_j | x_<j), that of the likeliest token there), j = 1 .. len of each prompt, at temperature 1.

        Past the prompt, at j = len, the token is the likeliest.
        """
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=1, logprobs=0, flat_logprobs=True, detokenize=False
        )
        outputs = await self._run(prompts, [params] * len(prompts))
        found = []
        for output in outputs:
            both, last = _flat(output.prompt_logprobs), _flat(output.outputs[0].logprobs)
            found.append((both[::2] + last, both[1::2] + last))  # of each token: its own, and the first by rank
        return found

    def _load(self) -> None:
        gc.disable()  # what is imported is no garbage, and looking for some takes a quarter of the imports' time
        try:
            from vllm.v1.engine.async_llm import AsyncLLM
        finally:
            gc.enable()
        arguments = _arguments(self.config, self.model_path, self.worker_extension, self.direct, self.loading)
        self._llm = AsyncLLM.from_engine_args(arguments)
        self.vocabulary = self._llm.model_config.get_vocab_size()

    def _live(self) -> "AsyncLLM":
        if self._unusable or self._llm is None:
            raise GeneratorError(f"generator {self.name!r} cannot be used: {self._unusable}")
        return self._llm

    async def _call(self, what: str, answer: Coroutine[Any, Any, T], seconds: float | None = None) -> T:
        result: list[T] = []
        async with self._within(seconds or self.config.call_deadline_s, what):
            result.append(await answer)
        return result[0]

    async def _run(self, prompts: Sequence[Sequence[int]], params: "Sequence[SamplingParams]") -> "list[RequestOutput]":
        """Run requests to their end, and watch that the engine makes progress."""
        self._progress = time.monotonic()
        tasks = [
            asyncio.ensure_future(self._one(list(prompt), param)) for prompt, param in zip(prompts, params, strict=True)
        ]
        pending = set(tasks)
        try:
            while pending:
                done, pending = await asyncio.wait(pending, timeout=_WATCH_S, return_when=asyncio.FIRST_EXCEPTION)
                for task in done:
                    task.result()
                silence = time.monotonic() - self._progress
                if pending and silence > self.config.progress_deadline_s and not self.paused:
                    raise GeneratorTimeout(
                        f"generator {self.name!r} made no token for {silence:.0f} s, and "
                        f"{self._under_way} requests wait"
                    )
            return [task.result() for task in tasks]
        finally:
            for task in tasks:
                task.cancel()  # vLLM drops the request of a cancelled task
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(self, prompt: list[int], params: "SamplingParams") -> "RequestOutput":
        from vllm.inputs import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        self._requests += 1
        self._under_way += 1
        last, counted = None, 0
        try:
            async for output in self._live().generate(tokens_input(prompt), params, f"{self.name}-{self._requests}"):
                self._progress = time.monotonic()
                tokens = len(output.outputs[0].token_ids)  # of a list that vLLM goes on filling
                self._tokens += tokens - counted
                last, counted = output, tokens
        except (EngineDeadError, EngineGenerateError) as error:
            raise self._failed("sample", error) from error
        finally:
            self._under_way -= 1
        assert last is not None, "vLLM ended a request without an output"
        return last

    def _sampled(self, output: "RequestOutput") -> Sampled:
        response = output.outputs[0]
        if response.finish_reason not in ("stop", "length"):
            raise GeneratorError(
                f"generator {self.name!r}: a request ended with {response.finish_reason!r}, not by itself"
            )
        spans = response.weight_versions or ()
        return Sampled(
            ids=tuple(response.token_ids),
            logprobs=tuple(_flat(response.logprobs)),
            versions=tuple(int(span.version) for span in spans for _ in range(span.start, span.end)),
            stopped=response.finish_reason == "stop",
        )

    @asynccontextmanager
    async def _within(self, seconds: float, what: str) -> AsyncIterator[None]:
        """Put a deadline on a wait for the engine, and the generator's name on every error."""
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError as error:
            raise GeneratorTimeout(
                f"generator {self.name!r}: the engine did not {what} within {seconds:.0f} s"
            ) from error
        except Exception as error:
            raise self._failed(what, error) from error

    def _failed(self, what: str, error: Exception) -> GeneratorError:
        return GeneratorError(f"generator {self.name!r}: the engine failed to {what}: {type(error).__name__}: {error}")


def _arguments(
    config: GeneratorConfig, model_path: Path, worker_extension: str, direct: bool, loading: LoadingConfig = UNTRUSTED
) -> "AsyncEngineArgs":
    from vllm.config.weight_transfer import WeightTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    cuda = torch.cuda.is_available()
    # On a CPU vLLM would put a lone worker into a process of its own: a quarter slower, since the engine spins
    # while it waits, and ten seconds more to start. OMP_NUM_THREADS, its reason for that, is set already.
    alone = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
    return AsyncEngineArgs(
        model=str(model_path),
        trust_remote_code=loading.trust_remote_code,
        skip_tokenizer_init=True,  # tokens in, tokens out; the text is ChatEncoding's
        generation_config="vllm",  # sampling is what the run says, not what a model folder suggests
        dtype=config.dtype,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        tensor_parallel_size=config.tensor_parallel_size,
        distributed_executor_backend=alone if config.tensor_parallel_size == 1 else "mp",
        enforce_eager=config.enforce_eager,
        gpu_memory_utilization=config.gpu_memory_utilization,
        kv_cache_memory_bytes=None if cuda else int(config.kv_cache_gib * 2**30),
        # vLLM's CPU backend cannot take back the random number of a seeded request whose prompt it cut in two.
        enable_chunked_prefill=None if cuda else False,
        max_num_batched_tokens=None if cuda else max(_CPU_BATCH_TOKENS, config.max_model_len),
        enable_prefix_caching=False,  # cached keys would outlive the weights that made them
        logprobs_mode="processed_logprobs",  # of the distribution sampled from, temperature included
        stream_interval=_STREAM_INTERVAL,
        use_tqdm_on_load=False,
        disable_log_stats=True,
        weight_transfer_config=WeightTransferConfig(backend="rayward_nccl" if direct else "rayward_gloo"),
        worker_extension_cls=worker_extension,
    )


def _flat(logprobs: Any) -> list[float]:
    """One number a token, of vLLM's FlatLogprobs of the given tokens alone."""
    return list(logprobs.logprobs)
