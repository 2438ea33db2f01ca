"""When somebody should look at a run: rules on its metrics, each told once, and once when it is over."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from cluster.config.schema import AlertsConfig

_FOR = {"fleet": 3, "eos": 3, "scores": 3}  # steps in a row before it is told: newcomers take time, chance is short
_FEW, _EQUAL = 0.02, 1e-6  # share of responses; spread of scores, which are float32
_KEEP_FIRING = 3  # steps in a row before it is over


@dataclass(frozen=True, slots=True)
class Alert:
    """Something that somebody should look at, or that it is over."""

    kind: str
    """kl, gap, eos, scores, non-finite, fleet, stalled or paused"""
    text: str
    """what was seen, the bound, and what to look at"""
    over: bool = False
    """it has been told, and is no longer so"""


class Alerts:
    """Watches the steps of a run. `tell` is called for each alert, from the thread that calls `step` or `tick`.

    `paused()` says why the run waits for scores, None while it does not.
    """

    def __init__(
        self,
        config: AlertsConfig,
        tell: Callable[[Alert], None],
        paused: Callable[[], str | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._tell = tell
        self._paused = paused
        self._clock = clock
        self._last = clock()
        self._where = "the start"
        self._firing: set[str] = set()
        self._streak: dict[str, int] = {}  # steps in a row: out of bounds above 0, within them below

    def step(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Look at the metrics of a step; of what it has no metric, nothing is known."""
        silence = self._clock() - self._last
        self._last, self._where = self._clock(), f"step {step} of {stage}"
        self._say("stalled", f"{self._where} was logged, after {silence:.0f} s", over=True)
        for kind, wrong, text in _seen(self._config, metrics):
            streak = self._streak.get(kind, 0)
            self._streak[kind] = streak = max(streak, 0) + 1 if wrong else min(streak, 0) - 1
            if streak >= _FOR.get(kind, 1):
                self._say(kind, f"{self._where}: {text}")
            elif streak <= -_KEEP_FIRING:
                text = f"{self._where}: {kind} is within its bounds again, for {_KEEP_FIRING} steps"
                self._say(kind, text, over=True)

    def tick(self) -> None:
        """Look at the clock and the pause in between: no step for `stalled_s` seconds is an alert."""
        why = self._paused()
        self._say("paused", why or "no longer paused", over=why is None)
        silence = self._clock() - self._last
        if self._config.stalled_s and silence > self._config.stalled_s:
            self._say("stalled", f"no step was logged for {silence:.0f} s since {self._where}; see rayward status")

    def _say(self, kind: str, text: str, over: bool = False) -> None:
        if over == (kind in self._firing):
            self._firing ^= {kind}
            self._tell(Alert(kind, text, over))


def _seen(config: AlertsConfig, metrics: Mapping[str, float]) -> Iterator[tuple[str, bool, str]]:
    """(kind, whether it is out of bounds, what to say then) of every rule that these metrics tell about."""
    kl, size, wanted = (metrics.get(name) for name in ("kl/mean", "fleet/size", "fleet/wanted"))
    if config.kl_above is not None and kl is not None:
        text = f"the KL to the SFT model is {kl:.3g} nats a response, above {config.kl_above:g}: the samples may "
        text += "exploit the reward model; read some, raise ppo.kl.coef or lower the learning rate"
        yield "kl", kl > config.kl_above, text
    gaps = [(metrics[name], name) for name in ("parity/mean_gap", "importance/log_ratio_mean") if name in metrics]
    if config.gap_above is not None and gaps:
        gap, name = max(gaps)
        text = f"{name} is {gap:.3g} nats, above {config.gap_above:g}: sampler and learner disagree on the same tokens"
        yield "gap", gap > config.gap_above, f"{text}; compare generator.dtype with the network's, and see staleness/*"
    if size is not None and wanted is not None:
        text = f"{size:g} of {wanted:g} generators have been at work for {_FOR['fleet']} steps"
        yield "fleet", size < wanted, f"{text}; their logs in RUN/logs say why the others are gone"
    if (ended := metrics.get("response/eos_rate")) is not None:
        text = f"{ended:.1%} of the responses end by themselves, for {_FOR['eos']} steps: cut off, they score "
        text += (
            "rollout.missing_eos and teach little; raise rollout.max_new_tokens, or see whether step 1 taught an EOS"
        )
        yield "eos", ended < _FEW, text
    if (spread := metrics.get("score/std")) is not None:
        text = f"all responses of a batch score the same, for {_FOR['scores']} steps: there is nothing to learn from; "
        text += "see the gates of scoring.parts and rollout.missing_eos, and read some samples"
        yield "scores", spread < _EQUAL, text
    broken = sorted(name for name, value in metrics.items() if not math.isfinite(value))
    skips = (value for name, value in metrics.items() if name.startswith("optimizer/skipped_") and math.isfinite(value))
    skipped = sum(skips)
    if broken or skipped or any("grad_norm" in name for name in metrics):
        text = f"not finite: {', '.join(broken)}" if broken else f"{skipped:g} optimizer steps were skipped"
        text += "; lower the learning rate, or look for a sample with an extreme score"
        yield "non-finite", bool(broken or skipped), text
