"""What a model's shape, the machines and the deadlines do not allow, each with the nearest that works."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from cluster.config.schema import Config
from cluster.plan.counts import PPOPlan, either, indivisible
from cluster.plan.hardware import Machine
from cluster.plan.memory import Models
from cluster.plan.remedies import SAMPLING, TRAINED, nearest_counts
from cluster.plan.roofline import Phase
from cluster.plan.shapes import Shape
from cluster.runtime.fitting import Placed
from cluster.runtime.resources import Plan, ResourceError, check


def shape_problems(config: Config, models: Models, steps: Sequence[str]) -> Iterator[str]:
    """What the shape of the model does not allow."""
    shape, rollout = models.policy, config.rollout
    if SAMPLING & set(steps):
        yield from _engine_problems(config, shape)
    turn = rollout.max_prompt_tokens + rollout.max_new_tokens
    scored = {"select", "ppo", "evaluate"} & set(steps) and config.scoring.uses_own_model
    if scored and turn > models.reward.positions and not config.scoring.truncate_prompt:
        yield (
            f"rollout.max_prompt_tokens + rollout.max_new_tokens = {turn:,} is more than the "
            f"{models.reward.positions:,} positions of the reward model {models.reward.name}. Nearest: "
            f"rollout.max_prompt_tokens = {max(1, models.reward.positions - rollout.max_new_tokens)}"
        )
    lengths = {f"{step}.max_tokens": getattr(config, step).max_tokens for step in ("sft", "baseline") if step in steps}
    text = config.ppo.pretraining
    if "ppo" in steps and text.coef:
        lengths["ppo.pretraining.sequence_tokens"] = text.sequence_tokens
    for key, tokens in lengths.items():
        if tokens > shape.positions:
            yield _too_long(key, tokens, shape)
    for step in TRAINED:
        network = getattr(config, step).network
        if step in steps and network.last_layers > shape.layers:
            yield (
                f"{step}.network.last_layers = {network.last_layers}, and {shape.name} has {shape.layers} layers. "
                f"Nearest: {shape.layers}, or 0 for all"
            )


def _engine_problems(config: Config, shape: Shape) -> Iterator[str]:
    generator, rollout = config.generator, config.rollout
    size, turn = generator.tensor_parallel_size, rollout.max_prompt_tokens + rollout.max_new_tokens
    key = "generator.tensor_parallel_size"
    if shape.heads % size:
        yield indivisible(key, size, shape.heads, f"attention heads of {shape.name}")
    elif not parallel(shape, size):
        sizes = [n for n in range(1, shape.heads + 1) if parallel(shape, n)]
        near = [*[n for n in sizes if n < size][-1:], *[n for n in sizes if n > size][:1]]
        yield (
            f"{key} = {size} cannot share the {shape.kv_heads} heads of keys and values of {shape.name}: one of the "
            f"numbers has to divide the other. Nearest: {key} = {either(near)}"
        )
    if turn > generator.max_model_len:
        most = min(turn, shape.positions)
        less = f", rollout.max_prompt_tokens = {most - rollout.max_new_tokens}" if most < turn else ""
        yield (
            f"rollout.max_prompt_tokens + rollout.max_new_tokens = {turn:,} is more than generator.max_model_len = "
            f"{generator.max_model_len:,}. Nearest: generator.max_model_len = {most}{less}"
        )
    if generator.max_model_len > shape.positions:
        yield _too_long("generator.max_model_len", generator.max_model_len, shape)


def parallel(shape: Shape, size: int) -> bool:
    """Whether vLLM can share the heads of a model over so many devices."""
    return shape.heads % size == 0 and (shape.kv_heads % size == 0 or size % shape.kv_heads == 0)


def _too_long(key: str, value: int, shape: Shape) -> str:
    return (
        f"{key} = {value:,} is more than the {shape.positions:,} positions of {shape.name}. Nearest: "
        f"{key} = {shape.positions}"
    )


def placement_problems(
    plan: Plan,
    placed: Placed[Machine],
    machines: Sequence[Machine],
    config: Config,
    works: Callable[[Config], bool] | None,
) -> Iterator[str]:
    """Threads, GPUs and bundles that are too many. `works`: whether another configuration has none of these.

    Without it, of `rayward serve`, whose copies may have more threads than there are cores: they only get slower.
    """
    found = list(placed.unplaced[:1])
    if len(placed.unplaced) > 1:
        found[0] += f". So it is with {len(placed.unplaced) - 1} more bundles"
    if not found and len(machines) == 1 and works:  # of GPUs both would say the same
        try:
            check(plan, cores=machines[0].cpus, gpus=machines[0].gpus)
        except ResourceError as error:
            found.append(str(error))
    found += shared_ranks(placed.devices)
    if found:
        nearest = nearest_counts(config, works) if works else None
        yield from found[:-1]
        yield f"{found[-1]}. Of these would do: {nearest}" if nearest else found[-1]


def shared_ranks(devices: Mapping[str, Sequence[str]]) -> list[str]:
    """What is wrong where learner ranks share a GPU, which NCCL does not allow."""
    ranks = {name: at for name, at in devices.items() if name.startswith("learner-")}
    count = Counter(gpu for at in ranks.values() for gpu in at)
    several = [gpu for gpu, number in count.items() if number > 1]
    if not several:
        return []
    names = ", ".join(name for name, at in ranks.items() if several[0] in at)
    return [f"{names} would share {several[0]}, and NCCL lets every rank of a group have a GPU of its own only"]


def shared_with_learner(devices: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Generators on the GPU of the rank that publishes, which NCCL takes into no group together."""
    sender = set(devices.get("learner-0", ()))
    names = [name for name, at in devices.items() if name.startswith("generator-") and sender & set(at)]
    if names:
        yield (
            f"learner-0 and {', '.join(names)} share {min(sender)}: weights are published through main memory (gloo), "
            "as NCCL takes no two members of a group on one GPU"
        )


