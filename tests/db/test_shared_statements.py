"""Callers that share a statement, while another session holds what one of them needs: only that one waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from queue_service import App, Turn
from queue_service.db.execute import Connection
from queue_service.errors import DatabaseUnavailable
from queue_service.services import combiner
from tests.support import one

Session = Callable[[], Awaitable[Connection]]

MARKER = "select from queue_service.turn_markers where message_id = 'held' for update"
STREAM = "select from queue_service.streams where stream = 'held' for no key update"
# Sooner than whoever waits for a lock gives up.
SOON = 8.0


@asynccontextmanager
async def holding(conn: Connection, lock: str) -> AsyncIterator[None]:
    """While this lasts, the session holds the row in an open transaction."""
    async with conn.transaction(force_rollback=True):
        assert (await conn.execute(lock.encode())).rowcount == 1
        yield


async def owe(app: App, *message_ids: str) -> None:
    for message_id in message_ids:
        assert await app.turns.arm(Turn(deployment="d", message_id=message_id, stream=message_id))


@pytest.fixture
async def owing(app: App) -> App:
    await owe(app, "held", *(f"m{n}" for n in range(20)))
    return app


def reply(app: App, *message_ids: str) -> asyncio.Task[list[str]]:
    return asyncio.create_task(app.turns.commit_reply("d", message_ids, {"text": "x"}))


@pytest.mark.parametrize("lock", [MARKER, STREAM], ids=["marker", "stream"])
async def test_a_held_turn_keeps_its_own_caller_waiting_and_nobody_else(
    owing: App, conn: Connection, lock: str
) -> None:
    async with holding(conn, lock):
        held = reply(owing, "held")
        others = [reply(owing, f"m{n}") for n in range(20)]
        async with asyncio.timeout(SOON):
            assert await asyncio.gather(*others) == [[f"m{n}"] for n in range(20)]
        assert not held.done()
    assert await held == ["held"]


@pytest.mark.parametrize("lock", [MARKER, STREAM], ids=["marker", "stream"])
async def test_a_reply_to_several_messages_waits_as_a_whole(owing: App, conn: Connection, lock: str) -> None:
    async with holding(conn, lock):
        call = reply(owing, "m1", "held", "m2")
        async with asyncio.timeout(SOON):
            assert await reply(owing, "m3") == ["m3"]
        assert await owing.turns.is_live("d", "m1")
        assert await owing.turns.is_live("d", "m2")
    assert await call == ["m1", "held", "m2"]


async def test_an_event_of_a_held_stream_waits_and_the_others_do_not(owing: App, conn: Connection) -> None:
    async with holding(conn, STREAM):
        held = asyncio.create_task(owing.events.append("held", "delta", {"n": 1}))
        others = [owing.events.append(f"m{n}", "delta", {"n": 1}) for n in range(20)]
        async with asyncio.timeout(SOON):
            await asyncio.gather(*others)
        assert not held.done()
    assert await held == 1
    assert await one(conn, "select count(*) from queue_service.events where stream = 'held'") == 1


async def test_events_that_waited_keep_the_order_of_their_call(owing: App, conn: Connection) -> None:
    async with holding(conn, STREAM):
        call = asyncio.create_task(owing.events.append_many("held", [("delta", {"n": n}) for n in range(5)]))
        await owing.events.append("m1", "delta", {"n": 1})
        assert not call.done()
    assert await call == [1, 2, 3, 4, 5]
    assert [event.body["n"] for event in await owing.events.read("held")] == list(range(5))


async def test_a_turn_that_is_held_for_ever_is_reported_in_the_end_and_stays_owed(
    owing: App, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(combiner, "LOCK_SECONDS", 0.05)
    async with holding(conn, MARKER):
        with pytest.raises(DatabaseUnavailable, match="Is one left open"):
            await reply(owing, "held")
    assert await owing.turns.is_live("d", "held")
    assert await reply(owing, "held") == ["held"]


async def test_a_turn_that_somebody_ends_meanwhile_is_not_ended_again(owing: App, conn: Connection) -> None:
    async with conn.transaction():
        await conn.execute("delete from queue_service.turn_markers where message_id = 'held'")
        call = reply(owing, "held", "m1")
        async with asyncio.timeout(SOON):
            assert await reply(owing, "m2") == ["m2"]
    assert await call == ["m1"]
