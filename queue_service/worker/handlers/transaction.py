"""A handler's own transaction, which ends its run: what it wrote and the ending are committed together, or neither is."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

from queue_service.db.lending import Lender
from queue_service.db.steps import Steps
from queue_service.errors import ClaimLost
from queue_service.runs import queries, settling
from queue_service.runs.claim import hold
from queue_service.runs.model import Ending, Run, RunState
from queue_service.worker.handlers import results
from queue_service.worker.handlers.block import Block

A = TypeVar("A")
S = TypeVar("S")


class Transaction(Block[A, S, Ending]):
    """As `Run.transaction` says. `ended` is called once it is known that the run has ended so, and in no other case."""

    def __init__(
        self, run: Run, conn: Any, *, lender: Lender, worker_id: int, limit: int, ended: Callable[[Ending], None]
    ) -> None:
        super().__init__(run, conn, lender=lender, spelt="run.transaction(…)")
        # JSON: what becomes the run's result. Read when the block is left.
        self.result: Any = None
        self._worker_id = worker_id
        self._limit = limit
        self._ended = ended

    async def __aenter__(self) -> A:
        return await self._begin()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await self._end(kind, error, trace)

    def __enter__(self) -> S:
        return self._begin_blocking()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._end_blocking(kind, error, trace)

    def _finish(self) -> Steps[Ending]:
        self._check_is_ours()
        ending = results.succeeded(self._run, self.result, limit=self._limit)
        write = settling.hand_on if ending.handed_on else settling.finish
        yield queries.plan_as_ours()
        if not (yield write([ending], worker_id=self._worker_id)):
            raise ClaimLost(*self._run.claim)
        return ending

    def _look(self, written: Ending) -> Steps[bool]:
        if (yield hold(written.claim)):
            return False
        run = yield queries.get(self._run.id)
        return run is not None and run.state is RunState.SUCCEEDED and run.attempt == self._run.attempt

    def _committed(self, written: Ending) -> None:
        self._ended(written)
