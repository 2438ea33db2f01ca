"""When somebody should look at a run: rules on its metrics, each told once until it is over."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from cluster.config import AlertsConfig

_GAPS = ("parity/mean_gap", "importance/log_ratio_mean")
_SKIPPED = "optimizer/skipped_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """Something that somebody should look at."""

    kind: str
    """kl, gap, non-finite or stalled"""
    text: str
    """what was seen, the bound, and what to look at"""


class Alerts:
    """Watches the steps of a run. `tell` is called for each alert, from the thread that calls `step` or `tick`."""

    def __init__(
        self, config: AlertsConfig, tell: Callable[[Alert], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config = config
        self._tell = tell
        self._clock = clock
        self._last = clock()
        self._where = "the start"
        self._standing: set[str] = set()

    def step(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Look at the metrics of a step."""
        self._last, self._where = self._clock(), f"step {step} of {stage}"
        found = dict(_seen(self._config, metrics))
        for kind in found.keys() - self._standing:
            self._tell(Alert(kind=kind, text=f"{self._where}: {found[kind]}"))
        self._standing = set(found)

    def tick(self) -> None:
        """Look at the clock: no step for `stalled_s` seconds is an alert."""
        silence = self._clock() - self._last
        if self._config.stalled_s and silence > self._config.stalled_s and "stalled" not in self._standing:
            self._standing.add("stalled")
            text = f"no step was logged for {silence:.0f} s since {self._where}; see rayward status"
            self._tell(Alert(kind="stalled", text=text))


def _seen(config: AlertsConfig, metrics: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    kl = metrics.get("kl/mean", 0.0)
    if config.kl_above is not None and kl > config.kl_above:
        yield (
            "kl",
            f"the KL to the SFT model is {kl:.3g} nats a response, above {config.kl_above:g}: the samples may exploit "
            "the reward model; read some, raise ppo.kl.coef or lower the learning rate",
        )
    gap, name = max((metrics.get(name, 0.0), name) for name in _GAPS)
    if config.gap_above is not None and gap > config.gap_above:
        yield (
            "gap",
            f"{name} is {gap:.3g} nats, above {config.gap_above:g}: sampler and learner disagree on the same tokens; "
            "compare generator.dtype with the network's, and see staleness/*",
        )
    broken = sorted(name for name, value in metrics.items() if not math.isfinite(value))
    skipped = sum(value for name, value in metrics.items() if name.startswith(_SKIPPED) and math.isfinite(value))
    if broken or skipped:
        what = f"not finite: {', '.join(broken)}" if broken else f"{skipped:g} optimizer steps were skipped"
        yield "non-finite", f"{what}; lower the learning rate, or look for a sample with an extreme score"
