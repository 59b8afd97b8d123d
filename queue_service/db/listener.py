"""LISTEN on a connection of its own, kept alive, and honest about what it may have missed.

A `NoticesMissed` says "notices may have been lost: read again". One comes first, once listening has begun (so that whoever
reads upon it misses nothing that is committed later), and after every reconnection.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import psycopg
from psycopg import sql

from queue_service.backoff import Pauses, spread
from queue_service.db.channels import Notice
from queue_service.db.execute import translated
from queue_service.db.pool import Connection, connect
from queue_service.errors import DatabaseUnavailable
from queue_service.logs import get_logger

log = get_logger(__name__)

# A connection that answers neither notices nor a question for this long is given up.
PING_INTERVAL = 10.0
PING_DEADLINE = 5.0
FIRST_PAUSE, MAX_PAUSE = 0.1, 5.0


@dataclass(frozen=True, slots=True)
class NoticesMissed:
    pass


class Listener:
    """Iterate `notices()` for as long as they are wanted; it survives every outage of the database."""

    def __init__(self, conninfo: str, channels: Sequence[str], *, application: str = "queue_service listener") -> None:
        self._conninfo = conninfo
        self._channels = channels
        self._application = application
        self.connected = False

    async def notices(self) -> AsyncIterator[Notice | NoticesMissed]:
        """Each notice as it comes, for ever. A NoticesMissed comes first, and again whenever notices may have been lost:
        then look yourself. An outage ends nothing; it is logged once."""
        pauses = Pauses(FIRST_PAUSE, MAX_PAUSE, jitter=spread)
        while True:
            conn = None
            try:
                conn = await self._listen()
                if pauses.count:
                    log.info("listening again")
                pauses.reset()
                self.connected = True
                yield NoticesMissed()
                async for notice in self._read(conn):
                    yield notice
            except DatabaseUnavailable as lost:
                if not pauses.count:
                    log.warning("listener lost its connection; polling until it is back", why=str(lost))
            finally:
                self.connected = False
                if conn is not None:
                    await conn.close()
            # Jitter: a restarted server must not be met by every listener at once.
            await asyncio.sleep(pauses.next())

    async def _listen(self) -> Connection:
        conn = await connect(self._conninfo, application=self._application)
        try:
            with translated():
                for channel in self._channels:
                    await conn.execute(sql.SQL("listen {}").format(sql.Identifier(channel)))
        except BaseException:
            await conn.close()
            raise
        return conn

    async def _read(self, conn: Connection) -> AsyncIterator[Notice]:
        with translated():
            while True:
                async for notify in conn.notifies(timeout=PING_INTERVAL):
                    yield Notice(notify.channel, notify.payload)
                await _ping(conn)


async def _ping(conn: Connection) -> None:
    try:
        async with asyncio.timeout(PING_DEADLINE):
            await conn.execute("select 1")
    except TimeoutError:
        raise psycopg.OperationalError("the listening connection stopped answering") from None
