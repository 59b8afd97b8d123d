"""When endings are written, and with which others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest
from psycopg import errors as pg

from queue_service.db.execute import Connection, fetch
from queue_service.db.pool import Place, Pool
from queue_service.db.query import Query
from queue_service.db.session import Limits
from queue_service.errors import DatabaseUnavailable
from queue_service.runs import queries
from queue_service.runs.claim import hold
from queue_service.runs.model import Ending, NewRun, Return, RunState
from queue_service.services.loop import Service
from queue_service.worker import finisher
from queue_service.worker.finisher import Finisher
from queue_service.worker.leases import Held, Leases
from tests.support import claimed, enqueued, eventually, one, refusing, rows


class Desk:
    """A finisher at work, with runs that were claimed for it."""

    def __init__(self, conn: Connection, place: Place) -> None:
        self._conn = conn
        self._leases = Leases()
        self.finisher = Finisher(place, self._leases, 1)
        self.service = Service("finisher", self.finisher.run)
        self.running: asyncio.Task[None]

    async def held(self, count: int, *, key: str | None = None, limited: bool = False) -> list[Held]:
        for number in range(count):
            await enqueued(self._conn, ordering_key=key and f"{key}{number}")
        return self._leases.take(
            await claimed(self._conn, limit=count, laned=key is not None), time.monotonic(), limited=limited
        )

    def end(self, *runs: Held) -> None:
        for each in runs:
            self.finisher.put(each, Ending(each.run.claim, RunState.SUCCEEDED))

    async def written(self, count: int) -> None:
        """Until so many endings are stored, and the finisher has heard of it."""
        await eventually(lambda: self.finisher.tally.succeeded == count)
        assert await one(self._conn, "select count(*) from queue_service.finished_runs") == count


@pytest.fixture
async def desk(conn: Connection, database: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Desk]:
    """One that would let others come for an hour."""
    monkeypatch.setattr(finisher, "REST", 3_600.0)
    monkeypatch.setattr(finisher, "AGAIN", 0.05)
    pool = Pool(database, size=1, application="test")
    made = Desk(conn, pool.reserved(Limits(timedelta(milliseconds=100), timedelta(milliseconds=500))))
    made.running = asyncio.create_task(made.service.run())
    yield made
    made.finisher.close()
    await made.running
    await pool.close()


async def test_after_a_few_endings_others_are_let_come_together(desk: Desk, conn: Connection) -> None:
    first, second = await desk.held(2), await desk.held(3)
    desk.end(*first)
    await eventually(lambda: desk.finisher._is_resting)
    desk.end(*second[:1])
    desk.end(*second[1:])
    assert await one(conn, "select count(*) from queue_service.finished_runs") == 2
    # A worker that stops waits for nobody.
    desk.finisher.close()
    await desk.written(5)
    assert desk.finisher.tally.succeeded == 5


async def test_after_one_ending_the_next_is_written_at_once(desk: Desk) -> None:
    for number, held in enumerate(await desk.held(5)):
        desk.end(held)
        await desk.written(number + 1)


async def test_after_many_endings_the_next_are_written_at_once(desk: Desk) -> None:
    many = await desk.held(finisher.FEW)
    desk.end(*many)
    await desk.written(finisher.FEW)
    desk.end(*await desk.held(2))
    await desk.written(finisher.FEW + 2)


@pytest.mark.parametrize("how", ["in a lane", "limited"])
@pytest.mark.parametrize("when", ["while others come", "while others are written"])
async def test_an_ending_that_makes_room_is_written_at_once(desk: Desk, how: str, when: str) -> None:
    first, second = await desk.held(2), await desk.held(2)
    (room,) = await (desk.held(1, key="k") if how == "in a lane" else desk.held(1, limited=True))
    desk.end(*first)
    if when == "while others come":
        await desk.written(2)
    else:
        while desk.finisher.is_idle or not desk.finisher._groups:  # noqa: ASYNC110 - it is not to go on a step too late
            await asyncio.sleep(0)  # a step of the loop
    desk.end(*second)
    desk.end(room)
    await desk.written(5)


@pytest.mark.parametrize("how", ["ends", "goes back"])
@pytest.mark.parametrize("what", ["run", "lane"])
async def test_what_another_session_has_locked_holds_up_no_other(
    desk: Desk,
    conn: Connection,
    session: Callable[[], Awaitable[Connection]],
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    how: str,
) -> None:
    monkeypatch.setattr(finisher, "REST", 0.0)
    (first,), (second,) = await desk.held(1, key="a"), await desk.held(1, key="b")
    both = await desk.held(2)
    other = await session()
    await other.execute("begin")
    if what == "run":
        assert await fetch(other, hold(first.run.claim))
    else:
        await fetch(other, queries.enqueue(NewRun("noop", "default", "{}", ordering_key="a0")))
    # Of two leases that the batch would let go of, one has a run that has to wait; and so has one of two runs.
    for held in (first, second, *both):
        ending = Ending(held.run.claim, RunState.SUCCEEDED)
        desk.finisher.put(held, Return(held.run.claim) if held is first and how == "goes back" else ending)
    await desk.written(3)
    # Looked at several times meanwhile, and without waiting.
    for number, held in enumerate(await desk.held(3)):
        desk.end(held)
        await desk.written(4 + number)
    assert not desk.finisher.is_idle
    assert await rows(conn, "select id from queue_service.leases") == [(first.lease.id,)]
    await other.execute("commit")
    await eventually(lambda: desk.finisher.is_idle)
    assert await rows(conn, "select id from queue_service.leases") == []
    assert await one(conn, "select count(*) from queue_service.runs where state = 'running'") == 0
    tally = desk.finisher.tally
    assert (tally.succeeded, tally.returned, tally.lost) == ((7, 0, 0) if how == "ends" else (6, 1, 0))


async def test_a_worker_that_stops_waits_for_what_it_has_set_aside_and_says_so(
    desk: Desk, session: Callable[[], Awaitable[Connection]], caplog: pytest.LogCaptureFixture
) -> None:
    (held,) = await desk.held(1)
    other = await session()
    await other.execute("begin")
    assert await fetch(other, hold(held.run.claim))
    desk.end(held)
    await eventually(lambda: desk.finisher._locked.entries)
    desk.finisher.close()
    await other.execute("commit")
    await desk.written(1)
    assert desk.finisher.tally.succeeded == 1
    found, waits = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "pg_stat_activity" in found
    assert "stopping waits" in waits


async def test_a_claim_that_is_lost_while_it_is_set_aside_is_reported(
    desk: Desk, conn: Connection, session: Callable[[], Awaitable[Connection]]
) -> None:
    (held,) = await desk.held(1)
    other = await session()
    await other.execute("begin")
    await other.execute("delete from queue_service.runs where id = %s", [held.run.id])
    desk.end(held)
    await eventually(lambda: desk.finisher._locked.entries)
    await other.execute("commit")
    await eventually(lambda: desk.finisher.is_idle)
    assert (desk.finisher.tally.succeeded, desk.finisher.tally.lost) == (0, 1)


# What the database refuses, or is slow to take


@pytest.mark.parametrize("how", ["ends", "goes back"])
async def test_a_run_that_is_refused_holds_up_no_other_and_keeps_its_lease(
    desk: Desk, conn: Connection, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(finisher, "REST", 0.0)
    held = await desk.held(8)
    bad, begun = held[5], time.monotonic()
    table, what = ("finished_runs", "") if how == "ends" else ("runs", "and state = 'queued'")
    async with refusing(conn, table, f"id = {bad.run.id} {what}"):
        for each in held:
            ending = Ending(each.run.claim, RunState.SUCCEEDED)
            desk.finisher.put(each, Return(each.run.claim) if each is bad and how == "goes back" else ending)
        await desk.written(7)
        assert await rows(conn, "select id from queue_service.runs") == [(bad.run.id,)]
        # With the lease it would be given to another worker, while this one still tries.
        assert await rows(conn, "select id from queue_service.leases") == [(bad.lease.id,)]
        desk.end(*await desk.held(3))
        await desk.written(10)
        said = [record for record in caplog.records if getattr(record, "run_id", None) == bad.run.id]
        # Each time it is tried, which is no more than once in so long.
        assert 1 <= len(said) <= 1 + (time.monotonic() - begun) / finisher.AGAIN
    await eventually(lambda: desk.finisher.is_idle)
    assert desk.finisher.tally.lost == 0
    assert await one(conn, "select count(*) from queue_service.runs where state = 'running'") == 0
    assert await one(conn, "select count(*) from queue_service.leases") == 0


async def test_a_worker_that_stops_does_not_wait_for_what_is_refused(
    desk: Desk, conn: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    (held,) = await desk.held(1)
    async with refusing(conn, "finished_runs", f"id = {held.run.id}"):
        desk.end(held)
        await eventually(lambda: desk.finisher._refused.entries)
        desk.finisher.close()
        await asyncio.wait_for(asyncio.shield(desk.running), 5)
    assert any("refuses these endings" in record.message for record in caplog.records)


async def test_what_nobody_may_write_is_not_taken_apart(desk: Desk, conn: Connection) -> None:
    """It is no fault of any of them, and each is written when it may be again."""
    await conn.execute("alter table queue_service.finished_runs rename to elsewhere")
    desk.end(*await desk.held(100))
    await eventually(lambda: desk.service.why is not None)
    assert len(desk.finisher._groups) == 1
    await conn.execute("alter table queue_service.elsewhere rename to finished_runs")
    await desk.written(100)


async def test_a_batch_that_is_too_slow_is_written_in_parts(desk: Desk, conn: Connection) -> None:
    await conn.execute(
        "create function queue_service.slow() returns trigger language plpgsql as "
        "$$begin perform pg_sleep(0.02); return new; end$$"
    )
    await conn.execute(
        "create trigger slow before insert on queue_service.finished_runs for each row execute function queue_service.slow()"
    )
    desk.end(*await desk.held(120))
    await eventually(lambda: desk.finisher.tally.succeeded == 120, within=30)
    assert desk.finisher._at_once < finisher.ENDINGS_AT_ONCE
    assert desk.finisher.tally.lost == 0
    await conn.execute("drop trigger slow on queue_service.finished_runs")
    for number in range(10):
        desk.end(*await desk.held(1))
        await desk.written(121 + number)
    assert desk.finisher._at_once == finisher.ENDINGS_AT_ONCE


@pytest.mark.parametrize("how", ["ends", "goes back"])
@pytest.mark.parametrize("slow_then", [False, True], ids=["", "and it is then too slow as a whole"])
async def test_a_write_whose_answer_was_lost_is_no_lost_claim(
    desk: Desk, conn: Connection, monkeypatch: pytest.MonkeyPatch, how: str, slow_then: bool
) -> None:
    monkeypatch.setattr(finisher, "FIRST_PAUSE", 0.01)
    fetch_, calls = Place.fetch, 0

    async def cut(self: Place, query: Query[Any], **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 and slow_then:
            raise DatabaseUnavailable("too slow") from pg.QueryCanceled()
        answer = await fetch_(self, query, **options)
        if calls == 1:
            raise DatabaseUnavailable("the answer was lost")
        return answer

    monkeypatch.setattr(Place, "fetch", cut)
    held = await desk.held(5)
    for each in held:
        ending = Ending(each.run.claim, RunState.SUCCEEDED)
        desk.finisher.put(each, Return(each.run.claim) if how == "goes back" else ending)
    await eventually(lambda: desk.finisher.is_idle)
    tally = desk.finisher.tally
    assert (tally.succeeded, tally.returned, tally.lost) == ((5, 0, 0) if how == "ends" else (0, 5, 0))
    assert await one(conn, "select count(*) from queue_service.leases") == 0


async def test_what_is_made_ready_while_others_are_written_is_written_once_whatever_is_refused_of_it(
    desk: Desk, conn: Connection
) -> None:
    desk.finisher._at_once = finisher.FEW
    held = await desk.held(6 * finisher.FEW)
    bad = {held[number].run.id for number in (2, 99, 203)}
    async with refusing(conn, "finished_runs", f"id in ({', '.join(map(str, bad))})"):
        for number, each in enumerate(held):
            ending = Ending(each.run.claim, RunState.SUCCEEDED)
            desk.finisher.put(each, Return(each.run.claim) if number % 5 == 0 else ending)
        await eventually(lambda: desk.finisher.tally.succeeded == 237 and desk.finisher.tally.returned == 60)
        assert {held.run.id for held, _ in desk.finisher.unwritten()} == bad
        assert {row[0] for row in await rows(conn, "select id from queue_service.runs where state = 'running'")} == bad
    await eventually(lambda: desk.finisher.is_idle)
    assert (desk.finisher.tally.succeeded, desk.finisher.tally.lost) == (240, 0)
    assert await one(conn, "select count(*) from queue_service.leases") == 0


async def test_one_that_certainly_was_not_written_may_be_a_lost_claim(
    desk: Desk, conn: Connection, session: Callable[[], Awaitable[Connection]]
) -> None:
    """A statement that waited for a lock in vain has changed nothing."""
    (held,) = await desk.held(1)
    other = await session()
    await other.execute("begin")
    await other.execute("lock table queue_service.runs")
    desk.end(held)
    await eventually(lambda: desk.service.why is not None or desk.finisher._locked.entries)
    await other.execute("delete from queue_service.runs")
    await other.execute("commit")
    await eventually(lambda: desk.finisher.is_idle)
    assert (desk.finisher.tally.succeeded, desk.finisher.tally.lost) == (0, 1)


async def test_handlers_wait_while_too_much_is_unwritten(
    desk: Desk, conn: Connection, session: Callable[[], Awaitable[Connection]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finisher, "REST", 0.0)
    monkeypatch.setattr(finisher, "MAX_UNWRITTEN", 5)
    monkeypatch.setattr(finisher, "MAX_BYTES", 1_000)
    held, large = await desk.held(5), await desk.held(1)
    other = await session()
    await other.execute("begin")
    await other.execute("lock table queue_service.finished_runs")
    desk.end(*held[:4])
    assert not desk.finisher.is_full
    desk.end(held[4])
    assert desk.finisher.is_full
    waiting = asyncio.create_task(desk.finisher.room())
    await eventually(lambda: desk.finisher._groups)
    assert not waiting.done()
    await other.execute("commit")
    await asyncio.wait_for(waiting, 10)
    desk.finisher.put(large[0], Ending(large[0].run.claim, RunState.SUCCEEDED, '"' + "x" * 1_000 + '"'))
    assert desk.finisher.is_full
    await asyncio.wait_for(desk.finisher.room(), 10)
    assert (desk.finisher._unwritten, desk.finisher._bytes) == (0, 0)
