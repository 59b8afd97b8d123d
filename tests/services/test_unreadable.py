"""Events, outcomes, markers, schedules, queues and roster rows that cannot be read: each says so, and the others are read."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from datetime import timedelta

import pytest

from queue_service import App, Turn
from queue_service.db.execute import Connection, fetch
from queue_service.roster import queries as roster
from queue_service.services.scheduler import Scheduler
from tests.support import one, rows

DEEP = "(repeat('{\"a\":', 3000) || '1' || repeat('}', 3000))::jsonb"
BODIES = {
    "number": '\'{"text": "kept", "n": 1e5000}\'::jsonb',
    "depth": f"jsonb_build_object('text', 'kept', 'n', {DEEP})",
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
async def test_who_follows_gets_an_event_that_says_so_and_goes_on(app: App, conn: Connection, body: str) -> None:
    for stream in ("bad", "good"):
        await app.events.append(stream, "delta", {"n": 0})
    async with (
        asyncio.timeout(20),
        aclosing(app.events.follow("bad")) as bad,
        aclosing(app.events.follow("good")) as good,
    ):
        assert ((await anext(bad)).seq, (await anext(good)).seq) == (1, 1)
        # As an older library, or somebody by hand, may have stored it.
        await conn.execute(
            f"with moved as (update queue_service.streams set head = 2 where stream = 'bad' returning stream) "
            f"insert into queue_service.events (stream, seq, kind, body) select stream, 2, 'delta', {body} from moved".encode()
        )
        await conn.execute("update queue_service.events set created_at = 'infinity' where seq = 2")
        for n in range(3):
            await app.events.append("bad", "delta", {"n": n})
            await app.events.append("good", "delta", {"n": n})
        unread = await anext(bad)
        assert (unread.seq, unread.kind, unread.body["text"]) == (2, "delta", "kept")
        assert unread.body["unreadable"]
        assert [(await anext(bad)).body for _ in range(3)] == [(await anext(good)).body for _ in range(3)]
    assert [event.seq for event in await app.events.read("bad")] == [1, 2, 3, 4, 5]


async def test_a_reply_that_cannot_be_read_is_an_ending_all_the_same(app: App, conn: Connection) -> None:
    await app.turns.arm(Turn(deployment="d", message_id="m", stream="s"))
    await app.turns.commit_reply("d", ["m"], {"text": "Hello"})
    await conn.execute("update queue_service.events set body = body || '{\"n\": 1e5000}' where terminal")
    outcome = await app.turns.wait("d", "m", timeout=10)
    body = outcome.body or {}
    assert (outcome.kind, body["text"], body["message_ids"]) == ("reply", "Hello", ["m"])
    assert body["unreadable"]
    async with asyncio.timeout(10), aclosing(app.events.follow("s")) as events:
        reply = await anext(events)
    assert (reply.terminal, reply.body["text"]) == (True, "Hello")


async def test_a_marker_that_cannot_be_read_is_listed_and_swept(app: App, conn: Connection) -> None:
    for name in ("bad", "good"):
        await app.turns.arm(Turn(deployment="d", message_id=name, stream="s", platform="chat", channel_id="c"))
    await conn.execute(
        f"update queue_service.turn_markers set metadata = {DEEP}, armed_at = '-infinity' where message_id = 'bad'".encode()
    )
    assert {marker.message_id for marker in await app.turns.list()} == {"bad", "good"}
    await conn.execute("update queue_service.turn_markers set deadline = clock_timestamp() - interval '1 s'")
    assert await app.turns.sweep() == 2
    assert {event.body["message_ids"][0] for event in await app.events.read("s")} == {"bad", "good"}


async def test_a_schedule_that_cannot_be_read_is_listed_and_the_others_fire(app: App, conn: Connection) -> None:
    for name in ("bad payload", "bad time", "bad interval", "good"):
        await app.schedules.put(name, "noop", {"n": 1}, every=60, misfire="last")
    for name, corruption in {
        "bad payload": "payload = '{\"n\": 1e5000}'",
        "bad time": "created_at = 'infinity', updated_at = 'infinity'",
        "bad interval": "every = '100000000 years'",
    }.items():
        await conn.execute(f"update queue_service.schedules set {corruption} where name = %s".encode(), [name])
    await conn.execute("update queue_service.schedules set next_at = date_trunc('minute', now()) - interval '5 min'")
    assert len(await app.schedules.list()) == 4
    scheduler = Scheduler(app.fetch, app.notify, poll_interval=timedelta(seconds=1), retention=timedelta(days=1))
    assert await scheduler.once() >= 2
    fired = {name for (name,) in await rows(conn, "select name from queue_service.schedules where next_at > now()")}
    assert fired >= {"good", "bad payload"}
    assert await one(conn, "select count(*) from queue_service.runs") == len(fired)


async def test_a_worker_that_cannot_be_read_is_listed(app: App, conn: Connection) -> None:
    for name in ("bad", "good"):
        await app.fetch(roster.join(name, "1", '{"default": 10}'))
    await conn.execute(
        f"update queue_service.workers set queues = {DEEP}, started_at = '-infinity' where name = 'bad'".encode()
    )
    assert {worker.name for worker in await fetch(conn, roster.listed(timedelta(days=1_000)))} == {"bad", "good"}
