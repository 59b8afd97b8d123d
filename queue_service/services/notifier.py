"""Sends notices after the commit they tell of: the first at once, then at most one statement each 10 ms, whatever the
rate. A commit that notifies takes a lock shared by the whole server, so a notice for each run would cap its commits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection

from queue_service.db.channels import Notice, notify
from queue_service.db.query import Query
from queue_service.errors import DatabaseUnavailable
from queue_service.logs import get_logger

log = get_logger(__name__)

QUIET = 0.010


class Notifier:
    def __init__(self, fetch: Callable[[Query[None]], Awaitable[None]]) -> None:
        self._fetch = fetch
        # A dict for its order and for dropping what is said twice.
        self._pending: dict[Notice, None] = {}
        self._sender: asyncio.Task[None] | None = None

    def send(self, notices: Collection[Notice]) -> None:
        """Send these soon. Never raises and never waits: a lost notice costs its reader one poll interval."""
        self._pending.update(dict.fromkeys(notices))
        if self._sender is None or self._sender.done():
            self._sender = asyncio.create_task(self._send(), name="notifier")

    async def close(self) -> None:
        """Send what is pending."""
        if self._sender is not None:
            await self._sender

    async def _send(self) -> None:
        while self._pending:
            notices, self._pending = list(self._pending), {}
            try:
                await self._fetch(notify(notices, alone=True))
            except DatabaseUnavailable as lost:
                log.debug("notices not sent; they will be found by polling", count=len(notices), why=str(lost))
            await asyncio.sleep(QUIET)
