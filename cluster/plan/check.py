"""What sections, models, files and the machine must agree on: looked at before anything heavy starts, told all at once.

Nothing heavy is imported here. What needs a tokenizer or a whole file (prompts that are too long, a bad row) is found
right after it, by the stages themselves, and still before Ray starts.
"""

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from cluster.config.load import settings
from cluster.config.schema import Config
from cluster.pipeline.stage import Stage
from cluster.plan.counts import indivisible_batch
from cluster.plan.memory import Bytes, generator_memory, network_memory, total, width
from cluster.rundir.inputs import KINDS, Model, check_base, check_data, data_file, model_folder
from cluster.runtime.resources import GIB, machine_gpus, machine_memory, plan_run, ray_obstacles
from learner.config import NetworkConfig, OptimizerConfig
from reward_server.bearer import bearer_token, token_of
from reward_server.functions import load_function


class Diagnostics(NamedTuple):
    """What is wrong with a configuration, and what is only odd: a line each."""

    problems: tuple[str, ...] = ()
    """the command must not start"""
    warnings: tuple[str, ...] = ()
    """it may"""


def check_config(config: Config, stage: type[Stage], run_dir: Path) -> Diagnostics:
    """Everything that can be told of a command's configuration without loading a model or starting a process."""
    sections, models = stage.sections, dict[str, Model]()
    problems = [*_bad_inputs(config, stage, run_dir, models)]
    for one in settings(Config, config):  # NaN passes where no bound is set, and infinity passes every lower bound
        if one.key.split(".")[0] in sections and isinstance(one.default, float) and not math.isfinite(one.default):
            problems.append(f"{one.key} = {one.default} is not a finite number: give one")
    problems += _unloadable(config, sections)
    if "ppo" in sections and (problem := indivisible_batch(config)):
        problems.append(problem)
    for key, (network, optimizer) in stage.trained(config).items():
        if optimizer.zero_stage == 0 and network.dtype != "float32":
            problems.append(
                f"{key}.zero_stage = 0 with {key.split('.')[0]}.network.dtype = {network.dtype}: stage 0 is for "
                f"float32 only. Set {key}.zero_stage to 1, or the dtype to float32"
            )
        problems += _unfusable(key, network, optimizer, config.cluster.address == "local" and not machine_gpus())
    limits = {key: (str(one.path), one.positions or 0) for key, one in models.items()}
    sampled = next((limits[name] for name in ("policy", "init", "sft") if name in limits), ("", 0))
    problems += too_long(config, sections, limits | {"policy": sampled})
    problems += _other_tokenizer(models)
    if "cluster" in sections:
        problems += _too_large(config, stage, run_dir, models)
    return Diagnostics(problems=tuple(dict.fromkeys(problems)), warnings=tuple(_odd(config, stage)))


def _unfusable(key: str, network: NetworkConfig, optimizer: OptimizerConfig, no_gpu: bool) -> Iterator[str]:
    """Why a network's norms and MLPs cannot be fused as it says."""
    section = key.split(".")[0]
    if network.compile and optimizer.zero_stage == 3:
        yield (
            f"{section}.network.compile does not go with {key}.zero_stage = 3, which gathers weights inside of what is "
            f"compiled. Set it to false, or {key}.zero_stage to 2"
        )
    if network.liger and not find_spec("liger_kernel"):
        yield (
            f"{section}.network.liger needs the package liger-kernel, which is not installed here. "
            "Remedy: pip install liger-kernel, or set it to false"
        )
    if network.liger and no_gpu:
        yield f"{section}.network.liger computes on GPUs alone, and this machine has none. Set it to false"


def _told(check: Callable[..., Any], *given: Any) -> Iterator[str]:
    """What a check says that raises ValueError."""
    try:
        check(*given)
    except ValueError as error:
        yield str(error)


