"""What an App holds while it is open: the pool, what works in the background for those who wait or follow, and a share in
the cluster."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal, TypeVar

from queue_service.db import embedded, revision, schema, url
from queue_service.db.cluster import Cluster
from queue_service.db.execute import DEADLINE, copying, translated, unanswered
from queue_service.db.listener import Listener
from queue_service.db.pool import Pool
from queue_service.db.query import Query
from queue_service.db.session import Address, connect
from queue_service.db.url import EmbeddedCluster, Server
from queue_service.errors import ConfigError, DatabaseRefused
from queue_service.exceptions import message
from queue_service.logs import get_logger
from queue_service.services.endings import Endings
from queue_service.services.fanout import Fanout
from queue_service.services.loop import Service, Services, every
from queue_service.services.notifier import Notifier
from queue_service.services.outcomes import Outcomes
from queue_service.services.replica import Replica
from queue_service.services.sweeper import Sweeper
from queue_service.settings import Settings
from queue_service.waiting import to_its_end

T = TypeVar("T")

log = get_logger(__name__)

# How often we look whether the embedded server is there.
SERVER_LOOK = timedelta(seconds=1)
# So long, in seconds, a wait goes on before this process sweeps for it.
FIRST_SWEEP = 0.020


class Opened:
    is_async: Literal[True] = True

    def __init__(self, address: Address, settings: Settings, cluster: Cluster | None) -> None:
        self.address = address
        self.pool = Pool(address, size=settings.pool_size)
        fetch, poll_interval = self.pool.fetch, settings.poll_interval.total_seconds()
        self.services = Services()
        self.notifier = Notifier(self.pool.fetch_on_any)
        self.listener = Listener(address, send=fetch, begin=lambda: self.services.ensure("listener", self._listen))
        self.endings = Endings(fetch, self.listener, self.services, poll_interval=poll_interval)
        self.fanout = Fanout(fetch, self.listener, self.services, poll_interval=poll_interval)
        self.outcomes = Outcomes(
            fetch, self.fanout, poll_interval=poll_interval, grace=settings.lease.total_seconds() / 3
        )
        self.replica = Replica(fetch, self.notifier.send, self.listener, self.services, poll_interval=poll_interval)
        self._sweeper = Sweeper(fetch, self.notifier.send, max_losses=settings.max_losses, grace=settings.lease / 3)
        # A wait that is over sooner needs none, and a sweep would be in its way.
        self._sweeping = every(settings.sweep_interval, self._sweeper.once, after=FIRST_SWEEP)
        self._waiters = 0
        self._cluster = cluster
        self._pid = os.getpid()
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def at(cls, database: Server | EmbeddedCluster, settings: Settings) -> Opened:
        """Connect and check the schema. Blocking work (starting a server, migrating) is done in a thread."""
        conninfo, cluster = await _reached(database)
        try:
            address = Address(conninfo, pooler=settings.pooler, listen_url=_listen_url(settings))
            opened = cls(address, settings, cluster)
            conn = await connect(address)
            try:
                if cluster is not None and await revision.current(conn) is None:
                    await asyncio.to_thread(schema.upgrade, conninfo)
                with translated():
                    await revision.require(conn)
            finally:
                await conn.close()
            try:
                await opened.pool.open()
            except BaseException:
                await to_its_end(opened.pool.close())
                raise
            if cluster is not None:
                opened.services.ensure("embedded server", every(SERVER_LOOK, opened._keep_server))
        except BaseException:
            if cluster is not None:
                await to_its_end(asyncio.to_thread(cluster.leave))
            raise
        return opened

    async def close(self) -> None:
        """Wake everyone who waits, send the notices that are pending, and let go of all connections and of the embedded
        cluster."""
        self.fanout.close()
        self.endings.close()
        await self.services.close()
        await self.notifier.close()
        await self.pool.close()
        if self._cluster is not None:
            await asyncio.to_thread(self._cluster.leave)

    async def _listen(self, service: Service) -> None:
        await self.listener.run(service.well, service.failed)

    async def _keep_server(self) -> None:
        """Start it again if it has crashed, or was killed. One that somebody has stopped stays so."""
        if self._cluster is not None and self._cluster.has_crashed():
            log.error("the embedded Postgres is gone; starting it again", path=str(self._cluster.path))
            await asyncio.to_thread(self._cluster.start)

    async def sweep_turns(self) -> int:
        """End the turns whose deadline has passed. Returns how many. Raises DatabaseRefused where one cannot be ended,
        once the others are."""
        refused: dict[tuple[str, str], Exception] = {}
        count = await self._sweeper.turns(refused)
        for (deployment, message_id), why in refused.items():
            others = f", and {len(refused) - 1:,} others" if len(refused) > 1 else ""
            raise DatabaseRefused(
                f"Of the turns that are overdue {count:,} were ended, and the database refuses to end {message_id} of "
                f"deployment {deployment}{others}: " + message(why).partition("\n")[0]
            ) from why
        return count

    @contextmanager
    def sweeping(self) -> Iterator[None]:
        """Sweep in this process for the length of the block: whoever waits needs no worker to be alive somewhere."""
        self._waiters += 1
        self.services.ensure("sweeper", self._sweeping)
        try:
            yield
        finally:
            self._waiters -= 1
            if not self._waiters:
                self.services.stop("sweeper")

    async def fetch(self, query: Query[T]) -> T:
        """Run one query on a connection of the pool, and return its result."""
        return await self.pool.fetch(query)

    async def copy(self, statement: str, data: str) -> None:
        """Send rows in the text format of COPY, all or none, within DEADLINE seconds."""
        async with self.pool.connection() as conn:
            try:
                with translated(), copying(conn.pgconn):
                    async with (
                        asyncio.timeout(DEADLINE),
                        conn.cursor() as cursor,
                        cursor.copy(statement.encode()) as copy,
                    ):
                        await copy.write(data)
            except TimeoutError:
                raise unanswered(DEADLINE) from None

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


def _listen_url(settings: Settings) -> str | None:
    if settings.listen_url is None:
        return None
    where = url.parse(settings.listen_url, source="QUEUE_SERVICE_LISTEN_URL")
    if not isinstance(where, Server):
        raise ConfigError(
            "QUEUE_SERVICE_LISTEN_URL names an embedded cluster. Notices are heard from a server: postgresql://…"
        )
    return where.conninfo


async def _reached(database: Server | EmbeddedCluster) -> tuple[str, Cluster | None]:
    """As `embedded.reach`, in a thread. Where we are cancelled meanwhile, what was started is left again."""
    reaching = asyncio.ensure_future(asyncio.to_thread(embedded.reach, database))
    try:
        return await to_its_end(reaching)
    except asyncio.CancelledError:
        if reaching.done() and not reaching.cancelled() and reaching.exception() is None:
            _, cluster = reaching.result()
            if cluster is not None:
                await to_its_end(asyncio.to_thread(cluster.leave))
        raise
