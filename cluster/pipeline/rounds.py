"""Iterated rounds: completions of the current policy are ranked, a reward model and a policy trained, and again.

The paper (section 3.1): "Steps 2 and 3 can be iterated continuously; more comparison data is collected on the current
best policy, which is used to train a new RM and then a new policy." A round is a run of its own in RUN/round-<k>; a
step of it whose result is recorded in the lineage, and there as it was made, is not repeated.
"""

import json
import logging
from pathlib import Path
from typing import Any, Literal

import torch

from actors.prompts import Prompt, Shuffle, check_prompts, read_prompts
from cluster.config.load import save_toml
from cluster.config.schema import Config, DataConfig
from cluster.pipeline.job import Job, run_rank, run_reward, sampled, write_completions
from cluster.pipeline.ppo import Alignment
from cluster.pipeline.win_rates import round_figures
from cluster.pipeline.workplace import Workplace
from cluster.rundir.lineage import done
from learner.maths.intervals import bootstrap_interval
from reward_server.encoding import ChatEncoding
from reward_server.preferences.labeling import Comparison, read_comparisons, write_comparisons
from reward_server.preferences.records import RecordError
from reward_server.preferences.sheets import Rankings, agreement_credit, merge_rankings, read_rankings, write_sheet

_SHOWN = 20  # comparisons without ranks that are listed
_TRAINED = ("reward", "policy", "policy_ema", "evaluations/ppo.jsonl")
log = logging.getLogger(__name__)


