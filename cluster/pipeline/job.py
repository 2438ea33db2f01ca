"""A job: one command at work in its run directory."""

import json
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config.schema import Config
from cluster.rundir.inputs import data_file, model_folder
from cluster.rundir.lineage import record
from cluster.rundir.record import Start
from cluster.runtime.health import Monitor
from cluster.tracking.tracker import Tracker
from learner.weights.checkpoint import whole_folder
from reward_server.preferences.records import write_whole

if TYPE_CHECKING:
    from learner.worker.group import LearnerGroup

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One command at work in its run directory."""

    config: Config
    """what the run was told"""
    run_dir: Path
    """where everything is written"""
    tracker: Tracker
    """metrics, phases and the console"""
    monitor: Monitor = field(default_factory=Monitor)
    """its processes and waits, for who shows them"""
    command: str = "rayward"
    """command line, for the lineage"""
    variant: str | None = None
    """flag that stood for another preset"""
    root: Path | None = None
    """the run that this one is a round of, which keeps the lineage; None for a run of its own"""
    start: Start = "resume"
    """what to do with stages that the run directory holds: refuse, go on with them, or start them over"""

    def model(self, name: str) -> Path:
        """Folder of a model: the configured one, else the run's own. Raises ValueError naming the key without either.

        "init" is the configured one, else the SFT model; "critic" likewise, else the reward model.
        """
        return model_folder(self.config, self.run_dir, name)

    def file(self, name: str) -> Path:
        """The configured data file, else the run's own. Raises ValueError naming the key when there is neither."""
        return data_file(self.config, self.run_dir, name)

    def files(self, *names: str) -> dict[str, Path]:
        """Those of some data files that are there, by dotted key."""
        own = self.run_dir / "data"
        paths = {f"data.{name}": getattr(self.config.data, name) or own / f"{name}.jsonl" for name in names}
        return {key: path for key, path in paths.items() if path.exists()}

    @property
    def reward_to_serve(self) -> Path | None:
        """The run's reward model, where scoring has a part that uses it."""
        return self.model("reward") if self.config.scoring.uses_own_model else None

    @property
    def max_bad_rows(self) -> int:
        """Malformed rows of a file that may be skipped."""
        return self.config.data.max_bad_rows

    def install(self, model: Path, name: str) -> None:
        """Make RUN/<name> a copy of another model's folder, written aside and renamed when it is whole."""

        def copy() -> None:
            with whole_folder(self.run_dir / name) as aside:
                shutil.copytree(model, aside, dirs_exist_ok=True)

        self.monitor.disk.written(copy)

    async def export(self, learner: "LearnerGroup", *network: Any, **settings: Any) -> None:
        """Save a network of the learner as a Hugging Face folder, see its `save`, as soon as there is room for it."""
        await self.monitor.disk.saved(lambda: learner.save(*network, **settings))

    def made(self, kind: str, path: Path, *inputs: str | Path) -> None:
        """Record in the lineage, and in W&B, that `path` was made of `inputs`."""
        root = self.root or self.run_dir
        made = self.monitor.disk.written(lambda: record(root, kind, path, inputs, self.command, self.config))
        self.tracker.artefact(made, root)

    def write(self, path: Path, text: str) -> None:
        """Write a text file whole, as soon as there is room for it."""
        self.monitor.disk.written(lambda: write_whole(path, text))

    def summarise(self, /, *keys: str, **figures: Any) -> None:
        """Merge final figures into RUN/summary.json, under a path of keys."""
        path = self.run_dir / "summary.json"
        try:
            summary = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            table = summary
            for key in keys:
                table = table.setdefault(key, {})
            table.update(figures)
        except (ValueError, AttributeError) as error:  # no reason to lose what a stage has just made
            damaged = path.replace(path.with_name(f"damaged-{path.name}"))
            log.warning("%s was damaged (%s), and is begun anew; it is now %s", path, error, damaged.name)
            return self.summarise(*keys, **figures)
        self.write(path, json.dumps(summary, indent=2) + "\n")
