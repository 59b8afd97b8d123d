"""Leases outlive a blocked loop, and a lost one stops its handlers and changes nothing."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import psycopg
import pytest

from queue_service import App, RunState, Worker
from queue_service.db.execute import Connection, fetch_sync
from queue_service.runs import queries
from queue_service.worker import suspects
from tests.support import eventually, one, rows, working

# What a sweep does to every lease, whatever its deadline.
SWEPT = """
with gone as (delete from queue_service.leases returning id)
update queue_service.runs set state = 'queued', lease_id = null, claimed_at = null, losses = losses + 1
 where lease_id in (select id from gone)
"""


@pytest.mark.parametrize("how", ["sleeping", "computing"])
async def test_a_handler_that_blocks_the_loop_for_many_leases_loses_nothing(
    app: App, database: str, how: str, conn: Connection
) -> None:
    def sleep_on() -> None:
        time.sleep(0.02)  # the handler's work

    def compute() -> None:
        sum(range(30_000))

    pause = sleep_on if how == "sleeping" else compute
    sweeps: list[int] = []

    @app.task
    async def block(seconds: float) -> str:
        """Blocks the loop, and meanwhile sweeps as another worker would."""
        deadline = time.monotonic() + seconds
        with psycopg.connect(database, autocommit=True) as another:
            while time.monotonic() < deadline:
                sweeps.extend(swept.run_id for swept in fetch_sync(another, queries.sweep(limit=20, max_losses=3)))
                pause()
        return "through"

    @app.task
    async def bystander() -> None:
        await asyncio.sleep(0)

    blocked = await app.enqueue("block", {"seconds": 6.5})
    await app.enqueue_many("bystander", [{}] * 50)
    settings = dataclasses.replace(app.settings, lease=timedelta(seconds=2))
    tally = await Worker(app, {"default": 5}, settings=settings).run(once=True)
    run = await app.wait(blocked, timeout=10)
    assert sweeps == []
    assert (run.state, run.result, run.attempt, run.losses) == (RunState.SUCCEEDED, "through", 1, 0)
    assert (tally.succeeded, tally.lost, tally.returned) == (51, 0, 0)
    assert await one(conn, "select sum(losses) from queue_service.finished_runs") == 0


async def test_a_handler_that_waits_for_many_leases_loses_nothing(app: App, conn: Connection) -> None:
    release = asyncio.Event()

    @app.task
    async def wait() -> None:
        await release.wait()

    run_id = await app.enqueue("wait", {})
    settings = dataclasses.replace(app.settings, lease=timedelta(seconds=2))
    async with working(app, settings=settings):
        deadlines = "select count(distinct expires_at) from seen"
        await conn.execute("create temporary table seen (expires_at timestamptz)")

        async def extended() -> bool:
            await conn.execute("insert into seen select expires_at from queue_service.leases")
            return bool(await one(conn, deadlines) >= 6)

        await eventually(extended, within=30)
        release.set()
        run = await app.wait(run_id, timeout=10)
    assert (run.state, run.attempt, run.losses) == (RunState.SUCCEEDED, 1, 0)


async def test_a_lost_lease_cancels_the_handler_and_its_run_goes_on_elsewhere(app: App, conn: Connection) -> None:
    attempts: list[int] = []
    stopped = asyncio.Event()

    @app.task
    async def wait() -> str:
        attempts.append(len(attempts) + 1)
        if len(attempts) == 1:
            try:
                await asyncio.Event().wait()
            finally:
                stopped.set()
        return f"attempt {len(attempts)}"

    run_id = await app.enqueue("wait", {})
    async with working(app) as worker:
        await eventually(lambda: attempts)
        await conn.execute(SWEPT.encode())
        await asyncio.wait_for(stopped.wait(), 10)
        run = await app.wait(run_id, timeout=10)
        # Either may be written first.
        await eventually(lambda: (worker.tally.succeeded, worker.tally.lost) == (1, 1))
        assert worker.tally.returned == 0
    assert (run.result, run.attempt, run.losses, run.failures) == ("attempt 2", 2, 1, 0)


async def test_a_late_finish_of_a_lost_run_changes_nothing(app: App, conn: Connection) -> None:
    attempts: list[int] = []
    asked, go_on = asyncio.Event(), asyncio.Event()

    @app.task
    async def stubborn() -> str:
        attempts.append(1)
        attempt = len(attempts)
        try:
            if attempt == 1:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            asked.set()
        await go_on.wait()
        return f"attempt {attempt}"

    run_id = await app.enqueue("stubborn", {})
    async with working(app) as worker:
        await eventually(lambda: attempts)
        await conn.execute(SWEPT.encode())
        await asyncio.wait_for(asked.wait(), 10)
        await eventually(lambda: len(attempts) == 2)
        go_on.set()
        run = await app.wait(run_id, timeout=10)
        await eventually(lambda: worker.tally.succeeded == 1 and worker.tally.lost == 1)
    assert (run.result, run.attempt) == ("attempt 2", 2)
    assert await one(conn, "select count(*) from queue_service.finished_runs") == 1


async def test_a_late_finish_of_a_run_that_is_over_changes_nothing(app: App, conn: Connection) -> None:
    started, release = threading.Event(), threading.Event()

    @app.task
    def stubborn() -> str:
        started.set()
        release.wait(20)
        return "too late"

    run_id = await app.enqueue("stubborn", {})
    async with working(app) as worker:
        await eventually(started.is_set)
        # As the sweep of a run that has lost its worker too often.
        await conn.execute(
            """
            with gone as (delete from queue_service.leases),
                 over as (delete from queue_service.runs where id = %s returning *)
            insert into queue_service.finished_runs
                   (id, run_at, created_at, attempt, failures, losses, priority, state, queue, task, payload)
            select id, run_at, created_at, attempt, failures, losses + 1, priority, 'failed', queue, task, payload from over
            """,
            [run_id],
        )
        release.set()
        await eventually(lambda: worker.tally.lost == 1)
    run = await app.get(run_id)
    assert run is not None
    assert (run.state, run.result) == (RunState.FAILED, None)
    assert await one(conn, "select count(*) from queue_service.finished_runs") == 1


async def test_runs_claimed_ahead_under_a_lost_lease_are_not_executed_for_it(
    app: App, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All the runs of one claim lose their lease together; each is executed once more, and none twice at a time."""
    # However long it takes until the worker hears of it, it begins none of them beside what it had.
    monkeypatch.setattr(suspects, "UNTIL_IDLE", 60.0)
    running: set[int] = set()
    overlaps: list[int] = []
    begun: list[int] = []
    hold = asyncio.Event()

    @app.task
    async def note(n: int) -> None:
        if n in running:
            overlaps.append(n)
        running.add(n)
        begun.append(n)
        try:
            if not hold.is_set():
                await asyncio.Event().wait()
        finally:
            running.discard(n)

    await app.enqueue_many("note", [{"n": n} for n in range(40)])
    async with working(app, {"default": 8}):
        await eventually(lambda: len(begun) == 8)
        hold.set()
        await conn.execute(SWEPT.encode())
        await eventually(lambda: one(conn, "select count(*) = 40 from queue_service.finished_runs"), within=30)
    assert overlaps == []
    lost = await rows(conn, "select payload ->> 'n' from queue_service.finished_runs where losses = 1")
    assert len(lost) >= 8
    assert len(begun) == 48


async def test_leases_are_gone_when_their_runs_are(app: App, conn: Connection) -> None:
    @app.task
    async def noop() -> None:
        await asyncio.sleep(0)

    await app.enqueue_many("noop", [{}] * 200)
    async with working(app):
        done: Callable[[], object] = lambda: one(conn, "select count(*) = 200 from queue_service.finished_runs")  # noqa: E731
        await eventually(done)
        await eventually(lambda: one(conn, "select count(*) = 0 from queue_service.leases"))
