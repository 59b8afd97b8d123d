"""Whoever ended a turn, and wherever: its person gets the ending, from the process that can show it or from any other."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing

import pytest

from queue_service import App, Event, TurnFailure
from queue_service.db.execute import Connection
from queue_service.deliveries import MAX_ATTEMPTS, Delivery
from tests.support import eventually, one, rows, working
from tests.worker.test_deliveries import (
    CHAT,
    ENDED,
    QUEUE,
    Make,
    Replica,
    Screen,
    ended,
    error_of,
    make_due,
    named,
    one_replica,
    only_run,
    replica,
)

__all__ = ["one_replica", "replica"]

OVERDUE = "update queue_service.turn_markers set deadline = clock_timestamp() - interval '1 minute'"


# The API: the event in the stream is the delivery


ENDERS: dict[str, Callable[[App], Awaitable[object]]] = {
    "reply": lambda app: app.turns.commit_reply("dep-1", ["m1"], {"text": "Hello"}),
    "worker_died": lambda app: app.turns.fail_deployment("dep-1", TurnFailure("worker_died")),
    "worker_unresponsive": lambda app: app.turns.sweep(),
}


@pytest.mark.parametrize("name", ENDERS)
async def test_whichever_process_holds_the_socket_gets_the_ending_and_nothing_is_queued(
    app: App, database: str, conn: Connection, name: str
) -> None:
    async def last(holder: App) -> Event:
        async with asyncio.timeout(10), aclosing(holder.events.follow("conv-1")) as events:
            return await anext(event async for event in events if event.terminal)

    await app.turns.arm(named("m1", platform="api", channel_id=None))
    async with App(database) as here, App(database) as there:
        following = [asyncio.ensure_future(last(holder)) for holder in (here, there)]
        await eventually(lambda: here.opened.fanout._tails and there.opened.fanout._tails)
        if name == "worker_unresponsive":
            await conn.execute(OVERDUE)
        await ENDERS[name](app)
        first, second = await asyncio.gather(*following)
    assert first == second
    assert (first.body.get("code", first.kind), first.body["message_ids"]) == (name, ["m1"])
    assert await one(conn, "select count(*) from queue_service.runs") == 0


# Platforms


async def test_a_turn_that_lapsed_is_ended_and_shown_with_nobody_waiting(replica: Make, conn: Connection) -> None:
    here, there = await replica(), await replica()
    await there.deliveries.connect("chat", "c1")
    async with working(here.app, QUEUE), working(there.app, QUEUE):
        await here.app.turns.arm(CHAT)
        await conn.execute(OVERDUE)
        await eventually(lambda: there.screen.ids == ["m1"])
    ((name, delivery),) = there.screen.shown
    assert (name, delivery.event.body["code"]) == ("error", "worker_unresponsive")
    assert here.screen.shown == []


async def test_a_rejection_comes_through_though_sending_it_fails_at_first(
    one_replica: Replica, conn: Connection
) -> None:
    asked: list[Delivery] = []

    def fails_at_first(delivery: Delivery) -> None:
        asked.append(delivery)
        if len(asked) == 1:
            raise ConnectionError("the platform is away")

    one_replica.screen.answer = fails_at_first
    await one_replica.app.turns.arm(CHAT)
    await one_replica.app.turns.reject("dep-1", "m1", "Not here.")
    await one_replica.work()
    assert one_replica.screen.shown == []
    await make_due(conn)
    await one_replica.work()
    ((name, delivery),) = one_replica.screen.shown
    assert (name, delivery.event.body["message"]) == ("error", "Not here.")


async def test_the_last_try_renders_where_it_is_though_another_process_is_connected(
    replica: Make, conn: Connection
) -> None:
    here, there = await replica(), await replica()
    await there.deliveries.connect("chat", "c1")
    await ended(here.app)
    await make_due(conn, attempt=MAX_ATTEMPTS - 2)
    await here.work()
    assert here.screen.shown == []
    await make_due(conn)
    await here.work()
    assert [delivery.last for _, delivery in here.screen.asked] == [False, True]
    assert here.screen.ids == ["m1"]
    assert await rows(conn, ENDED) == [("succeeded", MAX_ATTEMPTS, 0)]


@pytest.mark.parametrize("source", ["schedule", "automation"])
async def test_a_headless_turn_is_shown_where_it_is_claimed_though_another_process_is_connected(
    replica: Make, conn: Connection, source: str
) -> None:
    here, there = await replica(), await replica()
    await there.deliveries.connect("chat", "c1")
    await ended(here.app, named("m1", metadata={"source": source}))
    await make_due(conn)
    await here.work()
    assert here.screen.ids == ["m1"]
    assert await rows(conn, ENDED) == [("succeeded", 1, 0)]


async def test_a_delta_that_cannot_be_shown_holds_up_its_ending_for_three_tries(
    one_replica: Replica, conn: Connection
) -> None:
    def broken(delivery: Delivery) -> None:
        if delivery.event.kind == "delta":
            raise RuntimeError("no room for deltas")

    one_replica.screen.answer = broken
    app = one_replica.app
    await app.turns.arm(CHAT)
    seq = await app.events.append("conv-1", "delta", {"text": "Hel"})
    await one_replica.deliveries.send(CHAT, Event(stream="conv-1", seq=seq, kind="delta", body={"text": "Hel"}))
    assert await app.turns.commit_reply("dep-1", ["m1"], {"text": "Hello"}) == ["m1"]
    for _ in range(3):
        assert one_replica.screen.shown == []
        await make_due(conn)
        await one_replica.work()
    assert [(name, delivery.event.seq) for name, delivery in one_replica.screen.shown] == [("completion", seq + 1)]


# What cannot be rendered


async def test_a_delivery_that_failed_for_want_of_a_renderer_can_be_tried_again_with_one(
    one_replica: Replica, conn: Connection
) -> None:
    await ended(one_replica.app, named("m1", platform="mail"))
    for _ in range(6):
        await one_replica.work()
        await make_due(conn)
    run = await only_run(one_replica.app, conn)
    assert run.state == "failed"
    mail = Screen()
    one_replica.deliveries.register("mail", mail)
    assert await one_replica.app.retry(run.id)
    await one_replica.work()
    assert mail.ids == ["m1"]


@pytest.mark.parametrize(
    "spoil", ["payload - 'platform'", "payload || '{\"platform\": null}'"], ids=["missing", "null"]
)
async def test_a_delivery_without_a_platform_ends_as_an_error_that_is_logged(
    one_replica: Replica, conn: Connection, caplog: pytest.LogCaptureFixture, spoil: str
) -> None:
    await ended(one_replica.app)
    await conn.execute(f"update queue_service.runs set payload = {spoil}".encode())
    for _ in range(6):
        await one_replica.work()
        await make_due(conn)
    run = await only_run(one_replica.app, conn)
    assert run.state in {"failed", "cancelled"}
    assert "platform" in error_of(run)
    assert one_replica.screen.asked == []
    assert any(record.levelname in {"WARNING", "ERROR"} for record in caplog.records)
