from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from queue_service.db import listener as listening
from queue_service.db.channels import Notice
from queue_service.db.execute import Connection
from queue_service.db.listener import Listener, Notices, NoticesMissed
from queue_service.db.pool import Pool
from queue_service.db.session import Address
from tests.support import eventually, one

NAME = "listener under test"

PIDS = "from pg_stat_activity where application_name = %s and datname = current_database()"
KILL = f"select pg_terminate_backend(pid) {PIDS}"
COUNT = f"select count(*) {PIDS}"


class Listening(Listener):
    """One that runs, and what became of it."""

    def __init__(self, address: Address, pool: Pool) -> None:
        super().__init__(address, send=pool.fetch, begin=self.start, application=NAME)
        self.task: asyncio.Task[None] | None = None
        self.failures: list[Exception] = []
        self.wells = 0

    def start(self) -> None:
        if self.task is None:
            self.task = asyncio.create_task(self.run(self.well, self.failures.append))

    def well(self) -> None:
        self.wells += 1


@asynccontextmanager
async def listener_at(address: Address) -> AsyncIterator[Listening]:
    pool = Pool(address, size=2)
    await pool.open()
    made = Listening(address, pool)
    try:
        yield made
    finally:
        if made.task is not None:
            made.task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await made.task
        await pool.close()


pytestmark = pytest.mark.direct("no notice comes through it")


@pytest.fixture
async def listener(database: str) -> AsyncIterator[Listening]:
    async with listener_at(Address(database)) as made:
        yield made


async def following(notices: Notices) -> Notice | NoticesMissed:
    async with asyncio.timeout(15):
        return await anext(notices)


async def notify(conn: Connection, channel: str, payload: object) -> None:
    await conn.execute("select pg_notify(%s, %s)", [channel, str(payload)])


async def test_a_gap_comes_first_and_from_then_on_nothing_is_missed(listener: Listening, conn: Connection) -> None:
    assert not listener.connected
    with listener.subscribed("one") as notices:
        assert await following(notices) == NoticesMissed()
        assert listener.connected
        assert listener.hears("one")
        for number in range(100):
            await notify(conn, "one", number)
        assert [await following(notices) for _ in range(100)] == [Notice("one", str(number)) for number in range(100)]


async def test_each_subscriber_hears_its_channels_and_no_other_on_one_connection(
    listener: Listening, conn: Connection
) -> None:
    with listener.subscribed('Two "quoted"', "one") as first, listener.subscribed("three", "one") as second:
        assert [await following(each) for each in (first, second)] == [NoticesMissed()] * 2
        for channel in ("four", "two", 'Two "quoted"', "three", "one"):
            await notify(conn, channel, "x")
        assert [await following(first) for _ in range(2)] == [Notice('Two "quoted"', "x"), Notice("one", "x")]
        assert [await following(second) for _ in range(2)] == [Notice("three", "x"), Notice("one", "x")]
        assert await one(conn, COUNT, NAME) == 1


async def test_a_subscriber_that_comes_later_is_told_of_a_gap_and_the_others_are_not(
    listener: Listening, conn: Connection
) -> None:
    with listener.subscribed("one") as first:
        await following(first)
        with listener.subscribed("one") as same, listener.subscribed("two") as other:
            assert await following(same) == NoticesMissed()
            assert await following(other) == NoticesMissed()
            for channel in ("one", "two"):
                await notify(conn, channel, "x")
            assert await following(first) == await following(same) == Notice("one", "x")
            assert await following(other) == Notice("two", "x")
        # What nobody is subscribed to is not listened to any more.
        await eventually(lambda: not listener.hears("two"))
        for channel in ("two", "one"):
            await notify(conn, channel, "y")
        assert await following(first) == Notice("one", "y")


