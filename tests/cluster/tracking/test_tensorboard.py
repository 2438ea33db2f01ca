from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster.config.schema import TrackingConfig
from cluster.tracking.tracker import Tracker


def test_tensorboard_gets_every_metric_the_samples_and_their_distributions(tmp_path: Path):
    with Tracker(tmp_path, TrackingConfig(mode="disabled", tensorboard=True), "ppo") as found:
        for step in (1, 2):
            found.log("ppo", step, {"score/mean": step / 2})
        found.samples("ppo", 2, [{"prompt": "a|b\nc", "gold": 0.12345}], {"gold": [0.0, 0.25, 1.0]})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("ppo/score/mean")] == [(1, 0.5), (2, 1.0)]
    (text,) = events.Tensors("ppo/heldout/samples/text_summary")
    assert text.tensor_proto.string_val == [b"| prompt | gold |\n| --- | --- |\n| a\\|b c | 0.123 |"]
    (bars,) = events.Histograms("ppo/heldout/gold")
    assert (bars.step, bars.histogram_value.num, bars.histogram_value.sum) == (2, 3.0, 1.25)
