"""When endings are written, and with which others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta

import pytest

from queue_service.db.execute import fetch
from queue_service.db.pool import Connection, OwnConnection
from queue_service.runs import queries
from queue_service.runs.claim import hold
from queue_service.runs.model import Ending, NewRun, Return, RunState
from queue_service.services.loop import Service
from queue_service.worker import finisher
from queue_service.worker.finisher import Finisher
from queue_service.worker.leases import Held, Leases
from tests.support import claimed, enqueued, eventually, one, rows


class Desk:
    """A finisher at work, with runs that were claimed for it."""

    def __init__(self, conn: Connection, connection: OwnConnection) -> None:
        self._conn = conn
        self._leases = Leases()
        self.finisher = Finisher(connection, self._leases, 1)

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
    connection = OwnConnection(database, application="test", lock_timeout=timedelta(milliseconds=100))
    made = Desk(conn, connection)
    running = asyncio.create_task(Service("finisher", made.finisher.run).run())
    yield made
    made.finisher.close()
    await running
    await connection.close()


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
