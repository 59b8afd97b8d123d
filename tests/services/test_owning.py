"""An App is opened once however many ask, leaves nothing behind when that is cancelled, and wakes whoever waits as it closes."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from queue_service import App, Retry, Turn, Worker
from queue_service.app.opened import Opened
from queue_service.db import embedded
from queue_service.db.cluster import Cluster
from queue_service.db.execute import Connection
from queue_service.errors import ConfigError, DatabaseUnavailable
from tests.support import eventually, one

OURS = "select count(*) from pg_stat_activity where datname = current_database() and application_name = 'queue_service'"


@pytest.mark.direct("its connections to the server are the pooler's")
async def test_ten_who_open_at_once_share_one_opening(database: str, conn: Connection) -> None:
    app = App(database)
    before = await one(conn, OURS)
    await asyncio.gather(*(app.open() for _ in range(10)))
    assert await one(conn, OURS) - before <= 2
    for _ in range(9):
        await app.close()
    assert await app.enqueue("noop", {}, queue="q")
    await app.close()
    await eventually(lambda: one(conn, f"select ({OURS}) = %s", before))


async def test_all_who_open_at_once_hear_why_it_failed(database: str) -> None:
    app = App(database + " dbname=nowhere")
    answers = await asyncio.gather(*(app.open() for _ in range(3)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [DatabaseUnavailable] * 3
    assert not app._core.is_open


@pytest.mark.direct("its connections to the server are the pooler's")
async def test_an_open_that_is_cancelled_leaves_nothing_behind(
    database: str, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await one(conn, OURS)
    reached, go_on = asyncio.Event(), asyncio.Event()
    at = Opened.at

    async def slow(*arguments: Any) -> Opened:
        opened = await at(*arguments)
        reached.set()
        await go_on.wait()
        return opened

    monkeypatch.setattr(Opened, "at", slow)
    app = App(database)
    first, second = asyncio.create_task(app.open()), asyncio.create_task(app.open())
    await reached.wait()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    go_on.set()
    # The other one still wants it.
    await second
    await app.enqueue("noop", {}, queue="q")
    await app.close()
    await eventually(lambda: one(conn, f"select ({OURS}) = %s", before))


async def test_an_embedded_server_that_was_started_by_a_cancelled_open_is_stopped(tmp_path: Path) -> None:
    app = App(f"file:{tmp_path / 'cluster'}")
    opening = asyncio.create_task(app.open())
    cluster = Cluster(tmp_path / "cluster", embedded.programs())
    await eventually((tmp_path / "cluster").exists, within=30)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    await eventually(lambda: not [task for task in asyncio.all_tasks() if task.get_name() == "opening"], within=60)
    assert not cluster.is_running()


Waits = Callable[[App, int], Coroutine[Any, Any, Any]]


async def follows(app: App, _run_id: int) -> None:
    async for _ in app.events.follow("s"):
        pass


WAITS: dict[str, Waits] = {
    "wait": lambda app, run_id: app.wait(run_id),
    "wait_many": lambda app, run_id: app.wait_many([run_id]),
    "turns.wait": lambda app, _: app.turns.wait("d", "m"),
    "follow": follows,
}


@pytest.mark.parametrize("what", WAITS)
async def test_closing_wakes_everyone_who_waits(database: str, what: str) -> None:
    app = App(database)
    await app.open()
    run_id = await app.enqueue("noop", {}, queue="q")
    await app.turns.arm(Turn(deployment="d", message_id="m", stream="s"))
    waiting = [asyncio.create_task(WAITS[what](app, run_id)) for _ in range(3)]
    await eventually(lambda: len(list(app.opened.services)) > 1)
    await app.close()
    async with asyncio.timeout(5):
        answers = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(answer) for answer in answers] == [DatabaseUnavailable] * 3
    assert all("closed" in str(answer) for answer in answers)


async def test_closing_from_another_thread_wakes_who_waits_in_a_thread(database: str) -> None:
    q = App(database).sync
    await asyncio.to_thread(q.open)
    run_id = await asyncio.to_thread(q.enqueue, "noop", {}, queue="q")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(q.wait, run_id)
        await eventually(lambda: q._core._opened is not None and len(list(q._core._opened.services)) > 1)
        await asyncio.to_thread(q.close)
        with pytest.raises(DatabaseUnavailable, match="closed"):
            await asyncio.wrap_future(waiting)


@pytest.mark.direct("its connections to the server are the pooler's")
async def test_a_close_that_is_cancelled_closes_and_is_cancelled(database: str, conn: Connection) -> None:
    before = await one(conn, OURS)
    app = App(database)
    await app.open()
    closing = asyncio.create_task(app.close())
    await asyncio.sleep(0)  # a step of the loop
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    await eventually(lambda: one(conn, f"select ({OURS}) = %s", before))


async def test_waiting_lives_through_an_outage(own_cluster: Cluster) -> None:
    async with App(own_cluster.conninfo) as app:

        @app.task
        async def noop() -> str:
            return "done"

        run_id = await app.enqueue("noop", {})
        waiting = asyncio.create_task(app.wait(run_id, timeout=60))
        await app.turns.arm(Turn(deployment="d", message_id="m", stream="s"))
        turn = asyncio.create_task(app.turns.wait("d", "m", timeout=60))
        await asyncio.to_thread(own_cluster.stop)
        late = asyncio.create_task(app.wait(run_id, timeout=60))
        await asyncio.to_thread(own_cluster.start)
        await eventually(lambda: _works(app), within=30)
        await Worker(app).run(once=True)
        await app.turns.commit_reply("d", ["m"], {"text": "hi"})
        assert [(await each).result for each in (waiting, late)] == ["done", "done"]
        assert (await turn).kind == "reply"


async def _works(app: App) -> bool:
    try:
        await app.events.head("s")
    except DatabaseUnavailable:
        return False
    return True


FORKS = """
import os, sys
from queue_service import App
from queue_service.errors import ConfigError

