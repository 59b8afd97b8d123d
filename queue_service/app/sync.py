"""The App's methods, blocking: each call runs on one event loop, in a thread of its own.

A call with `conn=` runs in the calling thread instead, on the caller's connection, and needs no loop at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import CancelledError
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar

from queue_service.app.core import Core
from queue_service.app.events import Events
from queue_service.app.queues import Queues
from queue_service.app.runs import Runs
from queue_service.app.schedules import Schedules
from queue_service.app.turns import Turns
from queue_service.db.borrowed import borrow
from queue_service.db.query import Query
from queue_service.errors import ConfigError, DatabaseUnavailable
from queue_service.events.model import Event

O = TypeVar("O")  # noqa: E741 - the object whose methods are made blocking
P = ParamSpec("P")
T = TypeVar("T")


class Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        # What is submitted under it comes before the loop's stop, and so is run or cancelled. Later, nobody would answer.
        self._submitting = threading.Lock()

    def start(self) -> None:
        """Start the thread. ConfigError if it runs already."""
        if self._loop is not None:
            raise ConfigError("This is open already. Take another `app.sync` for a second use at the same time.")
        self._loop, self._pid = asyncio.new_event_loop(), os.getpid()
        self._thread = threading.Thread(target=_run, args=(self._loop,), name="queue_service sync", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Cancel what is still going on there, and end the thread. One that was not started is left as it is."""
        if self._is_forked:
            self._loop = None
            return
        with self._submitting:
            loop, self._loop = self._loop, None
            if loop is not None:
                # A closed loop: a callback has ended the thread.
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(loop.stop)
        if loop is not None and self._thread is not None:
            self._thread.join()

    @property
    def is_running(self) -> bool:
        """Whether there is a thread. After a fork there is none."""
        return self._loop is not None and not self._is_forked

    def call(self, call: Coroutine[Any, Any, T]) -> T:
        """The result of the coroutine, run in the thread. ConfigError if there is none, if it was left behind by a fork, or
        this is that thread; DatabaseUnavailable where another thread stops it meanwhile."""
        if self._is_forked:
            call.close()
            raise ConfigError(
                "This `app.sync` was opened before a fork, and its thread is in the parent process. Open another one here: "
                "`with app.sync as q:`."
            )
        if threading.current_thread() is self._thread:
            call.close()
            raise ConfigError("A callback (`on_progress`) cannot call its own App: it would wait for itself.")
        with self._submitting:
            if self._loop is None:
                call.close()
                raise ConfigError("This App is not connected. Use it inside `with app.sync as q:`.")
            submitted = asyncio.run_coroutine_threadsafe(_outcome(call), self._loop)
        try:
            result, error = submitted.result()
        except CancelledError:
            # It may not have begun.
            call.close()
            raise DatabaseUnavailable("This App was closed while a call of another thread waited for it.") from None
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    @property
    def _is_forked(self) -> bool:
        return self._loop is not None and os.getpid() != self._pid


async def _outcome(call: Coroutine[Any, Any, T]) -> tuple[T | None, BaseException | None]:
    """As values: SystemExit, say, that a callback raises is for its caller, and would end the loop for all."""
    try:
        return await call, None
    except asyncio.CancelledError:
        raise
    except BaseException as error:  # noqa: BLE001 - raised where it is waited for
        return None, error


def _run(loop: asyncio.AbstractEventLoop) -> None:
    # In the end the runner cancels the tasks that are left, and waits for them. One that was dropped would give its
    # connection back whenever the garbage collector finds it.
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.get_loop().run_forever()


class Blocking(Generic[O]):
    """An object whose methods are those of `asynchronous`, blocking."""

    def __init__(self, asynchronous: O, loop: Loop) -> None:
        self._asynchronous = asynchronous
        self._loop = loop


def blocking(method: Callable[Concatenate[O, P], Coroutine[Any, Any, T]]) -> Callable[Concatenate[Blocking[O], P], T]:
    """The blocking form of an asynchronous method, with its parameters and its documentation."""

    @functools.wraps(method)
    def call(self: Blocking[O], /, *args: P.args, **kwargs: P.kwargs) -> T:
        conn = kwargs.get("conn")
        if conn is None:
            return self._loop.call(method(self._asynchronous, *args, **kwargs))
        if _is_asynchronous(conn):
            raise ConfigError(
                f"{type(conn).__name__} is asynchronous: use the App itself, not its `sync` twin, with it."
            )
        return _here(method(self._asynchronous, *args, **kwargs))

    return call


