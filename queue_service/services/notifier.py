"""Sends notices: the first at once, as part of the very statement that causes it; those that follow within a moment are
gathered and sent together, after the commits that cause them.

A commit that notifies takes a lock shared by the whole server: with a notice for each run, 16 connections commit 4,600
times a second instead of 21,500. So the moment follows the rate: it is 1 ms up to 4,000 notices a second, and 10 ms in a
flood.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection

from queue_service.db.channels import Notice, notify
from queue_service.db.query import Query
from queue_service.errors import DatabaseUnavailable
from queue_service.exceptions import message
from queue_service.logs import get_logger

log = get_logger(__name__)

SHORTEST, LONGEST = 0.001, 0.010
# Where more than one comes in this time, the moment grows, and where fewer come, it shrinks.
EACH = 0.00025


class Notifier:
    def __init__(self, fetch: Callable[[Query[None]], Awaitable[None]]) -> None:
        self._fetch = fetch
        # By channel, since one must not make the other wait.
        self._channels: dict[str, _Channel] = {}

    def send(self, notices: Collection[Notice]) -> None:
        """Send these soon. Never raises and never waits: a lost notice costs its reader one poll interval."""
        for notice in notices:
            self._channel(notice.channel).send(notice)

    def try_reserve(self, channel: str) -> bool:
        """True if nothing was sent to the channel a moment ago. Then the caller's own statement must send its notice, which
        saves a round trip; other notices for the channel wait for a moment."""
        return self._channel(channel).try_reserve()

    async def close(self) -> None:
        """Send what is pending."""
        for channel in self._channels.values():
            await channel.flush()

    def _channel(self, name: str) -> _Channel:
        channel = self._channels.get(name)
        if channel is None:
            channel = self._channels[name] = _Channel(self._fetch)
        return channel


class _Channel:
    def __init__(self, fetch: Callable[[Query[None]], Awaitable[None]]) -> None:
        self._fetch = fetch
        # A dict for its order and for dropping what is said twice.
        self._pending: dict[Notice, None] = {}
        self._sender: asyncio.Task[None] | None = None
        self._moment = SHORTEST
        self._heard = 0

    def send(self, notice: Notice) -> None:
        self._pending[notice] = None
        self._heard += 1
        if self._sender is None or self._sender.done():
            self._sender = asyncio.create_task(self._send(), name="notifier")

    def try_reserve(self) -> bool:
        if self._sender is not None and not self._sender.done():
            return False
        self._sender = asyncio.create_task(self._send(), name="notifier")
        return True

    async def flush(self) -> None:
        if self._sender is not None:
            await self._sender

    async def _send(self) -> None:
        """Send what is pending, wait for a moment, and again until a moment brings nothing."""
        while True:
            if self._pending:
                notices, self._pending = list(self._pending), {}
                try:
                    await self._fetch(notify(notices, alone=True))
                except DatabaseUnavailable as lost:
                    log.debug("notices not sent; polling will find what they announce", why=str(lost))
                except Exception as refused:  # noqa: BLE001 - whatever it is, the next ones may go out
                    log.error(
                        "the database refuses notices; polling will find what they announce", why=message(refused)
                    )
            self._heard = 0
            await asyncio.sleep(self._moment)
            self._moment = min(max(self._heard * EACH, SHORTEST), LONGEST)
            if not self._pending:
                return
