"""The replicas of a run's reward service: each is started again when it is lost, and the client is told where.

The run goes on with the others meanwhile, and is paused while there is none. When none is to come back it stops.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager

from actors.waits import Waits
from cluster.config.schema import FleetConfig
from cluster.fleet.restarts import Place, keep
from cluster.runtime.health import Health
from reward_server.client import RewardClient

_STEADY_S = 60.0  # one that has done well for so long is not counted among those lost in a row
log = logging.getLogger(__name__)

Start = Callable[[str], AbstractAsyncContextManager[tuple[Health, str]]]
"""Starts the replica of that name: its health, and where it listens. Leaving the block ends it."""


@contextlib.asynccontextmanager
async def reward_replicas(
    names: Sequence[str],
    start: Start,
    connect: Callable[[Sequence[str]], RewardClient],
    config: FleetConfig,
    waits: Waits,
    silence_s: float,
) -> AsyncIterator[RewardClient]:
    """A client of the replicas of these names, all of which have scored a probe; `connect` makes it of addresses.

    One that says nothing, or computes one batch, for `silence_s` seconds is lost. Raises what kept one of them from
    starting.
    """
    assert names, "no replica is planned"
    loop = asyncio.get_running_loop()
    urls = [loop.create_future() for _ in names]
    client: asyncio.Future[RewardClient] = loop.create_future()

    async def live(index: int) -> tuple[str, bool] | None:
        first, well_s = urls[index], 0.0
        try:
            async with start(names[index]) as (health, url):
                began = time.monotonic()
                if first.done():
                    (await client).moved(index, url)
                else:
                    first.set_result(url)
                while not (cause := health.died or _hanging(health, silence_s)):
                    await health.attend(config.watch_s)
                    await asyncio.sleep(config.watch_s)
                well_s = time.monotonic() - began - (0.0 if health.died else silence_s)
        except Exception as error:
            if not first.done():
                first.set_exception(error)
                return None
            cause = f"it did not start: {error}"
        return cause, well_s > _STEADY_S

    async def keeper(index: int) -> None:
        place = Place(names[index])
        if not await keep(place, lambda: live(index), config, waits):
            away[place.name] = f"was started {config.max_restarts + 1} times in a row and is lost again: {place.cause}"
            log.error("%s %s. It stays away", place.name, away[place.name])
            if len(away) == len(names):
                (await client).end("; ".join(f"{name} {cause}" for name, cause in away.items()))

    away: dict[str, str] = {}
    keepers = [asyncio.create_task(keeper(index), name=name) for index, name in enumerate(names)]
    try:
        made = connect(await asyncio.gather(*urls))
        client.set_result(made)
        try:
            await made.healthy()
            yield made
        finally:
            await made.close()
    finally:
        for task in keepers:
            task.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)


def _hanging(health: Health, silence_s: float) -> str:
    """Why a process that lives is as good as dead; empty for one that is not."""
    if health.silent_s > silence_s:
        return f"it has said nothing for {health.silent_s:.0f} s"
    computing_s = health.last.facts.get("computing_s", 0.0) if health.last else 0.0
    if computing_s > silence_s:
        return f"it has computed one batch for {computing_s:.0f} s; where scores take so long, raise scoring.retry_s"
    return ""
