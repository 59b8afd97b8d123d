"""What the App and its faces share: settings, the registry of tasks, and the connections of this process.

The connections are opened by the first `open` and closed by the last `close`. The faces hold this, and not the App.
"""

from __future__ import annotations

import asyncio
import copy
import uuid
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from queue_service.app.opened import Opened
from queue_service.db import channels
from queue_service.db.borrowed import borrow
from queue_service.db.channels import Notice
from queue_service.db.query import Query
from queue_service.db.steps import fetch_any
from queue_service.db.url import EmbeddedCluster, Server
from queue_service.errors import ConfigError
from queue_service.schedules.model import NewSchedule
from queue_service.settings import Settings
from queue_service.tasks import Tasks
from queue_service.waiting import to_its_end

T = TypeVar("T")


class Core:
    def __init__(self, database: Server | EmbeddedCluster, settings: Settings) -> None:
        self.database = database
        self.settings = settings
        self.tasks = Tasks()
        # The schedules that `@app.schedule` declared, by name.
        self.declared: dict[str, NewSchedule] = {}
        # Names this process among those that hold connections; a process that starts again is another one.
        self.identity = uuid.uuid4().hex
        self._opened: Opened | None = None
        self._opening: asyncio.Task[None] | None = None
        self._users = 0

    def twin(self) -> Core:
        """The same tasks and the same database, with connections of its own."""
        twin = Core(self.database, self.settings)
        twin.tasks, twin.declared, twin.identity = self.tasks, self.declared, self.identity
        return twin

    def with_tasks(self, tasks: Tasks) -> Core:
        """The same connections, as they are now, with other tasks."""
        other = copy.copy(self)
        other.tasks = tasks
        return other

    async def open(self) -> None:
        """Connect, if nobody has: however many ask at once, one opening serves them all. Raises DatabaseUnavailable,
        SchemaMismatch, EmbeddedUnavailable."""
        self._users += 1
        try:
            while self._opened is None:
                await asyncio.shield(self._begun())
        except BaseException:
            self._users -= 1
            if not self._users and self._opening is not None:
                # The last one who wanted it was cancelled. It undoes what it has done.
                self._opening.cancel()
            raise

    def _begun(self) -> asyncio.Task[None]:
        if self._opening is None:
            self._opening = asyncio.create_task(self._open(), name="opening")
            # Where everyone who wanted it was cancelled, nobody else asks what became of it.
            self._opening.add_done_callback(lambda task: task.cancelled() or task.exception())
        if self._opening.get_loop() is not asyncio.get_running_loop():
            raise ConfigError("This App is being opened on another event loop. Open another one here.")
        return self._opening

    async def _open(self) -> None:
        try:
            opened = await Opened.at(self.database, self.settings)
        finally:
            self._opening = None
        if self._users:
            self._opened = opened
        else:
            await opened.close()

    async def close(self) -> None:
        """Let go of the connections and of the embedded cluster, once this was called as often as `open`; to the end, even
        if this is cancelled meanwhile."""
        self._users = max(0, self._users - 1)
        if not self._users and self._opened is not None:
            opened, self._opened = self._opened, None
            await to_its_end(opened.close())

    @property
    def is_open(self) -> bool:
        """Whether it holds connections."""
        return self._opened is not None

    @property
    def opened(self) -> Opened:
        """The connections. ConfigError while there are none, after a fork, or on another event loop."""
        if self._opened is None:
            raise ConfigError("This App is not connected. Use it inside `async with app:` (or `with app.sync as q:`).")
        self._opened.check_caller()
        return self._opened

    async def fetch(self, query: Query[T], conn: Any = None) -> T:
        """Run one query on a connection of the pool, or on `conn`, the caller's."""
        return await (self.opened.pool.fetch(query) if conn is None else fetch_any(query, borrow(conn)))

    def notify(self, notices: Iterable[Notice]) -> None:
        """Send notices soon, together with the others of this process."""
        self.opened.notifier.send(list(notices))

    async def announce(self, notices: Sequence[Notice], conn: Any = None) -> None:
        """Send notices of what was done: soon, or on `conn`, the caller's, with its transaction."""
        if conn is None:
            self.notify(notices)
        elif notices:
            await self.fetch(channels.notify(notices, alone=False), conn)

    def rides_along(self, channel: str, conn: Any = None) -> bool:
        """Whether a statement is to send its notices itself, with its commit: always on `conn`, the caller's."""
        return conn is not None or self.opened.notifier.try_reserve(channel)
