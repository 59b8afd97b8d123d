"""A run whose handler is at work: how it is made to stop, and what is logged of its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from datetime import timedelta
from enum import Enum, auto
from typing import Any

import msgspec

from queue_service import codec
from queue_service.logs import get_logger
from queue_service.runs.model import Ending, Run, RunState
from queue_service.worker.handlers.steps import AttemptSteps
from queue_service.worker.leases import Held
from queue_service.worker.tally import Settlement

log = get_logger(__name__)


class Cause(Enum):
    TIMED_OUT = auto()
    CANCELLED = auto()
    LOST = auto()
    DRAINED = auto()


class Execution(msgspec.Struct, eq=False):
    """`task` is the slot's."""

    held: Held
    task: asyncio.Task[Any]
    cause: Cause | None = None
    timer: asyncio.TimerHandle | None = None
    # Of a batch, and shared by its runs: those for whose sake the handler goes on.
    counting: set[Held] | None = None
    # It waits for a process, and its handler was certainly not called.
    unbegun: bool = False
    # How its handler has ended the run, in a transaction of its own.
    ended: Ending | None = None
    # Those of its handler, once that has asked for one.
    steps: AttemptSteps | None = None
    # How many of its blocks wait for something of ours, (monotonic) since when the first does, and how much time is left to
    # its handler, which counts on once none waits.
    waits: int = 0
    waiting_since: float | None = None
    time_left: float | None = None
    # The worker has ended, and the handler has not.
    is_given_up: bool = False

    def begin(self) -> None:
        self.unbegun = False

    def begin_steps(self, limit: int) -> AttemptSteps:
        """Those of its handler. `limit` bounds a result, in bytes."""
        if self.steps is None:
            self.steps = AttemptSteps(self.held.run, limit=limit)
        return self.steps

    def give_up(self) -> bool:
        """False: its run has ended, or was given up before."""
        if self.is_given_up or self.ended is not None:
            return False
        self.is_given_up = True
        return True

    def limit(self, of_task: timedelta | None) -> None:
        """Let its time run from now on, if it has a limit."""
        limit = self.held.run.timeout or of_task
        if limit is not None:
            self.timer = asyncio.get_running_loop().call_later(limit.total_seconds(), self.interrupt, Cause.TIMED_OUT)

    def stop_clock(self, *, waits: bool) -> None:
        """Its handler begins to wait for something of ours, or no longer does."""
        loop = asyncio.get_running_loop()
        self.waits += 1 if waits else -1
        if waits and self.waits == 1:
            self.waiting_since = time.monotonic()
            if self.timer is not None and self.cause is None:
                self.time_left = max(0.0, self.timer.when() - loop.time())
                self.timer.cancel()
        elif not self.waits:
            self.waiting_since = None
            if self.time_left is not None and self.cause is None:
                self.timer = loop.call_later(self.time_left, self.interrupt, Cause.TIMED_OUT)
            self.time_left = None

    def interrupt(self, cause: Cause) -> None:
        # A handler that goes on after its time can still be stopped for another reason, and one that goes on after any of
        # them must not keep a worker from ending.
        if self.cause is None or self.cause is Cause.TIMED_OUT:
            self.cause = cause
            self.held.run.stop()
            if self.counting is not None:
                self.counting.discard(self.held)
        elif cause is not Cause.DRAINED:
            return
        # The others of its batch go on.
        if not self.counting:
            self.task.cancel()


def stop_clocks(running: Mapping[int, Execution], key: int, *, waits: bool) -> None:
    """Of all runs that the handler of this one was given: no time of theirs passes while it waits for us."""
    execution = running.get(key)
    if execution is not None:
        for each in [execution] if execution.counting is None else list(running.values()):
            if each.task is execution.task:
                each.stop_clock(waits=waits)


def outcome_to_write(execution: Execution, outcome: Settlement) -> Settlement | None:
    """The outcome, once it was logged if something went wrong; None if the run has ended already, or was given up."""
    if execution.is_given_up:
        return None
    if execution.ended is not None:
        _log_ignored(execution.held.run, execution.ended, outcome)
        return None
    if outcome.error != "null":
        _log_failure(execution.held.run, outcome)
    return outcome


def _log_failure(run: Run, outcome: Settlement) -> None:
    """Log what went wrong, if that is what it was; neither payload nor message, which may hold what is private."""
    error = codec.loads(outcome.error)
    if error["reason"] == "result_refused":
        log.warning("a result cannot be stored", run_id=run.id, task=run.task, why=error["message"])
    elif error["reason"] != "cancelled":
        log.warning(
            "run failed" if isinstance(outcome, Ending) else "run failed, will be tried again",
            run_id=run.id, task=run.task, attempt=run.attempt, reason=error["reason"], error=error.get("type"),
        )  # fmt: skip


def _log_ignored(run: Run, ending: Ending, outcome: Settlement) -> None:
    """Log what a handler did after it had ended its run, if that would have been another ending."""
    if outcome not in {ending, Ending(run.claim, RunState.SUCCEEDED)}:
        error = None if outcome.error == "null" else codec.loads(outcome.error).get("type")
        log.warning(
            "a run has ended with the transaction of its handler; what that returned or raised afterwards is dropped",
            run_id=run.id, task=run.task, error=error,
        )  # fmt: skip
