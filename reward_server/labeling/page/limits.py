"""How often somebody may ask."""

import time
from collections import deque
from collections.abc import Callable

_MINUTE_S = 60.0
_MOST = 10_000  # keys that are remembered; an address costs nothing to who has many


class Rate:
    """Counts events of the last minute, by key."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = per_minute
        self._clock = clock
        self._times: dict[str, deque[float]] = {}

    def count(self, key: str) -> None:
        """Note one event."""
        times = self._times.pop(key, None) or deque(maxlen=self._most)
        times.append(self._clock())
        self._times[key] = times  # the last to be forgotten
        if len(self._times) > _MOST:
            del self._times[next(iter(self._times))]

    def wait_s(self, key: str) -> float:
        """Seconds until there is room for one more; 0 where there is."""
        times = self._times.get(key)
        if times is None or len(times) < self._most:
            return 0.0
        return max(0.0, times[0] + _MINUTE_S - self._clock())
