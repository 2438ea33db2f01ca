"""Iterated rounds: completions of the current policy are ranked, a reward model and a policy trained, and again.

The paper (section 3.1): "Steps 2 and 3 can be iterated continuously; more comparison data is collected on the current
best policy, which is used to train a new RM and then a new policy." A round is a run of its own in RUN/round-<k>, made
of the same stages; one whose result is recorded in the lineage, and there as it was made, is not repeated.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.prompts import Prompt, Shuffle
from cluster.config.load import save_toml
from cluster.config.schema import Config, DataConfig
from cluster.pipeline.evaluate import round_figures
from cluster.pipeline.job import Job
from cluster.pipeline.labeling.commands import refuse
from cluster.pipeline.labeling.items import other_items
from cluster.pipeline.labeling.page import RankOnPage, check_page
from cluster.pipeline.labeling.sheets import RankByPeople
from cluster.pipeline.ppo import PPO
from cluster.pipeline.preferences import Rank, Sample, generators, preference_prompts, sampled, write_completions
from cluster.pipeline.reward_model import RewardModel
from cluster.pipeline.stage import SAMPLING, SECTIONS, MadeOf, Stage, Trained, advance
from cluster.runtime.resources import KINDS
from reward_server.preferences.labeling import read_comparisons, write_comparisons
from reward_server.preferences.records import json_lines
from reward_server.preferences.sheets import write_sheet

if TYPE_CHECKING:
    from cluster.fleet.pool import ProcessPool

log = logging.getLogger(__name__)


class Rounds(Stage):
    """The rounds of one run directory."""

    name = "rounds"
    purpose = "Steps 2 and 3 in rounds: the policy's completions are ranked, a reward model and a policy trained."
    files = (
        "Reads RUN/sft, data.preference_prompts and what reward and ppo read. Writes RUN/round-1 and on; stops "
        "for people to rank RUN/round-<k>/sheet.csv, and goes on from RUN/round-<k>/rankings when given again. With "
        "rounds.labelers = page it serves the page, and goes on by itself when all is ranked."
    )
    example = "rayward rounds --run runs/mine --rounds.count 3 --rounds.labelers people"
    sections = (
        *(*SECTIONS, "rounds", "sample", "labeler", "label", "reward", "ppo", *SAMPLING),
        *("scoring", "publish", "evaluation", "benchmarks", "tracking"),
    )
    reads = ("models.sft",)
    processes = KINDS
    resumes = False
    parts = ("sample", "reward", "ppo")

    @classmethod
    def trained(cls, config: Config) -> Trained:
        return {**RewardModel.trained(config), **PPO.trained(config)}

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The preference prompts of all rounds; every other file is read and checked too. Raises ValueError."""
        job, config = self.job, self.job.config
        count, own = config.sample.completions_per_prompt, config.rounds.sft_completions
        if own >= count:
            raise ValueError(
                f"rounds.sft_completions = {own} leaves none of the {count} completions of a prompt to the policy: "
                "lower it, or raise sample.completions_per_prompt"
            )
        if config.rounds.labelers == "page" and not self._ranked:
            check_page(job)
            _ = other_items(job)
        prompts = preference_prompts(job, job.model("sft"))
        if config.rounds.count * config.rounds.prompts > len(prompts):
            log.warning(
                "data.preference_prompts has %d prompts for %d rounds of %d: some are compared in more than one round",
                *(len(prompts), config.rounds.count, config.rounds.prompts),
            )
        _ = self.ppo.inputs
        return prompts

    @classmethod
    def aside(cls, config: Config, run_dir: Path) -> bool:
        refuse(config)
        return super().aside(config, run_dir)

    @property
    def _ranked(self) -> bool:
        """Whether the last round's comparisons are there, after which nobody is asked."""
        return (self.job.run_dir / f"round-{self.job.config.rounds.count}" / Rank.results[0]).is_file()

    @cached_property
    def ppo(self) -> PPO:
        """Step 3 as far as no round differs from another: what is held out."""
        return PPO(self.job)

    def check(self) -> list[Prompt]:
        return self.prompts

    def pending(self) -> bool:
        """Whether there is work before people have to rank a sheet. What they have ranked is checked."""
        _ = self.prompts
        for number, job in self._rounds():
            sample, rank, *training = self.stages(number, job)
            if not sample.complete:
                return True
            if self._waits(number, rank):
                return False
            if not all(stage.complete for stage in (rank, *training)):
                return True
            self._summarise(number)
        return False

    async def run(self, processes: "ProcessPool", inputs: list[Prompt]) -> None:
        """Do every stage that is not done yet, until people have to rank a sheet first."""
        if self.job.config.rounds.labelers == "simulated":  # people stop the command before the learner is needed
            processes.prefetch()
        processes.announce = self.job.tracker.console.phase  # a round's time is recorded as a whole
        for number, job in self._rounds():
            save_toml(job.config, job.run_dir / "config.toml")
            with self.job.tracker.phase(f"round {number}", "rounds"):
                for stage in self.stages(number, job):
                    if stage.name == "rank" and self._waits(number, stage):
                        return
                    if not stage.complete:
                        await advance(stage, processes)
            self._summarise(number)

    def conclude(self) -> None:
        from cluster.report.report import show_report

        stages = [stage for number, job in self._rounds() for stage in self.stages(number, job)]
        if all(stage.complete for stage in stages):
            show_report(self.job.run_dir, self.job.tracker.console)

    def stages(self, number: int, job: Job) -> list[Stage]:
        """Those of a round."""
        rank = {"simulated": Rank, "people": RankByPeople, "page": RankOnPage}[job.config.rounds.labelers]
        return [SampleOfRound(job, self, number), rank(job), RewardModelOfRound(job), PPO(job)]

    def _rounds(self) -> Iterator[tuple[int, Job]]:
        """Each round as a run of its own: RUN/round-<number>."""
        job = self.job
        for number in range(1, job.config.rounds.count + 1):
            name = f"round-{number}"
            (job.run_dir / name / "data").mkdir(parents=True, exist_ok=True)
            yield (
                number,
                replace(
                    job,
                    config=self._config(number),
                    run_dir=job.run_dir / name,
                    tracker=job.tracker.part(name),
                    root=job.run_dir,
                    start="resume",
                ),
            )

    def _config(self, number: int) -> Config:
        """That of the run; the run's own files and models are named, as they are not in the round's directory."""
        config, run_dir = self.job.config, self.job.run_dir
        own = {name: run_dir / "data" / f"{name}.jsonl" for name in DataConfig.model_fields}
        given = {name: path for name, path in own.items() if getattr(config.data, name) is None and path.is_file()}
        collected: dict[str, Path | None] = {"preference_prompts": None, "completions": None, "comparisons": None}
        if config.rounds.comparisons == "all" and number > 1:
            collected["comparisons"] = run_dir / f"round-{number}" / "data" / "all_comparisons.jsonl"
        models: dict[str, Path | None] = {"sft": self.job.model("sft"), "reward": None, "policy": None}
        if config.rounds.start == "policy" and number > 1:
            models["init"] = self.policy(number - 1)
        return config.model_copy(
            update={
                "data": config.data.model_copy(update=given | collected),
                "models": config.models.model_copy(update=models),
            }
        )

    def policy(self, number: int) -> Path:
        """The current policy after a round: the SFT model before the first."""
        return self.job.run_dir / f"round-{number}" / "policy" if number else self.job.model("sft")

    def _waits(self, number: int, rank: Stage) -> bool:
        """Whether people have to rank the round's sheet first, which is then there, and said."""
        job = rank.job
        if rank.complete:
            return False
        if not (job.run_dir / "sheet.csv").is_file():  # never over one that somebody may be filling in
            comparisons = read_comparisons(job.file("completions"))
            for sheet in write_sheet(job.run_dir, comparisons, job.config.rounds.seed):
                job.made("sheet", sheet, job.file("completions"))
        if not isinstance(rank, RankByPeople):
            return False
        if rank.sheets:
            rank.check()
            return False
        comparisons = read_comparisons(job.file("completions"))
        completions = sum(len(one.responses) for one in comparisons)
        self.job.tracker.console.line(
            f"Round {number} waits for people: rank the {completions} completions of {len(comparisons)} prompts in "
            f"{job.run_dir / 'sheet.csv'} (or sheet.jsonl): 1 is best, equal numbers are a tie. Save each "
            f"labeler's sheet as {rank.folder / 'NAME.csv'} (or .jsonl), then give the same command again."
        )
        return True

    def _summarise(self, number: int) -> None:
        """The round's figures in RUN/summary.json, from its files, so that a kill costs none of them."""
        self.job.summarise("rounds", str(number), **round_figures(self.job, number))


