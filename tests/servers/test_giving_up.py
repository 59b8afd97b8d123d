"""What waits for a synchronous standby is given up in every way there is, and is never acknowledged before the standby has it.

A commit that waits for its standby is written, and not visible yet. To cancel it there ends the wait, and not the commit: it
becomes visible, and whoever asks again finds it and takes it for stored. When the standby is promoted, it is gone.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
from psycopg.conninfo import make_conninfo

from queue_service import App
from queue_service.app import opened as opened_module
from queue_service.db.execute import Connection
from queue_service.db.session import connect
from queue_service.errors import ConfigError, DatabaseUnavailable
from queue_service.runs import queries
from queue_service.settings import load
from tests.servers.operations import OPERATIONS, Call
from tests.servers.pair import GAVE_UP, Pair
from tests.support import eventually, one, quick_app

# Seconds until a call is given up.
PATIENCE = 0.3
# So many are tried at once.
AT_ONCE = 16
WAITING = (
    "select count(*) from pg_stat_activity where datname = current_database() and wait_event = 'SyncRep' "
    "and query not like '%%pg_notify(%%channel%%'"
)

Way = Callable[[App, Call, Connection], Awaitable[object]]


class GivenUp:
    """What a call came to that was not acknowledged."""


GIVEN_UP = GivenUp()


async def begun(call: asyncio.Future[Any], conn: Connection) -> None:
    """It waits for the standby, or is over."""
    before = await one(conn, WAITING)

    async def is_waiting() -> bool:
        return call.done() or await one(conn, WAITING) > before

    with_patience = asyncio.ensure_future(eventually(is_waiting, within=PATIENCE * 2))
    await asyncio.wait([with_patience])
    # A repeat waits for a lock of the first.
    with_patience.exception()


@contextmanager
def short_deadlines(app: App) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(app.pool, "fetch", functools.partial(app.pool.fetch, deadline=PATIENCE))
        patched.setattr(opened_module, "DEADLINE", PATIENCE)
        yield


async def by_a_deadline(app: App, call: Call, conn: Connection) -> object:
    # Some go again for longer than that.
    return await by_a_timeout(app, call, conn, seconds=4 * PATIENCE)


async def by_a_timeout(app: App, call: Call, conn: Connection, seconds: float = PATIENCE) -> object:
    try:
        return await asyncio.wait_for(call(app), seconds)
    except (TimeoutError, DatabaseUnavailable):
        return GIVEN_UP


async def outcome(calling: asyncio.Future[Any]) -> object:
    """After it was cancelled, or what it needs was closed."""
    try:
        return await calling
    except (asyncio.CancelledError, DatabaseUnavailable, ConfigError):
        # Of more than one statement, the next one finds the App closed.
        return GIVEN_UP


async def by_being_cancelled(app: App, call: Call, conn: Connection) -> object:
    calling = asyncio.ensure_future(call(app))
    await begun(calling, conn)
    calling.cancel()
    # Once more while it ends, as a task group does whose own task is cancelled.
    await asyncio.sleep(0)
    calling.cancel()
    return await outcome(calling)


async def by_closing(app: App, call: Call, conn: Connection) -> object:
    async with quick_app(app.conninfo) as other:
        calling = asyncio.ensure_future(call(other))
        await begun(calling, conn)
    calling.cancel()
    return await outcome(calling)


async def by_closing_from_another_thread(app: App, call: Call, conn: Connection) -> object:
    """The blocking face, used in one thread and closed in another."""
    loop, blocking = asyncio.get_running_loop(), quick_app(app.conninfo).sync
    with ThreadPoolExecutor(2) as threads:
        await loop.run_in_executor(threads, blocking.open)
        calling = loop.run_in_executor(threads, call, blocking)
        await begun(calling, conn)
        await loop.run_in_executor(threads, blocking.close)
        return await outcome(calling)


WAYS: dict[str, Way] = {
    each.__name__: each
    for each in (by_a_deadline, by_a_timeout, by_being_cancelled, by_closing, by_closing_from_another_thread)
}


@pytest.fixture
async def watching(own_database: str) -> AsyncIterator[Connection]:
    conn = await connect(own_database)
    yield conn
    await conn.close()


def wide_app(database: str) -> App:
    """With a connection for each that waits at once."""
    return App(database, settings=dataclasses.replace(load({}), pool_size=2 * AT_ONCE))


@pytest.fixture
async def replicated(own_database: str) -> AsyncIterator[App]:
    async with wide_app(own_database) as app:
        yield app


async def acknowledged(app: App, names: Collection[str], way: Way, conn: Connection) -> dict[str, list[object]]:
    """What each call and its repeat were answered while the standby took nothing."""
    found: dict[str, list[object]] = {}
    some = asyncio.Semaphore(AT_ONCE)

    async def attempt(name: str) -> None:
        async with some:
            answers = [await way(app, OPERATIONS[name].call, conn) for _ in range(2)]
        if OPERATIONS[name].steps_over:
            # The first has it.
            answers.pop()
        if taken := [answer for answer in answers if answer is not GIVEN_UP]:
            found[name] = taken

    # For all of them at once: each that puts back what it met would put back what another one has set.
    with short_deadlines(app) if way is by_a_deadline else nullcontext():
        await asyncio.gather(*(attempt(name) for name in names))
    return found


async def prepare(app: App) -> None:
    for operation in OPERATIONS.values():
        if operation.prepare is not None:
            await operation.prepare(app)


async def stored(conn: Connection) -> set[str]:
    return {name for name, operation in OPERATIONS.items() if await one(conn, operation.stored)}


@pytest.mark.parametrize("way", WAYS)
async def test_what_the_standby_does_not_have_is_not_acknowledged(
    way: str, shared_pair: Pair, replicated: App, watching: Connection
) -> None:
    await prepare(replicated)
    told = len(shared_pair.primary.log)
    shared_pair.stall()
    answers = await acknowledged(replicated, OPERATIONS, WAYS[way], watching)
    seen = await stored(watching)
    waiting = await one(watching, WAITING)
    shared_pair.resume()
    assert answers == {}
    assert seen == set()
    # The first of them go on there, and whoever comes has to wait behind them.
    assert waiting >= len(OPERATIONS) / 2
    assert GAVE_UP not in shared_pair.primary.log[told:]
    # The standby is back: what was given up is carried out, and asking once more is answered.
    async with asyncio.timeout(30):
        await asyncio.gather(*(operation.call(replicated) for operation in OPERATIONS.values()))
    assert await stored(watching) == OPERATIONS.keys()
    standby = await connect(make_conninfo(shared_pair.standby.conninfo, dbname=watching.info.dbname), writable=False)

    async def is_there() -> bool:
        return await stored(standby) == OPERATIONS.keys()

    await eventually(is_there)
    await standby.close()


@pytest.mark.parametrize("way", ["by_a_deadline", "by_being_cancelled"])
async def test_after_a_failover_all_that_was_acknowledged_is_there(way: str, pair: Pair) -> None:
    """Each operation is tried twice while the standby takes nothing, and once more when it is the primary."""
    async with wide_app(pair.primary.conninfo) as app:
        watcher = await connect(pair.primary.conninfo)
        before = await app.enqueue("noop", {}, queue="before")
        await prepare(app)
        pair.stall()
        answers = await acknowledged(app, OPERATIONS, WAYS[way], watcher)
        await watcher.close()
        await asyncio.to_thread(pair.fail_over)
    async with wide_app(pair.primary.conninfo) as app:
        there = await connect(pair.primary.conninfo)
        assert answers.keys() - await stored(there) == set()
        assert await app.get(before) is not None
        # Nor is anything half done: each goes through as if it had not been tried.
        await asyncio.gather(*(operation.call(app) for operation in OPERATIONS.values()))
        assert await stored(there) == OPERATIONS.keys()
        await there.close()


async def test_ids_are_not_given_before_a_standby_that_is_promoted_would_not_give_them_again(pair: Pair) -> None:
    """Only every 32nd writes a record for the standby. Many runs are stored by two statements, which may be answered by two
    primaries: the second one would meet the ids of others, or leave them theirs to meet."""
    reserving = queries.reserve(3, None, None, None)
    async with wide_app(pair.primary.conninfo) as app:
        first = (await app.pool.fetch(reserving)).ids
        second = (await app.pool.fetch(reserving)).ids
        pair.stall()
        with pytest.raises(DatabaseUnavailable):
            await app.pool.fetch(reserving, deadline=1.0)
        await asyncio.to_thread(pair.fail_over)
    async with wide_app(pair.primary.conninfo) as app:
        third = (await app.pool.fetch(reserving)).ids
    assert len({*first, *second, *third}) == 9
