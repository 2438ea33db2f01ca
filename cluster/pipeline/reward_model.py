"""Step 2, the reward model: a scalar head learns the rankings."""

import json
import logging
import math
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cluster.config.schema import Config
from cluster.pipeline.stage import SECTIONS, MadeOf, Stage, Trained
from reward_server.preferences.records import read_all

if TYPE_CHECKING:
    from cluster.fleet.pool import ProcessPool

log = logging.getLogger(__name__)
_SUMMARISED = (
    *("accuracy", "accuracy_ci", "prompt_accuracy", "prompt_accuracy_ci"),
    *("score_std", "longer_wins", "pairs", "log_loss"),
)


class RewardModel(Stage):
    """Trains a reward model from the SFT model on the ranked completions; writes RUN/reward."""

    name = "reward"
    purpose = "Step 2c: train a reward model on ranked completions."
    files = "Reads RUN/sft, RUN/data/comparisons.jsonl and data.demonstrations. Writes RUN/reward."
    example = "rayward reward --run runs/mine --data.comparisons comparisons.jsonl"
    sections = (*SECTIONS, "reward", "tracking")
    reads = ("models.sft", "data.comparisons", "data.demonstrations")
    fresh_head = True
    processes = ("learner",)
    writes = ("reward",)
    results = ("reward",)

    @classmethod
    def trained(cls, config: Config) -> Trained:
        return {"reward.optimizer": (config.reward.network, config.reward.optimizer)}

    def made_of(self) -> MadeOf:
        contents = {"models.sft": self.job.model("sft"), **self.job.files("comparisons", "demonstrations")}
        return {"reward": self.job.config.reward.model_dump(mode="json")}, contents

    def check(self) -> Any:
        """Read, encode and split the files: groups of ranked completions, and demonstrations as token ids."""
        from actors.prompts import Demonstration, read_demonstrations
        from learner.reward_modeling import RankedGroup, ranked_group, split_groups
        from reward_server.encoding import ChatEncoding
        from reward_server.preferences.labeling import Comparison, read_comparisons

        job, bad = self.job, self.job.max_bad_rows
        encoding = ChatEncoding.load(job.model("sft"), job.config.models)
        limit, odd = encoding.positions or math.inf, Counter[str]()

        def group(row: Comparison) -> RankedGroup:
            best = [text for text, rank in zip(row.responses, row.ranks or (), strict=False) if not rank]
            odd["have an empty completion of rank 0"] += any(not text.strip() for text in best)
            odd["have a completion that ends in an end mark already"] += any(map(encoding.ends_twice, row.responses))
            return ranked_group(row, encoding)

        def tokens(row: Demonstration) -> tuple[int, ...]:
            return (*encoding.prompt(row.prompt), *encoding.response(row.response, ended=True))

        groups, rows = read_all(
            lambda: read_comparisons(job.file("comparisons"), bad, group),
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
        split_groups(groups, job.config.reward)
        return groups, demonstrations

    async def run(self, processes: "ProcessPool", inputs: Any) -> None:
        from learner.reward_modeling import reward_modeling, split_groups

        (groups, demonstrations), job, config = inputs, self.job, self.job.config.reward
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
        await job.export(learner, "reward", folder)
        await learner.unload()
        calibration = {**asdict(found), "calibration_error": found.calibration_error}
        job.write(folder / "calibration.json", json.dumps(calibration, indent=2) + "\n")
        job.summarise("reward", **{name: getattr(found, name) for name in _SUMMARISED})
        job.made("reward", folder, base, job.file("comparisons"), job.file("demonstrations"))