class SampleOfRound(Sample):
    """Completions of the round's prompts by the current policy, and some by the SFT model where asked for."""

    def __init__(self, job: Job, rounds: Rounds, number: int) -> None:
        super().__init__(job)
        self.rounds, self.number = rounds, number

    def made_of(self) -> MadeOf:
        settings, contents = super().made_of()
        rounds = self.job.config.rounds.model_dump(mode="json", include={"prompts", "sft_completions", "seed"})
        return {**settings, "rounds": rounds}, {**contents, "models.policy": self.rounds.policy(self.number - 1)}

    def check(self) -> list[Prompt]:
        """Write the round's prompts, which are among those that were checked."""
        config, job = self.job.config, self.job
        chosen = round_prompts(self.rounds.prompts, self.number, config.rounds.prompts, config.rounds.seed)
        rows = (
            {"id": f"r{self.number}-{row:04d}", "prompt": _turns(prompt), "source": prompt.id}
            | ({"use_case": prompt.use_case} if prompt.use_case else {})
            for row, prompt in enumerate(chosen, start=1)
        )
        file = job.run_dir / "data" / "preference_prompts.jsonl"
        job.write(file, json_lines(rows))
        job.made("data", file, self.rounds.job.file("preference_prompts"))
        return super().check()

    async def run(self, processes: "ProcessPool", inputs: Sequence[Prompt]) -> None:
        job, config, rounds = self.job, self.job.config, self.rounds
        policy, sft = rounds.policy(self.number - 1), job.model("sft")
        by_sft = config.rounds.sft_completions if self.number > 1 else 0
        count, seed = config.sample.completions_per_prompt - by_sft, config.sample.seed
        groups = await sampled(job, await generators(self.job, processes, policy), inputs, policy, count, seed)
        if by_sft:
            others = await sampled(job, await generators(self.job, processes, sft), inputs, sft, by_sft, seed + 1)
            groups = [[*group, *other] for group, other in zip(groups, others, strict=True)]
        write_completions(job, inputs, groups, policy, *[sft] * bool(by_sft))


