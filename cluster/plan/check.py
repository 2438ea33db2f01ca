"""What sections, models, files and the machine must agree on: looked at before anything heavy starts, told all at once.

Nothing heavy is imported here. What needs a tokenizer or a whole file (prompts that are too long, a bad row) is found
right after it, by the steps themselves, and still before Ray starts.
"""

import math
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.config.load import settings
from cluster.config.schema import Config
from cluster.pipeline.stage import Stage, Trained
from cluster.plan.counts import indivisible_batch
from cluster.rundir.inputs import KINDS, Model, check_base, check_data, data_file, model_folder
from cluster.runtime.resources import ResourceError, machine_gpus, machine_memory, plan_run
from reward_server.bearer import bearer_token
from reward_server.functions import load_function

GIB = 2**30
_NUMBER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What is wrong with a configuration, and what is only odd."""

    problems: tuple[str, ...] = ()
    """a line each; the command must not start"""
    warnings: tuple[str, ...] = ()
    """a line each; it may"""


def check_config(config: Config, stage: type[Stage], run_dir: Path) -> Findings:
    """Everything that can be told of a command's configuration without loading a model or starting a process."""
    sections = stage.sections
    models: dict[str, Model] = {}
    problems = [*_bad_inputs(config, stage, run_dir, models)]
    problems += _not_finite(config, sections)
    problems += _bad_functions(config, sections)
    if "scoring" in sections:
        problems += _bad_token()
    if "ppo" in sections:
        problems += _indivisible(config)
    problems += _bad_optimizers(stage.trained(config))
    problems += _too_long(config, sections, models)
    if "cluster" in sections:
        problems += _too_large(config, stage, run_dir, models)
    return Findings(problems=tuple(dict.fromkeys(problems)), warnings=tuple(_odd(config, stage)))


def _bad_inputs(config: Config, stage: type[Stage], run_dir: Path, models: dict[str, Model]) -> Iterator[str]:
    """Models and files that are not there or are something else; the models that are right go into `models`.

    Those of other stages are looked at where they are configured, but for a stage that makes its own.
    """
    wanted = stage.models(config)
    if "base" in wanted:
        if config.models.base is None:
            yield "models.base is not set: name a Hugging Face folder or hub id, --models.base NAME"
        else:
            yield from _model(config, "base", Path(config.models.base), models)
    if "models" in stage.sections and not stage.variants:
        for name in ("sft", "init", "reward", "critic", "policy"):
            if name in wanted or getattr(config.models, name) is not None:
                try:
                    path = model_folder(config, run_dir, name)
                except ValueError as error:
                    yield str(error)
                else:
                    yield from _model(config, name, path, models)
    wanted = stage.data(config)
    for name in KINDS:
        if name in wanted:
            try:
                check_data(name, data_file(config, run_dir, name))
            except ValueError as error:
                yield str(error)


def _model(config: Config, name: str, path: Path, models: dict[str, Model]) -> Iterator[str]:
    model = Model(name=name, path=path)
    try:
        if name == "base":
            check_base(str(config.models.base))
        else:
            model.check()
        if (path / "config.json").is_file():
            _ = model.parameters, model.positions
            models[name] = model
    except ValueError as error:
        yield str(error)


def _not_finite(config: Config, sections: Iterable[str]) -> Iterator[str]:
    """NaN passes where no bound is set, and an infinite learning rate or deadline passes every lower bound."""
    for setting in settings(Config, config):
        value = setting.default  # of this very config
        if setting.key.split(".")[0] in sections and isinstance(value, float) and not math.isfinite(value):
            yield f"{setting.key} = {value} is not a finite number. It takes {setting.type}: {setting.doc}"


def _bad_functions(config: Config, sections: Iterable[str]) -> Iterator[str]:
    """The user's functions that cannot be imported here."""
    functions = {}
    if "scoring" in sections:
        functions |= {part.target: "scoring.parts" for part in config.scoring.parts if part.kind == "function"}
    if "labeler" in sections and not config.labeler.name.startswith("simulated:"):
        functions[config.labeler.name] = "labeler.name"
    for name, key in functions.items():
        try:
            load_function(name or "")
        except ValueError as error:
            yield f"{key}: {error}"


def _bad_token() -> Iterator[str]:
    try:
        bearer_token()
    except ValueError as error:
        yield str(error)


def _indivisible(config: Config) -> Iterator[str]:
    problem = indivisible_batch(
        config.ppo.prompts_per_batch, config.rollout.samples_per_prompt, config.ppo.minibatch_size
    )
    if problem:
        yield problem


def _bad_optimizers(trained: Trained) -> Iterator[str]:
    for key, (network, optimizer) in trained.items():
        if optimizer.zero_stage == 0 and network.dtype != "float32":
            section = key.split(".")[0]
            yield (
                f"{key}.zero_stage = 0 with {section}.network.dtype = {network.dtype}: stage 0 is for float32 only. "
                f"Set {key}.zero_stage to 1, or the dtype to float32"
            )


