"""What handlers log carries their run, wherever it is logged from, and nothing of another run."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Iterator, MutableMapping
from typing import Any

import pytest
import structlog

from queue_service import App, Run, Worker, logs
from tests.support import eventually
from tests.worker.conftest import Observe
from tests.worker.worker_process import WorkerProcess

FIELDS = ("run_id", "task", "queue", "attempt")


@pytest.fixture
def said() -> Iterator[list[dict[str, Any]]]:
    """What is logged by a program that configures structlog itself, with our processor."""
    events: list[dict[str, Any]] = []

    def keep(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        events.append(dict(event))
        raise structlog.DropEvent

    structlog.configure(processors=[structlog.contextvars.merge_contextvars, logs.run_context, keep])
    yield events
    structlog.reset_defaults()


log = structlog.get_logger()


def of(run_id: int, task: str, event: str, **more: Any) -> dict[str, Any]:
    return {"event": event, "run_id": run_id, "task": task, "queue": "default", "attempt": 1, **more}


async def test_an_async_handler_and_all_that_it_starts(app: App, said: list[dict[str, Any]]) -> None:
    @app.task
    async def talk() -> None:
        log.info("begun")
        await asyncio.sleep(0.01)  # it is taken off the loop and back
        log.info("after a wait")
        await asyncio.create_task(child())
        await asyncio.to_thread(log.info, "in a thread of its own")
        log.info("of another", run_id=0)

    async def child() -> None:
        log.info("in a task of its own")

    log.info("outside")
    run_id = await app.enqueue("talk", {})
    await Worker(app).run(once=True)
    log.info("outside")
    mine = ["begun", "after a wait", "in a task of its own", "in a thread of its own"]
    assert said == [
        {"event": "outside"}, *(of(run_id, "talk", each) for each in mine), {"event": "of another", "run_id": 0}, {"event": "outside"},
    ]  # fmt: skip


async def test_a_handler_in_a_thread(app: App, said: list[dict[str, Any]]) -> None:
    @app.task
    def talk() -> None:
        log.info("hello")

    run_ids = [await app.enqueue("talk", {}) for _ in range(3)]
    await Worker(app, {"default": 1}).run(once=True)
    assert said == [of(run_id, "talk", "hello") for run_id in run_ids]


@pytest.mark.parametrize("waits", [False, True], ids=["at once", "after a wait"])
async def test_nothing_is_left_for_the_next_run_in_the_slot(app: App, said: list[dict[str, Any]], waits: bool) -> None:
    theirs: contextvars.ContextVar[int] = contextvars.ContextVar("theirs", default=-1)
    released = asyncio.Event()
    left: list[asyncio.Task[None]] = []

    @app.task
    async def first() -> None:
        if waits:
            await asyncio.sleep(0)
        structlog.contextvars.bind_contextvars(user="Ada")
        theirs.set(1)
        left.append(asyncio.create_task(stays()))
        log.info("first")

    async def stays() -> None:
        await released.wait()
        log.info("still here")

    @app.task
    async def second() -> None:
        log.info("second", theirs=theirs.get())
        released.set()
        await left[0]

    run_ids = [await app.enqueue("first", {}), await app.enqueue("second", {})]
    await Worker(app, {"default": 1}).run(once=True)
    assert said == [
        of(run_ids[0], "first", "first", user="Ada"),
        of(run_ids[1], "second", "second", theirs=-1),
        # What a handler left behind is still its own.
        of(run_ids[0], "first", "still here", user="Ada"),
    ]


async def test_runs_side_by_side_do_not_mix(app: App, said: list[dict[str, Any]]) -> None:
    @app.task
    async def talk(n: int) -> None:
        structlog.contextvars.bind_contextvars(n=n)
        for _ in range(3):
            await asyncio.sleep(0.001 * (n % 5))  # so that they overlap
            log.info("hello", mine=n)

    run_ids = await app.enqueue_many("talk", [{"n": n} for n in range(100)])
    await Worker(app, {"default": 20}).run(once=True)
    assert len(said) == 300
    assert all(each["n"] == each["mine"] == run_ids.index(each["run_id"]) for each in said)


async def test_a_batch_names_no_run_unless_it_is_one_alone(app: App, said: list[dict[str, Any]]) -> None:
    @app.task(batch=10)
    async def talk(runs: list[Run]) -> None:
        log.info("hello", runs=len(runs))
        structlog.contextvars.bind_contextvars(user="Ada")

    worker = Worker(app, {"default": 1})
    await app.enqueue_many("talk", [{}, {}])
    await worker.run(once=True)
    run_id = await app.enqueue("talk", {})
    await worker.run(once=True)
    assert said == [{"event": "hello", "runs": 2}, of(run_id, "talk", "hello", runs=1)]


async def test_standard_logging_with_the_filter(app: App) -> None:
    records: list[logging.LogRecord] = []

    class Keeping(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    handler = Keeping()
    handler.addFilter(logs.RunFilter())
    plain = logging.getLogger("tests.plain")
    plain.addHandler(handler)
    plain.setLevel("INFO")

    @app.task
    async def talk() -> None:
        plain.info("async")

    @app.task
    def talk_in_thread() -> None:
        plain.info("thread")

    try:
        plain.info("outside")
        run_ids = [await app.enqueue("talk", {}), await app.enqueue("talk_in_thread", {})]
        await Worker(app, {"default": 1}).run(once=True)
    finally:
        plain.removeHandler(handler)
    formatter = logging.Formatter("%(message)s %(run_id)s %(task)s %(queue)s %(attempt)s")
    assert [formatter.format(record) for record in records] == [
        "outside None None None None",
        f"async {run_ids[0]} talk default 1",
        f"thread {run_ids[1]} talk_in_thread default 1",
    ]


async def test_the_command_lines_worker_adds_it_to_all_that_handlers_log(database: str, observe: Observe) -> None:
    worker = await observe(database, "--processes", "1")
    async with App(database) as app:
        run_ids = {}
        for task in ("speak", "speak_in_thread", "speak_in_process"):
            run_ids[task] = await app.enqueue(task, {"word": task})
            await app.wait(run_ids[task], timeout=30)
    for task, lines in {"speak": 2, "speak_in_thread": 1, "speak_in_process": 2}.items():
        said = await eventually(lambda: spoken(worker, task, lines))  # noqa: B023
        assert {tuple(each[field] for field in FIELDS) for each in said} == {(run_ids[task], task, "default", 1)}
        assert {each["level"] for each in said} == {"info"}
    assert worker.events("speak")[0]["name"] == "a field of theirs"


def spoken(worker: WorkerProcess, word: str, lines: int) -> list[dict[str, Any]] | None:
    found = [*worker.events(word), *worker.events(f"plain {word}")]
    return found if len(found) == lines else None
