"""The connections to channels that this process holds. Each is one process's at a time, while it renews its lease."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection

from queue_service.app import App
from queue_service.connections import queries as connections
from queue_service.connections.queries import Channel
from queue_service.errors import DatabaseUnavailable
from queue_service.exceptions import message, type_name
from queue_service.logs import get_logger

log = get_logger(__name__)


class Holding:
    """`lost` is called with platform and channel id when a connection went to another process."""

    def __init__(self, app: App, lost: Callable[[str, str], object] | None) -> None:
        self._app = app
        self._lost = lost
        self._held: set[Channel] = set()
        self._changing = asyncio.Lock()

    async def hold(self, channel: Channel) -> bool:
        """False: another live process holds it."""
        async with self._changing:
            query = connections.hold(channel, self._app.identity, self._app.settings.lease)
            # A connection we had may have lapsed, and be another's by now.
            self._held.discard(channel)
            if await self._app.fetch(query):
                self._held.add(channel)
            return channel in self._held

    async def release(self, channel: Channel) -> bool:
        """False: it was not held here."""
        async with self._changing:
            self._held.discard(channel)
            return channel in await self._app.fetch(connections.release([channel], self._app.identity))

    async def release_all(self) -> None:
        """Out of reach, they lapse by themselves."""
        held, self._held = self._held, set()
        with contextlib.suppress(DatabaseUnavailable):
            await self._app.fetch(connections.release(held, self._app.identity))

    def __contains__(self, channel: object) -> bool:
        return channel in self._held

    async def renew(self) -> None:
        """Push the deadline of every connection that is held here, and report those that are not any more."""
        async with self._changing:
            if not self._held:
                return
            query = connections.renew(self._held, self._app.identity, self._app.settings.lease)
            gone = self._held - await self._app.fetch(query)
            self._held -= gone
        self._report(gone)

    def _report(self, gone: Collection[Channel]) -> None:
        for platform, channel_id in sorted(gone):
            log.warning("lost the connection to a channel", platform=platform, channel_id=channel_id)
            try:
                if self._lost is not None:
                    self._lost(platform, channel_id)
            except BaseException as error:  # noqa: BLE001 - the caller's mistake must not end the renewal of the others
                log.error("the callback for a lost connection raised", error=type_name(error), why=message(error))
