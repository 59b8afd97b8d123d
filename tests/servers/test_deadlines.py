"""A deadline holds whatever the server does: a process of it that is stopped, and a server that takes no connections."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import psutil  # type: ignore[import-untyped]
import pytest

from queue_service import App
from queue_service.db.execute import Connection
from queue_service.db.query import Query, nothing, scalar
from queue_service.errors import DatabaseUnavailable
from queue_service.settings import load
from tests.servers.pair import Pair
from tests.support import eventually, one, rows
from tests.worker.test_lent import Borrower, lending_from

DEADLINE, ANSWERED = 1.0, 1.5
READ: Query[int] = Query("select pg_backend_pid()", scalar, writes=False)
WRITE: Query[int] = Query("select pg_backend_pid()", scalar)
LONG_READ: Query[None] = Query("select pg_sleep(60) as a_read", nothing, writes=False)
LONG_WRITE: Query[None] = Query("select pg_sleep(60) as a_write", nothing)
ASLEEP = "select exists (select from pg_stat_activity where query = %s and wait_event = 'PgSleep')"


def narrow_app(database: str) -> App:
    """With one connection at a time: when it was given up, the next call has a new one."""
    return App(database, settings=load({"QUEUE_SERVICE_POOL_SIZE": "1"}))


@pytest.fixture
async def app(database: str) -> AsyncIterator[App]:
    async with narrow_app(database) as opened:
        yield opened


@contextmanager
def stopped(*pids: int) -> Iterator[None]:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


async def others(conn: Connection) -> list[int]:
    """The server's processes for all other sessions of this database. They are idle."""
    found = "from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
    await eventually(lambda: one(conn, f"select bool_and(state = 'idle') {found} and backend_type = 'client backend'"))
    return [pid for (pid,) in await rows(conn, f"select pid {found}")]


async def sessions(app: App, conn: Connection) -> list[int]:
    """Those of the App's pool."""
    await app.pool.fetch(READ)
    return await others(conn)


@pytest.mark.parametrize("query", [READ, WRITE], ids=["read", "write"])
async def test_it_holds_where_the_servers_process_is_stopped_and_the_pool_goes_on(
    app: App, conn: Connection, query: Query[int]
) -> None:
    pids = await sessions(app, conn)
    with stopped(*pids):
        begun = time.monotonic()
        with pytest.raises(DatabaseUnavailable, match="did not answer within 1 s"):
            await app.pool.fetch(query, deadline=DEADLINE)
        assert time.monotonic() - begun < ANSWERED
        assert await app.pool.fetch(READ, deadline=DEADLINE) not in pids


async def test_who_comes_after_somebody_who_was_given_up_waits_for_no_other_dead_connection(
    database: str, conn: Connection
) -> None:
    """As where the machine of the server is frozen: what was opened before answers nothing, and is open."""
    async with App(database) as app:
        busy: Query[int] = Query("select pg_backend_pid() from pg_sleep(0.2)", scalar, writes=False)
        await asyncio.gather(*(app.pool.fetch(busy) for _ in range(4)))
        pids = await others(conn)
        assert len(pids) > 1
        with stopped(*pids):
            with pytest.raises(DatabaseUnavailable):
                await app.pool.fetch(WRITE, deadline=DEADLINE)
            # Without the look, its deadline would pass with the next of them.
            assert await app.pool.fetch(WRITE, deadline=20) not in pids


@pytest.mark.parametrize("query", [READ, WRITE], ids=["read", "write"])
async def test_the_callers_own_timeout_holds_there_too(app: App, conn: Connection, query: Query[int]) -> None:
    pids = await sessions(app, conn)
    with stopped(*pids):
        begun = time.monotonic()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(DEADLINE):
                await app.pool.fetch(query)
        assert time.monotonic() - begun < ANSWERED
        assert await app.pool.fetch(READ, deadline=DEADLINE) not in pids


