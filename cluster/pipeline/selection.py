"""Which epoch of an SFT model is the best: the one whose responses the reward model scores highest.

InstructGPT chooses its SFT models so (section 3.5, C.1): the held-out loss rises after the first epoch, while the score
and people's liking go on rising. The reward model is younger than the epochs, so they are kept until it is there.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from rich.table import Table

from actors.prompts import Prompt, fitting, read_prompts
from cluster.pipeline.stage import SAMPLING, SECTIONS, Stage

if TYPE_CHECKING:
    from actors.rollout import Scorer
    from actors.sampling import Fleet
    from cluster.fleet.pool import ProcessPool
    from reward_server.encoding import ChatEncoding


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What the reward model says of one epoch's weights."""

    epoch: int
    """from 1"""
    score: float
    """mean over the validation prompts, of one response each, truncated ones too"""
    score_ci: tuple[float, float]
    """95 % bootstrap interval of it over the prompts"""
    eos_rate: float
    """share of the responses that ended by themselves"""
    tokens: float
    """mean length of the responses"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Epochs:
    """What is compared, and on what."""

    folders: tuple[Path, ...]
    """of the kept epochs, in their order"""
    prompts: tuple[Prompt, ...]
    """validation prompts"""
    encoding: "ChatEncoding"
    """of the model"""


class Select(Stage):
    """Compares the epochs, writes RUN/selection-NAME.json, and makes the best of them RUN/NAME."""

    name = "select"
    purpose = "Choose the epoch of an SFT model whose responses the reward model scores highest."
    files = (
        "Reads RUN/baseline-epochs (or RUN/sft-epochs), RUN/reward and data.prompts_valid. Writes RUN/baseline "
        "(or RUN/sft) and RUN/selection-baseline.json."
    )
    example = "rayward select --run runs/mine --data.prompts_valid prompts.jsonl"
    sections = (*SECTIONS, "select", *SAMPLING, "scoring", "tracking")
    reads = ("models.reward", "data.prompts_valid")
    processes = ("generator", "reward")
    resumes = False

    def check(self) -> Epochs:
        """Find the epochs and read the prompts. Raises ValueError when there are none."""
        from reward_server.encoding import ChatEncoding

        job, name = self.job, self.job.config.select.model
        folder = job.run_dir / f"{name}-epochs"
        found = [path for path in folder.glob("*") if path.name.isdigit() and (path / "config.json").is_file()]
        if not found:
            raise ValueError(
                f"{folder} holds no epochs to choose among: run `rayward {name} --{name}.select reward` in this run "
                "directory first"
            )
        _ = job.reward_to_serve
        folders = sorted(found, key=lambda path: int(path.name))
        encoding = ChatEncoding.load(folders[0], job.config.models)
        fits = fitting(encoding, job.config.rollout.max_prompt_tokens)
        prompts = read_prompts(job.file("prompts_valid"), job.max_bad_rows, fits)
        return Epochs(folders=tuple(folders), prompts=tuple(prompts), encoding=encoding)

    async def run(self, processes: "ProcessPool", inputs: Epochs) -> None:
        job, name, prompts = self.job, self.job.config.select.model, inputs.prompts
        found: list[Candidate] = []
        with job.tracker.phase(f"select: {len(inputs.folders)} epochs on {len(prompts)} prompts", f"select-{name}"):
            for folder in inputs.folders:
                fleet, rewards = await processes.sampling(folder, job.reward_to_serve)
                one = await self._measure(fleet, rewards, inputs, int(folder.name))
                found.append(one)
                low, high = one.score_ci
                metrics = {"score": one.score, "score_low": low, "score_high": high, "eos_rate": one.eos_rate}
                job.tracker.log(f"select-{name}", one.epoch, {f"select/{key}": value for key, value in metrics.items()})
        chosen = max(found, key=lambda one: one.score)
        best = inputs.folders[found.index(chosen)]
        job.install(best, name)
        job.made(name, job.run_dir / name, best, job.file("prompts_valid"))
        rows = [asdict(one) for one in found]
        text = json.dumps({"model": name, "chosen": chosen.epoch, "prompts": len(prompts), "epochs": rows}, indent=2)
        job.write(job.run_dir / f"selection-{name}.json", text + "\n")
        job.summarise("select", name, epoch=chosen.epoch, score=chosen.score, score_ci=chosen.score_ci)
        job.tracker.console.show(_table(found, chosen))

    async def _measure(self, fleet: "Fleet", rewards: "Scorer", inputs: Epochs, epoch: int) -> Candidate:
        """One response a prompt at temperature 1, from the same seeds for every epoch."""
        import torch

        from actors.config import MissingEos
        from actors.sampling import sample
        from actors.scoring import score_groups
        from learner.maths.intervals import bootstrap_interval

        job, select = self.job, self.job.config.select
        rollout = job.config.rollout.model_copy(update={"temperature": 1.0})
        groups = await sample(fleet, inputs.prompts, inputs.encoding, rollout, samples=1, seed=select.seed)
        completions = [group[0] for group in groups]
        scored = await score_groups(rewards, inputs.prompts, groups, MissingEos(rule="none"))
        scores = torch.tensor(scored, dtype=torch.float64)[:, 0]
        return Candidate(
            epoch=epoch,
            score=fmean(scores.tolist()),
            score_ci=bootstrap_interval(scores, torch.ones(len(scores), dtype=torch.long), resamples=1000, seed=0),
            eos_rate=fmean(completion.ended for completion in completions),
            tokens=fmean(len(completion.response_ids) for completion in completions),
        )


def _table(found: Sequence[Candidate], chosen: Candidate) -> Table:
    table = Table("epoch", "score", "95% CI", "ended", "tokens", box=None, header_style="dim")
    for one in found:
        low, high = one.score_ci
        row = (
            f"{one.epoch}",
            f"{one.score:.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{one.eos_rate:.2f}",
            f"{one.tokens:.1f}",
        )
        table.add_row(*row, style="bold" if one is chosen else None)
    return table
