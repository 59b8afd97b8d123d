"""A handler's own transaction, whose last statements are ours: what it wrote and what these write are committed together,
or neither is.

They are fenced like any other: where the claim is lost they change nothing, and all is rolled back. From them on nobody
interrupts, since a commit that is given up may be done all the same, and none is cancelled on the server. One whose answer
is lost is looked up, behind the lock that it holds for as long as it is under way.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from contextlib import AsyncExitStack, ExitStack
from types import TracebackType
from typing import Any, Generic, TypeVar

from queue_service.backoff import Pauses
from queue_service.db.borrowed import AsyncBorrowed, SyncBorrowed, borrow
from queue_service.db.execute import DEADLINE, translated
from queue_service.db.hangup import HangUp
from queue_service.db.lending import Lender
from queue_service.db.lent import LentAsyncConnection, LentConnection
from queue_service.db.steps import Steps, drive, drive_sync
from queue_service.errors import ClaimLost, ConfigError, DatabaseUnavailable
from queue_service.logs import get_logger
from queue_service.runs.model import Run
from queue_service.waiting import to_its_end

log = get_logger(__name__)

A = TypeVar("A")
S = TypeVar("S")
W = TypeVar("W")

FIRST_PAUSE, MAX_PAUSE = 0.1, 1.0


class Block(ABC, Generic[A, S, W]):
    """Begins a transaction on a connection of the lender, or on `conn`, and ends it. `spelt` is how a handler writes it.
    What the last statements write is a W."""

    def __init__(self, run: Run, conn: Any, *, lender: Lender, spelt: str) -> None:
        self._run = run
        self._given = conn
        self._lender = lender
        self._spelt = spelt
        self._lent: LentAsyncConnection | LentConnection | None = None
        # What was written, once only the commit is left to do: from then on a failure does not say what has happened.
        self._in_doubt: W | None = None

    @abstractmethod
    def _finish(self) -> Steps[W]:
        """The last statements of the transaction. Raises ClaimLost, and PayloadRefused for the result."""

    @abstractmethod
    def _look(self, written: W) -> Steps[bool]:
        """Whether it was committed. While that is not decided, the first statement waits for the lock on the run."""

    @abstractmethod
    def _committed(self, written: W) -> None:
        """Called once it is known that it was committed, and in no other case."""

    async def _begin(self) -> A:
        self._check_is_ours()
        async with AsyncExitStack() as stack:
            conn = self._given
            if conn is None:
                conn = self._lent = await stack.enter_async_context(self._lender.transaction(self._run))
            borrowed = self._asynchronous(conn)
            if self._lent is None:
                await stack.enter_async_context(borrowed.begin())
            _check_begun(in_transaction=await borrowed.in_transaction())
            self._async, self._async_stack = borrowed, stack.pop_all()
        return conn  # type: ignore[no-any-return]

    async def _end(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if kind is not None:
            return await self._async_stack.__aexit__(kind, error, trace)
        try:
            await to_its_end(self._commit())
        except Exception:
            if self._in_doubt is None or not await self._was_committed(self._in_doubt):
                raise
            self._committed(self._in_doubt)
        return None

    async def _commit(self) -> None:
        self._begin_ending()
        line = None if self._lent is not None else HangUp(await self._async.driver(), DEADLINE)
        try:
            async with self._async_stack:
                _check_begun(in_transaction=await self._async.in_transaction())
                written = self._in_doubt = await drive(self._finish(), self._async)
        except Exception as lost:
            if line is not None and line.has_hung_up:
                raise DatabaseUnavailable(f"The database did not commit within {DEADLINE:g} s.") from lost
            raise
        finally:
            if line is not None:
                line.cancel()
        self._committed(written)

    async def _was_committed(self, written: W) -> bool:
        pauses = Pauses(FIRST_PAUSE, MAX_PAUSE)
        while True:
            try:
                with translated():
                    async with self._lender.transaction(self._run) as conn:
                        return await drive(self._look(written), self._asynchronous(conn))
            except DatabaseUnavailable as lost:
                self._log_doubt(lost, pauses)
                await asyncio.sleep(pauses.next())

    def _begin_blocking(self) -> S:
        self._check_is_ours()
        with ExitStack() as stack:
            conn = self._given
            if conn is None:
                conn = self._lent = stack.enter_context(self._lender.blocking_transaction(self._run))
            borrowed = self._blocking(conn)
            if self._lent is None:
                stack.enter_context(borrowed.begin())
            _check_begun(in_transaction=borrowed.in_transaction())
            self._sync, self._stack = borrowed, stack.pop_all()
        return conn  # type: ignore[no-any-return]

    def _end_blocking(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if kind is not None:
            return self._stack.__exit__(kind, error, trace)
        self._begin_ending()
        try:
            with self._stack:
                _check_begun(in_transaction=self._sync.in_transaction())
                written = self._in_doubt = drive_sync(self._finish(), self._sync)
        except Exception:
            if self._in_doubt is None or not self._was_committed_blocking(self._in_doubt):
                raise
            written = self._in_doubt
        self._committed(written)
        return None

    def _was_committed_blocking(self, written: W) -> bool:
        pauses = Pauses(FIRST_PAUSE, MAX_PAUSE)
        while True:
            try:
                with translated(), self._lender.blocking_transaction(self._run) as conn:
                    return drive_sync(self._look(written), self._blocking(conn))
            except DatabaseUnavailable as lost:
                self._log_doubt(lost, pauses)
                time.sleep(pauses.next())

    def _begin_ending(self) -> None:
        """From now on nobody cuts its line but us: `_finish` looks first whether the run is still ours."""
        if self._lent is not None:
            self._lent.is_ending = True

    def _check_is_ours(self) -> None:
        # A thread that was given up goes on, and comes here.
        if self._run.cancelled:
            raise ClaimLost(*self._run.claim)

    def _asynchronous(self, conn: Any) -> AsyncBorrowed:
        borrowed = borrow(conn)
        if not borrowed.is_async:
            raise ConfigError(f"{type(conn).__name__} is blocking. Use `with {self._spelt}`, in a thread.")
        return borrowed

    def _blocking(self, conn: Any) -> SyncBorrowed:
        borrowed = borrow(conn)
        if borrowed.is_async:
            raise ConfigError(f"{type(conn).__name__} is asynchronous. Use `async with {self._spelt}`.")
        return borrowed

    def _log_doubt(self, lost: DatabaseUnavailable, pauses: Pauses) -> None:
        if not pauses.count:
            log.warning(
                "cannot find out whether a handler's transaction was committed; trying until it works",
                run_id=self._run.id, task=self._run.task, why=str(lost),
            )  # fmt: skip


def _check_begun(*, in_transaction: bool) -> None:
    if not in_transaction:
        raise ConfigError(
            "There is no transaction: this connection commits each statement by itself, or has committed or rolled back in "
            "the block. Give one that is not in autocommit mode, and let the block do both."
        )
