"""What tests say about the queue, and the message where it is otherwise: what is there instead."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar, overload

from queue_service import codec
from queue_service.app import App
from queue_service.db.borrowed import borrow
from queue_service.db.query import Fetch
from queue_service.db.steps import fetch_any
from queue_service.errors import ConfigError, nearest
from queue_service.runs import walks
from queue_service.runs.model import Run, RunState
from queue_service.tasks import Task, duration

T = TypeVar("T")

LOOK_PAUSE = 0.005
RUNS_AT_ONCE = 1_000
# Runs that a message shows.
LINES_SHOWN = 10
FIELDS = frozenset(Run.__struct_fields__) - {"payload", "task"}
DURATIONS = frozenset({"timeout", "retry_delay"})


@overload
async def eventually(condition: Callable[[], Awaitable[T | None]], *, within: float = ...) -> T: ...
@overload
async def eventually(condition: Callable[[], T | None], *, within: float = ...) -> T: ...
async def eventually(condition: Callable[[], Any], *, within: float = 10.0) -> Any:
    """Wait for the first true value of `condition`, which may be async, and return it. Fails after `within` seconds, with
    its last value."""
    __tracebackhide__ = True
    deadline = time.monotonic() + within
    while True:
        answer = condition()
        value = await answer if inspect.isawaitable(answer) else answer
        if value:
            return value
        if time.monotonic() >= deadline:
            raise AssertionError(f"did not come true within {within:g} s; the last value was {value!r}")
        await asyncio.sleep(LOOK_PAUSE)


async def assert_enqueued(
    app: App,
    task: str | Task[..., Any],
    payload: Mapping[str, Any] | None = None,
    *,
    count: int | None = None,
    conn: Any = None,
    **fields: Any,
) -> Run:
    """Assert that a run of this task is queued, or exactly `count` are. Returns the first of them; AssertionError says
    what is there instead.

    `payload` and `metadata` may leave keys out. `fields` are those of Run, such as `queue`, `priority` or
    `singleton_key`; `state` looks for runs in another state than `queued`. Instead of a value, a function of it may say.
    With `conn`, what the caller's own transaction sees, committed or not; the App need not be open then.
    """
    __tracebackhide__ = True
    if count is not None and count < 1:
        raise ConfigError(f"count={count}: to say that there is none, use refute_enqueued.")
    wish = _Wish(app, named(task), payload, fields)
    async with _looking(app, conn) as fetch:
        fitting = await wish.fitting(fetch)
        if not fitting or count not in {None, len(fitting)}:
            found = f"{len(fitting)} instead of {count}" if fitting else "There is no"
            raise AssertionError("\n".join([f"{found} {wish}.", *await _instead(app, wish, fetch)]))
    return fitting[0]


async def refute_enqueued(
    app: App, task: str | Task[..., Any], payload: Mapping[str, Any] | None = None, *, conn: Any = None, **fields: Any
) -> None:
    """Assert that nothing is there that `assert_enqueued` would find."""
    __tracebackhide__ = True
    wish = _Wish(app, named(task), payload, fields)
    async with _looking(app, conn) as fetch:
        if fitting := await wish.fitting(fetch):
            raise AssertionError("\n".join([f"There is a {wish}.", *_listed(map(_shown, fitting))]))


def named(task: str | Task[..., Any]) -> str:
    """The name of a task that is given by its name or as itself."""
    return task if isinstance(task, str) else task.name


async def runs_in(fetch: Fetch, *, state: RunState | None = None, task: str | None = None) -> AsyncIterator[Run]:
    """All of them, the latest first."""
    page = await fetch(walks.page(state=state, task=task, limit=RUNS_AT_ONCE))
    while True:
        for run in page.runs:
            yield run
        if page.below is None:
            return
        page = await fetch(walks.page(before=page.below, state=state, task=task, limit=RUNS_AT_ONCE))


class _Wish:
    """What a run should be like."""

    def __init__(self, app: App, task: str, payload: Mapping[str, Any] | None, fields: dict[str, Any]) -> None:
        for name in fields.keys() - FIELDS:
            raise ConfigError(f"A run has no field {name!r}.{nearest(name, FIELDS)}")
        self.task = task
        state = fields.pop("state", RunState.QUEUED)
        if state not in set(RunState):
            raise ConfigError(f"{state!r} is no state of a run.{nearest(str(state), map(str, RunState))}")
        self.state = RunState(state)
        self._wanted = {name: _stored(name, value, app.settings.payload_limit) for name, value in fields.items()}
        if payload is not None:
            self._wanted = {"payload": _stored("payload", payload, app.settings.payload_limit), **self._wanted}

    def __str__(self) -> str:
        like = ", ".join(f"{name}={value!r}" for name, value in self._wanted.items())
        return f"{self.state} run of task {self.task!r}" + (f" with {like}" if like else "")

    async def fitting(self, fetch: Fetch) -> Sequence[Run]:
        """The runs that are as wished, the first enqueued first."""
        found = [run async for run in runs_in(fetch, state=self.state, task=self.task) if not self.misfit(run)]
        return found[::-1]

    def misfit(self, run: Run) -> str:
        """In what the run is otherwise; empty if in nothing."""
        return "; ".join(
            each for name, wanted in self._wanted.items() for each in _differences(wanted, getattr(run, name), name)
        )


@asynccontextmanager
async def _looking(app: App, conn: Any) -> AsyncIterator[Fetch]:
    if conn is not None:
        borrowed = borrow(conn)
        yield lambda query: fetch_any(query, borrowed)
    else:
        async with app:
            yield app.fetch


def _stored(name: str, value: Any, limit: int) -> Any:
    """The value as it would be read back."""
    if callable(value) or value is None:
        return value
    if name in DURATIONS:
        return duration(value, name)
    if name not in {"payload", "metadata", "result", "error"}:
        return value
    if isinstance(value, Mapping):
        return {key: _stored(name, each, limit) for key, each in value.items()}
    return codec.loads(codec.dumps(value, what=name, limit=limit))


def _differences(wanted: Any, found: Any, where: str) -> Iterator[str]:
    if callable(wanted):
        if not wanted(found):
            yield f"{where} is {found!r}"
    elif isinstance(wanted, Mapping) and isinstance(found, Mapping):
        for key, value in wanted.items():
            if key in found:
                yield from _differences(value, found[key], f"{where}[{key!r}]")
            else:
                yield f"{where} has no {key!r}"
    elif wanted != found:
        yield f"{where} is {found!r}"


async def _instead(app: App, wish: _Wish, fetch: Fetch) -> list[str]:
    """What is there, as lines: the runs of this task and in what each is otherwise, and how many there are of others."""
    of_task = [run async for run in runs_in(fetch, task=wish.task)][::-1]
    others = Counter([run.task async for run in runs_in(fetch, state=wish.state) if run.task != wish.task])
    lines = []
    for run in of_task:
        misfit = wish.misfit(run)
        if run.state is not wish.state:
            misfit = "; ".join(["it is " + run.state, *([misfit] if misfit else [])])
        lines.append(f"run {run.id}: {misfit}" if misfit else f"{_shown(run)}, as it should be")
    report = (
        [f"Runs of {wish.task!r}:", *_listed(iter(lines))] if lines else [f"No run of {wish.task!r} is there at all."]
    )
    if others:
        report.append(
            f"Other tasks, {wish.state}: " + ", ".join(f"{name!r} ({n})" for name, n in sorted(others.items()))
        )
    if not lines and wish.task not in app.tasks:
        report.append(f"This App has no task of that name.{nearest(wish.task, app.tasks)}")
    return report


def _listed(lines: Iterator[str]) -> list[str]:
    listed = [f"  {line}" for line in lines]
    more = len(listed) - LINES_SHOWN
    return listed if more <= 0 else [*listed[:LINES_SHOWN], f"  and {more} more"]


def _shown(run: Run) -> str:
    return f"run {run.id}: payload={dict(run.payload)!r}, queue={run.queue!r}"
