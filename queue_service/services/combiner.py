"""Concurrent calls of one process share a statement: those that come while statements are under way wait for one to
return, and go together with the next.

A lone call goes at once. A statement costs both sides about 0.2 ms however much it carries, so sixteen callers get four
times the throughput of sixteen statements.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from queue_service.errors import DatabaseUnavailable

A = TypeVar("A")
R = TypeVar("R")

# Two, so that one is prepared here while the server works on the other.
LANES = 2
MOST = 200


class Combiner(Generic[A, R]):
    """`send` takes items and returns an answer for each, in order. Where a batch is refused, each item is sent alone, so
    that only the caller whose fault it was hears of it.
    """

    def __init__(self, send: Callable[[Sequence[A]], Awaitable[Sequence[R]]], *, name: str) -> None:
        self._send = send
        self._name = name
        self._pending: list[tuple[A, asyncio.Future[R]]] = []
        self._lanes: set[asyncio.Task[None]] = set()

    async def __call__(self, item: A) -> R:
        answer: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._pending.append((item, answer))
        if len(self._lanes) < LANES:
            lane = asyncio.create_task(self._work(), name=self._name)
            self._lanes.add(lane)
            lane.add_done_callback(self._lanes.discard)
        return await answer

    async def _work(self) -> None:
        while self._pending:
            batch, self._pending = self._pending[:MOST], self._pending[MOST:]
            try:
                await self._settle(batch)
            except BaseException as broken:
                # Told to whoever waits: nobody may wait for a lane that has died.
                _refuse(batch, broken)
                if not isinstance(broken, Exception):
                    raise

    async def _settle(self, batch: list[tuple[A, asyncio.Future[R]]]) -> None:
        try:
            answers = await self._send([item for item, _ in batch])
        except DatabaseUnavailable:
            raise
        except Exception:
            if len(batch) == 1:
                raise
            for each in batch:
                try:
                    await self._settle([each])
                except Exception as refused:  # noqa: BLE001 - handed to its caller
                    _refuse([each], refused)
            return
        for (_, future), answer in zip(batch, answers, strict=True):
            if not future.done():
                future.set_result(answer)


def _refuse(batch: list[tuple[A, asyncio.Future[R]]], error: BaseException) -> None:
    for _, future in batch:
        if not future.done():
            future.set_exception(
                error if isinstance(error, Exception) else DatabaseUnavailable("This process is ending.")
            )
