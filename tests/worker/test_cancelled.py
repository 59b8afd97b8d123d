"""A worker that is cancelled, or whose handlers do not end, hands back what it has, and in time."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from queue_service import App, Run, RunState, Worker
from queue_service.db.execute import Connection
from queue_service.worker.worker import CANCELLED_SECONDS
from tests.support import enqueued, eventually, one, rows
from tests.worker.conftest import Start

LEFT = "select id, state, failures, losses from queue_service.runs order by id"

Cancels = Callable[[Worker, asyncio.Event], Awaitable[None]]


async def by_its_task(worker: Worker, begun: asyncio.Event) -> None:
    running = asyncio.create_task(worker.run())
    await begun.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def by_a_timeout(worker: Worker, begun: asyncio.Event) -> None:
    async def limited() -> None:
        async with asyncio.timeout(None) as limit:
            begins = asyncio.ensure_future(begun.wait())
            begins.add_done_callback(lambda _: limit.reschedule(0))
            await worker.run()

    with pytest.raises(TimeoutError):
        await limited()


async def by_a_sibling(worker: Worker, begun: asyncio.Event) -> None:
    async def fails() -> None:
        await begun.wait()
        raise ValueError("the sibling")

    async def together() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(worker.run())
            group.create_task(fails())

    with pytest.raises(ExceptionGroup):
        await together()


async def with_all_that_there_is(worker: Worker, begun: asyncio.Event) -> None:
    """As asyncio.run does in the end."""
    me = asyncio.current_task()
    before = asyncio.all_tasks()
    running = asyncio.create_task(worker.run())
    await begun.wait()
    for task in asyncio.all_tasks() - before - {me}:
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


WAYS: list[Cancels] = [by_its_task, by_a_timeout, by_a_sibling, with_all_that_there_is]


@pytest.mark.parametrize("cancel", WAYS, ids=lambda way: way.__name__)
async def test_a_cancelled_worker_hands_back_and_nothing_is_lost(app: App, conn: Connection, cancel: Cancels) -> None:
    begun, loop = asyncio.Event(), asyncio.get_running_loop()
    at_work: list[str] = []

    def begins(name: str) -> None:
        at_work.append(name)
        if len(at_work) == 5:
            loop.call_soon_threadsafe(begun.set)

    @app.task
    async def wait() -> None:
        begins("wait")
        await asyncio.Event().wait()

    @app.task(on_lost="fail")
    async def once() -> None:
        await wait()

    @app.task
    def in_a_thread(run: Run) -> None:
        begins("in a thread")
        while not run.cancelled:
            time.sleep(0.01)  # the handler's work

    waiting = await app.enqueue_many("wait", [{}] * 3)
    final, threaded = await app.enqueue("once", {}), await app.enqueue("in_a_thread", {})
    worker = Worker(app, {"default": 10})
    started = time.monotonic()
    await cancel(worker, begun)
    assert time.monotonic() - started < CANCELLED_SECONDS + 5
    assert await rows(conn, LEFT) == [(run_id, "queued", 0, 0) for run_id in (*waiting, threaded)]
    interrupted = await app.wait(final, timeout=5)
    assert interrupted.error is not None
    assert (interrupted.state, interrupted.error["reason"]) == (RunState.FAILED, "interrupted")
    assert await one(conn, "select count(*) from queue_service.leases") == 0
    assert await one(conn, "select count(*) from queue_service.workers") == 0


async def test_what_was_executed_before_is_recorded(app: App, conn: Connection) -> None:
    begun = asyncio.Event()

    @app.task
    async def wait() -> None:
        begun.set()
        await asyncio.Event().wait()

    @app.task
    async def quick() -> None: ...

    await app.enqueue_many("quick", [{}] * 200)
    await app.enqueue("wait", {})
    await by_its_task(Worker(app, {"default": 2}), begun)
    assert await one(conn, "select count(*) from queue_service.finished_runs where state = 'succeeded'") == 200


@pytest.mark.parametrize("how", ["is cancelled", "stops"])
@pytest.mark.parametrize("stubborn", ["swallows", "waits in finally"])
async def test_a_handler_that_does_not_end_is_given_up(
    app: App, conn: Connection, how: str, stubborn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, release = asyncio.Event(), asyncio.Event()

    @app.task
    async def swallows() -> None:
        begun.set()
        while not release.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await release.wait()

    @app.task(name="waits in finally")
    async def waits_in_finally() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            while not release.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await release.wait()

    @app.task(on_lost="fail")
    async def final() -> None:
        await swallows()

    again, once = await app.enqueue(stubborn, {}), await app.enqueue("final", {})
    worker = Worker(app, {"default": 2})
    running = asyncio.create_task(worker.run())
    await begun.wait()
    await eventually(lambda: one(conn, "select count(*) = 2 from queue_service.runs where state = 'running'"))
    asked = time.monotonic()
    if how == "stops":
        worker.stop(now=True)
        await running
    else:
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert time.monotonic() - asked < CANCELLED_SECONDS + 1
    assert await rows(conn, LEFT) == [(again, "queued", 0, 0)]
    run = await app.wait(once, timeout=5)
    assert run.error is not None
    assert run.error["reason"] == "interrupted"
    # What it still does counts for nothing.
    release.set()
    await eventually(lambda: not [task for task in asyncio.all_tasks() if task.get_name() == "slot"])
    assert await rows(conn, LEFT) == [(again, "queued", 0, 0)]


async def test_a_stop_before_the_first_step_is_a_stop(app: App) -> None:
    worker = Worker(app)
    running = asyncio.create_task(worker.run())
    worker.stop()
    async with asyncio.timeout(10):
        await running
        # It is for that run only.
        later = asyncio.create_task(worker.run())
        await eventually(lambda: worker.id is not None and not later.done())
        worker.stop()
        await later


# What a shell runs in the background ignores Ctrl-C, and so does what that starts.
PROGRAM = """
import asyncio, signal, sys
from queue_service import App, Worker

