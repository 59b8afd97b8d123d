"""Tasks whose runs are begun at most once: what interrupts them is their end, and what was not begun goes on."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from queue_service import App, Retry, Run, RunState, Worker
from queue_service.db.execute import Connection, fetch
from queue_service.runs import queries
from queue_service.services.sweeper import SweepCounts, Sweeper
from tests.support import enqueued, eventually, is_gone, lapse, one, rows, working
from tests.worker import tasks_for_tests

NEVER_AGAIN = Retry(max_attempts=1)


async def found(app: App, run_id: int) -> Run:
    run = await app.get(run_id)
    assert run is not None
    return run


def reason(run: Run) -> str:
    assert run.error is not None
    return str(run.error["reason"])


def started_on(database: str) -> subprocess.Popen[bytes]:
    """A worker process with the tasks for tests."""
    command = [sys.executable, "-m", "queue_service", "worker", "-a", "tests.worker.tasks_for_tests:app"]
    return subprocess.Popen([*command, "--database-url", database], env={**os.environ}, stderr=subprocess.DEVNULL)


# Its worker is lost


async def test_a_killed_worker_ends_its_run_which_a_replica_that_knows_no_tasks_sees_to(
    app: App, database: str, conn: Connection, tmp_path: Path
) -> None:
    once = await enqueued(conn, "hold_once", payload=f'{{"directory": "{tmp_path}"}}')
    again = await enqueued(conn, "hold", payload=f'{{"directory": "{tmp_path}"}}')
    process = started_on(database)
    try:
        started = tmp_path / "started"
        await eventually(lambda: started.exists() and len(started.read_text().splitlines()) == 2, within=30)
    finally:
        process.kill()
        process.wait()
    await lapse(conn)
    assert app.tasks == {}
    assert await Sweeper(app.fetch, app.notify, max_losses=3).once() == SweepCounts(1, 1, 0)
    run = await found(app, once)
    assert (run.state, reason(run), run.attempt, run.losses, run.failures) == (RunState.FAILED, "worker_lost", 1, 1, 0)
    assert run.error is not None
    assert "on_lost" in run.error["message"]
    other = await found(app, again)
    assert (other.state, other.losses) == (RunState.QUEUED, 1)


async def test_a_lease_lost_while_the_worker_lives_ends_its_runs_whatever_they_answer(
    app: App, conn: Connection
) -> None:
    begun, release = asyncio.Event(), asyncio.Event()

    @app.task(on_lost="fail")
    async def charge(n: int) -> None:
        begun.set()
        await release.wait()

    first, second = await app.enqueue_many("charge", [{"n": n} for n in range(2)])
    async with working(app, {"default": 2}):
        await asyncio.wait_for(begun.wait(), 10)
        assert await rows(conn, "select distinct final_tasks from queue_service.leases") == [(["charge"],)]
        # In one transaction: the worker's keeper would extend what it finds lapsed.
        async with conn.transaction():
            await lapse(conn)
            await fetch(conn, queries.sweep(limit=10, max_losses=3))
        release.set()
        runs = [await app.wait(run_id, timeout=10) for run_id in (first, second)]
    assert [(run.state, reason(run), run.attempt) for run in runs] == [(RunState.FAILED, "worker_lost", 1)] * 2
    assert await one(conn, "select count(*) from queue_service.finished_runs") == 2


async def test_a_worker_without_such_tasks_says_nothing_of_them(app: App, conn: Connection) -> None:
    begun, release = asyncio.Event(), asyncio.Event()

    @app.task
    async def ordinary() -> None:
        begun.set()
        await release.wait()

    await app.enqueue("ordinary", {})
    async with working(app):
        await asyncio.wait_for(begun.wait(), 10)
        assert await rows(conn, "select final_tasks from queue_service.leases") == [(None,)]
        release.set()


# Its worker stops


async def test_a_begun_run_is_ended_by_a_drain_and_others_are_handed_back(app: App) -> None:
    begun: list[str] = []
    stopping = threading.Event()

    @app.task(on_lost="fail")
    async def on_the_loop() -> None:
        begun.append("on_the_loop")
        await asyncio.Event().wait()

    @app.task(on_lost="fail")
    def in_a_thread(run: Run) -> None:
        begun.append("in_a_thread")
        stopping.wait(20)

    @app.task
    async def ordinary() -> None:
        begun.append("ordinary")
        await asyncio.Event().wait()

    ids = {name: await app.enqueue(name, {}) for name in app.tasks}
    async with working(app) as worker:
        await eventually(lambda: len(begun) == 3)
        worker.stop(now=True)
    stopping.set()
    for name in ("on_the_loop", "in_a_thread"):
        run = await found(app, ids[name])
        assert (run.state, reason(run), run.attempt, run.losses) == (RunState.FAILED, "interrupted", 1, 0)
    other = await found(app, ids["ordinary"])
    assert (other.state, other.failures, other.losses) == (RunState.QUEUED, 0, 0)
    assert (worker.tally.failed, worker.tally.returned, worker.tally.lost) == (2, 1, 0)


async def test_a_run_claimed_ahead_and_not_begun_is_handed_back(app: App, conn: Connection) -> None:
    blocked: list[int] = []
    ahead = 2_000

    @app.task(on_lost="fail")
    async def short_then_slow(n: int) -> None:
        if n >= ahead:
            blocked.append(n)
            await asyncio.Event().wait()
        elif n % 50 == 0:
            await asyncio.sleep(0)

    await app.enqueue_many("short_then_slow", [{"n": n} for n in range(2 * ahead)])
    async with working(app, {"default": 2}) as worker:
        await eventually(lambda: len(blocked) == 2)
        assert await one(conn, "select count(*) from queue_service.runs where state = 'running'") > 2
        worker.stop(now=True)
    failed = await rows(
        conn,
        "select (payload ->> 'n')::int, error ->> 'reason' from queue_service.finished_runs where state = 'failed'",
    )
    assert sorted(failed) == [(n, "interrupted") for n in sorted(blocked)]
    left = await rows(conn, "select distinct state, failures, losses from queue_service.runs")
    assert left == [("queued", 0, 0)]
    assert await one(conn, "select count(*) from queue_service.runs") == ahead - 2


async def test_a_run_that_waits_for_a_process_is_handed_back_and_the_one_that_has_it_is_ended(
    app: App, tmp_path: Path
) -> None:
    app.tasks.add(tasks_for_tests.burn_once)
    path = tmp_path / "pids"
    first = await app.enqueue("burn_once", {"path": str(path)})
    async with working(app, {"default": 2}, processes=1) as worker:
        await eventually(lambda: path.exists() and path.read_text(), within=30)
        second = await app.enqueue("burn_once", {"path": str(path)})

        async def is_claimed() -> bool:
            return (await found(app, second)).state is RunState.RUNNING

        await eventually(is_claimed)
        worker.stop(now=True)
    pid = int(path.read_text().split()[0])
    assert is_gone(pid)
    over, back = await found(app, first), await found(app, second)
    assert (over.state, reason(over)) == (RunState.FAILED, "interrupted")
    assert (back.state, back.failures) == (RunState.QUEUED, 0)
    assert len(path.read_text().splitlines()) == 1


async def test_a_worker_that_is_cancelled_interrupts_its_run(app: App) -> None:
    begun = asyncio.Event()

    @app.task(on_lost="fail")
    async def charge() -> None:
        begun.set()
        await asyncio.Event().wait()

    run_id = await app.enqueue("charge", {})
    running = asyncio.create_task(Worker(app).run())
    await asyncio.wait_for(begun.wait(), 10)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(running, 10)
    async with working(app):
        run = await app.wait(run_id, timeout=15)
    assert (run.state, reason(run), run.attempt) == (RunState.FAILED, "interrupted", 1)


async def test_of_a_batch_each_run_is_ended_by_a_drain(app: App) -> None:
    begun = asyncio.Event()

    @app.task(on_lost="fail", batch=10)
    async def charge(runs: list[Run]) -> None:
        begun.set()
        await asyncio.Event().wait()

    ids = await app.enqueue_many("charge", [{}] * 3)
    async with working(app, {"default": 1}) as worker:
        await asyncio.wait_for(begun.wait(), 10)
        worker.stop(now=True)
    runs = [await found(app, run_id) for run_id in ids]
    assert [(run.state, reason(run), run.attempt) for run in runs] == [(RunState.FAILED, "interrupted", 1)] * 3


# Nothing is lost


async def test_failures_are_the_retry_policys_to_decide(app: App) -> None:
    @app.task(on_lost="fail", retry=Retry(max_attempts=2, base=0))
    async def stumble(run: Run) -> int:
        if run.failures == 0:
            raise ValueError
        return run.attempt

    @app.task(on_lost="fail", retry=NEVER_AGAIN)
    async def fall() -> None:
        raise ValueError

    again, never = await app.enqueue("stumble", {}), await app.enqueue("fall", {})
    await Worker(app).run(once=True)
    assert (await found(app, again)).result == 2
    run = await found(app, never)
    assert (run.state, reason(run), run.attempt) == (RunState.FAILED, "raised", 1)


async def test_the_death_of_a_handlers_process_is_a_failure_and_no_loss(app: App) -> None:
    app.tasks.add(tasks_for_tests.die_once)
    run_id = await app.enqueue("die_once", {"how": "SIGKILL"})
    await Worker(app, processes=1).run(once=True)
    run = await found(app, run_id)
    assert (run.state, reason(run), run.attempt, run.losses) == (RunState.FAILED, "process_died", 2, 0)


async def test_one_that_failed_so_is_begun_again_when_somebody_says_so(app: App, conn: Connection) -> None:
    begun: list[int] = []

    @app.task(on_lost="fail")
    async def charge(run: Run) -> str:
        begun.append(run.attempt)
        if run.attempt == 1:
            await asyncio.Event().wait()
        return "charged"

    run_id = await app.enqueue("charge", {})
    async with working(app) as worker:
        await eventually(lambda: begun)
        worker.stop(now=True)
    assert (await found(app, run_id)).state is RunState.FAILED
    assert await app.retry(run_id)
    async with working(app):
        run = await app.wait(run_id, timeout=10)
    assert (run.result, begun) == ("charged", [1, 2])
    assert [each.error and each.error["reason"] for each in run.attempts] == ["interrupted", None]
