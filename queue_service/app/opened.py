"""What an App holds while it is open: the pool, what works in the background for those who wait or follow, and a share in
the cluster."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar

from queue_service.db import channels, embedded, revision, schema
from queue_service.db.cluster import Cluster
from queue_service.db.execute import translated
from queue_service.db.listener import Listener
from queue_service.db.pool import Pool, connect
from queue_service.db.query import Query
from queue_service.db.url import EmbeddedCluster, Server
from queue_service.errors import ConfigError
from queue_service.logs import get_logger
from queue_service.services.endings import Endings
from queue_service.services.fanout import Fanout
from queue_service.services.loop import every
from queue_service.services.notifier import Notifier
from queue_service.services.outcomes import Outcomes
from queue_service.services.sweeper import Sweeper
from queue_service.settings import Settings

T = TypeVar("T")

log = get_logger(__name__)


class Opened:
    is_async: Literal[True] = True

    def __init__(self, conninfo: str, settings: Settings, cluster: Cluster | None) -> None:
        self.conninfo = conninfo
        self.pool = Pool(conninfo, size=settings.pool_size)
        self.notifier = Notifier(self.pool.fetch)
        self.endings = Endings(
            self.pool.fetch,
            Listener(conninfo, [channels.FINISHED]),
            poll_interval=settings.poll_interval.total_seconds(),
        )
        self.fanout = Fanout(
            self.pool.fetch,
            Listener(conninfo, [channels.EVENTS]),
            poll_interval=settings.poll_interval.total_seconds(),
        )
        self.outcomes = Outcomes(
            self.pool.fetch,
            self.fanout,
            poll_interval=settings.poll_interval.total_seconds(),
            grace=settings.lease.total_seconds() / 3,
        )
        self._sweeper = Sweeper(
            self.pool.fetch, self.notifier.send, max_losses=settings.max_losses, grace=settings.lease / 3
        )
        self._sweep_interval = settings.sweep_interval
        self._sweeping: asyncio.Task[None] | None = None
        # The sweep under way, and those that were cancelled and have not ended yet.
        self._sweeps: set[asyncio.Task[None]] = set()
        self._waiters = 0
        self._cluster = cluster
        self._pid = os.getpid()
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def at(cls, database: Server | EmbeddedCluster, settings: Settings) -> Opened:
        """Connect and check the schema. Blocking work (starting a server, migrating) is done in a thread."""
        conninfo, cluster = await asyncio.to_thread(embedded.reach, database)
        try:
            opened = cls(conninfo, settings, cluster)
            conn = await connect(conninfo)
            try:
                if cluster is not None and await revision.current(conn) is None:
                    await asyncio.to_thread(schema.upgrade, conninfo)
                await revision.require(conn)
            finally:
                await conn.close()
            await opened.pool.open()
        except BaseException:
            if cluster is not None:
                await asyncio.to_thread(cluster.leave)
            raise
        return opened

    async def close(self) -> None:
        """Send the notices that wait, and let go of all connections and of the embedded cluster."""
        self._stop_sweeping()
        if self._sweeps:
            await asyncio.wait(self._sweeps)
        await self.fanout.close()
        await self.endings.close()
        await self.notifier.close()
        await self.pool.close()
        if self._cluster is not None:
            await asyncio.to_thread(self._cluster.leave)

    async def sweep_turns(self) -> int:
        """End the turns whose deadline has passed. Returns how many."""
        return await self._sweeper.turns()

    @contextmanager
    def sweeping(self) -> Iterator[None]:
        """Sweep in this process for the length of the block: whoever waits needs no worker to be alive somewhere."""
        self._waiters += 1
        if self._sweeping is None or self._sweeping.done():
            self._sweeping = asyncio.create_task(every(self._sweep_interval, self._sweeper.once, name="sweeper"))
            self._sweeps.add(self._sweeping)
            self._sweeping.add_done_callback(self._sweep_ended)
        try:
            yield
        finally:
            self._waiters -= 1
            if not self._waiters:
                self._stop_sweeping()

    def _stop_sweeping(self) -> None:
        if self._sweeping is not None:
            self._sweeping.cancel()
            self._sweeping = None

    def _sweep_ended(self, sweeping: asyncio.Task[None]) -> None:
        self._sweeps.discard(sweeping)
        if not sweeping.cancelled() and sweeping.exception() is not None:
            log.error("sweeping has failed; the next one who waits starts it again", why=repr(sweeping.exception()))

    async def fetch(self, query: Query[T]) -> T:
        """Run one query on a connection of the pool, and return its result."""
        return await self.pool.fetch(query)

    async def copy(self, statement: str, data: str) -> None:
        """Send rows in the text format of COPY, all or none."""
        with translated():
            async with self.pool.connection() as conn, conn.cursor() as cursor, cursor.copy(statement.encode()) as copy:
                await copy.write(data)

    def check_caller(self) -> None:
        """Raise ConfigError where these connections cannot be used: after a fork, or on another event loop."""
        if os.getpid() != self._pid:
            raise ConfigError(
                "This App was opened before a fork, and connections cannot be shared with the parent process. "
                "Open it in the child."
            )
        if asyncio.get_running_loop() is not self._loop:
            raise ConfigError(
                "This App was opened on another event loop. Open another one here, or use `app.sync` from threads."
            )
