"""What a worker does for the handlers it executes when they ask: transactions that end their run, and progress."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from queue_service.app import App
from queue_service.db.lending import Lender
from queue_service.errors import ConfigError
from queue_service.runs.model import Ending, Run
from queue_service.settings import Settings
from queue_service.turn import Input, Turn
from queue_service.worker.handlers.transaction import Transaction
from queue_service.worker.reports import Reports


class Executing(Protocol):
    """Those who execute the handlers of one queue. The first two may be called from any thread."""

    def executes(self, run: Run) -> bool: ...
    def has_ended(self, run: Run) -> bool: ...
    def settle(self, run: Run, ending: Ending) -> None: ...


class HandlerContexts:
    """Finds the context of a run, from any thread; the rest belongs to the event loop that this is made on."""

    def __init__(self, app: App, executors: Mapping[str, Executing], *, worker_id: int, settings: Settings) -> None:
        self.loop = asyncio.get_running_loop()
        self.lender = Lender(app.conninfo, size=settings.pool_size, loop=self.loop)
        self.reports = Reports(app.fetch, is_executed=lambda run: self.find(run) is not None)
        self.worker_id = worker_id
        self.limit = settings.payload_limit
        self.app = app
        self._executors = executors
        # How far the handlers at work have read what was sent to steer them, each by its own Run.
        self._read: dict[int, tuple[Run, int]] = {}

    async def inputs(self, run: Run, turn: Turn, *, wait: bool) -> AsyncGenerator[Input, None]:
        """Each message once for each handler, however often it asks."""
        self._read = {key: each for key, each in self._read.items() if self.find(each[0]) is not None}
        after = self._read.get(id(run), (run, 0))[1]
        async with contextlib.aclosing(self.app.turns.inputs(turn, after=after, wait=wait)) as given:
            async for each in given:
                self._read[id(run)] = (run, each.seq)
                yield each

    def find(self, run: Run) -> HandlerContext | None:
        executor = self._executors.get(run.queue)
        return None if executor is None or not executor.executes(run) else HandlerContext(self, executor, run)


@dataclass(frozen=True, slots=True)
class HandlerContext:
    """The execution of one run's handler, as RunContext says."""

    contexts: HandlerContexts
    executor: Executing
    run: Run

    def transaction(self, conn: Any) -> Transaction[Any, Any]:
        if self.executor.has_ended(self.run):
            raise ConfigError(
                f"Run {self.run.id} has ended with the transaction of its handler before. Write all in one block, or use "
                "run.assert_held(conn) in those before the last."
            )
        contexts = self.contexts
        return Transaction(
            self.run,
            conn,
            lender=contexts.lender,
            worker_id=contexts.worker_id,
            limit=contexts.limit,
            ended=self._ended,
        )

    def inputs(self, *, wait: bool) -> AsyncGenerator[Input, None]:
        if self.run.turn is None:
            raise ConfigError(f"Run {self.run.id} works on no turn. Messages are sent to steer turns.")
        if asyncio._get_running_loop() is not self.contexts.loop:  # noqa: SLF001 - as below
            raise ConfigError("run.inputs() is for asynchronous handlers. In a thread, read the stream with app.sync.")
        return self.contexts.inputs(self.run, self.run.turn, wait=wait)

    def report(self, progress: str) -> bool:
        if self.run.cancelled or self.executor.has_ended(self.run):
            return False
        self.contexts.reports.put(self.run, progress)
        return True

    def _ended(self, ending: Ending) -> None:
        if asyncio._get_running_loop() is self.contexts.loop:  # noqa: SLF001 - None in a thread, where the public one raises
            self.executor.settle(self.run, ending)
        else:
            # A closed loop: the worker is gone, and nobody is left to be informed.
            with contextlib.suppress(RuntimeError):
                self.contexts.loop.call_soon_threadsafe(self.executor.settle, self.run, ending)
