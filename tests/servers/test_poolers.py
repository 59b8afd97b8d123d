"""A pooler in front of each server, and all of them named in the address; and what a session's end behind a pooler looks like."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from queue_service import App, Run, Worker
from queue_service.db import schema
from queue_service.db.execute import Connection
from queue_service.db.session import Address, connect, connect_blocking
from queue_service.errors import DatabaseUnavailable
from tests.pooler import pooling
from tests.servers.pair import Pair
from tests.support import eventually, one, quick_app


@contextmanager
def pooled(pair: Pair) -> Iterator[str]:
    """The address of two poolers, of which the first is before the primary. Each has met its server."""
    with pooling(pair.primary.conninfo) as first, pooling(pair.standby.conninfo) as second:
        each = [first.before(pair.primary.conninfo), second.before(pair.standby.conninfo)]
        for conninfo in each:
            with psycopg.connect(conninfo) as conn:
                conn.execute("select 1")
        hosts = ",".join(str(conninfo_to_dict(conninfo)["host"]) for conninfo in each)
        yield make_conninfo(each[0], host=hosts)


async def test_a_pooler_that_goes_on_calling_its_server_a_standby_does_not_hide_the_new_primary(pair: Pair) -> None:
    with pooled(pair) as url:
        await asyncio.to_thread(pair.switch_over)
        second = make_conninfo(url, host=str(conninfo_to_dict(url)["host"]).split(",")[1])
        with psycopg.connect(second) as conn:
            assert conn.info.parameter_status("in_hot_standby") == "on", (
                "the pooler tells the truth: this tests nothing"
            )
        app = quick_app(url)

        @app.task
        async def note(run: Run) -> None:
            async with run.transaction() as conn:
                await conn.execute("create table noted ()")

        async with app:
            run_id = await app.enqueue("note", {})
            # It borrows a connection, too.
            await Worker(app).run(once=True)
            assert (await app.wait(run_id, timeout=20)).state == "succeeded"
        with connect_blocking(Address(url, pooler="transaction"), application="test") as blocking:
            assert blocking.execute("select count(*) from noted").fetchone() == (0,)
        schema.upgrade(url)


@asynccontextmanager
async def storing(way: str, conninfo: str) -> AsyncIterator[asyncio.Task[list[int]]]:
    """Three runs of one lane are about to be stored, on a connection of ours or of the caller's."""
    payloads = [{"n": n} for n in range(3)]
    async with App(conninfo) as app:
        if way == "ours":
            yield asyncio.create_task(app.enqueue_many("noop", payloads, ordering_key="k"))
        elif way == "lent":
            async with await psycopg.AsyncConnection.connect(conninfo, autocommit=True, prepare_threshold=None) as lent:
                yield asyncio.create_task(app.enqueue_many("noop", payloads, ordering_key="k", conn=lent))
        else:
            with psycopg.connect(conninfo, autocommit=True, prepare_threshold=None) as lent_too:
                call = partial(app.sync.enqueue_many, "noop", payloads, ordering_key="k", conn=lent_too)
                yield asyncio.create_task(asyncio.to_thread(call))


@pytest.mark.parametrize("moment", ["as it begins", "as it ends"])
@pytest.mark.parametrize("way", ["ours", "lent", "lent, blocking"])
async def test_a_session_that_ends_behind_a_pooler_while_many_runs_are_stored_is_an_outage(
    server: str, direct: str, conn: Connection, moment: str, way: str
) -> None:
    await conn.execute("begin")
    if moment == "as it begins":
        await conn.execute("lock table queue_service.runs in access exclusive mode")
    else:
        # The lane is asked for when rows have come.
        await conn.execute(
            "insert into queue_service.lanes (queue, ordering_key, next_at) values ('default', 'k', now())"
        )
    watching = await connect(direct)
    waits = "select pid from pg_stat_activity where query like 'copy%%' and wait_event_type = 'Lock'"
    try:
        with pooling(server) as pooler:
            async with storing(way, pooler.before(direct)) as stored:
                pid = await eventually(lambda: one(watching, waits))
                await watching.execute("select pg_terminate_backend(%s)", [pid])
                with pytest.raises(DatabaseUnavailable):
                    await stored
    finally:
        await watching.close()