def _too_long(config: Config, sections: Iterable[str], models: dict[str, Model]) -> Iterator[str]:
    """Lengths that an engine or a model has no room for."""
    rollout = config.rollout
    longest = rollout.max_prompt_tokens + rollout.max_new_tokens
    sum_ = (
        f"rollout.max_prompt_tokens = {rollout.max_prompt_tokens} plus rollout.max_new_tokens = "
        f"{rollout.max_new_tokens} is {longest} tokens"
    )
    sampled = next((models[name] for name in ("policy", "init", "sft") if name in models), None)
    if "generator" in sections:
        room = config.generator.max_model_len
        if longest > room:
            yield f"{sum_}, and generator.max_model_len is {room}. Raise that to {longest}, or lower the others"
        if sampled and sampled.positions and room > sampled.positions:
            yield (
                f"generator.max_model_len = {room} is more than the {sampled.positions} positions of {sampled.path}. "
                f"Lower it to {sampled.positions} at most"
            )
    if "scoring" in sections:
        yield from _too_long_to_score(config, longest, sum_, models)
    lengths = {}
    for name in ("sft", "baseline"):
        if name in sections and "base" in models:
            lengths[f"{name}.max_tokens"] = (getattr(config, name).max_tokens, models["base"])
    if "ppo" in sections and "sft" in models:
        lengths["ppo.pretraining.sequence_tokens"] = (config.ppo.pretraining.sequence_tokens, models["sft"])
    for key, (tokens, model) in lengths.items():
        if model.positions and tokens > model.positions:
            yield (
                f"{key} = {tokens} is more than the {model.positions} positions of {model.path}. Lower it to "
                f"{model.positions} at most"
            )


def _too_long_to_score(config: Config, longest: int, sum_: str, models: dict[str, Model]) -> Iterator[str]:
    scoring, rollout, model = config.scoring, config.rollout, models.get("reward")
    if config.scoring.uses_own_model:
        limits = {"scoring.max_tokens": scoring.max_tokens, "the reward model's positions": model and model.positions}
        for what, limit in limits.items():
            if limit and longest > limit and not (scoring.truncate_prompt and rollout.max_new_tokens < limit):
                yield (
                    f"{sum_}, and {what}{' =' if '.' in what else ' are'} {limit}. Lower them, or set "
                    "scoring.truncate_prompt to cut long prompts from the left"
                )
    policy, critic = models.get("sft"), models.get("critic")
    if critic and policy:
        told = model and model.path == critic.path and not scoring.truncate_prompt
        if critic.positions and longest > critic.positions and not told:
            yield f"{sum_}, and the critic, which starts as {critic.path}, has {critic.positions} positions. Lower them"
        if critic.words and policy.words and not policy.words.items() <= critic.words.items():
            yield (
                f"the tokenizers of models.sft = {policy.path} and of {critic.path}, which the critic starts from, "
                "differ, and the critic reads the policy's tokens. Set models.critic to a folder with the policy's "
                f"tokenizer, such as {policy.path} (its value head starts afresh), or train a reward model from this "
                "SFT model (`rayward reward`)"
            )


def _too_large(config: Config, stage: type[Stage], run_dir: Path, models: dict[str, Model]) -> Iterator[str]:
    """What the machine has certainly no room for."""
    if config.cluster.address == "local":
        try:
            plan_run(config)
        except ResourceError as error:
            yield str(error)
    start = models.get("base", models.get("sft"))
    if start is None:
        return
    if names := stage.writes:
        network = next(iter(stage.trained(config).values()))[0]
        need = len(names) * start.parameters * _NUMBER_BYTES[network.dtype]
        there = next(folder for folder in (run_dir.resolve(), *run_dir.resolve().parents) if folder.exists())
        if need > (free := shutil.disk_usage(there).free):
            yield (
                f"{' and '.join(names)} take {need / GIB:.1f} GiB in {run_dir}, and that disk has {free / GIB:.1f} GiB "
                "free. Make room, or name a --run DIR on another disk"
            )
    if config.cluster.address == "local" and not machine_gpus():
        needs = _memory(config, stage, start.parameters)
        if (total := sum(needs.values())) > (has := machine_memory()):
            each = ", ".join(f"{name} {size / GIB:.1f}" for name, size in needs.items())
            yield (
                f"the processes need at least {total / GIB:.1f} GiB of memory at the same time ({each}), and this "
                f"machine has {has / GIB:.1f} GiB. Use fewer generators, LoRA (network.lora_rank), bfloat16, a smaller "
                "generator.kv_cache_gib or model, or a larger machine"
            )


def _memory(config: Config, stage: type[Stage], parameters: int) -> dict[str, int]:
    """Bytes that are held at the same time, without activations: less than what is needed."""
    by_section: dict[str, dict[str, int]] = {}
    for key, (network, _) in stage.trained(config).items():
        size = _NUMBER_BYTES[network.dtype]
        # Adam's two averages and the gradient, and float32 weights beside those of bfloat16
        trained = 0 if network.lora_rank or network.last_layers else 8 + size + (4 if size < 4 else 0)
        name = key.removesuffix("optimizer").rstrip("._")
        by_section.setdefault(key.split(".")[0], {})[name] = parameters * (size + trained)
    if "ppo" in by_section:
        by_section["ppo"]["reference"] = parameters * _NUMBER_BYTES[config.ppo.network.dtype]
    needs = max(by_section.values(), key=lambda one: sum(one.values()), default={})  # one after the other
    if "generator" in stage.sections:
        cache = int(config.generator.kv_cache_gib * GIB)
        count = max(config.cluster.generators, config.cluster.max_generators or 0)
        needs["generators"] = count * (parameters * _NUMBER_BYTES[config.generator.dtype] + cache)
    if "scoring" in stage.sections and config.scoring.uses_own_model:
        needs["reward service"] = parameters * _NUMBER_BYTES[config.scoring.dtype]
    return needs


def _odd(config: Config, stage: type[Stage]) -> Iterator[str]:
    """What is allowed and hardly meant."""
    if "ppo.policy_optimizer" not in stage.trained(config):
        return
    ppo, sampler, eos = config.ppo, config.generator.dtype, config.rollout.missing_eos
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