signal.signal(signal.SIGINT, signal.default_int_handler)
app = App(sys.argv[1])

@app.task
async def hold(path: str) -> str:
    open(path, "w").close()
    await asyncio.sleep(0.5)  # the handler's work
    return "ended"

@app.task
async def hold_for_ever(path: str) -> None:
    open(path, "w").close()
    await asyncio.Event().wait()

print(asyncio.run(Worker(app).run()))
"""


@pytest.mark.parametrize("signals", [1, 2])
async def test_ctrl_c_on_asyncio_run_stops_as_the_command_line_does(
    app: App, conn: Connection, database: str, tmp_path: Path, signals: int
) -> None:
    task = "hold" if signals == 1 else "hold_for_ever"
    await enqueued(conn, task, payload=f'{{"path": "{tmp_path / "begun"}"}}')
    process = subprocess.Popen(  # noqa: ASYNC220 - it returns at once
        [sys.executable, "-c", PROGRAM, database], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        await eventually((tmp_path / "begun").exists, within=30)
        process.send_signal(signal.SIGINT)
        if signals == 2:
            # Of two that wait to be taken, the kernel makes one.
            await eventually(lambda: not _has_waiting_signals(process.pid))
            # Its stop is under way: it has left off claiming.
            await enqueued(conn, "hold", payload=f'{{"path": "{tmp_path / "more"}"}}')
            process.send_signal(signal.SIGINT)
        out, err = await asyncio.to_thread(process.communicate, timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert out.startswith("Tally(succeeded=1" if signals == 1 else "Tally(succeeded=0")
    states = await rows(conn, "select distinct state, failures, losses from queue_service.runs")
    assert states == ([] if signals == 1 else [("queued", 0, 0)])


@pytest.mark.parametrize("task", ["swallow", "block", "thread"])
async def test_a_worker_process_ends_in_time_whatever_its_handlers_do(
    start: Start, conn: Connection, tmp_path: Path, task: str
) -> None:
    await enqueued(conn, task, payload=f'{{"path": "{tmp_path / "begun"}"}}')
    process = start("--drain-timeout", "200ms", QUEUE_SERVICE_LEASE="1h")
    await eventually((tmp_path / "begun").exists, within=30)
    asked = time.monotonic()
    process.terminate()
    await eventually(lambda: process.poll() is not None, within=20)
    assert time.monotonic() - asked < 0.2 + 5
    assert await rows(conn, "select state, failures, losses from queue_service.runs") == [("queued", 0, 0)]
    assert await one(conn, "select count(*) from queue_service.leases") == 0


def _has_waiting_signals(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return any(int(line.split()[1], 16) for line in status if line.startswith(("SigPnd", "ShdPnd")))
