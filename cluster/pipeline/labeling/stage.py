"""`rayward label`: people rank a run's completions on a page, or are invited to."""

from pathlib import Path
from typing import Any

from cluster.config.schema import Config
from cluster.pipeline.labeling import commands
from cluster.pipeline.labeling.items import read_items
from cluster.pipeline.labeling.page import check_port, log_of, people_of, serve, write_people, write_rankings
from cluster.pipeline.labeling.priority import scorers
from cluster.pipeline.preferences import Rank
from cluster.pipeline.stage import Stage
from cluster.rundir.lineage import latest, read_lineage
from reward_server.labeling.items import Item
from reward_server.labeling.people import People
from reward_server.preferences.labeling import Comparison


class Label(Stage):
    """Serves the page until all is ranked, or Ctrl-C; writes RUN/data/comparisons.jsonl."""

    name = "label"
    group = "operate"
    purpose = "Step 2b by people: serve the page on which they rank completions; --invite NAME prints a link."
    files = (
        "Reads RUN/data/completions.jsonl (or data.completions). Keeps RUN/labeling/log.jsonl; when all is ranked, or "
        "at Ctrl-C, writes RUN/data/comparisons.jsonl and RUN/labeling/exports."
    )
    example = "rayward label --run runs/mine --label.overlap 2"
    sections = ("models", "data", "label", "tracking")
    reads = ("data.completions",)
    resumes = False

    @classmethod
    def data(cls, config: Config) -> tuple[str, ...]:
        return super().data(config) if "rank" in config.label.tasks else ()

    @classmethod
    def looked_at(cls, config: Config) -> tuple[str, ...]:
        """None: the settings of models only say how label.scorers are loaded."""
        return ()

    @classmethod
    def aside(cls, config: Config, run_dir: Path) -> bool:
        return commands.carry_out(config, run_dir)

    def check(self) -> list[Item] | list[Comparison]:
        """Raises ValueError, also where comparisons are in the way that people did not give here."""
        job, config = self.job, self.job.config.label
        path = job.run_dir / Rank.results[0]
        made = latest(read_lineage(job.run_dir)).get(Rank.results[0])
        if path.is_file() and (made is None or made.command.split()[:2] != ["rayward", self.name]):
            raise ValueError(
                f"{path} is there, and `rayward {self.name}` has not made it, so it is not written over. Remedy: move "
                "it away, or label in another run directory"
            )
        if config.import_from:
            return commands.imported(job)
        if config.order == "disagreement" and not scorers(job):
            raise ValueError(
                f"label.order = disagreement asks reward models, and {job.run_dir} has none. Remedy: name folders in "
                "label.scorers, or let label.order be random"
            )
        check_port(config)
        return read_items(job)

    async def run(self, processes: Any, inputs: Any) -> None:
        if self.job.config.label.import_from:
            file = commands.named(self.job.config.label.import_from, "import_from")[1]
            write_people(self.job, inputs, inputs, self.job.file("completions"), file)
            return
        console, run_dir = self.job.tracker.console, self.job.run_dir
        if not People(people_of(self.job)).labelers:
            console.line(f"nobody is invited yet: rayward label --run {run_dir} --invite NAME, in another terminal")
        try:
            await serve(self.job, None, inputs, deadline_s=None)
        finally:  # also when Ctrl-C ends it
            if log_of(self.job).is_file():
                found, path = write_rankings(self.job), run_dir / Rank.results[0]
                console.line(
                    f"{len(found.comparisons)} rankings of people are in {path}, for rayward reward --run {run_dir}"
                    if found.comparisons
                    else f"there is no ranking that counts yet, so {path} is not written"
                )
                if found.left_out or found.unranked:
                    console.line(
                        f"{len(found.left_out)} answers were left out, and {len(found.unranked)} say that it cannot be "
                        f"ranked: {run_dir / 'labeling' / 'exports'} says why"
                    )
