"""What an App holds while it is open: the pool, the notifier, the watch for endings, and a share in the cluster."""

from __future__ import annotations

import asyncio
import os
from typing import Literal, TypeVar

from queue_service.db import channels, embedded, schema
from queue_service.db.cluster import Cluster
from queue_service.db.execute import translated
from queue_service.db.listener import Listener
from queue_service.db.pool import Pool, connect
from queue_service.db.query import Query
from queue_service.db.url import EmbeddedCluster, Server
from queue_service.errors import ConfigError
from queue_service.logs import get_logger
from queue_service.services.endings import Endings
from queue_service.services.notifier import Notifier
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
        self._cluster = cluster
        self._pid = os.getpid()
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def at(cls, database: Server | EmbeddedCluster, settings: Settings) -> Opened:
        """Connect and check the schema. Blocking work (starting a server, migrating) is done in a thread."""
        conninfo, cluster = await asyncio.to_thread(reach, database)
        try:
            opened = cls(conninfo, settings, cluster)
            conn = await connect(conninfo)
            try:
                if cluster is not None and await schema.current(conn) is None:
                    await asyncio.to_thread(schema.upgrade, conninfo)
                await schema.require(conn)
            finally:
                await conn.close()
            await opened.pool.open()
        except BaseException:
            if cluster is not None:
                await asyncio.to_thread(cluster.leave)
            raise
        return opened

    async def close(self) -> None:
        await self.endings.close()
        await self.notifier.close()
        await self.pool.close()
        if self._cluster is not None:
            await asyncio.to_thread(self._cluster.leave)

    async def fetch(self, query: Query[T]) -> T:
        return await self.pool.fetch(query)

    async def copy(self, statement: str, data: str) -> None:
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


def reach(database: Server | EmbeddedCluster) -> tuple[str, Cluster | None]:
    """The connection string; for an embedded cluster also the cluster, started, with us as one of its users."""
    if isinstance(database, Server):
        return database.conninfo, None
    cluster = embedded.cluster(database.path)
    return cluster.use(), cluster
