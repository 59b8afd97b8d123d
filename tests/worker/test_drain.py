"""Stopping: handlers end, or their runs go back, and nothing is charged for it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from queue_service import App, Run, RunState, Worker
from queue_service.db.execute import Connection, fetch
from queue_service.runs import queries
from queue_service.settings import load
from queue_service.worker import executor
from tests.support import enqueued, eventually, is_gone, listening, one, rows, working
from tests.worker import tasks_for_tests
from tests.worker.conftest import Start, short_then_slow


async def exit_code(process: subprocess.Popen[bytes]) -> int:
    await eventually(lambda: process.poll() is not None, within=30)
    assert process.returncode is not None
    return process.returncode


async def begun(directory: Path, count: int = 1) -> None:
    started = directory / "started"
    await eventually(lambda: started.exists() and len(started.read_text().splitlines()) >= count, within=30)


# In this process


async def test_stop_lets_handlers_end(app: App) -> None:
    started, release = asyncio.Event(), asyncio.Event()

    @app.task
    async def wait() -> str:
        started.set()
        await release.wait()
        return "to the end"

    run_id = await app.enqueue("wait", {})
    worker = Worker(app)
    running = asyncio.create_task(worker.run())
    await asyncio.wait_for(started.wait(), 10)
    worker.stop()
    worker.stop()
    later = await app.enqueue("wait", {})
    assert not running.done()
    release.set()
    tally = await asyncio.wait_for(running, 10)
    run = await app.get(run_id)
    assert run is not None
    assert (run.state, run.result) == (RunState.SUCCEEDED, "to the end")
    assert (tally.succeeded, tally.lost) == (1, 0)
    # It may have been claimed, by a claim that was under way, but then it was handed back.
    untouched = await app.get(later)
    assert untouched is not None
    assert (untouched.state, untouched.failures, untouched.losses) == (RunState.QUEUED, 0, 0)


@pytest.mark.parametrize("how", ["the drain timeout passes", "now", "stop and then now"])
async def test_handlers_that_do_not_end_are_cancelled_and_their_runs_handed_back(
    app: App, conn: Connection, how: str
) -> None:
    started: list[int] = []
    cancelled: list[int] = []

    @app.task
    async def wait(n: int) -> None:
        started.append(n)
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.append(n)

    await app.enqueue_many("wait", [{"n": n} for n in range(3)])
    before = await rows(conn, "select id, run_at from queue_service.runs order by id")
    drain = "200ms" if how == "the drain timeout passes" else "1h"
    settings = load({"QUEUE_SERVICE_DRAIN_TIMEOUT": drain, "QUEUE_SERVICE_POLL_INTERVAL": "100ms"})
    worker = Worker(app, {"default": 3}, settings=settings)
    running = asyncio.create_task(worker.run())
    await eventually(lambda: len(started) == 3)
    if how != "now":
        worker.stop()
    if how != "the drain timeout passes":
        worker.stop(now=True)
    tally = await asyncio.wait_for(running, 15)
    assert sorted(cancelled) == [0, 1, 2]
    after = await rows(conn, "select id, run_at, state, failures, losses from queue_service.runs order by id")
    assert after == [(*row, "queued", 0, 0) for row in before]
    assert (tally.returned, tally.failed, tally.lost) == (3, 0, 0)
    assert await one(conn, "select count(*) from queue_service.leases") == 0


async def test_what_was_claimed_ahead_is_handed_back_at_once(
    app: App, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Or it would be handed back because nothing ends here.
    monkeypatch.setattr(executor, "STALLED", 3_600.0)
    runs = await short_then_slow(app)
    worker = Worker(app, {"default": 2})
    running = asyncio.create_task(worker.run())
    await eventually(lambda: len(runs.blocked) == 2)
    # What has ended is running until that is written.
    await eventually(lambda: one(conn, "select count(*) = 2000 from queue_service.finished_runs"))
    held = await one(conn, "select count(*) from queue_service.runs where state = 'running'")
    assert held > 2
    worker.stop()
    await eventually(lambda: one(conn, "select count(*) = 2 from queue_service.runs where state = 'running'"))
    assert not running.done()
    runs.release.set()
    tally = await asyncio.wait_for(running, 15)
    assert tally.lost == 0
    assert tally.returned >= held - 2
    assert await rows(
        conn, "select distinct state, failures, losses from queue_service.runs"
    ) == [("queued", 0, 0)]  # fmt: skip
    assert await one(
        conn, "select (select count(*) from queue_service.runs) + (select count(*) from queue_service.finished_runs)"
    ) == 4_000  # fmt: skip


async def test_a_run_handed_back_by_one_worker_is_finished_by_the_next(app: App) -> None:
    patient = asyncio.Event()

    @app.task
    async def wait(run: Run) -> int:
        if run.attempt == 1:
            patient.set()
            await asyncio.Event().wait()
        return run.attempt

    run_id = await app.enqueue("wait", {}, max_attempts=1)
    async with working(app) as worker:
        await asyncio.wait_for(patient.wait(), 10)
        worker.stop(now=True)
    async with working(app):
        run = await app.wait(run_id, timeout=10)
    assert (run.result, run.failures, run.losses) == (2, 0, 0)


async def test_a_handler_that_ends_well_while_it_is_being_cancelled_keeps_its_result(app: App) -> None:
    started = asyncio.Event()

    @app.task
    async def tidy() -> str:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "tidied up"
        return "never"

    run_id = await app.enqueue("tidy", {})
    async with working(app) as worker:
        await asyncio.wait_for(started.wait(), 10)
        worker.stop(now=True)
    run = await app.get(run_id)
    assert run is not None
    assert (run.state, run.result) == (RunState.SUCCEEDED, "tidied up")


@pytest.mark.parametrize("why", ["cancelled", "lost"])
async def test_a_handler_that_goes_on_after_it_was_stopped_does_not_keep_its_worker_from_ending(
    app: App, conn: Connection, why: str
) -> None:
    begun, tidying = asyncio.Event(), asyncio.Event()

    @app.task
    async def tidies_up_for_ever() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            tidying.set()
            await asyncio.Event().wait()

    run_id = await app.enqueue("tidies_up_for_ever", {})
    async with working(app) as worker:
        await asyncio.wait_for(begun.wait(), 8)
        if why == "cancelled":
            assert await app.cancel(run_id)
        else:
            await conn.execute("delete from queue_service.leases")
        await asyncio.wait_for(tidying.wait(), 8)
        worker.stop(now=True)
    assert (worker.tally.cancelled, worker.tally.lost) == ((1, 0) if why == "cancelled" else (0, 0))


async def test_stop_may_come_from_another_thread(app: App) -> None:
    worker = Worker(app)
    running = asyncio.create_task(worker.run())
    await eventually(lambda: worker.id is not None)
    thread = threading.Thread(target=worker.stop)
    thread.start()
    await asyncio.wait_for(running, 10)
    thread.join()


async def test_cancelling_the_worker_itself_ends_it_and_its_run_is_rescued(app: App) -> None:
    started = asyncio.Event()

    @app.task
    async def wait(run: Run) -> str:
        if run.attempt == 1:
            started.set()
            await asyncio.Event().wait()
        return "rescued"

    run_id = await app.enqueue("wait", {})
    running = asyncio.create_task(Worker(app).run())
    await asyncio.wait_for(started.wait(), 10)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(running, 10)
    async with working(app):
        run = await app.wait(run_id, timeout=15)
    assert run.result == "rescued"


# Cancelled while it stops


@pytest.fixture(params=["quick clocks, and no notices", "slow clocks, and notices"])
async def hearing(request: pytest.FixtureRequest, database: str) -> AsyncIterator[tuple[App, bool]]:
    """An App with one of the two ways to hear of a cancellation, and whether it is by notices."""
    by_notice = request.param.startswith("slow")
    names = ("LEASE", "POLL_INTERVAL", "SWEEP_INTERVAL", "DRAIN_TIMEOUT")
    pace = dict.fromkeys(names, "10m") if by_notice else {"LEASE": "3s", **dict.fromkeys(names[1:3], "200ms")}
    async with App(database, settings=load({f"QUEUE_SERVICE_{name}": value for name, value in pace.items()})) as app:
        yield app, by_notice


@pytest.mark.parametrize("where", ["on the loop", "in a thread", "in a process"])
async def test_a_run_is_cancelled_while_its_worker_stops(
    hearing: tuple[App, bool], conn: Connection, tmp_path: Path, where: str
) -> None:
    app, by_notice = hearing
    begun, stopped, pids = threading.Event(), threading.Event(), tmp_path / "pids"

    @app.task(name="on the loop")
    async def on_the_loop() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    @app.task(name="in a thread")
    def in_a_thread(run: Run) -> None:
        begun.set()
        while not run.cancelled:
            threading.Event().wait(0.005)
        stopped.set()

    def has_begun() -> bool:
        return pids.exists() and pids.read_text() != "" if where == "in a process" else begun.is_set()

    def has_stopped() -> bool:
        return is_gone(int(pids.read_text().split()[0])) if where == "in a process" else stopped.is_set()

    app.tasks.add(tasks_for_tests.burn)
    payload = {"path": str(pids)} if where == "in a process" else {}
    run_id = await app.enqueue("burn" if where == "in a process" else where, payload)
    async with working(app, processes=1) as worker:
        await listening(conn)
        await eventually(has_begun, within=30)
        worker.stop()
        await eventually(lambda: worker._parts is not None and worker._parts.claimer.is_stopping)
        if by_notice:
            assert await app.cancel(run_id)
        else:
            assert await fetch(conn, queries.cancel(run_id)) == "requested"
        await eventually(has_stopped)
        await eventually(lambda: one(conn, "select count(*) = 1 from queue_service.finished_runs"))
    run = await app.get(run_id)
    assert run is not None
    assert (run.state, run.attempt, run.failures) == (RunState.CANCELLED, 1, 0)
    assert run.error is not None
    assert run.error["reason"] == "cancelled"
    assert (worker.tally.cancelled, worker.tally.returned, worker.tally.lost) == (1, 0, 0)


@pytest.mark.parametrize("stopping", [False, True], ids=["while it works", "while it stops"])
async def test_a_run_that_was_claimed_ahead_of_slots_is_cancelled(
    hearing: tuple[App, bool], conn: Connection, stopping: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "STALLED", 3_600.0)
    app, by_notice = hearing
    runs = await short_then_slow(app)
    async with working(app, {"default": 2}) as worker:
        await listening(conn)
        await eventually(lambda: len(runs.blocked) == 2)
        ahead = runs.ids[max(runs.blocked) + 1]
        await eventually(
            lambda: one(conn, "select (state, attempt) = ('running', 1) from queue_service.runs where id = %s", ahead)
        )
        if stopping:
            worker.stop()
        if by_notice:
            assert await app.cancel(ahead)
        else:
            assert await fetch(conn, queries.cancel(ahead)) is not None
        await eventually(
            lambda: one(conn, "select state = 'cancelled' from queue_service.finished_runs where id = %s", ahead)
        )
        assert len(runs.blocked) == 2
        runs.release.set()
        worker.stop()
    assert await one(conn, "select count(*) from queue_service.finished_runs where state = 'cancelled'") == 1


# As a process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_handlers_end_and_exits_with_zero(
    start: Start, conn: Connection, tmp_path: Path, number: signal.Signals
) -> None:
    run_id = await enqueued(conn, "hold", payload=f'{{"directory": "{tmp_path}"}}')
    process = start("-q", "default:2")
    await begun(tmp_path)
    process.send_signal(number)
    await eventually(lambda: one(conn, "select count(*) = 1 from queue_service.runs where state = 'running'"))
    assert process.poll() is None
    (tmp_path / "release").touch()
    assert await exit_code(process) == 0
    state = await one(conn, "select state from queue_service.finished_runs where id = %s", run_id)
    assert state == "succeeded"
    assert await one(conn, "select count(*) from queue_service.workers") == 0
    _, errors = process.communicate()
    assert b"Stopping." in errors
    assert b"Traceback" not in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_cancels_handlers_and_hands_their_runs_back(
    start: Start, conn: Connection, tmp_path: Path, number: signal.Signals
) -> None:
    for _ in range(3):
        await enqueued(conn, "hold", payload=f'{{"directory": "{tmp_path}"}}')
    process = start("-q", "default:2")
    await begun(tmp_path, 2)
    process.send_signal(number)
    assert process.stderr is not None
    os.set_blocking(process.stderr.fileno(), False)
    said = bytearray()

    def heard() -> bool:
        said.extend(process.stderr.read() or b"" if process.stderr else b"")
        return b"Signal again" in said

    await eventually(heard)
    process.send_signal(number)
    assert await exit_code(process) == 0
    left = await rows(conn, "select distinct state, failures, losses from queue_service.runs")
    assert left == [("queued", 0, 0)]
    assert await one(conn, "select count(*) from queue_service.runs") == 3


async def test_a_drain_timeout_given_on_the_command_line_holds(start: Start, conn: Connection, tmp_path: Path) -> None:
    await enqueued(conn, "hold", payload=f'{{"directory": "{tmp_path}"}}')
    process = start("--drain-timeout", "100ms")
    await begun(tmp_path)
    process.terminate()
    assert await exit_code(process) == 0
    assert await rows(conn, "select state, failures, losses from queue_service.runs") == [("queued", 0, 0)]


async def test_once_exits_with_zero_when_all_went_well(start: Start, conn: Connection) -> None:
    for n in range(20):
        await enqueued(conn, "double", payload=f'{{"n": {n}}}')
    assert await exit_code(start("--once")) == 0
    results = await rows(conn, "select result from queue_service.finished_runs order by id")
    assert results == [(2 * n,) for n in range(20)]


async def test_once_exits_with_five_when_runs_failed(start: Start, conn: Connection) -> None:
    await enqueued(conn, "double", payload='{"n": 1}')
    await enqueued(conn, "fail")
    assert await exit_code(start("--once")) == 5
    assert await one(conn, "select count(*) from queue_service.finished_runs") == 2


async def test_a_worker_has_at_most_eight_connections_at_any_concurrency(
    start: Start, conn: Connection, tmp_path: Path
) -> None:
    count = (
        "select count(*) from pg_stat_activity where datname = current_database() and backend_type = 'client backend' "
        "and pid <> pg_backend_pid()"
    )
    for _ in range(200):
        await enqueued(conn, "hold", payload=f'{{"directory": "{tmp_path}"}}')
    process = start("-q", "default:200")
    most = 0

    async def look() -> None:
        nonlocal most
        most = max(most, await one(conn, count))

    started = tmp_path / "started"

    async def all_begun() -> bool:
        await look()
        return started.exists() and len(started.read_text().splitlines()) == 200

    await eventually(all_begun, within=30)
    await conn.execute(
        "insert into queue_service.runs (queue, task, payload) "
        "select 'default', 'double', jsonb_build_object('n', n) from generate_series(1, 3000) as n"
    )
    (tmp_path / "release").touch()

    async def all_ended() -> bool:
        await look()
        return bool(await one(conn, "select count(*) = 3200 from queue_service.finished_runs"))

    await eventually(all_ended, within=40)
    process.terminate()
    assert await exit_code(process) == 0
    # The pool's four, and those that claim, finish, keep leases and hear notices.
    assert 4 <= most <= 8