def _is_asynchronous(conn: object) -> bool:
    try:
        return borrow(conn).is_async
    except ConfigError:
        # No connection at all: the method refuses it, after it looked at its other arguments.
        return False


def _here(call: Coroutine[Any, Any, T]) -> T:
    """Run in this thread what works on a blocking connection, and so has nothing to wait for."""
    try:
        call.send(None)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]
    raise AssertionError("a call on a blocking connection waited for an event loop")


class SyncTurns(Blocking[Turns]):
    """`app.turns`, blocking."""

    arm = blocking(Turns.arm)
    dispatch = blocking(Turns.dispatch)
    send = blocking(Turns.send)
    unsend = blocking(Turns.unsend)
    extend = blocking(Turns.extend)
    withhold = blocking(Turns.withhold)
    restore = blocking(Turns.restore)
    reset_admission = blocking(Turns.reset_admission)
    commit_reply = blocking(Turns.commit_reply)
    fail = blocking(Turns.fail)
    fail_deployment = blocking(Turns.fail_deployment)
    reject = blocking(Turns.reject)
    discharge = blocking(Turns.discharge)
    sweep = blocking(Turns.sweep)
    is_live = blocking(Turns.is_live)
    outcome = blocking(Turns.outcome)
    wait = blocking(Turns.wait)
    list = blocking(Turns.list)
    tally = blocking(Turns.tally)


class SyncEvents(Blocking[Events]):
    """`app.events`, blocking."""

    append = blocking(Events.append)
    append_many = blocking(Events.append_many)
    append_of = blocking(Events.append_of)
    read = blocking(Events.read)
    head = blocking(Events.head)
    stream = blocking(Events.stream)
    set_state = blocking(Events.set_state)
    trim = blocking(Events.trim)

    def follow(self, stream: str, *, after: int = 0) -> Iterator[Event]:
        """As `Events.follow`: an iterator that waits for each next event."""
        events = self._asynchronous.follow(stream, after=after)

        async def following() -> Event | None:
            return await anext(events, None)

        async def close() -> None:
            await events.aclose()

        try:
            while (event := self._loop.call(following())) is not None:
                yield event
        finally:
            if self._loop.is_running:
                self._loop.call(close())


class SyncQueues(Blocking[Queues]):
    """`app.queues`, blocking."""

    list = blocking(Queues.list)
    pause = blocking(Queues.pause)
    resume = blocking(Queues.resume)
    purge = blocking(Queues.purge)
    limit = blocking(Queues.limit)


class SyncSchedules(Blocking[Schedules]):
    """`app.schedules`, blocking."""

    put = blocking(Schedules.put)
    get = blocking(Schedules.get)
    next = blocking(Schedules.next)
    list = blocking(Schedules.list)
    run_now = blocking(Schedules.run_now)
    pause = blocking(Schedules.pause)
    resume = blocking(Schedules.resume)
    delete = blocking(Schedules.delete)
    store_declared = blocking(Schedules.store_declared)


class SyncApp(Blocking[Runs]):
    """Use as `with app.sync as q:`. May be used from any thread, but not from inside
    an event loop, which it would block."""

    def __init__(self, core: Core) -> None:
        super().__init__(Runs(core), Loop())
        self._core = core
        self.turns = SyncTurns(Turns(core), self._loop)
        self.events = SyncEvents(Events(core), self._loop)
        self.queues = SyncQueues(Queues(core), self._loop)
        self.schedules = SyncSchedules(Schedules(core), self._loop)

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> None:
        """Connect, as `App.open` does, once: for a second use at the same time take another `app.sync`."""
        self._loop.start()
        try:
            self._loop.call(self._core.open())
        except BaseException:
            self._loop.stop()
            raise

    def close(self) -> None:
        """Let go of the connections. Closing what is not open changes nothing."""
        if self._loop.is_running:
            try:
                self._loop.call(self._core.close())
            finally:
                self._loop.stop()
        else:
            self._loop.stop()

    def fetch(self, query: Query[T]) -> T:
        """Run one query on a connection of the pool, and return its result."""
        return self._loop.call(self._core.fetch(query))

    enqueue = blocking(Runs.enqueue)
    enqueue_many = blocking(Runs.enqueue_many)
    wait = blocking(Runs.wait)
    wait_many = blocking(Runs.wait_many)
    get = blocking(Runs.get)
    cancel = blocking(Runs.cancel)
    retry = blocking(Runs.retry)
    retry_many = blocking(Runs.retry_many)
    delete = blocking(Runs.delete)
