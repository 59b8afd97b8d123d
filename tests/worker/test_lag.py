"""A handler that blocks the event loop is reported, once, and by name."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from queue_service import App, RunState, Worker
from queue_service.db.execute import Connection
from queue_service.worker import lag
from queue_service.worker.lag import LagWatch
from tests.support import eventually, one, working


def reports(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [record.__dict__ for record in caplog.records if "loop is blocked" in record.message]


async def test_a_handler_that_blocks_for_longer_than_its_lease_is_reported_once_and_keeps_its_lease(
    app: App, conn: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    @app.task
    async def hog() -> str:
        time.sleep(4)  # noqa: ASYNC251  # what a handler should not do; leases last 3 s here
        return "through"

    caplog.set_level("INFO")
    async with working(app, {"default": 4}) as worker:
        run = await app.wait(await app.enqueue("hog", {}), timeout=20)
        await eventually(lambda: any("turns again" in record.message for record in caplog.records))
        assert worker.tally.lost == 0
    assert (run.state, run.attempt, run.losses) == (RunState.SUCCEEDED, 1, 0)
    (report,) = [each for each in reports(caplog) if each["task"] is not None]
    assert (report["levelname"], report["task"], report["run_id"]) == ("WARNING", "hog", run.id)
    assert "time.sleep(4)" in report["stack"]
    assert await one(conn, "select coalesce(sum(losses), 0) from queue_service.finished_runs") == 0


async def test_handlers_that_block_one_after_the_other_are_each_named(
    app: App, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lag, "THRESHOLD", 0.2)
    monkeypatch.setattr(lag, "LOOK_PERIOD", 0.01)

    @app.task
    async def hog(n: int) -> None:
        time.sleep(1)  # noqa: ASYNC251  # what is to be reported

    run_ids = await app.enqueue_many("hog", [{"n": n} for n in range(2)])
    await Worker(app, {"default": 1}).run(once=True)
    # Besides them, the machine may be slow to start a worker.
    assert [report["run_id"] for report in reports(caplog) if report["task"] == "hog"] == run_ids


async def test_each_time_that_the_loop_is_blocked_is_reported(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lag, "THRESHOLD", 0.1)
    monkeypatch.setattr(lag, "LOOK_PERIOD", 0.01)
    caplog.set_level("INFO")
    watching = asyncio.create_task(LagWatch(lambda _task: None).run())
    await eventually(watches)
    for n in range(1, 4):
        time.sleep(0.4)  # noqa: ASYNC251  # what is to be reported
        await eventually(lambda: sum("turns again" in record.message for record in caplog.records) == n)  # noqa: B023
        assert len(reports(caplog)) == n
    watching.cancel()
    await eventually(lambda: not watches())
    assert {report["task"] for report in reports(caplog)} == {None}


async def test_handlers_that_wait_or_share_the_loop_are_not_reported(
    app: App, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lag, "LOOK_PERIOD", 0.01)

    @app.task
    async def short() -> None:
        sum(range(2_000))

    @app.task
    def in_thread() -> None:
        threading.Event().wait(1.2)

    @app.task
    async def waits() -> None:
        await asyncio.sleep(1.2)  # what a handler may do

    async with working(app):
        run_ids = [await app.enqueue("in_thread", {}), await app.enqueue("waits", {})]
        await app.enqueue_many("short", [{}] * 2_000)
        for run_id in run_ids:
            await app.wait(run_id, timeout=20)
    assert reports(caplog) == []


async def test_watching_costs_next_to_nothing() -> None:
    watching = asyncio.create_task(LagWatch(lambda _task: None).run())
    await eventually(watches)
    process = psutil.Process()
    own: Callable[[], dict[int, float]] = lambda: {  # noqa: E731
        thread.id: thread.user_time + thread.system_time for thread in process.threads()
    }
    (ident,) = [thread.native_id for thread in threading.enumerate() if thread.name == "queue_service lag"]
    assert ident is not None
    before = own()[ident]
    await asyncio.sleep(3)  # idleness is what is measured
    # Clock ticks are of 10 ms; the budget is a thousandth of a core, and the ticks' own error.
    assert own()[ident] - before <= 0.003 + 0.01
    watching.cancel()


def watches() -> bool:
    return any(re.fullmatch("queue_service lag", thread.name) for thread in threading.enumerate())
