"""When endings are written, and with which others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from queue_service.db.pool import Connection, Wire
from queue_service.runs.model import Ending, RunState
from queue_service.worker import finisher
from queue_service.worker.finisher import Finisher
from queue_service.worker.leases import Held, Leases
from tests.support import claimed, enqueued, eventually, one


class Desk:
    """A finisher at work, with runs that were claimed for it."""

    def __init__(self, conn: Connection, wire: Wire) -> None:
        self._conn = conn
        self._leases = Leases()
        self.finisher = Finisher(wire, self._leases, 1)

    async def held(self, count: int, *, key: str | None = None, limited: bool = False) -> list[Held]:
        for number in range(count):
            await enqueued(self._conn, ordering_key=key and f"{key}{number}")
        return self._leases.take(await claimed(self._conn, limit=count, laned=key is not None), limited=limited)

    def end(self, *runs: Held) -> None:
        for each in runs:
            self.finisher.put(each, Ending(each.run.claim, RunState.SUCCEEDED))

    async def written(self, count: int) -> None:
        await eventually(lambda: one(self._conn, "select count(*) = %s from queue_service.finished_runs", count))


@pytest.fixture
async def desk(conn: Connection, database: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Desk]:
    """One that would let others come for an hour."""
    monkeypatch.setattr(finisher, "REST", 3_600.0)
    wire = Wire(database, application="test")
    made = Desk(conn, wire)
    running = asyncio.create_task(made.finisher.run())
    yield made
    made.finisher.close()
    await running
    await wire.close()


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
        while desk.finisher.is_idle or not desk.finisher._writing:  # noqa: ASYNC110 - it is not to go on a step too late
            await asyncio.sleep(0)  # a step of the loop
    desk.end(*second)
    desk.end(room)
    await desk.written(5)