async def test_it_holds_on_the_blocking_face(database: str, conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    with narrow_app(database).sync as q:
        q.fetch(READ)
        pids = await others(conn)
        pool = q._core._opened.pool  # type: ignore[union-attr]
        with stopped(*pids):
            with monkeypatch.context() as quick:
                quick.setattr(pool, "fetch", functools.partial(pool.fetch, deadline=DEADLINE))
                begun = time.monotonic()
                with pytest.raises(DatabaseUnavailable):
                    await asyncio.to_thread(q.enqueue, "noop", {}, singleton_key="k")
                assert time.monotonic() - begun < ANSWERED
            assert q.fetch(READ) not in pids


@pytest.mark.parametrize("query", [READ, WRITE], ids=["read", "write"])
async def test_nothing_else_stands_still_where_the_whole_server_is_stopped(pair: Pair, query: Query[int]) -> None:
    """What ends a read that is given up is a connection too, and is answered by nobody."""
    async with narrow_app(pair.primary.conninfo) as app:
        await app.pool.fetch(READ)
        async with stopped_whole(pair):
            begun = time.monotonic()
            with pytest.raises(DatabaseUnavailable):
                await app.pool.fetch(query, deadline=DEADLINE)
            assert time.monotonic() - begun < ANSWERED
            # And one that finds no connection.
            with pytest.raises(DatabaseUnavailable):
                await app.pool.fetch(query, deadline=DEADLINE)
            assert time.monotonic() - begun < 2 * ANSWERED
        assert await app.pool.fetch(READ)


@pytest.mark.parametrize("kind", ["coroutine", "thread"])
async def test_nor_where_a_handlers_statement_is_given_up_there(pair: Pair, kind: str) -> None:
    run = Borrower()
    async with (
        lending_from(pair.primary.conninfo) as lender,
        await Connection.connect(pair.primary.conninfo, autocommit=True) as conn,
    ):

        async def sleep() -> None:
            async with lender.transaction(run) as lent:
                await lent.execute(LONG_READ.text)

        def sleep_in_thread() -> None:
            with lender.blocking_transaction(run) as lent:
                lent.execute(LONG_READ.text)

        sleeping = asyncio.create_task(sleep() if kind == "coroutine" else asyncio.to_thread(sleep_in_thread))
        await eventually(lambda: one(conn, ASLEEP, LONG_READ.text))
        async with stopped_whole(pair):
            begun = time.monotonic()
            run.cancelled = True
            lender.stop((run.id, run.attempt))
            if kind == "coroutine":
                sleeping.cancel()
            async with asyncio.timeout(10):
                await asyncio.gather(sleeping, return_exceptions=True)
            assert time.monotonic() - begun < 2 * ANSWERED


async def test_it_holds_where_no_thread_can_be_started_to_cancel_the_statement(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also at the end of the interpreter."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    await app.pool.fetch(READ)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    begun = time.monotonic()
    with pytest.raises(DatabaseUnavailable):
        await app.pool.fetch(LONG_READ, deadline=DEADLINE)
    assert time.monotonic() - begun < ANSWERED


@asynccontextmanager
async def stopped_whole(pair: Pair) -> AsyncIterator[None]:
    """The primary, with all of its processes. Fails where this process, too, stood still meanwhile."""
    postmaster = psutil.Process(pair.primary.postmaster)
    gaps = [time.monotonic()]
    ticking = asyncio.create_task(tick(gaps))
    with stopped(*(each.pid for each in (postmaster, *postmaster.children()))):
        yield
    ticking.cancel()
    gaps.append(time.monotonic())
    assert max(later - earlier for earlier, later in itertools.pairwise(gaps)) < 0.5


async def tick(at: list[float]) -> None:
    while True:
        await asyncio.sleep(0.01)  # what is watched is the event loop
        at.append(time.monotonic())


@pytest.mark.parametrize("how", ["deadline", "cancelled"])
async def test_a_read_does_not_go_on_after_its_caller_has_left(app: App, conn: Connection, how: str) -> None:
    await given_up(app, conn, LONG_READ, how)
    await eventually(lambda: one(conn, ASLEEP.replace("select exists", "select not exists"), LONG_READ.text))


@pytest.mark.parametrize("how", ["deadline", "cancelled"])
async def test_a_write_goes_on_since_it_may_be_committing(app: App, conn: Connection, how: str) -> None:
    await given_up(app, conn, LONG_WRITE, how)
    # By now one that was cancelled would have ended.
    await given_up(app, conn, LONG_READ, how)
    await eventually(lambda: one(conn, ASLEEP.replace("select exists", "select not exists"), LONG_READ.text))
    assert await one(conn, ASLEEP, LONG_WRITE.text)


async def given_up(app: App, conn: Connection, query: Query[None], how: str) -> None:
    deadline = 0.5 if how == "deadline" else 30.0
    call = asyncio.create_task(app.pool.fetch(query, deadline=deadline))
    await eventually(lambda: one(conn, ASLEEP, query.text))
    if how == "cancelled":
        call.cancel()
    (answer,) = await asyncio.gather(call, return_exceptions=True)
    assert isinstance(answer, DatabaseUnavailable | asyncio.CancelledError)