class RewardModelOfRound(RewardModel):
    """Trained on the comparisons of all rounds so far, or on those of the round alone."""

    def check(self) -> Any:
        path, run_dir = self.job.config.data.comparisons, self.job.run_dir.parent
        if path is not None:
            number = int(self.job.run_dir.name.removeprefix("round-"))
            earlier = [run_dir / f"round-{k}" / "data" / "comparisons.jsonl" for k in range(1, number + 1)]
            write_comparisons(path, (one for file in earlier for one in read_comparisons(file)))
            self.job.made("comparisons", path, *earlier)
        return super().check()


def round_prompts(prompts: list[Prompt], number: int, count: int, seed: int) -> list[Prompt]:
    """The prompts of round `number`, from 1: a pure function of the arguments, in which no prompt is twice.

    Rounds take turns through one shuffle after another, so they have no prompt in common while there are enough.
    """
    size = min(count, len(prompts))
    order, chosen = Shuffle(size=len(prompts), seed=seed), dict[int, None]()
    place = (number - 1) * size
    while len(chosen) < size:
        chosen[order[place][0]] = None
        place += 1
    return [prompts[index] for index in chosen]


def _turns(prompt: Prompt) -> list[dict[str, Any]]:
    return [message.model_dump() for message in prompt.messages]
