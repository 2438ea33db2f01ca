"""The replicas of a run's reward service: each is started again when it is lost, and the client is told where.

The run goes on with the others meanwhile, and is paused while there is none.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from actors.waits import Waits
from cluster.config.schema import FleetConfig
from cluster.runtime.health import Health
from reward_server.client import RewardClient

_STEADY_S = 60.0  # one that has lived so long is not counted among those lost in a row
log = logging.getLogger(__name__)


class StartReplica(Protocol):
    """Starts the replica of that name: its health, and where it listens. Leaving the block ends it."""

    def __call__(self, name: str) -> AbstractAsyncContextManager[tuple[Health, str]]: ...


class Connect(Protocol):
    """Makes a client of the replicas at these addresses."""

    def __call__(self, urls: Sequence[str]) -> RewardClient: ...


@contextlib.asynccontextmanager
async def reward_replicas(
    names: Sequence[str], start: StartReplica, connect: Connect, config: FleetConfig, waits: Waits
) -> AsyncIterator[RewardClient]:
    """A client of the replicas of these names, all of which have scored a probe.

    Raises what kept one of them from starting.
    """
    assert names, "no replica is planned"
    urls = [asyncio.get_running_loop().create_future() for _ in names]
    client: asyncio.Future[RewardClient] = asyncio.get_running_loop().create_future()
    keepers = [
        asyncio.create_task(_keep(index, name, start, config, urls[index], client, waits), name=name)
        for index, name in enumerate(names)
    ]
    try:
        made = connect(await asyncio.gather(*urls))
        client.set_result(made)
        try:
            await made.healthy()
            yield made
        finally:
            await made.close()
    finally:
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)


async def _keep(
    index: int,
    name: str,
    start: StartReplica,
    config: FleetConfig,
    first: "asyncio.Future[str]",
    client: "asyncio.Future[RewardClient]",
    waits: Waits,
) -> None:
    """Have a replica, and another one when it is lost, until too many are lost in a row."""
    losses = 0
    while True:
        began = time.monotonic()
        try:
            async with start(name) as (health, url):
                if first.done():
                    (await client).moved(index, url)
                else:
                    first.set_result(url)
                cause = await _death(health, config.watch_s)
        except Exception as error:
            if not first.done():
                first.set_exception(error)
                return
            cause = f"it did not start: {error}"
        losses = 1 if time.monotonic() - began > _STEADY_S else losses + 1
        if losses > config.max_restarts:
            log.error("%s was started %d times in a row and is lost again: %s. It stays away", name, losses, cause)
            return
        seconds = config.backoff_s * 2 ** (losses - 1)
        log.warning("%s is lost: %s. It is started again in %g s", name, cause, seconds)
        with waits.reported(name, lambda cause=cause: f"its turn to be started again, lost since {cause}"):
            await asyncio.sleep(seconds)


async def _death(health: Health, every_s: float) -> str:
    """Wait until a process is found dead; why."""
    while not health.died:
        await health.attend(every_s)
        await asyncio.sleep(every_s)
    return health.died