async def test_one_alone_that_rests_hears_later_what_came_meanwhile(listener: Listening, conn: Connection) -> None:
    with listener.subscribed("one") as notices:
        await following(notices)
        listener.rest(notices, 0.5)
        began = time.monotonic()
        for number in range(3):
            await notify(conn, "one", number)
        assert [await following(notices) for _ in range(3)] == [Notice("one", str(number)) for number in range(3)]
        assert time.monotonic() - began > 0.4
        # It rests no longer than that, and again from when it says so.
        await notify(conn, "one", "at once")
        assert await following(notices) == Notice("one", "at once")


async def test_one_that_rests_costs_the_others_nothing(listener: Listening, conn: Connection) -> None:
    with listener.subscribed("one") as resting, listener.subscribed("two") as other:
        assert [await following(each) for each in (resting, other)] == [NoticesMissed()] * 2
        listener.rest(resting, 3600)
        await notify(conn, "two", "x")
        # Before it asks its server something.
        async with asyncio.timeout(listening.PING_INTERVAL / 2):
            assert await following(other) == Notice("two", "x")
    with listener.subscribed("one") as resting:
        await following(resting)
        listener.rest(resting, 3600)
        # Who comes later does not wait, either.
        with listener.subscribed("two") as other:
            assert await following(other) == NoticesMissed()
            await notify(conn, "two", "y")
            assert await following(other) == Notice("two", "y")


async def test_who_subscribes_while_others_come_and_go_misses_nothing(listener: Listening, conn: Connection) -> None:
    with listener.subscribed("one") as steady:
        await following(steady)
        for number in range(50):
            with ExitStack() as stack:
                comers = [stack.enter_context(listener.subscribed(f"c{number % 7}", "all")) for _ in range(3)]
                assert [await following(each) for each in comers] == [NoticesMissed()] * 3
                await notify(conn, "all", number)
                await notify(conn, "one", number)
                assert [await following(each) for each in comers] == [Notice("all", str(number))] * 3
        assert [await following(steady) for _ in range(50)] == [Notice("one", str(number)) for number in range(50)]


async def test_one_that_does_not_read_is_told_of_a_gap_and_costs_the_others_nothing(
    listener: Listening, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "MAX_WAITING", 10)
    with listener.subscribed("one") as slow, listener.subscribed("one") as quick:
        for each in (slow, quick):
            await following(each)
        for number in range(25):
            await notify(conn, "one", number)
            assert await following(quick) == Notice("one", str(number))
        assert await following(slow) == NoticesMissed()
        last = [await following(slow) for _ in range(5)]
        assert last == [Notice("one", str(number)) for number in range(20, 25)]


async def test_each_loss_of_its_connection_is_followed_by_a_gap_for_each(listener: Listening, conn: Connection) -> None:
    with listener.subscribed("one") as first, listener.subscribed("two") as second:
        for turn in range(3):
            assert [await following(each) for each in (first, second)] == [NoticesMissed()] * 2
            for channel, notices in (("one", first), ("two", second)):
                await notify(conn, channel, turn)
                assert await following(notices) == Notice(channel, str(turn))
            await eventually(lambda: one(conn, KILL, NAME))
        assert [await following(each) for each in (first, second)] == [NoticesMissed()] * 2
    assert len(listener.failures) == 3


async def test_a_connection_that_was_lost_leaves_nothing_on_the_loop(listener: Listening, conn: Connection) -> None:
    """libpq closes the socket, and another one of this process gets its number: who reads from it then is somebody else."""
    loop = asyncio.get_running_loop()
    broken: list[dict[str, object]] = []
    loop.set_exception_handler(lambda _loop, context: broken.append(context))
    with listener.subscribed("one") as notices:
        for _ in range(5):
            await following(notices)
            await eventually(lambda: one(conn, KILL, NAME))
            await eventually(lambda: not listener.connected)
            ours, theirs = socket.socketpair()
            with ours, theirs:
                assert not loop.remove_reader(ours)
                assert not loop.remove_reader(theirs)
    assert broken == []


