"""Runs worked off in the test's own process, by the worker that works everywhere else: what holds here holds there."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import functools
import uuid
from collections.abc import Callable, Collection, Mapping
from datetime import timedelta
from typing import Any

from queue_service.app import App
from queue_service.errors import ConfigError, TaskUnknown
from queue_service.runs.model import Run, RunState
from queue_service.tasks import Task, Tasks
from queue_service.testing.expecting import named, runs_in
from queue_service.worker.tally import Tally
from queue_service.worker.worker import Worker


class HandlerFailed(AssertionError):
    """A handler failed in a way that left no exception in this process, such as a timeout. `run` is as it was left."""

    def __init__(self, run: Run) -> None:
        self.run = run
        error = run.error or {}
        super().__init__(f"Run {run.id} of task {run.task!r} failed ({error.get('reason')}): {error.get('message')}")


async def drain(
    app: App, queues: Collection[str] | None = None, *, concurrency: int = 10, raising: bool = False
) -> Tally:
    """Work off all that is due, and what that enqueues in turn, and return what was done. What is due later stays where it
    is, a failed run that waits for its retry too.

    Without `queues`, those of the App's tasks and every other that holds a queued run. `concurrency` is of each queue; with
    1 the runs of a queue are worked off in order. With `raising`, the first exception of a handler is raised here once all
    is done. Opens the App where it is not open: `asyncio.run(drain(app))` does, from a test without an event loop.
    """
    if isinstance(queues, str):
        raise ConfigError(f"queues is a list of names, not the one text {queues!r}.")
    done = Tally()
    async with app:
        watch = _Watch(await _failures(app)) if raising else None
        worked = app if watch is None else watch.over(app)
        wanted = await _queues(app) if queues is None else set(queues)
        known: set[str] = set()
        # Handlers may enqueue to queues that nobody had heard of when the worker started.
        while wanted - known:
            known |= wanted
            done = _sum(done, await Worker(worked, dict.fromkeys(sorted(known), concurrency)).run(once=True))
            wanted = await _queues(app) if queues is None else known
        if watch is not None and (done.failed or done.returned):
            await watch.warn(app)
    return done


async def process(
    app: App,
    task: str | Task[..., Any],
    payload: Mapping[str, Any] | None = None,
    *,
    max_attempts: int = 1,
    timeout: timedelta | float | None = None,
    metadata: Mapping[str, Any] | None = None,
    organization_id: str | None = None,
    raising: bool = False,
) -> Run:
    """Run one handler now, and nothing else, and return its run as it was left: finished, unless the handler said Snooze or
    `max_attempts` leaves it another try. With `raising`, what the handler raised is raised here.

    The run is in a queue of its own, whatever the task's is. Raises TaskUnknown, and PayloadRefused, as enqueue does.
    """
    name = named(task)
    if name not in app.tasks:
        raise TaskUnknown(name, app.tasks)
    alone = f"testing-{uuid.uuid4().hex}"
    async with app:
        run_id = await app.enqueue(
            name, payload or {},
            queue=alone, max_attempts=max_attempts, timeout=timeout, metadata=metadata, organization_id=organization_id,
        )  # fmt: skip
        await drain(app, [alone], raising=raising)
        run = await app.get(run_id)
    assert run is not None
    return run


async def _queues(app: App) -> set[str]:
    return {task.queue for task in app.tasks.values()} | {
        run.queue async for run in runs_in(app.fetch, state=RunState.QUEUED)
    }


def _sum(*tallies: Tally) -> Tally:
    return Tally(
        **{each.name: sum(getattr(tally, each.name) for tally in tallies) for each in dataclasses.fields(Tally)}
    )


async def _failures(app: App) -> dict[int, int]:
    return {run.id: run.failures async for run in runs_in(app.fetch)}


class _Watch:
    """What handlers raise in this process, in order, and which runs fail."""

    def __init__(self, before: dict[int, int]) -> None:
        self._before = before
        self._raised: list[BaseException] = []

    def over(self, app: App) -> App:
        """The same App, open as it is, whose handlers are watched."""
        tasks = Tasks()
        for task in app.tasks.values():
            mine = copy.copy(task)
            mine.function = self._asynchronous(task) if task.is_async else self._plain(task)
            tasks.add(mine)
        watched = copy.copy(app)
        watched._core = app._core.with_tasks(tasks)  # noqa: SLF001 - the faces keep the tasks that are not watched
        return watched

    async def warn(self, app: App) -> None:
        """Raise what was raised first, or say of a run that it failed without that, as in another process."""
        if self._raised:
            raise self._raised[0]
        runs = [run async for run in runs_in(app.fetch)]
        for run in reversed(runs):
            if run.failures > self._before.get(run.id, 0):
                raise HandlerFailed(run)

    def _plain(self, task: Task[..., Any]) -> Callable[..., Any]:
        @functools.wraps(task.function)
        def call(*runs: list[Run], **arguments: Any) -> Any:
            try:
                return self._looked_through(task, task.function(*runs, **arguments))
            except BaseException as error:
                self._raised.append(error)
                raise

        return call

    def _asynchronous(self, task: Task[..., Any]) -> Callable[..., Any]:
        @functools.wraps(task.function)
        async def call(*runs: list[Run], **arguments: Any) -> Any:
            try:
                return self._looked_through(task, await task.function(*runs, **arguments))
            except asyncio.CancelledError:
                # Not the handler's: its time was over, or someone cancelled the run.
                raise
            except BaseException as error:
                self._raised.append(error)
                raise

        return call

    def _looked_through(self, task: Task[..., Any], answer: Any) -> Any:
        """The same answer. A batch may say of a run with an exception that it failed."""
        if task.batch is not None:
            each = answer.values() if isinstance(answer, Mapping) else answer if isinstance(answer, list) else (answer,)
            self._raised += [value for value in each if isinstance(value, BaseException)]
        return answer
