"""What a worker does for the handlers it executes when they ask: transactions that end their run, steps, and progress."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from queue_service.app import App
from queue_service.db.lending import Lender
from queue_service.errors import ClaimLost, ConfigError
from queue_service.runs import stopped
from queue_service.runs.model import Ending, Run
from queue_service.settings import Settings
from queue_service.turn import Input, Turn
from queue_service.worker.handlers.step_block import StepBlock
from queue_service.worker.handlers.steps import (
    AttemptSteps,
    StepStore,
    StoreOfThreads,
    called,
    called_blocking,
    check_no_loop,
    has_ended,
)
from queue_service.worker.handlers.transaction import Transaction
from queue_service.worker.reports import Reports


class Executed(Protocol):
    """A run whose handler is at work. `ended` is how that has ended the run itself."""

    @property
    def ended(self) -> Ending | None: ...
    def begin_steps(self, limit: int) -> AttemptSteps: ...


class Executing(Protocol):
    """Those who execute the handlers of one queue, so many at once. The first may be called from any thread. `stop_clock`
    says whether the handler of a run waits for something of ours: its time does not pass then."""

    concurrency: int

    def execution_of(self, run: Run) -> Executed | None: ...
    def settle(self, run: Run, ending: Ending) -> None: ...
    def stop_clock(self, run: Run, waits: bool) -> None: ...


class HandlerContexts:
    """Finds the context of a run, from any thread; the rest belongs to the event loop that this is made on."""

    def __init__(self, app: App, executors: Mapping[str, Executing], *, worker_id: int, settings: Settings) -> None:
        self.loop = asyncio.get_running_loop()
        self.lender = Lender(
            app.address,
            limit_of=lambda queue: min(executors[queue].concurrency, settings.lent_connections),
            statement_timeout=settings.lent_statement_timeout,
            loop=self.loop,
            on_wait=self._stop_clock,
        )
        stopped.watch(self._run_stopped)
        self.reports = Reports(app.fetch, is_executed=lambda run: self.find(run) is not None)
        self.step_store = StepStore(app.fetch)
        self.step_store_of_threads = StoreOfThreads(self.step_store, self.loop)
        self.changing = threading.Lock()
        self.worker_id = worker_id
        self.limit = settings.payload_limit
        self.app = app
        self._executors = executors
        # How far the handlers at work have read what was sent to steer them, each by its own Run.
        self._read: dict[int, tuple[Run, int]] = {}

    def close(self) -> None:
        stopped.unwatch(self._run_stopped)
        self.lender.close()

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
        if executor is None or executor.execution_of(run) is None:
            return None
        return HandlerContext(self, executor, run)

    def _run_stopped(self, claim: tuple[Any, ...]) -> None:
        self.lender.stop(claim[:2])

    def _stop_clock(self, run: Any, waits: bool) -> None:
        self.on_loop(self._executors[run.queue].stop_clock, run, waits)

    def on_loop(self, call: Callable[..., None], *args: Any) -> None:
        """Call it on the worker's event loop: at once, if this is there."""
        if asyncio._get_running_loop() is self.loop:  # noqa: SLF001 - None in a thread, where the public one raises
            call(*args)
        else:
            # A closed loop: the worker is gone, and nobody is left to be informed.
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(call, *args)


@dataclass(frozen=True, slots=True)
class HandlerContext:
    """The execution of one run's handler, as RunContext says."""

    contexts: HandlerContexts
    executor: Executing
    run: Run

    def transaction(self, conn: Any) -> Transaction[Any, Any]:
        if self._has_ended():
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

    def step(self, name: str, conn: Any) -> StepBlock[Any, Any]:
        contexts = self.contexts
        return StepBlock(
            self._steps(), name, conn,
            lender=contexts.lender, store=contexts.step_store, blocking_store=contexts.step_store_of_threads,
        )  # fmt: skip

    def call_step(self, name: str, call: Callable[[], Any]) -> Any:
        contexts, steps = self.contexts, self._steps()
        is_on_loop = asyncio._get_running_loop() is contexts.loop  # noqa: SLF001 - as in `on_loop`
        if not is_on_loop:
            check_no_loop()
        steps.use(name)
        if is_on_loop:
            return called(contexts.step_store, steps, name, call)
        return called_blocking(contexts.step_store_of_threads, steps, name, call)

    def inputs(self, *, wait: bool) -> AsyncGenerator[Input, None]:
        if self.run.turn is None:
            raise ConfigError(f"Run {self.run.id} works on no turn. Messages are sent to steer turns.")
        if asyncio._get_running_loop() is not self.contexts.loop:  # noqa: SLF001 - as in `on_loop`
            raise ConfigError("run.inputs() is for asynchronous handlers. In a thread, read the stream with app.sync.")
        return self.contexts.inputs(self.run, self.run.turn, wait=wait)

    def report(self, progress: str) -> bool:
        if self.run.cancelled or self._has_ended():
            return False
        self.contexts.reports.put(self.run, progress)
        return True

    def _has_ended(self) -> bool:
        execution = self.executor.execution_of(self.run)
        return execution is not None and execution.ended is not None

    def _steps(self) -> AttemptSteps:
        execution = self.executor.execution_of(self.run)
        if execution is None:
            raise ClaimLost(*self.run.claim)
        if execution.ended is not None:
            raise has_ended(self.run)
        # The first two steps may come from two threads.
        with self.contexts.changing:
            return execution.begin_steps(self.contexts.limit)

    def _ended(self, ending: Ending) -> None:
        self.contexts.on_loop(self.executor.settle, self.run, ending)
