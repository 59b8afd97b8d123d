from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import cast

import psycopg
import pytest

from queue_service.db import listener as listening
from queue_service.db.channels import Notice
from queue_service.db.listener import Listener, NoticesMissed
from queue_service.db.pool import Connection
from tests.support import eventually, one

NAME = "listener under test"
Heard = AsyncGenerator[Notice | NoticesMissed, None]

PIDS = "from pg_stat_activity where application_name = %s and datname = current_database()"

pytestmark = pytest.mark.direct("no notice comes through it")


@pytest.fixture
def listener(database: str) -> Listener:
    return Listener(database, ["one", 'Two "quoted"'], application=NAME)


@pytest.fixture
async def heard(listener: Listener) -> AsyncIterator[Heard]:
    async with aclosing(cast("Heard", listener.notices())) as notices:
        yield notices


async def following(heard: Heard) -> Notice | NoticesMissed:
    async with asyncio.timeout(10):
        return await anext(heard)


async def test_a_gap_comes_first_and_from_then_on_nothing_is_missed(
    listener: Listener, heard: Heard, conn: Connection
) -> None:
    assert not listener.connected
    assert await following(heard) == NoticesMissed()
    assert listener.connected
    for number in range(100):
        await conn.execute("select pg_notify('one', %s)", [str(number)])
    assert [await following(heard) for _ in range(100)] == [Notice("one", str(number)) for number in range(100)]


async def test_every_channel_is_heard_and_no_other(heard: Heard, conn: Connection) -> None:
    await following(heard)
    for channel in ("three", "two", 'Two "quoted"', "one"):
        await conn.execute("select pg_notify(%s, 'x')", [channel])
    assert [await following(heard) for _ in range(2)] == [Notice('Two "quoted"', "x"), Notice("one", "x")]


async def test_each_loss_of_its_connection_is_followed_by_a_gap(
    listener: Listener, heard: Heard, conn: Connection
) -> None:
    for turn in range(3):
        assert await following(heard) == NoticesMissed()
        await conn.execute("select pg_notify('one', %s)", [str(turn)])
        assert await following(heard) == Notice("one", str(turn))
        await eventually(lambda: one(conn, f"select pg_terminate_backend(pid) {PIDS}", NAME))
    assert await following(heard) == NoticesMissed()


async def test_it_waits_for_a_database_that_takes_no_connections(
    listener: Listener, heard: Heard, server: str, conn: Connection
) -> None:
    assert await following(heard) == NoticesMissed()
    name = await one(conn, "select current_database()")
    async with await psycopg.AsyncConnection.connect(server, autocommit=True) as admin:
        await admin.execute(f"alter database {name} allow_connections false".encode())
        await eventually(lambda: one(conn, f"select pg_terminate_backend(pid) {PIDS}", NAME))
        waiting = asyncio.ensure_future(following(heard))
        await eventually(lambda: not listener.connected)
        await admin.execute(f"alter database {name} allow_connections true".encode())
    assert await waiting == NoticesMissed()
    assert listener.connected


async def test_no_notice_falls_between_its_questions_whether_the_server_is_there(
    heard: Heard, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "PING_INTERVAL", 0.001)
    await following(heard)
    arrived: list[Notice | NoticesMissed] = []

    async def read() -> None:
        while len(arrived) < 500:
            arrived.append(await following(heard))

    reading = asyncio.ensure_future(read())
    for number in range(500):
        await conn.execute("select pg_notify('one', %s)", [str(number)])
    await reading
    assert arrived == [Notice("one", str(number)) for number in range(500)]


async def test_a_server_that_answers_no_question_is_left(
    heard: Heard, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await following(heard)
    before = await one(conn, f"select pid {PIDS}", NAME)
    monkeypatch.setattr(listening, "PING_INTERVAL", 0.001)
    monkeypatch.setattr(listening, "PING_DEADLINE", 0.0)
    waiting = asyncio.ensure_future(following(heard))
    await eventually(lambda: one(conn, "select not exists (select from pg_stat_activity where pid = %s)", before))
    monkeypatch.undo()
    assert await waiting == NoticesMissed()


async def test_leaving_the_loop_closes_its_connection(listener: Listener, conn: Connection) -> None:
    async with aclosing(cast("Heard", listener.notices())) as notices:
        await following(notices)
        assert await one(conn, f"select count(*) {PIDS}", NAME) == 1
    assert not listener.connected
    await eventually(lambda: one(conn, f"select count(*) = 0 {PIDS}", NAME))