class Rounds:
    """The rounds of one run directory."""

    def __init__(self, job: Job) -> None:
        """Read and check every file, before anything heavy starts. Raises ValueError."""
        self.job, self.sft, config = job, job.model("sft"), job.config
        count, own = config.sample.completions_per_prompt, config.rounds.sft_completions
        if own >= count:
            raise ValueError(
                f"rounds.sft_completions = {own} leaves none of the {count} completions of a prompt to the policy: "
                "lower it, or raise sample.completions_per_prompt"
            )
        self.prompts = read_prompts(job.file("preference_prompts"), config.data.max_bad_rows)
        check_prompts(self.prompts, ChatEncoding.load(self.sft), config.rollout.max_prompt_tokens)
        if config.rounds.count * config.rounds.prompts > len(self.prompts):
            log.warning(
                "data.preference_prompts has %d prompts for %d rounds of %d: some are compared in more than one round",
                *(len(self.prompts), config.rounds.count, config.rounds.prompts),
            )
        Alignment(job)

    def state(self) -> Literal["work", "wait", "done"]:
        """Take the rankings of people that are in; then whether there is work, or people have to rank a sheet first."""
        for number in range(1, self.job.config.rounds.count + 1):
            part = self.part(number)
            if not self._is_done(part, "data/completions.jsonl"):
                return "work"
            if not self._ranked(part, number):
                return "wait"
            if not self._is_done(part, *_TRAINED):
                return "work"
            self._summarise(number)
        return "done"

    async def run(self, place: Workplace) -> bool:
        """Do every step that is not done yet; False when people have to rank a sheet first."""
        for number in range(1, self.job.config.rounds.count + 1):
            part = self.part(number)
            save_toml(part.config, part.run_dir / "config.toml")
            with self.job.tracker.phase(f"round {number}", "rounds"):
                if not self._is_done(part, "data/completions.jsonl"):
                    await self._sample(part, number, place)
                if not self._ranked(part, number):
                    return False
                if not self._is_done(part, "reward"):
                    self._gather(part, number)
                    await run_reward(part, await place.learner(), self.sft)
                if not self._is_done(part, *_TRAINED):
                    await self._align(part, place)
            self._summarise(number)
        return True

    def _summarise(self, number: int) -> None:
        """The round's figures in RUN/summary.json, from its files, so that a kill costs none of them."""
        self.job.summarise("rounds", str(number), **round_figures(self.job, number))

    def part(self, number: int) -> Job:
        """A round as a run of its own: RUN/round-<number>."""
        job, name = self.job, f"round-{number}"
        (job.run_dir / name / "data").mkdir(parents=True, exist_ok=True)
        config = self._config(number)
        return Job(
            config=config,
            run_dir=job.run_dir / name,
            tracker=job.tracker.part(name),
            monitor=job.monitor,
            command=job.command,
            root=job.run_dir,
        )

    def _config(self, number: int) -> Config:
        """That of the run; the run's own files and models are named, as they are not in the round's directory."""
        config, run_dir = self.job.config, self.job.run_dir
        own = {name: run_dir / "data" / f"{name}.jsonl" for name in DataConfig.model_fields}
        given = {name: path for name, path in own.items() if getattr(config.data, name) is None and path.is_file()}
        collected: dict[str, Path | None] = {"preference_prompts": None, "completions": None, "comparisons": None}
        if config.rounds.comparisons == "all" and number > 1:
            collected["comparisons"] = run_dir / f"round-{number}" / "data" / "all_comparisons.jsonl"
        models: dict[str, Path | None] = {"sft": self.sft, "reward": None, "policy": None}
        if config.rounds.start == "policy" and number > 1:
            models["init"] = self._policy(number - 1)
        return config.model_copy(
            update={
                "data": config.data.model_copy(update=given | collected),
                "models": config.models.model_copy(update=models),
            }
        )

    def _policy(self, number: int) -> Path:
        """The current policy after a round: the SFT model before the first."""
        return self.job.run_dir / f"round-{number}" / "policy" if number else self.sft

    def _is_done(self, part: Job, *names: str) -> bool:
        return all(done(self.job.run_dir, part.run_dir / name) for name in names)

    async def _sample(self, part: Job, number: int, place: Workplace) -> None:
        """Completions of the round's prompts by the current policy, and some by the SFT model where asked for."""
        config, policy = part.config, self._policy(number - 1)
        chosen = round_prompts(self.prompts, number, config.rounds.prompts, config.rounds.seed)
        rows = (
            {"id": f"r{number}-{row:04d}", "prompt": _turns(prompt), "source": prompt.id}
            for row, prompt in enumerate(chosen, start=1)
        )
        file = part.run_dir / "data" / "preference_prompts.jsonl"
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        part.made("data", file, self.job.file("preference_prompts"))
        by_sft = config.rounds.sft_completions if number > 1 else 0
        count, seed = config.sample.completions_per_prompt - by_sft, config.sample.seed
        prompts, groups = await sampled(part, await (await place.fleet(policy)).wait_serving(), policy, count, seed)
        if by_sft:
            _, others = await sampled(
                part, await (await place.fleet(self.sft)).wait_serving(), self.sft, by_sft, seed + 1
            )
            groups = [[*group, *other] for group, other in zip(groups, others, strict=True)]
        write_completions(part, prompts, groups, policy, *[self.sft] * bool(by_sft))

    def _ranked(self, part: Job, number: int) -> bool:
        """Have the round's completions ranked, unless they are; False when people have not done so yet."""
        if self._is_done(part, "data/comparisons.jsonl"):
            return True
        comparisons = read_comparisons(part.file("completions"))
        if not (part.run_dir / "sheet.csv").is_file():  # never over one that somebody may be filling in
            for sheet in write_sheet(part.run_dir, comparisons, part.config.rounds.seed):
                part.made("sheet", sheet, part.file("completions"))
        if part.config.rounds.labelers == "simulated":
            run_rank(part)
            return True
        folder = part.run_dir / "rankings"
        folder.mkdir(exist_ok=True)
        files = sorted(file for file in folder.iterdir() if file.suffix in (".csv", ".jsonl"))
        if not files:
            completions = sum(len(one.responses) for one in comparisons)
            self.job.tracker.console.line(
                f"Round {number} waits for people: rank the {completions} completions of {len(comparisons)} prompts in "
                f"{part.run_dir / 'sheet.csv'} (or sheet.jsonl): 1 is best, equal numbers are a tie. Save each "
                f"labeler's sheet as {folder / 'NAME.csv'} (or .jsonl), then give the same command again."
            )
            return False
        self._take(part, comparisons, files)
        return True

    def _take(self, part: Job, comparisons: list[Comparison], files: list[Path]) -> None:
        """Write RUN/round-<k>/data/comparisons.jsonl of the sheets that people filled in. Raises ValueError."""
        rankings = _read_all(files, comparisons, part.config.rounds.seed)
        merged = merge_rankings(comparisons, rankings)
        ranked = {one.id for one in merged}
        missing = [one.id for one in comparisons if one.id not in ranked]
        told = [note for one in rankings for note in one.partial]
        allowed = part.config.rounds.max_unranked
        if len(missing) > allowed or not merged:
            names = ", ".join(missing[:_SHOWN]) + (", .." if len(missing) > _SHOWN else "")
            told.append(
                f"{len(missing)} of {len(comparisons)} comparisons are not ranked whole in {files[0].parent}: {names}. "
                f"Rank them, or let rounds.max_unranked, now {allowed}, be that many"
            )
            raise ValueError("\n".join(told[-_SHOWN:]))
        for note in told:
            log.warning("%s", note)
        if missing:
            log.warning("%d comparisons of %s are not ranked whole and are left out", len(missing), part.run_dir)
        path = part.run_dir / "data" / "comparisons.jsonl"
        write_comparisons(path, merged)
        part.summarise(rankings=f"people ({', '.join(one.labeler for one in rankings)})", **agreement_figures(rankings))
        part.made("comparisons", path, part.file("completions"), *files)

    def _gather(self, part: Job, number: int) -> None:
        """All comparisons so far, where the reward model is trained on them all."""
        path = part.config.data.comparisons
        if path is None:
            return
        earlier = [self.job.run_dir / f"round-{k}" / "data" / "comparisons.jsonl" for k in range(1, number + 1)]
        write_comparisons(path, (one for file in earlier for one in read_comparisons(file)))
        part.made("comparisons", path, *earlier)

    async def _align(self, part: Job, place: Workplace) -> None:
        alignment = Alignment(part)
        learner, fleet = await place.learner(), await place.fleet(part.model("init"), exactly=False)
        async with place.processes.reward(part.config.scoring, part.reward_to_serve()) as rewards:
            await alignment.connect(learner, fleet, rewards).run(part.config.ppo)
        place.weights = part.run_dir / "policy"


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


def agreement_figures(rankings: list[Rankings]) -> dict[str, Any]:
    """How often two labelers agree on a pair, with a bootstrap interval over prompts; none without two labelers."""
    credit = agreement_credit(rankings)
    if not credit:
        return {}
    agreed, pairs = torch.tensor([one for one, _ in credit]), torch.tensor([count for _, count in credit])
    interval = bootstrap_interval(agreed, pairs, resamples=1000, seed=0)
    rate = float(agreed.sum() / pairs.sum())
    return {"labelers_agree": rate, "labelers_agree_ci": list(interval), "labelers_agree_pairs": int(pairs.sum())}


def _read_all(files: list[Path], comparisons: list[Comparison], seed: int) -> list[Rankings]:
    """Every file's rankings. Raises RecordError with the mistakes of all files."""
    found, wrong = [], []
    for file in files:
        try:
            found.append(read_rankings(file, comparisons, seed))
        except RecordError as error:
            wrong.append(str(error))
    if wrong:
        raise RecordError("\n".join(wrong))
    return found


def _turns(prompt: Prompt) -> list[dict[str, Any]]:
    return [message.model_dump() for message in prompt.messages]