async def test_it_waits_for_a_database_that_takes_no_connections(
    listener: Listening, server: str, conn: Connection
) -> None:
    with listener.subscribed("one") as notices:
        assert await following(notices) == NoticesMissed()
        name = await one(conn, "select current_database()")
        async with await psycopg.AsyncConnection.connect(server, autocommit=True) as admin:
            await admin.execute(f"alter database {name} allow_connections false".encode())
            await eventually(lambda: one(conn, KILL, NAME))
            await eventually(lambda: not listener.connected)
            await admin.execute(f"alter database {name} allow_connections true".encode())
        assert await following(notices) == NoticesMissed()
        assert listener.connected


async def test_no_notice_falls_between_its_questions_whether_the_server_is_there(
    listener: Listening, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "PING_INTERVAL", 0.001)
    with listener.subscribed("one") as notices:
        await following(notices)
        for number in range(500):
            await notify(conn, "one", number)
        assert [await following(notices) for _ in range(500)] == [Notice("one", str(number)) for number in range(500)]


async def test_a_server_that_answers_no_question_is_left(
    listener: Listening, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listener.subscribed("one") as notices:
        monkeypatch.setattr(listening, "PING_INTERVAL", 0.001)
        await following(notices)
        before = await one(conn, f"select pid {PIDS}", NAME)
        monkeypatch.setattr(listening, "PING_DEADLINE", 0.0)
        await eventually(lambda: one(conn, "select not exists (select from pg_stat_activity where pid = %s)", before))
        monkeypatch.undo()
        assert await following(notices) == NoticesMissed()


async def test_without_a_subscriber_its_connection_is_closed_and_the_next_one_has_a_new_one(
    listener: Listening, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "LINGER", 0.05)
    for number in range(3):
        with listener.subscribed("one") as notices:
            assert await following(notices) == NoticesMissed()
            await notify(conn, "one", number)
            assert await following(notices) == Notice("one", str(number))
        await eventually(lambda: one(conn, f"select count(*) = 0 {PIDS}", NAME))
        assert not listener.connected


async def test_the_next_subscriber_in_time_finds_the_same_connection(listener: Listening, conn: Connection) -> None:
    pids = set()
    for _ in range(3):
        with listener.subscribed("one") as notices:
            assert await following(notices) == NoticesMissed()
            pids.add(await one(conn, f"select pid {PIDS}", NAME))
    assert len(pids) == 1


# Poolers, and an address of its own for notices


async def test_behind_a_transaction_pooler_it_does_not_connect_and_that_is_no_fault(
    database: str, conn: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with listener_at(Address(database, pooler="transaction")) as listener:
        with listener.subscribed("one") as notices, listener.subscribed("two"):
            await eventually(lambda: listener.why_polling is not None)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(notices), 0.05)
        assert listener.polls_by_design
        assert "QUEUE_SERVICE_LISTEN_URL" in str(listener.why_polling)
        assert (listener.failures, listener.connected) == ([], False)
        assert await one(conn, COUNT, NAME) == 0
    assert sum("transaction pooler" in record.getMessage() for record in caplog.records) == 1


async def test_an_address_for_notices_is_where_it_listens(database: str, conn: Connection) -> None:
    address = Address(database, pooler="transaction", listen_url=database)
    async with listener_at(address) as listener:
        with listener.subscribed("one") as notices:
            assert await following(notices) == NoticesMissed()
            await notify(conn, "one", "x")
            assert await following(notices) == Notice("one", "x")
            await eventually(lambda: listener.wells > 0)
    assert (listener.why_polling, listener.polls_by_design, listener.failures) == (None, False, [])


async def test_an_address_for_notices_that_leads_elsewhere_is_noticed_and_said(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "PING_DEADLINE", 1.0)
    address = Address(database, listen_url=make_conninfo(database, dbname="postgres"))
    async with listener_at(address) as listener:
        with listener.subscribed("one"):
            await eventually(lambda: listener.why_polling is not None)
        assert "leads to another database" in str(listener.why_polling)
        assert not listener.polls_by_design
        assert not listener.connected
        assert [str(each) for each in listener.failures] == [listener.why_polling]
        assert listener.wells == 0
