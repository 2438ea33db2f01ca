"""Step 2, the reward model: a scalar head learns the rankings."""

import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config.schema import Config
from cluster.pipeline.stage import SECTIONS, MadeOf, Stage, Trained
from reward_server.preferences.records import read_all

if TYPE_CHECKING:
    from cluster.fleet.pool import ProcessPool
    from learner.maths.accuracy import RewardAccuracy
    from learner.worker.group import LearnerGroup

log = logging.getLogger(__name__)
_SUMMARISED = (
    *("accuracy", "accuracy_ci", "prompt_accuracy", "prompt_accuracy_ci"),
    *("score_std", "longer_wins", "pairs", "log_loss", "by_labeler", "control"),
)
_SHOWN = 8  # labelers that have a line each


class RewardModel(Stage):
    """Trains a reward model from the SFT model on the ranked completions; writes RUN/reward."""

    name = "reward"
    purpose = "Step 2c: train a reward model on ranked completions."
    files = "Reads RUN/sft, RUN/data/comparisons.jsonl and data.demonstrations. Writes RUN/reward."
    example = "rayward reward --run runs/mine --data.comparisons comparisons.jsonl"
    sections = (*SECTIONS, "reward", "tracking")
    reads = ("models.sft", "data.comparisons", "data.demonstrations")
    processes = ("learner",)
    writes = ("reward",)
    results = ("reward",)

    @classmethod
    def models(cls, config: Config) -> tuple[str, ...]:
        return () if config.reward.normalise else super().models(config)

    @classmethod
    def data(cls, config: Config) -> tuple[str, ...]:
        return ("demonstrations",) if config.reward.normalise else super().data(config)

    @classmethod
    def trained(cls, config: Config) -> Trained:
        return {"reward.optimizer": (config.reward.network, config.reward.optimizer)}

    @property
    def start(self) -> tuple[str, Path]:
        """The model that it starts from, behind its key. Raises ValueError where there is none."""
        given = self.job.config.reward.normalise
        if given and not (given / "config.json").is_file():
            raise ValueError(f"reward.normalise = {given} is no model's folder (it has no config.json): name one")
        return ("reward.normalise", given) if given else ("models.sft", self.job.model("sft"))

    def weights(self) -> Iterator[tuple[str, str | Path, str]]:
        yield *self.start, "raw_value" if self.job.config.reward.normalise else "new_value"
        yield from (one for one in super().weights() if one[0] != self.start[0])

    def made_of(self) -> MadeOf:
        contents = dict([self.start]) | self.job.files(*self.data(self.job.config))
        return {"reward": self.job.config.reward.model_dump(mode="json")}, contents

    def check(self) -> Any:
        """Read, encode and split the files: groups of ranked completions, and demonstrations as token ids."""
        from actors.prompts import Demonstration, read_demonstrations
        from learner.reward_modeling import RankedGroup, ranked_group, split_groups, weighed
        from reward_server.encoding import ChatEncoding
        from reward_server.preferences.labeling import Comparison, read_comparisons

        job, bad = self.job, self.job.max_bad_rows
        encoding = ChatEncoding.load(self.start[1], job.config.models)
        limit, odd = encoding.positions or math.inf, Counter[str]()

        def group(row: Comparison) -> RankedGroup:
            best = [text for text, rank in zip(row.responses, row.ranks or (), strict=False) if not rank]
            odd["have an empty completion of rank 0"] += any(not text.strip() for text in best)
            odd["have a completion that ends in an end mark already"] += any(map(encoding.ends_twice, row.responses))
            return ranked_group(row, encoding)

        def tokens(row: Demonstration) -> tuple[int, ...]:
            return (*encoding.prompt(row.prompt), *encoding.response(row.response, ended=True))

        groups, rows = read_all(
            lambda: [] if job.config.reward.normalise else read_comparisons(job.file("comparisons"), bad, group),
            lambda: read_demonstrations(job.file("demonstrations"), bad, tokens),
        )
        demonstrations = [row for row in rows if len(row) <= limit]
        if len(demonstrations) < len(rows):
            told = f"{len(rows) - len(demonstrations)} of {len(rows)} rows of {job.file('demonstrations')} are longer"
            told += f" than the {limit} positions of the model and do not count in its normalisation"
            if not demonstrations:
                raise ValueError(f"{told}; give data.demonstrations shorter ones")
            log.warning("%s", told)
        odd["have no completion ranked above another"] = sum(not group.has_pair for group in groups)
        odd["rank identical completions differently"] = sum(group.identical_pairs > 0 for group in groups)
        for what, count in odd.items():
            if count:
                log.warning("%d of %d comparisons %s", count, len(groups), what)
        if not job.config.reward.normalise:
            groups = weighed(groups, job.config.reward.weights)
            split_groups(groups, job.config.reward)
        return groups, demonstrations

    async def run(self, processes: "ProcessPool", inputs: Any) -> None:
        from learner.reward_modeling import reward_modeling, split_groups

        (groups, demonstrations), job, config = inputs, self.job, self.job.config.reward
        if config.normalise:
            return await self._normalise(await processes.learner(), demonstrations)
        base, folder, progress = job.model("sft"), job.run_dir / "reward", self.progress(config)
        learner = await processes.learner()
        trained = await learner.load("reward", "new_value", base, config.network, config.optimizer)
        await progress.load(learner)
        completions = sum(len(group.sequences) for group in split_groups(groups, config)[0])
        with job.tracker.phase(f"reward: {completions} completions, {trained / 1e6:.1f} M parameters", "reward"):
            found = await reward_modeling(learner, groups, demonstrations, config, progress)
        if found.accuracy_ci[0] <= 0.5:
            log.warning(
                "the reward model is not told from chance: it ranks %.0f %% of %d held-out pairs as people did (95 %% "
                "interval from %.0f %%); look at the comparisons, or give more",
                *(100 * found.accuracy, found.pairs, 100 * found.accuracy_ci[0]),
            )
        for line in _parts(found):
            job.tracker.console.line(line)
        await job.export(learner, "reward", folder)
        await learner.unload()
        calibration = {**asdict(found), "calibration_error": found.calibration_error}
        job.write(folder / "calibration.json", json.dumps(calibration, indent=2) + "\n")
        job.summarise("reward", **{name: calibration[name] for name in _SUMMARISED})
        job.made("reward", folder, base, job.file("comparisons"), job.file("demonstrations"))

    async def _normalise(self, learner: "LearnerGroup", demonstrations: Sequence[tuple[int, ...]]) -> None:
        """Copy the model that is given, and give the copy the normalisation that the demonstrations ask for."""
        from reward_server.model import Normalisation, store_normalisation

        job, config, (_, base) = self.job, self.job.config.reward, self.start
        with job.tracker.phase(f"reward: {len(demonstrations)} demonstrations are scored", "reward"):
            await learner.load("reward", "raw_value", base, config.network, config.optimizer, frozen=True)
            values = await learner.last_values("reward", demonstrations, config.max_tokens_per_microbatch)
            await learner.unload()
        scale = Normalisation.of(values, config.unit_variance)
        job.install(base, "reward")
        store_normalisation(job.run_dir / "reward", scale)
        job.tracker.console.line(f"reward: the score is {scale.gain:.4g} times the raw output, plus {scale.bias:.4g}")
        job.made("reward", job.run_dir / "reward", base, job.file("demonstrations"))


def _parts(found: "RewardAccuracy") -> Iterator[str]:
    """A line for the control, and for those labelers with whom the reward model agrees least."""
    labelers = sorted(found.by_labeler.items(), key=lambda one: one[1].accuracy)
    control = [("the control", found.control)] if found.control else []
    for name, part in (*control, *((f"rankings of {name}", part) for name, part in labelers[:_SHOWN])):
        low, high = part.accuracy_ci
        yield (
            f"reward: {name}: pair accuracy {part.accuracy:.3f} on {part.pairs} held-out pairs "
            f"(95 % interval {low:.2f} to {high:.2f})"
        )
    if more := labelers[_SHOWN:]:
        yield f"reward: {len(more)} more labelers are in reward/calibration.json"
