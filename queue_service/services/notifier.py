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
        # By channel, since one must not make the other wait. Dicts for their order and for dropping what is said twice.
        self._pending: dict[str, dict[Notice, None]] = {}
        self._senders: dict[str, asyncio.Task[None]] = {}

    def send(self, notices: Collection[Notice]) -> None:
        """Send these soon. Never raises and never waits: a lost notice costs its reader one poll interval."""
        for notice in notices:
            self._pending.setdefault(notice.channel, {})[notice] = None
            sender = self._senders.get(notice.channel)
            if sender is None or sender.done():
                task = asyncio.create_task(self._send(notice.channel), name=f"notifier {notice.channel}")
                self._senders[notice.channel] = task

    def may_ride(self, channel: str) -> bool:
        """True if nothing was sent there for a while: then a notice may go with the caller's own statement, which saves
        a round trip, and the channel is quiet from now on."""
        sender = self._senders.get(channel)
        if sender is not None and not sender.done():
            return False
        self._senders[channel] = asyncio.create_task(self._send(channel, QUIET), name=f"notifier {channel}")
        return True

    async def close(self) -> None:
        """Send what is pending."""
        for sender in list(self._senders.values()):
            await sender

    async def _send(self, channel: str, delay: float = 0) -> None:
        await asyncio.sleep(delay)
        while notices := self._pending.pop(channel, None):
            try:
                await self._fetch(notify(list(notices), alone=True))
            except DatabaseUnavailable as lost:
                log.debug("notices not sent; polling will find what they tell of", count=len(notices), why=str(lost))
            await asyncio.sleep(QUIET)
