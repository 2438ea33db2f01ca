"""Step 2, what people (or a simulated labeler) compare: completions are sampled, and ranked."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.prompts import Prompt, fitting, read_prompts
from actors.trajectory import Completion
from cluster.config.schema import Config
from cluster.pipeline.job import Job
from cluster.pipeline.stage import SAMPLING, SECTIONS, MadeOf, Stage
from reward_server.preferences.labeling import (
    Comparison,
    Labeler,
    label,
    load_labeler,
    read_comparisons,
    write_comparisons,
)

if TYPE_CHECKING:
    from cluster.fleet.fleet import Fleet
    from cluster.fleet.pool import ProcessPool


class Sample(Stage):
    """Samples K completions a prompt from the SFT policy; writes RUN/data/completions.jsonl."""

    name = "sample"
    purpose = "Step 2a: sample completions to be compared."
    files = "Reads RUN/sft (or models.sft) and data.preference_prompts. Writes RUN/data/completions.jsonl."
    example = "rayward sample --run runs/mine --data.preference_prompts prompts.jsonl"
    sections = (*SECTIONS, "sample", *SAMPLING, "tracking")
    reads = ("models.sft", "data.preference_prompts")
    processes = ("generator",)
    results = ("data/completions.jsonl",)

    def made_of(self) -> MadeOf:
        config, contents = self.job.config, {"models.sft": self.job.model("sft")}
        settings = {"sample": config.sample.model_dump(mode="json"), "rollout": sampling_settings(config)}
        return settings, contents | self.job.files("preference_prompts")

    def check(self) -> list[Prompt]:
        return preference_prompts(self.job, self.job.model("sft"))

    async def run(self, processes: "ProcessPool", inputs: Sequence[Prompt]) -> None:
        model, config = self.job.model("sft"), self.job.config.sample
        fleet = await generators(self.job, processes, model)
        groups = await sampled(self.job, fleet, inputs, model, config.completions_per_prompt, config.seed)
        write_completions(self.job, inputs, groups, model)


class Rank(Stage):
    """Has the configured labeler rank the completions; writes RUN/data/comparisons.jsonl."""

    name = "rank"
    purpose = "Step 2b: rank the completions with a labeler, by default a simulated one (VADER)."
    files = "Reads RUN/data/completions.jsonl (or data.completions). Writes RUN/data/comparisons.jsonl."
    example = "rayward rank --run runs/mine --labeler.name my_module:my_verdicts"
    sections = ("data", "labeler", "tracking")
    reads = ("data.completions",)
    results = ("data/comparisons.jsonl",)

    def made_of(self) -> MadeOf:
        return {"labeler": self.job.config.labeler.model_dump(mode="json")}, self.job.files("completions")

    def check(self) -> tuple[Labeler, list[Comparison]]:
        labeler = load_labeler(self.job.config.labeler)
        return labeler, read_comparisons(self.job.file("completions"), self.job.max_bad_rows)

    async def run(self, processes: Any, inputs: tuple[Labeler, list[Comparison]]) -> None:
        (labeler, completions), job = inputs, self.job
        path = job.run_dir / "data" / "comparisons.jsonl"
        with job.tracker.phase(f"rank {len(completions)} prompts' completions by the {labeler.caption}", "rank"):
            write_comparisons(path, label(completions, labeler))
        job.summarise(labeler=labeler.caption)
        job.made("comparisons", path, job.file("completions"))


def sampling_settings(config: Config) -> dict[str, Any]:
    """The settings of rollout that say what is sampled, rather than how it is carried out."""
    names = {"samples_per_prompt", "max_prompt_tokens", "max_new_tokens", "temperature", "missing_eos"}
    return config.rollout.model_dump(mode="json", include=names)


def preference_prompts(job: Job, model: Path) -> list[Prompt]:
    """The prompts whose completions are compared, which a model has room for. Raises ValueError."""
    from reward_server.encoding import ChatEncoding

    fits = fitting(ChatEncoding.load(model, job.config.models), job.config.rollout.max_prompt_tokens)
    return read_prompts(job.file("preference_prompts"), job.max_bad_rows, fits)


async def generators(job: Job, processes: "ProcessPool", model: Path) -> "Fleet":
    """The generators with the weights of `model`: started with them, or given them by the learner."""
    from cluster.pipeline.evaluate import read_evaluation_set
    from learner.weights.publish import Publisher

    fleet = await processes.generators(model)
    if processes.weights == model:
        return fleet
    config, learner = job.config, await processes.learner()
    with processes.announce(f"hand the weights of {model.parent.name}/{model.name} to the actors"):
        await learner.load("policy", "policy", model, config.ppo.network, config.ppo.policy_optimizer, frozen=True)
        await learner.open_sender(config.publish)
        workers, probes = config.generator.tensor_parallel_size, read_evaluation_set(job).probes()
        fleet.publisher = Publisher(learner, config.publish, probes, workers, job.monitor.waits)
        await fleet.publish(0)
        await learner.unload()
    processes.weights = model
    return fleet


async def sampled(
    job: Job, fleet: Any, prompts: Sequence[Prompt], model: Path, count: int, seed: int
) -> list[list[Completion]]:
    """`count` completions of each prompt by generators that have the weights of `model`."""
    from actors.sampling import sample
    from reward_server.encoding import ChatEncoding

    title = f"sample {count} completions of {len(prompts)} prompts"
    with job.tracker.phase(title, "sample"), job.tracker.console.progress("sample", len(prompts)) as advance:
        return await sample(
            fleet, prompts, ChatEncoding.load(model, job.config.models), job.config.rollout, count, seed, advance
        )


def write_completions(
    job: Job, prompts: Sequence[Prompt], groups: Sequence[Sequence[Completion]], *models: Path
) -> None:
    """Write RUN/data/completions.jsonl, to be ranked."""
    path = job.run_dir / "data" / "completions.jsonl"
    found = [
        Comparison(
            id=prompt.id,
            prompt=prompt.messages,
            responses=tuple(c.text.replace("\0", "\N{REPLACEMENT CHARACTER}") for c in group),  # no file takes a NUL
            ended=tuple(c.ended for c in group),
            ranks=None,
            labeler=None,
            use_case=prompt.use_case,
        )
        for prompt, group in zip(prompts, groups, strict=True)
    ]
    write_comparisons(path, found)
    job.made("completions", path, *models, job.file("preference_prompts"))
