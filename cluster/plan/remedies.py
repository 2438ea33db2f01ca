"""The nearest configuration that fits: settings that trade time for memory, tried one after the other."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from cluster.config.load import as_toml
from cluster.config.schema import Config

SAMPLING = frozenset({"sample", "select", "ppo", "evaluate"})
"""Steps that need generators."""
TRAINED = ("sft", "baseline", "reward", "ppo")
"""Steps that train."""


def nearest_that_fits(config: Config, step: str, fits: Callable[[Config], bool]) -> str | None:
    """The fewest and mildest of `changes` that make `fits` true, as `key = value` in words; None for none."""
    options: dict[str, list[Any]] = {}
    for key, value in changes(config, step):
        options.setdefault(key, []).append(value)
    for key, values in options.items():
        for value in values:
            if fits(changed(config, {key: value})):
                return f"{key} = {as_toml(value)}"
    taken: dict[str, Any] = {}
    for key, values in options.items():
        taken[key] = values[-1]
        if fits(changed(config, taken)):
            break
    else:
        return None
    for key in list(taken):
        rest = {name: value for name, value in taken.items() if name != key}
        if fits(changed(config, rest)):  # it was tried on the way and is not needed
            taken = rest
            continue
        for value in options[key]:
            if fits(changed(config, taken | {key: value})):
                taken[key] = value
                break
    return ", ".join(f"{name} = {as_toml(value)}" for name, value in taken.items())


def nearest_counts(config: Config, works: Callable[[Config], bool]) -> str | None:
    """How many processes, or GPUs of one, `works` is true for: each number alone, else the generators with the ranks.

    In words, `cluster.generators = 2, or cluster.learner_ranks = 3`; None where not even one of each will do.
    """
    cluster, size = config.cluster, config.generator.tensor_parallel_size
    fewer = {
        "cluster.generators": range(cluster.generators - 1, 0, -1),
        "cluster.learner_ranks": range(cluster.learner_ranks - 1, 0, -1),
        "generator.tensor_parallel_size": range(size - 1, 0, -1),
        "cluster.max_generators": range((cluster.max_generators or 0) - 1, 0, -1),
    }
    alone = [
        f"{key} = {value}"
        for key, values in fewer.items()
        if (value := next((n for n in values if works(changed(config, {key: n}))), None)) is not None
    ]
    if alone:
        return ", or ".join(alone)
    one = {"cluster.generators": 1, "generator.tensor_parallel_size": 1}
    for ranks in range(cluster.learner_ranks, 0, -1):
        if works(changed(config, {**one, "cluster.learner_ranks": ranks})):
            return f"cluster.generators = 1, cluster.learner_ranks = {ranks}" + (
                ", generator.tensor_parallel_size = 1" if size > 1 else ""
            )
    return None


def changes(config: Config, step: str) -> Iterator[tuple[str, Any]]:
    """Settings that save memory in a step, the cheapest first."""
    if step in SAMPLING:
        for part in (0.7, 0.5, 0.35, 0.25):
            if part < config.generator.gpu_memory_utilization:
                yield "generator.gpu_memory_utilization", part
        for size in (0.5, 0.25):
            if size < config.generator.kv_cache_gib:
                yield "generator.kv_cache_gib", size
    if step in TRAINED:
        yield from _learner_changes(config, step)
    if step == "serve":
        for key, value in (
            ("scoring.max_batch_tokens", config.scoring.max_batch_tokens),
            ("serve.replicas", config.serve.replicas),
        ):
            while (value := value // 2) >= 1:
                yield key, value
    if step in SAMPLING:
        for size in (2, 4, 8, 16):
            if size > config.generator.tensor_parallel_size:
                yield "generator.tensor_parallel_size", size
        count = config.cluster.generators
        while (count := count // 2) >= 1:
            yield "cluster.generators", count


def _learner_changes(config: Config, step: str) -> Iterator[tuple[str, Any]]:
    section = getattr(config, step)
    budget = section.max_tokens_per_microbatch
    while (budget := budget // 2) >= 256:
        yield f"{step}.max_tokens_per_microbatch", budget
    if not section.network.gradient_checkpointing:
        yield f"{step}.network.gradient_checkpointing", True
    optimizers = ("policy_optimizer", "critic_optimizer") if step == "ppo" else ("optimizer",)
    for stage in (2, 3):
        for name in optimizers:
            if config.cluster.learner_ranks > 1 and getattr(section, name).zero_stage < stage:
                yield f"{step}.{name}.zero_stage", stage
    for name in optimizers:
        if not getattr(section, name).offload_optimizer:
            yield f"{step}.{name}.offload_optimizer", "cpu"
    if not section.network.lora_rank:
        yield f"{step}.network.lora_rank", 16


def changed(config: Config, values: Mapping[str, Any]) -> Config:
    """The configuration with other values at dotted keys."""
    found: BaseModel = config
    for key, value in values.items():
        found = _put(found, key.split("."), value)
    assert isinstance(found, Config)
    return found


def _put(section: BaseModel, path: list[str], value: Any) -> BaseModel:
    first, *rest = path
    inner = _put(getattr(section, first), rest, value) if rest else value
    return section.model_copy(update={first: inner})
