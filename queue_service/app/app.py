"""The object users hold: it registers tasks, opens and closes the connections, and has the faces for all the rest."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any, ParamSpec, Self, TypeVar, overload

from queue_service import settings as settings_module
from queue_service.app.core import Core
from queue_service.app.events import Events
from queue_service.app.hooks import Hooks, HookT, check_hook
from queue_service.app.opened import Opened
from queue_service.app.queues import Queues
from queue_service.app.runs import Runs
from queue_service.app.schedules import MisfireWord, Schedules, TaskT
from queue_service.app.sync import SyncApp
from queue_service.app.turns import Turns
from queue_service.db import url
from queue_service.db.channels import Notice
from queue_service.db.pool import Pool
from queue_service.db.query import Query
from queue_service.db.session import Address
from queue_service.db.url import EmbeddedCluster, Server
from queue_service.errors import ConfigError
from queue_service.schedules.model import NewSchedule
from queue_service.settings import Settings
from queue_service.tasks import BatchDecorator, Decorator, OnLost, Retry, Task, Tasks, duration
from queue_service.turn import Turn

P = ParamSpec("P")
T = TypeVar("T")


class App(Runs):
    """Tasks and a database.

    `database` is a Postgres URL or conninfo, or `file:PATH` (or a path) for an embedded cluster there; without it the
    environment decides, and the embedded cluster in the data directory comes last. Nothing is connected before
    `async with app` (or `with app.sync`).
    """

    def __init__(self, database: str | None = None, *, settings: Settings | None = None) -> None:
        settings = settings or settings_module.load(os.environ)
        super().__init__(Core(url.choose(database, os.environ, settings.data_dir), settings))
        self.turns = Turns(self._core)
        self.events = Events(self._core)
        self.queues = Queues(self._core)
        self.schedules = Schedules(self._core)
        self.hooks = Hooks()

    # Tasks

    @overload
    def task(self, function: Callable[P, Any], /) -> Task[P, Any]: ...
    @overload
    def task(
        self,
        function: None = ...,
        /,
        *,
        queue: str = ...,
        name: str | None = ...,
        timeout: timedelta | float | None = ...,
        retry: Retry | None = ...,
        process: bool = ...,
        on_lost: OnLost = ...,
    ) -> Decorator: ...
    @overload
    def task(
        self,
        function: None = ...,
        /,
        *,
        batch: int,
        queue: str = ...,
        name: str | None = ...,
        timeout: timedelta | float | None = ...,
        retry: Retry | None = ...,
        on_lost: OnLost = ...,
    ) -> BatchDecorator: ...
    def task(
        self,
        function: Callable[..., Any] | None = None,
        /,
        *,
        queue: str = "default",
        name: str | None = None,
        timeout: timedelta | float | None = None,
        retry: Retry | None = None,
        process: bool = False,
        batch: int | None = None,
        on_lost: OnLost = "retry",
    ) -> Any:
        """Register a function as a task, under its own name unless `name` says another. The name is what is stored: keep
        it when the function moves. `timeout` bounds one attempt; `retry` says how often a raising handler is tried, and
        when. With `process`, for a plain function at the top of its module, each run has a process of the worker's to
        itself; JSON goes in and out, and a process that dies is only that attempt's failure. With `batch`, the handler
        takes a list of up to so many runs, and returns None, or what becomes of each. With `on_lost="fail"`, a run that was
        claimed and whose worker was lost, or stopped it, ends `failed` instead of being tried again: with
        `Retry(max_attempts=1)` its handler is begun at most once.
        """
        if retry is not None and not isinstance(retry, Retry):
            raise ConfigError(f"retry must be a Retry, such as Retry(max_attempts=5), not {retry!r}.")

        def register(function: Callable[..., Any]) -> Task[..., Any]:
            task: Task[..., Any] = Task(
                function,
                name=name or function.__name__,
                queue=queue,
                timeout=None if timeout is None else duration(timeout, "timeout", positive=True),
                retry=retry or Retry(),
                enqueue=self.enqueue,
                process=process,
                batch=batch,
                on_lost=on_lost,
            )
            self.tasks.add(task)
            return task

        return register if function is None else register(function)

    def schedule(
        self,
        cron: str | None = None,
        /,
        *,
        every: timedelta | float | None = None,
        timezone: str = "UTC",
        misfire: MisfireWord = "last",
        payload: Mapping[str, Any] | None = None,
        queue: str | None = None,
        priority: int = 0,
        expires_in: timedelta | float | None = None,
        turn: Turn | None = None,
        name: str | None = None,
    ) -> Callable[[TaskT], TaskT]:
        """Above `@app.task`: declare that a task is to run by itself, as `app.schedules.put` says, under the task's own
        name unless `name` says another. A worker stores what is declared when it starts.
        """
        options = {"every": every, "timezone": timezone, "misfire": misfire, "queue": queue, "priority": priority}
        return self.schedules.declare(cron, name, payload, {**options, "expires_in": expires_in, "turn": turn})

    def on_start(self, hook: HookT, /) -> HookT:
        """Have each worker call this function, plain or asynchronous, once it is connected and before it claims anything.
        One that raises keeps the worker from starting."""
        check_hook(hook)
        self.hooks.on_start.append(hook)
        return hook

    def on_stop(self, hook: HookT, /) -> HookT:
        """Have each worker call this function, plain or asynchronous, when all of its handlers have ended and it is still
        connected; the last that was registered comes first. It has 3 s, and what it raises is logged."""
        check_hook(hook)
        self.hooks.on_stop.append(hook)
        return hook

    # Opening and closing

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(self) -> None:
        """Connect. An embedded cluster is started, and migrated if it is new. Raises DatabaseUnavailable, SchemaMismatch,
        EmbeddedUnavailable. Each `open` needs its `close`; only the first and the last do anything.
        """
        await self._core.open()

    async def close(self) -> None:
        """Let go of the connections and of the embedded cluster, once this was called as often as `open`."""
        await self._core.close()

    @property
    def sync(self) -> SyncApp:
        """The same methods, blocking, for code without an event loop: `with app.sync as q: q.enqueue(…)`."""
        return SyncApp(self._core.twin())

    # What it holds

    @property
    def settings(self) -> Settings:
        """Durations, limits and retention. They may be set while the App is closed."""
        return self._core.settings

    @settings.setter
    def settings(self, settings: Settings) -> None:
        """Set them, for an App that is closed."""
        self._core.settings = settings

    @property
    def tasks(self) -> Tasks:
        """The registered tasks, by name."""
        return self._core.tasks

    @property
    def declared(self) -> Mapping[str, NewSchedule]:
        """The schedules that `@app.schedule` declared, by name."""
        return self._core.declared

    @property
    def identity(self) -> str:
        """Names this process among those that hold connections of chat platforms; another one after a restart."""
        return self._core.identity

    @property
    def database(self) -> Server | EmbeddedCluster:
        """Where this App connects to. It may be set while the App is closed."""
        return self._core.database

    @database.setter
    def database(self, database: Server | EmbeddedCluster) -> None:
        """Set it, for an App that is closed."""
        self._core.database = database

    @property
    def is_open(self) -> bool:
        """Whether it holds connections."""
        return self._core.is_open

    @property
    def opened(self) -> Opened:
        """The connections. ConfigError while the App is closed, after a fork, or on another event loop."""
        return self._core.opened

    @property
    def conninfo(self) -> str:
        """How to reach the database this App is connected to, for libpq. ConfigError as for `opened`."""
        return self._core.opened.address.conninfo

    @property
    def address(self) -> Address:
        """The same, and what is between. ConfigError as for `opened`."""
        return self._core.opened.address

    @property
    def pool(self) -> Pool:
        """The pool of connections. Their sessions have our settings: a table of yours is found by its schema's name, as in
        `public.orders`. ConfigError as for `opened`."""
        return self._core.opened.pool

    async def fetch(self, query: Query[T]) -> T:
        """Run one query on a connection of the pool, and return its result."""
        return await self._core.fetch(query)

    def notify(self, notices: Iterable[Notice]) -> None:
        """Send notices soon, together with the others of this process."""
        self._core.notify(notices)
