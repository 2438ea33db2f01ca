"""A process is started again when it is lost, after longer and longer pauses, until that is in vain."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from actors.waits import Waits
from cluster.config.schema import FleetConfig

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Place:
    """Where one process belongs, whichever it is."""

    name: str
    """Of the process."""
    restarts: int = 0
    """How often it was replaced."""
    cause: str = "it is starting"
    """Why nobody is there."""


async def keep(
    place: Place, live: Callable[[], Awaitable[tuple[str, bool] | None]], config: FleetConfig, waits: Waits
) -> bool:
    """Have a place filled again after each loss; False when `config.max_restarts` were lost in a row.

    `live` is one life of a process: why it was lost, and whether it had got so far that those before it do not count;
    None when it is to be the last.
    """
    losses = 0
    while (loss := await live()) is not None:
        place.cause, steady = loss
        losses = 1 if steady else losses + 1
        if losses > config.max_restarts:
            return False
        seconds, of = config.backoff_s * 2 ** (losses - 1), f"{losses} of {config.max_restarts}"
        log.warning("%s is lost: %s. It is started again in %g s (%s)", place.name, place.cause, seconds, of)
        place.restarts += 1
        with waits.reported(place.name, lambda of=of: f"its turn to be started again ({of}), lost since {place.cause}"):
            await asyncio.sleep(seconds)
    return True
