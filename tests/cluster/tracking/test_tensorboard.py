from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster.config.schema import TrackingConfig
from cluster.tracking.tracker import Tracker


def test_tensorboard_gets_every_metric(tmp_path: Path):
    with Tracker(tmp_path, TrackingConfig(mode="disabled", tensorboard=True), "ppo") as found:
        for step in (1, 2):
            found.log("ppo", step, {"score/mean": step / 2})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("ppo/score/mean")] == [(1, 0.5), (2, 1.0)]
