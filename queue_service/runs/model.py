"""What a run is, who may write about it, and how it ends."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar, overload

import msgspec

from queue_service import turn
from queue_service.errors import ClaimLost, ConfigError
from queue_service.runs import context, stopped
from queue_service.runs.claim import Claim, assert_held
from queue_service.runs.context import RunContext, RunStep, RunTransaction
from queue_service.turn import Input, Turn

if TYPE_CHECKING:
    import psycopg

C = TypeVar("C")
P = ParamSpec("P")


class RunState(StrEnum):
    """The first two are live and in `runs`; the others are endings and in `finished_runs`."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def finished(self) -> bool:
        """Whether it is an ending."""
        return self not in {RunState.QUEUED, RunState.RUNNING}


class Attempt(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One claim of a run that failed, lost its worker, or was the last: by whom, from when to when, and what went wrong.

    `ended_at` is None while it goes on. `error` is as in Run, of an earlier attempt with message and traceback shortened;
    None where nothing went wrong.
    """

    attempt: int
    worker_id: int | None
    claimed_at: datetime
    ended_at: datetime | None = None
    error: Mapping[str, Any] | None = None


class Progress(msgspec.Struct, frozen=True):
    """How far a running run said that it is: `value` from 0 to 1, at a time of the database's clock."""

    value: float
    at: datetime
    note: str | None = None


class Run(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One unit of work, as it was when it was read. `payload`, `metadata`, `result` and `error` are JSON values.

    `error` is an object with `reason` (`raised`, `timeout`, `process_died`, `worker_lost`, `interrupted`, `cancelled`,
    `expired`, `result_refused`, `unreadable`), `message`, and where an exception was raised `type` and `traceback`; with
    `process_died` also `signal`, where it was one. Of a live run it is the last failure's.
    `attempt` counts claims, `failures` counts errors of the handler, `losses` counts workers that vanished.
    `attempts` are the one that goes on or was the last, and before it up to 20 that failed or lost their worker: what was
    snoozed or handed back is not among them, and numbers are missing. A handler's own run comes without them.
    `reported` is the progress that the handler at work reported last, `progress` in JSON.
    `unreadable` says what of the run could not be read as it is stored, which somebody has put there by other means than
    this library; None is as it should be. Such a run is never begun. What could not be read is None or the nearest value.
    """

    id: int
    queue: str
    task: str
    state: RunState
    payload: Mapping[str, Any]
    attempt: int
    failures: int
    losses: int
    priority: int
    created_at: datetime
    run_at: datetime
    expires_at: datetime | None = None
    claimed_at: datetime | None = None
    finished_at: datetime | None = None
    worker_id: int | None = None
    max_attempts: int | None = None
    retry_delay: timedelta | None = None
    timeout: timedelta | None = None
    singleton_key: str | None = None
    ordering_key: str | None = None
    organization_id: str | None = None
    metadata: Mapping[str, Any] | None = None
    result: Any = None
    error: Mapping[str, Any] | None = None
    cancel_requested: bool = False
    attempts: tuple[Attempt, ...] = ()
    reported: Progress | None = msgspec.field(default=None, name="progress")
    unreadable: str | None = None

    @property
    def claim(self) -> Claim:
        """The right to work on this run, as it was when the run was read."""
        return Claim(self.id, self.attempt)

    @property
    def turn(self) -> Turn | None:
        """The turn that this run works on, as it was dispatched; None for a run that works on none."""
        return turn.of_run(self.metadata)

    @property
    def cancelled(self) -> bool:
        """For the handler this run was given to: whether it should stop, and its outcome no longer counts. True once the
        run was cancelled, lost, over its time, or handed back because the worker stops. A handler in a thread cannot be
        interrupted, and looks here between its steps.
        """
        return stopped.is_marked(self._mark)

    @overload
    def transaction(self) -> RunTransaction[psycopg.AsyncConnection[Any], psycopg.Connection[Any]]: ...
    @overload
    def transaction(self, conn: C) -> RunTransaction[C, C]: ...
    def transaction(self, conn: Any = None) -> RunTransaction[Any, Any]:
        """For the handler this run was given to: `async with` (in a thread or a process `with`) a transaction that ends the
        run `succeeded` as it commits. What it wrote and the ending are stored together, or neither is.

        The block gets a psycopg connection, or `conn` again: a psycopg or SQLAlchemy connection or session, or Django's,
        that has no transaction under way; the block begins and commits it. What `result` is set to in the block is the
        run's result. If the block raises, all is rolled back. Raises ClaimLost, with all rolled back, if the run is not
        this handler's any more, and ConfigError outside its handler.
        """
        return self._context().transaction(conn)

    @overload
    def step(self, name: str, /) -> RunStep[psycopg.AsyncConnection[Any], psycopg.Connection[Any]]: ...
    @overload
    def step(self, name: str, /, *, conn: C) -> RunStep[C, C]: ...
    @overload
    def step(
        self, name: str, function: Callable[P, Awaitable[Any]], /, *args: P.args, **kwargs: P.kwargs
    ) -> Coroutine[Any, Any, Any]: ...
    @overload
    def step(self, name: str, function: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs) -> Any: ...
    def step(self, name: str, function: Any = None, /, *args: Any, **kwargs: Any) -> Any:
        """For the handler this run was given to: do a named part of it once, however many attempts the run takes. Its
        result is stored as JSON, and a later attempt gets that instead of doing the part again.

        With a function: call it with these arguments, store what it returns, and return that as it is stored. A coroutine
        handler awaits this, whatever the function is; in a thread or a process the result comes at once, and the function
        is a plain one. What the function raises is raised, and nothing is stored.

        Without one: a block for `async with`, or in a thread or a process for `with`. It begins a transaction, on a
        connection of the worker's or on `conn` (as in `transaction`), and gets an object with `done`, `result` and `conn`.
        Where `done` is True, `result` is what was stored, and there is nothing to do. Otherwise what is written on `conn`
        and what `result` is set to are committed together as the block is left. If it raises, all is rolled back.

        A name stands for one part of the run. Raises ConfigError for one that this attempt has used before, and outside the
        handler; PayloadRefused for a result that is not JSON, or too large; ClaimLost, with nothing stored, if the run is
        not this handler's any more.
        """
        return context.step(self._context(), name, function, args, kwargs)

    @overload
    def assert_held(self, conn: psycopg.Connection[Any]) -> None: ...
    @overload
    def assert_held(self, conn: psycopg.AsyncConnection[Any]) -> Awaitable[None]: ...
    @overload
    def assert_held(self, conn: Any) -> Any: ...
    def assert_held(self, conn: Any) -> Any:
        """Raise ClaimLost if the run is not this handler's any more; otherwise nobody can take it before the transaction
        of `conn` ends. For handlers that commit several times: before each commit. To be awaited where `conn` is
        asynchronous. Whoever would take or cancel the run waits meanwhile, so let the commit come soon.
        """
        return assert_held(self.claim, conn)

    def progress(self, value: float, note: str | None = None) -> bool:
        """For the handler this run was given to, of any kind: report how far it is, from 0 to 1. Returns at once: of what
        is reported the newest is stored within about a second, if the run is still this handler's, and a failure to store
        it is not raised. Returns False if the run is not this handler's any more, as `cancelled` says: then it should
        stop."""
        progress = context.encoded_progress(value, note)
        try:
            return self._context().report(progress)
        except ClaimLost:
            return False

    def inputs(self, *, wait: bool = True) -> AsyncGenerator[Input, None]:
        """For the asynchronous handler of a run that works on a turn: iterate over the messages that were sent to steer it,
        each once in this attempt. Without `wait` it ends with those that are there; with it, it goes on until the handler
        has enough. Who answers them as well says so: `commit_reply` with all the ids.
        """
        return self._context().inputs(wait=wait)

    def stop(self) -> None:
        """Make it `cancelled`, for whoever executes it in this process."""
        stopped.mark(self._mark)

    def _context(self) -> RunContext:
        found = context.find(self)
        if found is not None:
            return found
        if self.cancelled:
            raise ClaimLost(*self.claim)
        raise ConfigError(
            f"Run {self.id} is not executed here. Only the run that a handler was given can do this, while it runs."
        )

    @property
    def _mark(self) -> tuple[int, int, datetime]:
        # Another database in this process may have a run of the same id.
        return (self.id, self.attempt, self.created_at)


@dataclass(frozen=True, slots=True)
class NewRun:
    """What an enqueue stores. JSON is already text; `delay` counts from the database's clock."""

    task: str
    queue: str
    payload: str
    priority: int = 0
    delay: timedelta | None = None
    run_at: datetime | None = None
    expires_in: timedelta | None = None
    singleton_key: str | None = None
    ordering_key: str | None = None
    max_attempts: int | None = None
    retry_delay: timedelta | None = None
    timeout: timedelta | None = None
    metadata: str | None = None
    organization_id: str | None = None


class Ending(msgspec.Struct, frozen=True, gc=False):
    """How a claimed run ends. `result` and `error` are JSON text. Its turn ends with it, unless that is `handed_on`: then
    the turn ends with the run `heir`, or without one is its deployment's to answer.
    """

    claim: Claim
    state: RunState
    result: str = "null"
    error: str = "null"
    handed_on: bool = False
    heir: int | None = None


class Return(msgspec.Struct, frozen=True, gc=False):
    """A claimed run goes back to its queue: in `delay` seconds, or to its old place when that is None. `failed` counts
    a failure of the handler; the owner it is `reserved_for` may claim it a second before others. A run whose cancellation
    was requested ends `cancelled` instead.
    """

    claim: Claim
    delay: float | None = None
    failed: bool = False
    error: str = "null"
    reserved_for: str | None = None


class Floor(NamedTuple):
    """Where in one priority of one queue a claim starts to look: everything before was already handed out."""

    run_at: datetime
    id: int
