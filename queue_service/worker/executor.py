"""Executes the claimed runs of one queue: slots pull from a local deque, and each run becomes one outcome.

A slot makes one call at a time: of a handler that takes a run, or of one that takes a batch of them.

A slot is a coroutine that lives on from run to run, since a task for each run would cost more than a short handler. The
handler runs inside the slot's own task; cancelling a run cancels that task, with a cause noted first, by which the slot
knows that it is not meant itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import time
import types
from collections import deque
from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any

from queue_service.db.query import Fetch
from queue_service.exceptions import is_a
from queue_service.logs import get_logger, running
from queue_service.runs.model import Ending, Return, Run
from queue_service.tasks import Task, Tasks
from queue_service.worker.ahead import MAX_RUNS, Ahead
from queue_service.worker.execution import Cause, Execution, outcome_to_write, stop_clocks
from queue_service.worker.finisher import Finisher
from queue_service.worker.handlers import batches, process_protocol, results
from queue_service.worker.handlers.coroutines import awaited, watched
from queue_service.worker.handlers.processes import Processes
from queue_service.worker.handlers.threads import Exhausted, Threads
from queue_service.worker.leases import Held, Lease
from queue_service.worker.resets import after_reset, may_follow_another
from queue_service.worker.tally import Settlement

log = get_logger(__name__)

# Runs claimed ahead are handed back when none has come or ended for this long.
STALLED = 1.0
# Handlers that never wait would keep the loop from everything else; after this many, a slot lets others go first.
YIELD_EVERY = 50


class Executor:
    """One queue's slots. `spawn` starts a slot's task; `room` is called when more could be claimed, and `reported` with the
    progress that a handler in a process reports. `is_cancelled` says whether the worker itself was: then whoever did so may
    have cancelled the slots as well, and no handler is to blame."""

    def __init__(
        self,
        queue: str,
        concurrency: int,
        *,
        tasks: Tasks,
        fetch: Fetch,
        finisher: Finisher,
        threads: Threads,
        processes: Processes,
        reported: Callable[[Run, str], None],
        result_limit: int,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        room: Callable[[], None],
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        self.queue = queue
        self.concurrency = concurrency
        self._tasks = tasks
        self._fetch = fetch
        self._finisher = finisher
        self._threads = threads
        self._processes = processes
        self._reported = reported
        self._result_limit = result_limit
        self._spawn = spawn
        self._room = room
        self._waiting: deque[Held] = deque()
        # By the very Run that the handler was given, as an object. Not by run id: a run that was lost may be claimed here
        # again while its first handler is still ending.
        self._running: dict[int, Execution] = {}
        self._idle: list[asyncio.Future[None]] = []
        self._slots = 0
        # Set when the worker ends: from then on a slot that is cancelled is meant itself.
        self.closing = False
        self._is_cancelled = is_cancelled
        self._since_yield = 0
        self.completed = 0
        self._ahead = Ahead()
        # How many runs one call takes, of each task that has this queue or was seen in it, judged by its runs that came
        # last. The least of them counts: runs that go one at a time must not be held by the hundred because others do not.
        self._sizes = {task.name: task.batch or 1 for task in tasks.values() if task.queue == queue}
        self._a_call = min(self._sizes.values(), default=1)
        self._has_batches = any(task.batch for task in tasks.values())
        # Runs at work beside the first of their batch: they take no slot.
        self._beside = 0
        self._progress_at, self._seen_completed = time.monotonic(), 0

    # For the claimer

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self._running

    def wants(self, *, ahead: bool = True) -> int:
        """How many runs to claim now: what free slots take, and `ahead` of them only what will be begun within moments."""
        # In whole batches: what is less would be begun as a smaller batch than could be claimed a moment later.
        beyond = self._ahead.runs // self._a_call * self._a_call if ahead else 0
        if len(self._waiting) > beyond // 2:
            return 0
        free = self.concurrency - len(self._running) + self._beside
        wanted = min(free * self._a_call, max(free, MAX_RUNS)) + beyond - len(self._waiting)
        return max(0, min(wanted, max(self._ahead.at_once, self._a_call)))

    def measure_speed(self) -> None:
        """Follow the speed at which this queue is worked off: it decides how far to claim ahead."""
        self._ahead.measure(self.completed, places=self.concurrency * self._a_call)

    def offer(self, claimed: list[Held]) -> None:
        self._waiting.extend(claimed)
        if claimed:
            self._ahead.claimed(claimed)
            if self._has_batches:
                self._sizes |= batches.most(claimed, self._tasks)
                self._a_call = min(self._sizes.values())
        self._progress_at = time.monotonic()
        self._rouse()

    def take_back(self) -> list[Held]:
        """The runs that no slot has begun; they are the caller's again."""
        waiting, self._waiting = list(self._waiting), deque()
        return waiting

    def take_back_stalled(self, now: float) -> list[Held]:
        """As `take_back`, if nothing has come or gone here for a while; nothing otherwise."""
        if self.completed != self._seen_completed:
            self._seen_completed, self._progress_at = self.completed, now
        return self.take_back() if now - self._progress_at > STALLED else []

    # For whoever stops a run

    def cancel(self, run_id: int) -> None:
        """Someone asked for this run to be cancelled; nothing happens if it is not here."""
        for execution in [execution for execution in self._running.values() if execution.held.run.id == run_id]:
            execution.interrupt(Cause.CANCELLED)
        for held in [held for held in self._waiting if held.run.id == run_id]:
            self._waiting.remove(held)
            self._finisher.put(held, results.cancelled(held.run))

    def lose(self, lease: Lease) -> None:
        """The lease was swept: its runs are no longer ours."""
        for execution in [e for e in self._running.values() if e.held.lease is lease and e.ended is None]:
            log.warning(
                "lease lost, cancelling the handler", run_id=execution.held.run.id, task=execution.held.run.task
            )
            execution.interrupt(Cause.LOST)

    def interrupt_all(self) -> int:
        """Cancel every handler, because the worker stops. Returns how many runs they had."""
        for execution in list(self._running.values()):
            execution.interrupt(Cause.DRAINED)
        return len(self._running)

    def give_up(self) -> list[tuple[Held, Settlement]]:
        """Let go of the runs whose handlers go on although they were cancelled: what they still do does not count. Returns
        what becomes of each. May be called from any thread, while nothing else goes on here."""
        given_up = [execution for execution in list(self._running.values()) if execution.give_up()]
        return [(each.held, self._drained(each, self._tasks[each.held.run.task])) for each in given_up]

    def executing(self) -> list[tuple[Held, asyncio.Task[Any]]]:
        """The runs whose handlers go on, and the slot of each. May be called from any thread."""
        return [(each.held, each.task) for each in list(self._running.values())]

    def run_of(self, task: asyncio.Task[Any]) -> Run | None:
        """The run whose handler this task executes. May be called from any thread."""
        return next((each.held.run for each in list(self._running.values()) if each.task is task), None)

    # For the handler of a run; the first may be called from any thread

    def execution_of(self, run: Run) -> Execution | None:
        """None where the handler that was given this very Run is not at work any more."""
        return self._running.get(id(run))

    def settle(self, run: Run, ending: Ending) -> None:
        """The handler has ended its run. Too late where the run was given up meanwhile: then its outcome is with the
        finisher, and will be found to be lost."""
        execution = self._running.get(id(run))
        if execution is not None and execution.ended is None:
            execution.ended = ending
            self._finisher.settled(execution.held, ending)

    def stop_clock(self, run: Run, waits: bool) -> None:
        """The handler of a run begins to wait for something of ours, or no longer does."""
        stop_clocks(self._running, id(run), waits=waits)

    # Slots

    def _rouse(self) -> None:
        """Give work to at most two more slots. Each slot whose handler suspends does the same, so that handlers that wait
        are soon all begun, while handlers that never wait are worked off by one slot, which leaves the loop its turns."""
        for _ in range(min(2, len(self._waiting))):
            while self._idle and self._idle[-1].done():
                # Its slot was cancelled meanwhile.
                self._idle.pop()
            if self._idle:
                self._idle.pop().set_result(None)
            elif self._slots < self.concurrency:
                self._slots += 1
                self._spawn(self._slot())

    async def _slot(self) -> None:
        slot = asyncio.current_task()
        assert slot is not None
        try:
            while True:
                await self._handle_next(slot)
        finally:
            # Cancelled by somebody else, while it had nothing to do: another one takes its place.
            self._slots -= 1
            if not self._is_ending():
                self._rouse()

    async def _handle_next(self, slot: asyncio.Task[Any]) -> None:
        while not self._waiting:
            free: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._idle.append(free)
            await free
        if self._finisher.is_full:
            await self._finisher.room()
            if not self._waiting:
                return
        held = self._waiting.popleft()
        task = self._tasks[held.run.task]
        if task.batch is not None:
            await self._handle_batch(held, task, slot)
        else:
            # A lost lease: the run went back to its queue, and someone else may have it already.
            outcome = Return(held.run.claim) if held.lease.lost else await self._execute(held, task, slot)
            if outcome is not None:
                # Before anything is waited for: whoever looks now finds nothing running, and must find this.
                self._finisher.put(held, outcome)
            self.completed += 1
            if slot.cancelling():
                await self._absorb(slot)
        if len(self._waiting) <= self._ahead.runs // 2:
            self._room()
        self._since_yield += 1
        if self._since_yield >= YIELD_EVERY:
            self._since_yield = 0
            await asyncio.sleep(0)

    async def _execute(self, held: Held, task: Task[..., Any], slot: asyncio.Task[Any]) -> Settlement | None:
        """What becomes of the run; None if its handler has ended it already."""
        run = held.run
        key = id(run)
        execution = self._running[key] = Execution(held, slot)
        if not task.process and (run.timeout or task.timeout) is not None:
            execution.limit(task.timeout)
        # A context for each run: what one handler binds there is not found by the next.
        running.set(run)
        try:
            call = self._invoke(execution, task, run)
            if run.attempt > 1 and may_follow_another(run):
                call = after_reset(self._fetch, run, call)
            answer = await watched(call, contextvars.copy_context(), self._rouse)
            is_decided = task.process and isinstance(answer, (Ending, Return))
            outcome: Settlement = answer if is_decided else results.returned(run, answer, limit=self._result_limit)
        except BaseException as error:  # noqa: BLE001 - raised again if it is meant for the slot
            outcome = self._stopped(execution, task, error)
        finally:
            if execution.timer is not None:
                execution.timer.cancel()
            del self._running[key]
        if outcome.error == "null" and execution.ended is None and not execution.is_given_up:
            return outcome
        return outcome_to_write(execution, outcome)

    async def _handle_batch(self, first: Held, task: Task[..., Any], slot: asyncio.Task[Any]) -> None:
        taken = batches.taken(first, task, self._waiting)
        if len(self._waiting) <= self._ahead.runs // 2:
            # One call may have taken all that was claimed for many slots.
            self._room()
        batch = [held for held in taken if not held.lease.lost]
        outcomes = await self._execute_batch(batch, task, slot) if batch else {}
        for held in taken:
            outcome = outcomes[held] if held in outcomes else Return(held.run.claim)
            if outcome is not None:
                self._finisher.put(held, outcome)
        self.completed += len(taken)
        self._since_yield += len(taken)
        if slot.cancelling():
            await self._absorb(slot)

    async def _execute_batch(
        self, batch: list[Held], task: Task[..., Any], slot: asyncio.Task[Any]
    ) -> dict[Held, Settlement | None]:
        """As `_execute`, of many runs with one call. What is the end of one of them leaves the others alone."""
        runs, counting, alone = [held.run for held in batch], set(batch), len(batch) == 1
        executions = {held: Execution(held, slot, counting=counting) for held in batch}
        self._running.update((id(held.run), each) for held, each in executions.items())
        self._beside += len(batch) - 1
        for execution in executions.values():
            execution.limit(task.timeout)
        running.set(runs[0] if alone else None)
        try:
            call = self._invoke_batch(task, list(runs))
            if alone and may_follow_another(runs[0]):
                call = after_reset(self._fetch, runs[0], call)
            answer = await watched(call, contextvars.copy_context(), self._rouse)
            answers = zip(executions.items(), batches.answers(runs, answer), strict=True)
            outcomes = {held: self._answered(execution, task, each) for (held, execution), each in answers}
        except BaseException as error:  # noqa: BLE001 - raised again if it is meant for the slot
            outcomes = {held: self._stopped(each, task, error, alone=alone) for held, each in executions.items()}
        finally:
            for held, execution in executions.items():
                if execution.timer is not None:
                    execution.timer.cancel()
                del self._running[id(held.run)]
            self._beside -= len(batch) - 1
        return {held: outcome_to_write(executions[held], outcome) for held, outcome in outcomes.items()}

    def _answered(self, execution: Execution, task: Task[..., Any], answer: Any) -> Settlement:
        """What becomes of a run of a batch whose handler returned: what that says of it, unless it was stopped before. Of
        a handler that is stopped with its worker, what it still returns counts."""
        if execution.cause not in {None, Cause.DRAINED}:
            return self._stopped(execution, task, asyncio.CancelledError())
        run = execution.held.run
        if is_a(answer, BaseException):
            return results.raised(run, task.retry, answer)
        return results.returned(run, answer, limit=self._result_limit)

    def _stopped(
        self, execution: Execution, task: Task[..., Any], error: BaseException, *, alone: bool = True
    ) -> Settlement:
        """What becomes of a run whose handler raised, or was made to stop."""
        run = execution.held.run
        match execution.cause:
            case None if is_a(error, asyncio.CancelledError) and self._is_ending():
                run.stop()
                return self._drained(execution, task)
            case None if not is_a(error, Exhausted):
                return results.raised(run, task.retry, error, alone=alone)
            case Cause.TIMED_OUT:
                late = results.TimedOut((run.timeout or task.timeout or timedelta()).total_seconds())
                late.__cause__ = error
                return results.raised(run, task.retry, late, alone=alone)
            case Cause.CANCELLED:
                return results.cancelled(run)
            case Cause.DRAINED:
                return self._drained(execution, task)
        # Its lease is lost, or it was not begun.
        return Return(run.claim)

    def _drained(self, execution: Execution, task: Task[..., Any]) -> Settlement:
        """What becomes of a run whose worker stops before its handler has ended."""
        run = execution.held.run
        return results.interrupted(run) if task.on_lost == "fail" and not execution.unbegun else Return(run.claim)

    def _is_ending(self) -> bool:
        return self.closing or self._is_cancelled()

    async def _absorb(self, slot: asyncio.Task[Any]) -> None:
        """Undo a cancellation that has been dealt with: ours, or one that the handler aimed at its own task. Left
        standing, it would hit the slot at its next wait, and break every later timeout in it."""
        if self._is_ending():
            raise asyncio.CancelledError
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0)
        while slot.cancelling():
            slot.uncancel()

    def _received(self, execution: Execution, task: Task[..., Any], message: process_protocol.Message) -> None:
        """What the process of a handler sends before its answer."""
        match message:
            case process_protocol.HandlerBegun():
                execution.limit(task.timeout)
            case process_protocol.RunSettled(ending):
                self.settle(execution.held.run, ending)
            case process_protocol.HandlerWaits(waits):
                self.stop_clock(execution.held.run, waits)
            case process_protocol.ProgressReported(progress):
                self._reported(execution.held.run, progress)

    def _invoke(self, execution: Execution, task: Task[..., Any], run: Run) -> Coroutine[Any, Any, Any]:
        if task.is_async:
            called = task.function(**task.arguments(run))
            return called if isinstance(called, types.CoroutineType) else awaited(called)
        if task.process:
            execution.unbegun = True
            received = functools.partial(self._received, execution, task)
            return self._processes.run(task, run, on_turn=execution.begin, on_message=received)
        return self._threads.run(run, functools.partial(task.function, **task.arguments(run)))

    def _invoke_batch(self, task: Task[..., Any], runs: list[Run]) -> Coroutine[Any, Any, Any]:
        if task.is_async:
            return awaited(task.function(runs))
        return self._threads.run(runs[0], functools.partial(task.function, runs))
