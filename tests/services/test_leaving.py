"""Whoever leaves a wait, or closes an App, leaves no task behind that nobody waits for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import pytest

from queue_service import App
from queue_service.app.progress import watching
from queue_service.app.sync import Loop
from queue_service.db.execute import Connection
from queue_service.errors import DatabaseUnavailable
from queue_service.runs.model import Progress, Run
from tests.support import eventually, one, service

LISTENING = (
    "select exists (select from pg_stat_activity where datname = current_database() and query ilike 'listen%finished%')"
)
BLOCKED = "select exists (select from pg_locks where not granted and relation = 'queue_service.leases'::regclass)"


async def test_an_app_that_closes_waits_for_its_sweep(database: str, conn: Connection) -> None:
    app = App(database)
    async with app, conn.transaction():
        await conn.execute("lock table queue_service.leases")
        with app.opened.sweeping():
            sweeping = service(app.opened.services, "sweeper").task
            await eventually(lambda: one(conn, BLOCKED))
    assert sweeping is not None
    assert sweeping.done()


async def test_a_sync_app_that_closes_ends_what_still_goes_on_there(database: str) -> None:
    ended: list[str] = []

    async def for_ever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append("in order")

    # Held, or the garbage collector might end it: it waits for what nobody else knows.
    going_on: list[asyncio.Task[None]] = []

    async def start() -> None:
        going_on.append(asyncio.create_task(for_ever()))
        await asyncio.sleep(0)

    def use() -> None:
        with App(database).sync as q:
            q._loop.call(start())

    await asyncio.to_thread(use)
    assert ended == ["in order"]


@pytest.mark.direct("no notice comes through it")
async def test_a_call_of_another_thread_hears_that_the_app_was_closed(database: str, conn: Connection) -> None:
    with App(database).sync as q:
        run_id = q.enqueue("noop", {})
        waiting = asyncio.create_task(asyncio.to_thread(q.wait, run_id, timeout=60))
        await eventually(lambda: one(conn, LISTENING))
    async with asyncio.timeout(20):
        with pytest.raises(DatabaseUnavailable, match="closed while"):
            await waiting


def test_a_call_that_is_submitted_while_another_thread_stops_the_loop_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = Loop()
    loop.start()
    stopping = threading.Thread(target=loop.stop)
    submit = asyncio.run_coroutine_threadsafe

    def late(call: Coroutine[Any, Any, Any], into: asyncio.AbstractEventLoop) -> Any:
        stopping.start()
        stopping.join(0.5)  # where nothing keeps it from that, it ends the loop now
        return submit(call, into)

    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", late)
    with pytest.raises(DatabaseUnavailable, match="closed while"):
        loop.call(asyncio.Event().wait())
    stopping.join(20)
    assert not stopping.is_alive()


async def test_a_wait_whose_look_for_progress_fails_leaves_nothing_that_goes_on() -> None:
    async def never() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)

    async def look() -> Run | None:
        raise LookupError("on purpose")

    def note(progress: Progress) -> None: ...

    before = asyncio.all_tasks()
    with pytest.raises(LookupError):
        await watching(never(), look, note, poll_interval=60)
    assert asyncio.all_tasks() == before
