"""Handlers that say how far they are: who sees it, how often it is written, and what becomes of it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from queue_service import App, Progress, Retry, Run, RunState, Snooze, Worker
from queue_service.db.execute import Connection, fetch
from queue_service.errors import ConfigError, DatabaseUnavailable
from queue_service.runs import queries, settling
from queue_service.runs.claim import hold
from queue_service.worker import reports
from queue_service.worker.reports import Reports
from tests.support import claimed, enqueued, eventually, lapse, one, working
from tests.worker import tasks_for_tests

Open = Callable[[], Awaitable[Connection]]


async def progress(app: App, run_id: int) -> tuple[float, str | None] | None:
    run = await app.get(run_id)
    return None if run is None or run.reported is None else (run.reported.value, run.reported.note)


@pytest.mark.parametrize("kind", ["coroutine", "thread", "process"])
async def test_the_newest_report_is_seen_while_the_handler_goes_on(app: App, tmp_path: Path, kind: str) -> None:
    go_on = tmp_path / "go_on"
    if kind == "process":
        app.tasks.add(tasks_for_tests.progress)
    elif kind == "thread":

        @app.task(name="progress")
        def in_a_thread(run: Run, path: str) -> list[bool]:
            answers = [run.progress(n / 1000, f"step {n}") for n in range(500)]
            done.wait(20)
            return sorted(set(answers))
    else:

        @app.task(name="progress")
        async def in_a_coroutine(run: Run, path: str) -> list[bool]:
            answers = [run.progress(n / 1000, f"step {n}") for n in range(500)]
            await asyncio.to_thread(done.wait, 20)
            return sorted(set(answers))

    done = threading.Event()
    async with working(app, processes=1):
        run_id = await app.enqueue("progress", {"path": str(go_on)})
        await eventually(lambda: is_at(app, run_id, 0.499, "step 499"), within=30)
        await asyncio.to_thread(go_on.touch)
        done.set()
        run = await app.wait(run_id, timeout=10)
    assert (run.state, run.result, run.reported) == (RunState.SUCCEEDED, [True], None)


async def is_at(app: App, run_id: int, value: float, note: str | None) -> bool:
    return await progress(app, run_id) == (value, note)


async def test_whoever_waits_hears_of_each_that_is_new(app: App) -> None:
    seen: asyncio.Queue[Progress] = asyncio.Queue()

    @app.task
    async def index(run: Run) -> int:
        assert run.progress(0.25, "indexing")
        await first.wait()
        assert run.progress(1)
        await second.wait()
        return 7

    first, second = asyncio.Event(), asyncio.Event()
    async with working(app):
        run_id = await app.enqueue("index", {})
        waiting = asyncio.create_task(app.wait(run_id, timeout=20, on_progress=seen.put_nowait))
        begun = await seen.get()
        first.set()
        ended = await seen.get()
        second.set()
        run = await waiting
    assert [(each.value, each.note) for each in (begun, ended)] == [(0.25, "indexing"), (1, None)]
    assert begun.at < ended.at
    assert (run.result, seen.qsize()) == (7, 0)


async def test_what_on_progress_raises_is_raised_where_it_was_given(app: App) -> None:
    @app.task
    async def index(run: Run) -> None:
        run.progress(0.5)
        await refused.wait()

    def refuse(progress: Progress) -> None:
        raise LookupError(f"{progress.value}")

    refused = asyncio.Event()
    async with working(app):
        run_id = await app.enqueue("index", {})
        with pytest.raises(LookupError, match=r"0\.5"):
            await app.wait(run_id, timeout=20, on_progress=refuse)
        refused.set()
        assert (await app.wait(run_id, timeout=20)).state is RunState.SUCCEEDED
    with pytest.raises(TimeoutError):
        await app.wait(await app.enqueue("index", {}), timeout=0.2, on_progress=refuse)


async def test_many_reports_of_many_runs_are_one_statement_each_period(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports, "REPORT_PERIOD", 0.2)
    batches: list[int] = []
    report = settling.report

    def counted(given: Any) -> Any:
        batches.append(len(given))
        return report(given)

    monkeypatch.setattr(settling, "report", counted)

    @app.task
    async def index(run: Run) -> None:
        for n in range(100):
            run.progress(n / 100)
            await asyncio.sleep(0.01)  # the handler's work, for about a second

    await app.enqueue_many("index", [{}] * 20)
    begun = time.monotonic()
    await Worker(app, {"default": 20}).run(once=True)
    assert 2 <= len(batches) <= (time.monotonic() - begun) / reports.REPORT_PERIOD + 1
    assert max(batches) == 20


@pytest.mark.parametrize("how", ["fails", "snoozes", "is lost"])
async def test_the_next_attempt_begins_without_it(app: App, conn: Connection, how: str) -> None:
    @app.task(retry=Retry(base=3600))
    async def index(run: Run) -> Snooze:
        run.progress(0.5)
        await eventually(lambda: is_at(app, run.id, 0.5, None))
        if how == "fails":
            raise RuntimeError("on purpose")
        return Snooze(3600)

    if how == "is lost":
        run_id = await enqueued(conn)
        ((run, _),) = await claimed(conn)
        assert await fetch(conn, settling.report({run.claim: '{"value":0.5}'})) == {run.claim}
        assert await progress(app, run_id) == (0.5, None)
        await lapse(conn)
        await fetch(conn, queries.sweep(limit=1, max_losses=3))
    else:
        run_id = await app.enqueue("index", {})
        await Worker(app).run(once=True)
    run_now = await app.get(run_id)
    assert run_now is not None
    assert (run_now.state, run_now.reported) == (RunState.QUEUED, None)


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan"), True, "0.5", None])
async def test_what_is_no_progress_is_refused(app: App, value: Any) -> None:
    refusals: list[str] = []

    @app.task
    async def index(run: Run) -> None:
        with pytest.raises(ConfigError) as refused:
            run.progress(value)
        refusals.append(str(refused.value))

    run_id = await app.enqueue("index", {})
    await Worker(app).run(once=True)
    assert (await app.wait(run_id, timeout=5)).state is RunState.SUCCEEDED
    assert refusals == [f"Progress is a number from 0 to 1, not {value!r}."]


async def test_a_note_that_postgres_could_not_store_is_stored_as_it_can(app: App) -> None:
    @app.task
    async def index(run: Run) -> None:
        assert run.progress(0, "nul \x00 and \ud800 " + "x" * 1000)
        await eventually(lambda: seen(run))

    async def seen(run: Run) -> bool:
        found = await progress(app, run.id)
        return found is not None and str(found[1]).startswith("nul \ufffd and \ufffd xxx")

    run_id = await app.enqueue("index", {})
    await Worker(app).run(once=True)
    assert (await app.wait(run_id, timeout=5)).state is RunState.SUCCEEDED


async def test_a_handler_whose_run_is_not_its_own_any_more_gets_an_error(app: App) -> None:
    answers: list[bool] = []
    over = threading.Event()

    @app.task(timeout=1, retry=Retry(max_attempts=1))
    def index(run: Run) -> None:
        answers.append(run.progress(0.1))
        over.wait(20)
        answers.append(run.progress(0.2))

    async with working(app):
        await app.wait(await app.enqueue("index", {}), timeout=10)
        over.set()
        await eventually(lambda: len(answers) == 2)
    assert answers == [True, False]


class Table:
    """Three running runs, and what stores their progress; `executed` are those whose handlers are at work."""

    def __init__(self, runs: list[Run], fetch: Callable[[Any], Awaitable[Any]]) -> None:
        self.runs = runs
        self.executed = list(runs)
        self.reports = Reports(fetch, is_executed=lambda run: run in self.executed)

    def put(self, *values: float) -> None:
        for run, value in zip(self.runs, values, strict=False):
            self.reports.put(run, f'{{"value":{value}}}')


@pytest.fixture
async def table(app: App, conn: Connection) -> Table:
    for _ in range(3):
        await enqueued(conn)
    return Table([run for run, _ in await claimed(conn)], app.fetch)


async def values(app: App, table: Table) -> list[float | None]:
    return [found and found[0] for found in [await progress(app, run.id) for run in table.runs]]


async def test_a_run_that_is_locked_keeps_no_other_waiting_and_goes_next(app: App, table: Table, session: Open) -> None:
    handler = await session()
    async with handler.transaction():
        assert await fetch(handler, hold(table.runs[1].claim))
        table.put(0.1, 0.2, 0.3)
        async with asyncio.timeout(9):
            await table.reports.once()
        assert await values(app, table) == [0.1, None, 0.3]
        table.put(0.5)
        await table.reports.once()
        assert await values(app, table) == [0.5, None, 0.3]
    await table.reports.once()
    assert await values(app, table) == [0.5, 0.2, 0.3]


async def test_the_newest_comes_before_what_could_not_be_stored(app: App, table: Table, session: Open) -> None:
    handler = await session()
    async with handler.transaction():
        await fetch(handler, hold(table.runs[0].claim))
        table.put(0.1)
        storing = asyncio.create_task(table.reports.once())
        await asyncio.sleep(0)
        table.put(0.9)
        await storing
    await table.reports.once()
    assert await values(app, table) == [0.9, None, None]


async def test_nothing_is_sent_once_the_handler_has_ended(app: App, table: Table) -> None:
    table.put(0.1, 0.2, 0.3)
    table.executed.pop()
    await table.reports.once()
    assert await values(app, table) == [0.1, 0.2, None]


async def test_an_outage_is_survived_with_what_is_newest(app: App, conn: Connection, table: Table) -> None:
    down = True

    async def fetched(query: Any) -> Any:
        if down:
            raise DatabaseUnavailable("down")
        return await app.fetch(query)

    table.reports = Reports(fetched, is_executed=lambda _run: True)
    table.put(0.1)
    await table.reports.once()
    table.put(0.2)
    await table.reports.once()
    down = False
    await table.reports.once()
    assert await values(app, table) == [0.2, None, None]
    assert await one(conn, "select count(progress) from queue_service.runs") == 1