def crowded(plan: Plan, cores: int) -> Iterator[str]:
    """Copies of `rayward serve` with more threads than there are cores."""
    threads = sum(process.threads for process in plan.processes)
    if threads > cores:
        yield (
            f"the copies have {threads} threads (serve.replicas or serve.max_replicas, times serve.threads) on {cores} "
            "cores: beyond the cores all of them run several times slower"
        )


def notes(config: Config, batches: object, phases: Sequence[Phase]) -> Iterator[str]:
    """What works, but not as somebody may think."""
    if not isinstance(batches, PPOPlan):
        return
    ranks, generators = config.cluster.learner_ranks, config.cluster.generators
    if batches.minibatch < ranks:
        yield f"a minibatch has {batches.minibatch} episodes for {ranks} learner ranks: the others idle"
    replicas, waves = config.cluster.reward_replicas, config.rollout.waves_in_flight
    if replicas > generators * waves:
        yield (
            f"cluster.reward_replicas = {replicas}, and {generators} generators with {waves} waves in flight ask "
            f"{generators * waves} at a time: the others idle"
        )
    share, each = config.rollout.prompts_per_wave, -(-batches.prompts // generators)
    if each < share:
        yield (
            f"{generators} generators take waves of {share} prompts, but a batch has {batches.prompts}: some idle. "
            f"rollout.prompts_per_wave = {each} gives each its part"
        )
    wanted = config.ppo.pretraining.sequences_per_episode * batches.minibatch
    if batches.pretraining_sequences and abs(wanted - batches.pretraining_sequences) > 1e-9:
        yield (
            f"ppo.pretraining.sequences_per_episode * ppo.minibatch_size = {wanted:g} is rounded to "
            f"{batches.pretraining_sequences} sequences a minibatch"
        )
    yield from _near_deadlines(config, batches, {phase.name: phase.expected for phase in phases})


def _near_deadlines(config: Config, batches: PPOPlan, seconds: Mapping[str, float]) -> Iterator[str]:
    """Waits that are expected to take more than half of what they may."""
    rollout = seconds.get("generate", 0.0)
    waits = {
        "rollout.wave_deadline_s": (rollout / max(1, batches.waves), "a wave"),
        "ppo.rollout_deadline_s": (rollout + seconds.get("score", 0.0), "a batch of responses"),
        "cluster.step_deadline_s": (max(seconds.get(f"update {n}", 0.0) for n in ("policy", "critic")), "an update"),
        "publish.deadline_s": (seconds.get("publish", 0.0), "a publication"),
    }
    for key, (expected, what) in waits.items():
        section, _, name = key.partition(".")
        limit = getattr(getattr(config, section), name)
        if expected > limit / 2:
            yield f"{what} is expected to take {expected:.0f} s, and {key} = {limit:g} ends the wait: raise it"
