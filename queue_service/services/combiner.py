"""Concurrent calls of one process share a statement: those that come while statements are under way wait for one to
return, and go together with the next.

A lone call goes at once, in its caller's own task. A statement costs both sides about 0.2 ms however much it carries, so
sixteen callers get several times the throughput of sixteen statements. What shares a statement must not wait in it for
another session's locks, or one caller's trouble would be everyone's: it comes back as busy, and goes again a moment later.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from psycopg import errors as pg

from queue_service.backoff import Pauses, spread
from queue_service.db.meaning import is_outage
from queue_service.errors import DatabaseUnavailable

A = TypeVar("A")
R = TypeVar("R")

# Two, so that one is prepared here while the server works on the other.
CARRIERS = 2
# So much goes into one statement: items, and bytes of what they carry.
MAX_ITEMS = 200
MAX_BYTES = 1_000_000
# What is busy goes again after the first pause, then after twice as long, and is given up after LOCK_SECONDS.
FIRST_PAUSE, LAST_PAUSE = 0.002, 0.1
LOCK_SECONDS = 10.0


class Busy:
    """The answer for an item that another session's lock keeps from being done."""


BUSY = Busy()


class StillLocked(DatabaseUnavailable):
    """Another session's lock was not let go of in time."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"Another transaction has held what this needs ({name}) for {LOCK_SECONDS:g} s. Is one left open?"
        )


class Combiner(Generic[A, R]):
    """`send` takes items and returns an answer for each, in order, or BUSY. Where a batch is refused, each item is sent
    alone, so that only the caller whose fault it was hears of it. `weigh` says how many bytes an item carries.
    """

    def __init__(
        self,
        send: Callable[[Sequence[A]], Awaitable[Sequence[R | Busy]]],
        *,
        name: str,
        weigh: Callable[[A], int],
    ) -> None:
        self._send = send
        self._name = name
        self._weigh = weigh
        self._pending: deque[tuple[A, asyncio.Future[R | Busy]]] = deque()
        # Statements under way: of lone callers, and of carriers, which are tasks that are kept from being forgotten here.
        self._under_way = 0
        self._carriers: set[asyncio.Task[None]] = set()

    async def __call__(self, item: A) -> R:
        """Raises StillLocked, and whatever `send` raises."""
        answer = await self._sent(item)
        return await self._insist(item) if isinstance(answer, Busy) else answer

    async def _insist(self, item: A) -> R:
        """Send a busy item again, until it is done."""
        pauses, deadline = Pauses(FIRST_PAUSE, LAST_PAUSE, jitter=spread), time.monotonic() + LOCK_SECONDS
        while time.monotonic() <= deadline:
            # With jitter, so that two who collide drift apart.
            await asyncio.sleep(pauses.next())
            answer = await self._sent(item)
            if not isinstance(answer, Busy):
                return answer
        raise StillLocked(self._name)

    async def _sent(self, item: A) -> R | Busy:
        future: asyncio.Future[R | Busy] = asyncio.get_running_loop().create_future()
        self._pending.append((item, future))
        if self._under_way < CARRIERS:
            self._under_way += 1
            try:
                # For those who call at the same moment: a batch that splits once stays split, and halves the throughput.
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                future.cancel()
                self._start_carrier()
                raise
            if len(self._pending) == 1 and self._pending[0][1] is future:
                return await self._alone()
            self._start_carrier()
        return await future

    async def _alone(self) -> R | Busy:
        item, _ = self._pending.popleft()
        try:
            (answer,) = await self._send([item])
        finally:
            self._statement_ended()
        return answer

    def _statement_ended(self) -> None:
        """One who was under way is done. What came meanwhile goes together in its place."""
        self._under_way -= 1
        if self._pending and self._under_way < CARRIERS:
            self._under_way += 1
            self._start_carrier()

    def _start_carrier(self) -> None:
        carrier = asyncio.create_task(self._work(), name=self._name)
        self._carriers.add(carrier)
        carrier.add_done_callback(self._carrier_ended)

    def _carrier_ended(self, carrier: asyncio.Task[None]) -> None:
        # Here and not in the task, which may have been cancelled before it began.
        self._carriers.discard(carrier)
        self._statement_ended()

    async def _work(self) -> None:
        while batch := self._batch():
            try:
                await self._settle(batch)
            except Exception as refused:  # noqa: BLE001 - handed to those who wait for it
                _refuse(batch, refused)
            except BaseException as broken:
                # Raised in whoever waits: nobody may wait for a carrier that has died.
                _refuse(batch, DatabaseUnavailable(f"This process is ending ({type(broken).__name__})."))
                raise

    def _batch(self) -> list[tuple[A, asyncio.Future[R | Busy]]]:
        """As much as one statement takes, but one item in any case; nothing where nobody waits any more. Whoever has
        given up is left out."""
        batch: list[tuple[A, asyncio.Future[R | Busy]]] = []
        size = 0
        while self._pending and len(batch) < MAX_ITEMS:
            item, future = self._pending[0]
            if not future.done():
                size += self._weigh(item)
                if batch and size > MAX_BYTES:
                    break
                batch.append((item, future))
            self._pending.popleft()
        return batch

    async def _settle(self, batch: list[tuple[A, asyncio.Future[R | Busy]]]) -> None:
        try:
            answers = await self._send([item for item, _ in batch])
        except Exception as refused:
            # Of a database that is gone, one word is enough; a lock that was not let go of is somebody's in particular.
            gone = is_outage(refused) and not isinstance(refused.__cause__, pg.LockNotAvailable)
            if len(batch) == 1 or gone:
                raise
            for each in batch:
                try:
                    await self._settle([each])
                except Exception as its_own:  # noqa: BLE001 - handed to its caller
                    _refuse([each], its_own)
            return
        for (_, future), answer in zip(batch, answers, strict=True):
            if not future.done():
                future.set_result(answer)


def _refuse(batch: list[tuple[A, asyncio.Future[R | Busy]]], error: Exception) -> None:
    for _, future in batch:
        if not future.done():
            future.set_exception(error)