def _bad_inputs(config: Config, stage: type[Stage], run_dir: Path, models: dict[str, Model]) -> Iterator[str]:
    """Models and files that are not there or are something else; the models that are right go into `models`.

    Those of other stages are looked at where they are configured, but for a stage that makes its own.
    """

    def look(name: str) -> None:
        if name == "base":
            if config.models.base is None:
                raise ValueError("models.base is not set: name a Hugging Face folder or hub id, --models.base NAME")
            model = Model(name=name, path=Path(config.models.base))
            check_base(config.models.base)
        else:
            model = Model(name=name, path=model_folder(config, run_dir, name))
            model.check()
        if (model.path / "config.json").is_file():
            _ = model.parameters, model.positions
            models[name] = model

    for name in stage.looked_at(config):
        yield from _told(look, name)
    for name in KINDS:
        if name in stage.data(config):
            yield from _told(lambda name: check_data(name, data_file(config, run_dir, name)), name)


def _unloadable(config: Config, sections: Sequence[str]) -> Iterator[str]:
    """The user's functions that cannot be imported here, and a token that cannot be used."""
    functions = {}
    if "scoring" in sections:
        functions = {part.target: "scoring.parts" for part in config.scoring.parts if part.kind == "function"}
        yield from _told(bearer_token)
        for part in config.scoring.parts:
            yield from _told(token_of, part.token_variable) if part.token_variable else ()
    if "labeler" in sections and not config.labeler.name.startswith("simulated:"):
        functions[config.labeler.name] = "labeler.name"
    for name, key in functions.items():
        yield from (f"{key}: {text}" for text in _told(load_function, name or ""))


def too_long(config: Config, sections: Sequence[str], models: Mapping[str, tuple[str, int]]) -> Iterator[str]:
    """Lengths that an engine or a model has no room for. `models`: (name, positions) of base, policy (what samples),
    reward and critic, as far as they are known; 0 positions are no limit.
    """
    rollout, scoring, room = config.rollout, config.scoring, config.generator.max_model_len
    turn = rollout.max_prompt_tokens + rollout.max_new_tokens
    told = (
        f"rollout.max_prompt_tokens = {rollout.max_prompt_tokens} plus rollout.max_new_tokens = "
        f"{rollout.max_new_tokens} is {turn} tokens"
    )
    single = {f"{name}.max_tokens": "base" for name in ("sft", "baseline") if name in sections}
    if "ppo" in sections:
        single["ppo.pretraining.sequence_tokens"] = "policy"
    if "generator" in sections:
        if turn > room:
            yield f"{told}, and generator.max_model_len is {room}. Nearest: generator.max_model_len = {turn}"
        single["generator.max_model_len"] = "policy"
    for key, which in single.items():
        name, positions = models.get(which, ("", 0))
        tokens: Any = reduce(getattr, key.split("."), config)
        if positions and tokens > positions:
            yield f"{key} = {tokens} is more than the {positions} positions of {name}. Nearest: {key} = {positions}"
    (name, positions), cut = models.get("reward", ("", 0)), scoring.truncate_prompt
    own = "scoring" in sections and scoring.uses_own_model and "generator" in sections
    limits = {"scoring.max_tokens": scoring.max_tokens, f"the positions of the reward model {name}": positions}
    for what, limit in limits.items():
        if own and limit and turn > limit and not (cut and rollout.max_new_tokens < limit):
            yield f"{told}, and {what} = {limit}. Lower them, or set scoring.truncate_prompt to cut from the left"
    reference, positions = models.get("sft", ("", 0))
    if "evaluation" in sections and positions and turn > positions:
        yield f"{told}, and the reference model {reference} has {positions} positions. Lower them"
    critic, positions = models.get("critic", ("", 0))
    if {"scoring", "ppo"} <= {*sections} and positions and turn > positions and (critic != name or cut or not own):
        yield f"{told}, and the critic, which starts as {critic}, has {positions} positions. Lower them"


