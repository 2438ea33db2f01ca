"""When somebody should look at a run: rules on its metrics, each told once, and once when it is over."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from cluster.config.schema import AlertsConfig

_GAPS = ("parity/mean_gap", "importance/log_ratio_mean")
_SKIPPED = "optimizer/skipped_"
_FOR = {"fleet": 3}  # steps in a row before it is told; a newcomer takes its time to join
_KEEP_FIRING = 3  # steps in a row before it is over


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """Something that somebody should look at, or that it is over."""

    kind: str
    """kl, gap, non-finite, fleet, stalled or paused"""
    text: str
    """what was seen, the bound, and what to look at"""
    over: bool = False
    """it has been told, and is no longer so"""


class Alerts:
    """Watches the steps of a run. `tell` is called for each alert, from the thread that calls `step` or `tick`.

    What comes and goes from step to step is one alert: it is over after a few steps without it.
    """

    def __init__(
        self, config: AlertsConfig, tell: Callable[[Alert], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config = config
        self._tell = tell
        self._clock = clock
        self._last = clock()
        self._where = "the start"
        self._firing: set[str] = set()
        self._streak: dict[str, int] = {}  # steps in a row: out of bounds above 0, within them below
        self._looks: dict[str, Callable[[], str | None]] = {}

    @contextlib.contextmanager
    def looking(self, kind: str, look: Callable[[], str | None]) -> Iterator[None]:
        """While the block lasts, it is an alert whenever `look()` says what is wrong rather than None."""
        self._looks[kind] = look
        try:
            yield
        finally:
            del self._looks[kind]

    def step(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Look at the metrics of a step; of what it has no metric, nothing is known."""
        silence = self._clock() - self._last
        self._last, self._where = self._clock(), f"step {step} of {stage}"
        if "stalled" in self._firing:
            self._end("stalled", f"{self._where} was logged, after {silence:.0f} s")
        for kind, text in _seen(self._config, metrics):
            streak = self._streak.get(kind, 0)
            self._streak[kind] = streak = max(streak, 0) + 1 if text else min(streak, 0) - 1
            if streak >= _FOR.get(kind, 1):
                self._begin(kind, f"{self._where}: {text}")
            elif streak <= -_KEEP_FIRING and kind in self._firing:
                self._end(kind, f"{self._where}: {kind} is within its bounds again, for {_KEEP_FIRING} steps")

    def tick(self) -> None:
        """Look at the clock: no step for `stalled_s` seconds is an alert. Look at what is wrong in between steps."""
        for kind, look in list(self._looks.items()):
            if text := look():
                self._begin(kind, text)
            elif kind in self._firing:
                self._end(kind, f"no longer {kind}")
        silence = self._clock() - self._last
        if self._config.stalled_s and silence > self._config.stalled_s:
            self._begin("stalled", f"no step was logged for {silence:.0f} s since {self._where}; see rayward status")

    def _begin(self, kind: str, text: str) -> None:
        if kind not in self._firing:
            self._firing.add(kind)
            self._tell(Alert(kind=kind, text=text))

    def _end(self, kind: str, text: str) -> None:
        self._firing.discard(kind)
        self._tell(Alert(kind=kind, text=text, over=True))


def _seen(config: AlertsConfig, metrics: Mapping[str, float]) -> Iterator[tuple[str, str | None]]:
    """(kind, what is wrong or None) of every rule that these metrics tell about."""
    if config.kl_above is not None and (kl := metrics.get("kl/mean")) is not None:
        yield (
            "kl",
            f"the KL to the SFT model is {kl:.3g} nats a response, above {config.kl_above:g}: the samples may exploit "
            "the reward model; read some, raise ppo.kl.coef or lower the learning rate"
            if kl > config.kl_above
            else None,
        )
    gaps = [(metrics[name], name) for name in _GAPS if name in metrics]
    if config.gap_above is not None and gaps:
        gap, name = max(gaps)
        yield (
            "gap",
            f"{name} is {gap:.3g} nats, above {config.gap_above:g}: sampler and learner disagree on the same tokens; "
            "compare generator.dtype with the network's, and see staleness/*"
            if gap > config.gap_above
            else None,
        )
    if (size := metrics.get("fleet/size")) is not None and (wanted := metrics.get("fleet/wanted")) is not None:
        yield (
            "fleet",
            f"{size:g} of {wanted:g} generators have been at work for {_FOR['fleet']} steps; their logs in "
            "RUN/logs say why the others are gone"
            if size < wanted
            else None,
        )
    broken = sorted(name for name, value in metrics.items() if not math.isfinite(value))
    skipped = sum(value for name, value in metrics.items() if name.startswith(_SKIPPED) and math.isfinite(value))
    if broken or skipped or any("grad_norm" in name for name in metrics):
        what = f"not finite: {', '.join(broken)}" if broken else f"{skipped:g} optimizer steps were skipped"
        advice = f"{what}; lower the learning rate, or look for a sample with an extreme score"
        yield "non-finite", advice if broken or skipped else None