with App(sys.argv[1]).sync as q:
    q.enqueue("noop", {}, queue="q")
    child = os.fork()
    if not child:
        try:
            q.enqueue("noop", {}, queue="q")
        except ConfigError as refused:
            print("child:", refused, flush=True)
        q.close()
        with App(sys.argv[1]).sync as own:
            print("child:", own.enqueue("noop", {}, queue="q") > 0, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
    print("parent:", q.enqueue("noop", {}, queue="q") > 0)
"""


async def test_a_sync_app_notices_a_fork(database: str) -> None:
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", FORKS, database], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 3, done.stdout + done.stderr
    refused, works, parent = done.stdout.splitlines()
    assert "opened before a fork" in refused
    assert (works, parent) == ("child: True", "parent: True")


async def test_an_app_notices_a_fork(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: pid + 1)
    with pytest.raises(ConfigError, match="before a fork"):
        await app.enqueue("noop", {}, queue="q")


async def test_a_callback_that_ends_its_thread_is_heard_and_ends_nobody_else(database: str) -> None:
    def use() -> None:
        def callback(_progress: object) -> None:
            raise SystemExit(3)

        with App(database).sync as q:
            run_id = q.enqueue("report", {}, queue="q")
            q._loop.call(_reported(q._core, run_id))
            with pytest.raises(SystemExit):
                q.wait(run_id, timeout=20, on_progress=callback)
            assert q.get(run_id) is not None

    await asyncio.to_thread(use)


async def _reported(core: Any, run_id: int) -> None:
    async with core.opened.pool.connection() as conn:
        await conn.execute(
            "update queue_service.runs set progress = jsonb_build_object('value', 0.5, 'at', now()) where id = %s",
            [run_id],
        )


class Large:
    """Something that should not be kept."""


@pytest.mark.parametrize("kind", ["thread", "coroutine", "batch"])
async def test_what_a_failed_handler_held_goes_with_its_run(app: App, kind: str) -> None:
    kept: list[weakref.ref[Large]] = []

    def held() -> Large:
        large = Large()
        kept.append(weakref.ref(large))
        return large

    def fails_with(large: Large) -> None:
        cause = ValueError("cause")
        raise RuntimeError(f"on purpose {id(large)}") from cause

    if kind == "thread":

        @app.task(name="fail", retry=Retry(max_attempts=1))
        def in_a_thread() -> None:
            large = held()
            fails_with(large)

    elif kind == "coroutine":

        @app.task(name="fail", retry=Retry(max_attempts=1))
        async def in_a_coroutine() -> None:
            large = held()
            fails_with(large)

    else:

        @app.task(name="fail", batch=5)
        async def in_a_batch(_runs: list[Any]) -> None:
            large = held()
            fails_with(large)

    gc.collect()
    gc.disable()
    try:
        await app.enqueue_many("fail", [{}] * 10, max_attempts=1)
        await Worker(app, {"default": 2}).run(once=True)
        assert len(kept) >= 10
        assert [each for each in kept if each() is not None] == []
    finally:
        gc.enable()


async def test_a_deadline_holds_where_the_server_has_stopped(database: str, conn: Connection, session: Any) -> None:
    from queue_service.db.execute import fetch
    from queue_service.db.query import Query, scalar

    frozen = await session()
    query = Query("select pg_sleep(60)", scalar, writes=False)
    pid = frozen.info.backend_pid
    started = time.monotonic()
    asking = asyncio.create_task(fetch(frozen, query, deadline=1.0))
    await eventually(lambda: one(conn, "select state = 'active' from pg_stat_activity where pid = %s", pid))
    os.kill(pid, 19)
    try:
        with pytest.raises(DatabaseUnavailable, match="did not answer within 1 s"):
            await asking
        assert time.monotonic() - started < 2.5
    finally:
        os.kill(pid, 18)
    await eventually(lambda: one(conn, "select count(*) = 0 from pg_stat_activity where pid = %s", pid))