def _other_tokenizer(models: Mapping[str, Model]) -> Iterator[str]:
    policy, critic = models.get("sft"), models.get("critic")
    if critic and policy and critic.words and policy.words and not policy.words.items() <= critic.words.items():
        yield (
            f"the tokenizers of models.sft = {policy.path} and of {critic.path}, which the critic starts from, differ. "
            f"Set models.critic to a folder with the policy's tokenizer, such as {policy.path} (its value head starts "
            "afresh), or train a reward model from this SFT model (`rayward reward`)"
        )


def _too_large(config: Config, stage: type[Stage], run_dir: Path, models: Mapping[str, Model]) -> Iterator[str]:
    """What the machine has certainly no room for."""
    local = config.cluster.address == "local"
    if local:
        yield from _told(plan_run, config)
        yield from (f"{what}. Remedy: {remedy}" for what, remedy in ray_obstacles())
    start = models.get("base", models.get("sft"))
    if start is None:
        return
    if writes := [name for name in stage.writes if name != "policy_best" or config.evaluation.keep_best]:
        network, _ = next(iter(stage.trained(config).values()))
        need = len(writes) * start.parameters * width(network.dtype)
        there = next(folder for folder in (run_dir.resolve(), *run_dir.resolve().parents) if folder.exists())
        if need > (free := shutil.disk_usage(there).free):
            yield (
                f"{' and '.join(writes)} take {need / GIB:.1f} GiB in {run_dir}, and that disk has "
                f"{free / GIB:.1f} GiB free. Make room, or name a --run DIR on another disk"
            )
    needs = _least_memory(config, stage, start.parameters)
    if local and not machine_gpus() and (least := sum(needs.values())) > (has := machine_memory()):
        each = ", ".join(f"{name} {size / GIB:.1f}" for name, size in needs.items())
        yield (
            f"the processes need at least {least / GIB:.1f} GiB of memory at the same time ({each}), and this machine "
            f"has {has / GIB:.1f}. Use fewer generators, LoRA (network.lora_rank), or a smaller generator.kv_cache_gib"
        )


def _least_memory(config: Config, stage: type[Stage], parameters: int) -> dict[str, float]:
    """Bytes that are held at the same time, without activations: less than what is needed."""
    sections: dict[str, dict[str, float]] = {}
    for key, (network, optimizer) in stage.trained(config).items():
        trained = 0 if network.lora_rank or network.last_layers else parameters
        held = total(network_memory(parameters, trained, width(network.dtype), optimizer, ranks=1))
        needs = sections.setdefault(key.split(".")[0], {})
        needs[key.removesuffix("optimizer").rstrip("._")] = held.device + held.host
    if "ppo" in sections:
        sections["ppo"]["reference"] = parameters * width(config.ppo.network.dtype)
    needs = max(sections.values(), key=lambda one: sum(one.values()), default={})  # one after the other
    if "generator" in stage.sections:
        engine = total(generator_memory(config, parameters) | {"process": Bytes()})
        needs["generators"] = max(config.cluster.generators, config.cluster.max_generators or 0) * engine.device
    if "scoring" in stage.sections and config.scoring.uses_own_model:
        needs["reward service"] = parameters * width(config.scoring.dtype)
    return needs


def _odd(config: Config, stage: type[Stage]) -> Iterator[str]:
    """What is allowed and hardly meant."""
    ppo, sampler, eos = config.ppo, config.generator.dtype, config.rollout.missing_eos
    if "ppo.policy_optimizer" not in stage.trained(config):
        return
    if sampler != ppo.network.dtype:
        yield (
            f"generator.dtype = {sampler} and ppo.network.dtype = {ppo.network.dtype} differ, so the log-probs of "
            "sampler and learner do too: take the same for both"
        )
    if eos.rule == "replace" and eos.value > 0:
        yield (
            f"rollout.missing_eos.value = {eos.value:g} is the score of every cut-off response, and it is above 0, the "
            "average of demonstrations: the policy will learn not to end"
        )
    if ppo.warmup_iterations >= ppo.iterations:
        yield (
            f"ppo.warmup_iterations = {ppo.warmup_iterations} of ppo.iterations = {ppo.iterations}: the learning rate "
            "never reaches ppo.policy_optimizer.lr"
        )
