"""A handler's own transaction, which ends its run: what it wrote and the ending are committed together, or neither is.

The finish is the last statement before the commit, and fenced like any other: where the claim is lost it changes nothing,
and all is rolled back. From the finish on nobody interrupts, since a commit that is given up may be done all the same. One
whose answer is lost is looked up, behind the lock that it holds for as long as it is under way.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from types import TracebackType
from typing import Any, Generic, TypeVar

from queue_service.backoff import Pauses
from queue_service.db.borrowed import AsyncBorrowed, SyncBorrowed, borrow
from queue_service.db.execute import DEADLINE
from queue_service.db.lending import Lender
from queue_service.db.steps import Steps, drive, drive_sync
from queue_service.errors import ClaimLost, ConfigError, DatabaseUnavailable
from queue_service.logs import get_logger
from queue_service.runs import queries, settling
from queue_service.runs.claim import hold
from queue_service.runs.model import Ending, Run, RunState
from queue_service.waiting import to_its_end
from queue_service.worker.handlers import results

log = get_logger(__name__)

A = TypeVar("A")
S = TypeVar("S")

FIRST_PAUSE, MAX_PAUSE = 0.1, 5.0


class Transaction(Generic[A, S]):
    """As `Run.transaction` says. `ended` is called once it is known that the run has ended so, and in no other case."""

    def __init__(
        self, run: Run, conn: Any, *, lender: Lender, worker_id: int, limit: int, ended: Callable[[Ending], None]
    ) -> None:
        # JSON: what becomes the run's result. Read when the block is left.
        self.result: Any = None
        self._run = run
        self._given = conn
        self._lender = lender
        self._worker_id = worker_id
        self._limit = limit
        self._ended = ended
        # The ending, once only the commit is left to do: from then on a failure does not say what has happened.
        self._in_doubt: Ending | None = None

    async def __aenter__(self) -> A:
        self._check_is_ours()
        async with AsyncExitStack() as stack:
            conn = self._given
            if conn is None:
                conn = await stack.enter_async_context(self._lender.connection())
            borrowed = _asynchronous(conn)
            await stack.enter_async_context(borrowed.begin())
            _check_begun(in_transaction=await borrowed.in_transaction())
            self._async, self._async_stack = borrowed, stack.pop_all()
        return conn  # type: ignore[no-any-return]

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if kind is not None:
            return await self._async_stack.__aexit__(kind, error, trace)
        try:
            await to_its_end(self._commit())
        except Exception:
            if self._in_doubt is None or not await self._was_committed():
                raise
            self._ended(self._in_doubt)
        return None

    async def _commit(self) -> None:
        try:
            async with asyncio.timeout(DEADLINE), self._async_stack:
                _check_begun(in_transaction=await self._async.in_transaction())
                ending = await drive(self._finish(), self._async)
        except TimeoutError:
            raise DatabaseUnavailable(f"The database did not commit within {DEADLINE:g} s.") from None
        self._ended(ending)

    async def _was_committed(self) -> bool:
        pauses = Pauses(FIRST_PAUSE, MAX_PAUSE)
        while True:
            try:
                async with self._lender.connection() as conn:
                    return await drive(self._look(), _asynchronous(conn))
            except DatabaseUnavailable as lost:
                self._log_doubt(lost, pauses)
                await asyncio.sleep(pauses.next())

    def __enter__(self) -> S:
        self._check_is_ours()
        with ExitStack() as stack:
            conn = self._given
            if conn is None:
                conn = stack.enter_context(self._lender.blocking())
            borrowed = _blocking(conn)
            stack.enter_context(borrowed.begin())
            _check_begun(in_transaction=borrowed.in_transaction())
            self._sync, self._stack = borrowed, stack.pop_all()
        return conn  # type: ignore[no-any-return]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if kind is not None:
            return self._stack.__exit__(kind, error, trace)
        try:
            with self._stack:
                _check_begun(in_transaction=self._sync.in_transaction())
                ending = drive_sync(self._finish(), self._sync)
        except Exception:
            if self._in_doubt is None or not self._was_committed_sync():
                raise
            ending = self._in_doubt
        self._ended(ending)
        return None

    def _was_committed_sync(self) -> bool:
        pauses = Pauses(FIRST_PAUSE, MAX_PAUSE)
        while True:
            try:
                with self._lender.blocking() as conn:
                    return drive_sync(self._look(), _blocking(conn))
            except DatabaseUnavailable as lost:
                self._log_doubt(lost, pauses)
                time.sleep(pauses.next())

    def _finish(self) -> Steps[Ending]:
        """The last statements of the transaction. Raises ClaimLost, and PayloadRefused for the result."""
        self._check_is_ours()
        ending = results.succeeded(self._run, self.result, limit=self._limit)
        write = settling.hand_on if ending.handed_on else settling.finish
        yield queries.plan_as_ours()
        if not (yield write([ending], worker_id=self._worker_id)):
            raise ClaimLost(*self._run.claim)
        self._in_doubt = ending
        return ending

    def _look(self) -> Steps[bool]:
        """Whether it was committed. While that is not decided, the first statement waits for the lock on the run."""
        if (yield hold(self._run.claim)):
            return False
        run = yield queries.get(self._run.id)
        return run is not None and run.state is RunState.SUCCEEDED and run.attempt == self._run.attempt

    def _check_is_ours(self) -> None:
        # A thread that was given up goes on, and comes here.
        if self._run.cancelled:
            raise ClaimLost(*self._run.claim)

    def _log_doubt(self, lost: DatabaseUnavailable, pauses: Pauses) -> None:
        if not pauses.count:
            log.warning(
                "cannot find out whether a handler's transaction was committed; trying until it works",
                run_id=self._run.id, task=self._run.task, why=str(lost),
            )  # fmt: skip


def _asynchronous(conn: Any) -> AsyncBorrowed:
    borrowed = borrow(conn)
    if not borrowed.is_async:
        raise ConfigError(f"{type(conn).__name__} is blocking. Use `with run.transaction(…)`, in a thread.")
    return borrowed


def _blocking(conn: Any) -> SyncBorrowed:
    borrowed = borrow(conn)
    if borrowed.is_async:
        raise ConfigError(f"{type(conn).__name__} is asynchronous. Use `async with run.transaction(…)`.")
    return borrowed


def _check_begun(*, in_transaction: bool) -> None:
    if not in_transaction:
        raise ConfigError(
            "There is no transaction: this connection commits each statement by itself, or has committed or rolled back in "
            "the block. Give one that is not in autocommit mode, and let the block do both."
        )
