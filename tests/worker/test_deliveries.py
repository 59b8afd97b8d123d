"""Events of turns come to the renderer that is connected, and to another one rather than to none."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest

from queue_service import App, Event, Retry, Run, Turn, TurnFailure, Worker
from queue_service.db.execute import Connection
from queue_service.deliveries import MAX_ATTEMPTS, NOT_MINE, RETRY_DELAY, Deliveries, Delivery, Shown
from queue_service.errors import ConfigError
from queue_service.services.loop import Services, every
from queue_service.settings import load
from tests.support import eventually, one, resting, rows, working

QUEUE = {"thread_response": 5}
QUICK = {"LEASE": "3s", "POLL_INTERVAL": "100ms", "SWEEP_INTERVAL": "100ms"}
PATIENT = {"LEASE": "1h", "POLL_INTERVAL": "1h", "SWEEP_INTERVAL": "1h"}
CHAT = Turn(deployment="dep-1", message_id="m1", stream="conv-1", platform="chat", channel_id="c1", user_id="u1")
LIVE = "select state, attempt, failures, reserved_for, extract(epoch from run_at - clock_timestamp())::float8 from queue_service.runs"
CLAIMED_BY_OTHERS_TOO_SOON = (
    "select id from queue_service.finished_runs where attempt > 1 and claimed_at - created_at < interval '1 s'"
)
ENDED = "select state, attempt, failures from queue_service.finished_runs where task = 'deliver'"


@dataclass
class Screen:
    """Shows what it is handed, where `answer` does not say otherwise."""

    answer: Callable[[Delivery], Any] = lambda _: None
    asked: list[tuple[str, Delivery]] = field(default_factory=list)
    shown: list[tuple[str, Delivery]] = field(default_factory=list)

    def _handle(self, name: str, delivery: Delivery) -> Any:
        self.asked.append((name, delivery))
        answer = self.answer(delivery)
        if answer is None or isinstance(answer, Shown):
            self.shown.append((name, delivery))
        return answer

    async def handle_delta(self, delivery: Delivery) -> Any:
        return self._handle("delta", delivery)

    async def handle_status(self, delivery: Delivery) -> Any:
        return self._handle("status", delivery)

    async def handle_error(self, delivery: Delivery) -> Any:
        return self._handle("error", delivery)

    async def handle_completion(self, delivery: Delivery) -> Any:
        return self._handle("completion", delivery)

    async def handle_ephemeral(self, delivery: Delivery) -> Any:
        return self._handle("ephemeral", delivery)

    @property
    def ids(self) -> list[str]:
        return [delivery.message_id for _, delivery in self.shown]


@dataclass
class Replica:
    """A process in all but its memory: an App, a renderer for `chat`, and what it heard of lost connections."""

    app: App
    deliveries: Deliveries
    screen: Screen
    lost: list[tuple[str, str]]

    async def work(self) -> None:
        """Until nothing is due for this one."""
        await Worker(self.app, QUEUE).run(once=True)


Make = Callable[..., Any]


@pytest.fixture
async def replica(database: str) -> AsyncIterator[Make]:
    """Makes replicas, open for the length of the test."""
    async with AsyncExitStack() as stack:

        async def make(paces: dict[str, str] = QUICK, **options: Any) -> Replica:
            app = App(database, settings=load({f"QUEUE_SERVICE_{name}": value for name, value in paces.items()}))
            lost: list[tuple[str, str]] = []
            deliveries = Deliveries(app, lost=lambda *channel: lost.append(channel), **options)
            await stack.enter_async_context(deliveries)
            screen = Screen()
            screen.answer = lambda d: (
                None if d.last or d.headless or deliveries.holds("chat", d.channel_id) else NOT_MINE
            )
            deliveries.register("chat", screen)
            return Replica(app, deliveries, screen, lost)

        yield make


@pytest.fixture
async def one_replica(replica: Make) -> Replica:
    made: Replica = await replica()
    return made


async def ended(app: App, turn: Turn = CHAT, body: Any = None) -> None:
    """The turn was owed its ending, and has got it."""
    await app.turns.arm(turn)
    assert await app.turns.commit_reply(turn.deployment, [turn.message_id], body or {"text": "Hello"})


def named(message_id: str, **fields: Any) -> Turn:
    words = {name: getattr(CHAT, name) for name in Turn.__slots__}
    return Turn(**{**words, "message_id": message_id, **fields})


async def make_due(conn: Connection, attempt: int | None = None) -> None:
    """Each run is due since a minute, and of this attempt."""
    await conn.execute(
        "update queue_service.runs set run_at = clock_timestamp() - interval '1 min', attempt = coalesce(%s, attempt)",
        [attempt],
    )


async def only_run(app: App, conn: Connection) -> Run:
    run_id = await one(conn, "select id from queue_service.runs union all select id from queue_service.finished_runs")
    run = await app.get(run_id)
    assert run is not None
    return run


def error_of(run: Run) -> str:
    assert run.error is not None
    return str(run.error["message"])


@pytest.fixture
def long_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute for each second between two tries, so that none comes while a test looks."""
    monkeypatch.setattr("queue_service.deliveries.tries.RETRY_DELAY", 60 * RETRY_DELAY)


# Who renders


async def test_an_ending_is_rendered_with_all_that_is_known_of_its_turn(one_replica: Replica) -> None:
    await one_replica.deliveries.connect("chat", "c1")
    turn = named("m1", metadata={"source": "web", "thread": 7})
    await ended(one_replica.app, turn)
    await one_replica.work()
    ((name, delivery),) = one_replica.screen.shown
    assert (name, delivery.event.kind, delivery.event.body["text"]) == ("completion", "reply", "Hello")
    assert delivery == Delivery(
        event=delivery.event, platform="chat", channel_id="c1", user_id="u1", message_id="m1", deployment="dep-1",
        metadata={"source": "web", "thread": 7}, last=False, headless=False,
    )  # fmt: skip


async def test_the_connected_process_renders_whoever_ended_the_turns(replica: Make, conn: Connection) -> None:
    here, there = await replica(), await replica()
    await there.deliveries.connect("chat", "c1")
    async with working(here.app, QUEUE), working(there.app, QUEUE):
        for number in range(20):
            await ended(here.app, named(f"m{number}"))
        await eventually(lambda: one(conn, "select count(*) = 20 from queue_service.finished_runs"))
    assert sorted(there.screen.ids) == sorted(f"m{number}" for number in range(20))
    assert here.screen.shown == []
    # At their first try: nobody else may claim one before a second has passed, as it may on a busy machine.
    assert await rows(conn, CLAIMED_BY_OTHERS_TOO_SOON) == []
    assert await rows(conn, "select distinct state, losses from queue_service.finished_runs") == [("succeeded", 0)]


async def test_a_renderer_that_says_not_mine_uses_no_attempt(replica: Make, conn: Connection) -> None:
    here, there = await replica(), await replica()
    await ended(here.app)
    await there.deliveries.connect("chat", "c1")
    await here.work()
    ((state, attempt, failures, owner, due_in),) = await rows(conn, LIVE)
    assert (state, attempt, failures, owner) == ("queued", 1, 0, there.app.identity)
    assert due_in <= 0
    assert here.screen.shown == []


async def test_a_deferred_delivery_is_for_its_owner_to_claim_first(replica: Make, conn: Connection) -> None:
    here, there = await replica(), await replica()
    async with working(here.app, QUEUE):
        await here.app.queues.pause("thread_response")
        await ended(here.app)
        await there.deliveries.connect("chat", "c1")
        await here.app.queues.resume("thread_response")
        await eventually(lambda: here.screen.asked)
        # It goes on with what comes behind it, and leaves this one alone.
        await ended(here.app, named("m2", channel_id=None))
        await eventually(lambda: here.screen.shown)
    assert [delivery.message_id for _, delivery in here.screen.asked] == ["m1", "m2"]
    await there.work()
    assert there.screen.ids == ["m1"]
    assert await rows(conn, f"{ENDED} and payload ->> 'message_id' = 'm1'") == [("succeeded", 2, 0)]


@pytest.mark.direct("no notice comes through it")
async def test_the_owner_hears_at_once_of_a_deferred_delivery(replica: Make, conn: Connection) -> None:
    here, there = await replica(PATIENT), await replica(PATIENT)
    async with working(there.app, QUEUE):
        await resting(conn)
        # As if it had been claimed by the other one before the connection was made.
        await here.app.turns.arm(CHAT)
        await here.app.queues.pause("thread_response")
        await here.app.turns.commit_reply("dep-1", ["m1"], {})
        await conn.execute("update queue_service.runs set reserved_for = %s", [here.app.identity])
        await conn.execute("delete from queue_service.queues")
        await there.deliveries.connect("chat", "c1")
        await here.work()
        assert len(here.screen.asked) == 1
        await eventually(lambda: there.screen.ids == ["m1"])


async def test_an_owner_that_claims_nothing_loses_its_precedence_after_a_second(
    replica: Make, conn: Connection
) -> None:
    here, there = await replica(), await replica()
    await there.deliveries.connect("chat", "c1")
    here.screen.answer = lambda _: None
    async with working(here.app, QUEUE):
        await ended(here.app)
        # What comes behind it is claimed before it.
        await ended(here.app, named("m2", channel_id=None))
        await eventually(lambda: here.screen.shown)
        assert here.screen.ids == ["m2"]
        await make_due(conn)
        await eventually(lambda: here.screen.ids == ["m2", "m1"])


@pytest.mark.usefixtures("long_pause")
async def test_without_an_owner_a_delivery_is_anyones_a_second_later(one_replica: Replica, conn: Connection) -> None:
    await ended(one_replica.app)
    await conn.execute("update queue_service.runs set reserved_for = %s", [one_replica.app.identity])
    await one_replica.work()
    ((state, attempt, failures, owner, due_in),) = await rows(conn, LIVE)
    assert (state, attempt, failures, owner) == ("queued", 1, 0, None)
    assert 30 < due_in <= 60


@pytest.mark.usefixtures("long_pause")
async def test_an_owner_whose_own_renderer_says_not_mine_does_not_spin(one_replica: Replica, conn: Connection) -> None:
    await one_replica.deliveries.connect("chat", "c1")
    one_replica.screen.answer = lambda _: NOT_MINE
    await ended(one_replica.app)
    await one_replica.work()
    ((state, attempt, _, owner, due_in),) = await rows(conn, LIVE)
    assert (state, attempt, owner) == ("queued", 1, None)
    assert due_in > 30


# The last try


@pytest.mark.usefixtures("long_pause")
async def test_thirty_tries_a_second_apart_and_the_last_one_renders(one_replica: Replica, conn: Connection) -> None:
    await ended(one_replica.app)
    for attempt in range(1, MAX_ATTEMPTS):
        await one_replica.work()
        ((state, tried, failures, _, due_in),) = await rows(conn, LIVE)
        assert (state, tried, failures, due_in > 30) == ("queued", attempt, 0, True)
        await make_due(conn)
    assert one_replica.screen.shown == []
    await one_replica.work()
    assert (MAX_ATTEMPTS, RETRY_DELAY) == (30, 1)
    assert [delivery.last for _, delivery in one_replica.screen.asked] == [False] * 29 + [True]
    assert one_replica.screen.ids == ["m1"]
    assert await rows(conn, ENDED) == [("succeeded", 30, 0)]


async def test_deferring_the_last_try_is_an_error(one_replica: Replica, conn: Connection) -> None:
    one_replica.screen.answer = lambda _: NOT_MINE
    await ended(one_replica.app)
    await make_due(conn, attempt=MAX_ATTEMPTS - 1)
    await one_replica.work()
    run = await only_run(one_replica.app, conn)
    assert (run.state, run.failures) == ("queued", 1)
    assert "'chat' left the event to another process, but this was the last of 30 tries" in error_of(run)


async def test_a_delivery_that_fails_at_its_last_try_is_tried_again_as_the_last(
    one_replica: Replica, conn: Connection
) -> None:
    one_replica.screen.answer = lambda d: NOT_MINE if d.event.seq and len(one_replica.screen.asked) < 2 else None
    await ended(one_replica.app)
    await make_due(conn, attempt=MAX_ATTEMPTS - 1)
    await one_replica.work()
    await make_due(conn)
    await one_replica.work()
    assert [delivery.last for _, delivery in one_replica.screen.asked] == [True, True]
    assert await rows(conn, ENDED) == [("succeeded", 31, 1)]


# Headless turns


@pytest.mark.parametrize(
    "fields",
    [{"metadata": {"source": "schedule"}}, {"metadata": {"source": "automation"}}, {"channel_id": None}],
    ids=["a schedule's", "an automation's", "without a channel"],
)
async def test_a_headless_turn_is_rendered_where_it_is_claimed(
    one_replica: Replica, conn: Connection, fields: dict[str, Any]
) -> None:
    await ended(one_replica.app, named("m1", **fields))
    await one_replica.work()
    assert [(d.headless, d.last) for _, d in one_replica.screen.shown] == [(True, False)]
    assert await rows(conn, ENDED) == [("succeeded", 1, 0)]


async def test_which_sources_are_headless_can_be_said(replica: Make) -> None:
    here = await replica(headless=["batch"])
    here.screen.answer = lambda _: None
    for number, source in enumerate(["batch", "schedule", ["batch"], None]):
        await ended(here.app, named(f"m{number}", metadata={"source": source}))
    await here.work()
    assert {d.message_id: d.headless for _, d in here.screen.shown} == {
        "m0": True,
        "m1": False,
        "m2": False,
        "m3": False,
    }


async def test_deferring_a_headless_turn_is_an_error(one_replica: Replica, conn: Connection) -> None:
    one_replica.screen.answer = lambda _: NOT_MINE
    await ended(one_replica.app, named("m1", channel_id=None))
    await one_replica.work()
    run = await only_run(one_replica.app, conn)
    assert run.failures == 1
    assert "but the turn is headless" in error_of(run)


# What cannot be rendered


async def test_an_unknown_platform_is_retried_and_ends_failed(one_replica: Replica, conn: Connection) -> None:
    await ended(one_replica.app, named("m1", platform="chatt"))
    for failures in range(1, 6):
        await one_replica.work()
        run = await only_run(one_replica.app, conn)
        assert (run.state, run.failures) == ("queued", failures)
        await make_due(conn)
    await one_replica.work()
    run = await only_run(one_replica.app, conn)
    assert run.state == "failed"
    assert error_of(run).endswith(
        "No renderer is registered here for platform 'chatt'. Did you mean 'chat'? Registered platforms: chat."
    )


async def test_a_platform_unknown_here_is_rendered_where_it_is_known(replica: Make, conn: Connection) -> None:
    here, there = await replica(), await replica()
    screen = Screen()
    there.deliveries.register("mail", screen)
    await ended(here.app, named("m1", platform="mail"))
    await here.work()
    await make_due(conn)
    await there.work()
    assert screen.ids == ["m1"]


async def test_a_renderer_that_raises_is_tried_again_with_the_usual_wait(
    one_replica: Replica, conn: Connection
) -> None:
    def broken(_: Delivery) -> None:
        raise RuntimeError("the platform is down")

    one_replica.screen.answer = broken
    await ended(one_replica.app)
    await one_replica.work()
    ((state, attempt, failures, owner, due_in),) = await rows(conn, LIVE)
    assert (state, attempt, failures, owner) == ("queued", 1, 1, None)
    assert due_in <= 2
    assert await one(conn, "select run_at > created_at + interval '1.5 s' from queue_service.runs")


async def test_how_often_a_renderer_may_raise_can_be_said(replica: Make, conn: Connection) -> None:
    here = await replica(retry=Retry(max_attempts=1))
    await ended(here.app, named("m1", platform="unknown"))
    await here.work()
    assert await rows(conn, ENDED) == [("failed", 1, 1)]


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        ("delete from queue_service.events", "does not exist any more"),
        ('update queue_service.events set body = body || \'{"platform": "api"}\'', "another platform"),
        ("update queue_service.events set body = body - 'platform'", "another platform"),
        ('update queue_service.events set body = body || \'{"message_ids": ["m2"]}\'', "does not end message 'm1'"),
        ("update queue_service.events set body = body || '{\"message_ids\": null}'", "does not end message 'm1'"),
        ('update queue_service.events set body = body || \'{"deployment": "dep-2"}\'', "of deployment 'dep-1'"),
        ("update queue_service.events set kind = 'error'", "is of kind 'error', and the run says 'reply'"),
        ('update queue_service.runs set payload = payload || \'{"platform": "chatt"}\'', "another platform"),
        ("update queue_service.runs set payload = payload || '{\"seq\": 2}'", "does not exist any more"),
        ('update queue_service.runs set payload = payload || \'{"stream": "conv-2"}\'', "does not exist any more"),
    ],
)
async def test_a_run_that_does_not_fit_its_event_is_dropped_loudly(
    one_replica: Replica, conn: Connection, caplog: pytest.LogCaptureFixture, spoil: str, why: str
) -> None:
    await one_replica.deliveries.connect("chat", "c1")
    await ended(one_replica.app)
    await conn.execute(spoil.encode())
    await one_replica.work()
    run = await only_run(one_replica.app, conn)
    assert (run.state, run.attempt, one_replica.screen.asked) == ("cancelled", 1, [])
    assert error_of(run).startswith("Nothing was delivered. ")
    assert why in error_of(run)
    (reported,) = [record for record in caplog.records if record.message == "a delivery was dropped"]
    assert (reported.levelname, vars(reported)["run_id"]) == ("ERROR", run.id)
    assert why in vars(reported)["why"]


# Which handler


@pytest.mark.parametrize(
    ("kind", "handler"),
    [("delta", "delta"), ("card", "delta"), ("status", "status"), ("ephemeral", "ephemeral"), ("thought", "status")],
)
async def test_an_event_of_a_turn_that_goes_on_is_sent(one_replica: Replica, kind: str, handler: str) -> None:
    app = one_replica.app
    await one_replica.deliveries.connect("chat", "c1")
    await app.turns.arm(CHAT)
    seq = await app.events.append("conv-1", kind, {"text": "…"})
    event = Event(stream="conv-1", seq=seq, kind=kind, body={"text": "…"})
    assert await one_replica.deliveries.send(CHAT, event) is not None
    await one_replica.work()
    ((name, delivery),) = one_replica.screen.shown
    assert (name, delivery.event.seq, delivery.event.body) == (handler, seq, {"text": "…"})
    assert (delivery.channel_id, delivery.message_id, delivery.deployment) == ("c1", "m1", "dep-1")


async def test_the_failure_of_a_turn_comes_to_the_handler_of_errors(one_replica: Replica) -> None:
    await one_replica.deliveries.connect("chat", "c1")
    await one_replica.app.turns.arm(CHAT)
    await one_replica.app.turns.fail("dep-1", "m1", TurnFailure("worker_died"))
    await one_replica.work()
    ((name, delivery),) = one_replica.screen.shown
    assert (name, delivery.event.body["code"]) == ("error", "worker_died")


@pytest.mark.direct("no notice comes through it")
async def test_what_is_sent_is_reserved_for_the_owner_and_announced_at_once(replica: Make, conn: Connection) -> None:
    here, there = await replica(), await replica(PATIENT)
    await there.deliveries.connect("chat", "c1")
    seq = await here.app.events.append("conv-1", "delta", {})
    async with working(there.app, QUEUE):
        await resting(conn)
        await here.deliveries.send(CHAT, Event(stream="conv-1", seq=seq, kind="delta", body={}))
        await eventually(lambda: there.screen.ids == ["m1"])
    assert await rows(conn, ENDED) == [("succeeded", 1, 0)]


async def test_the_api_needs_no_delivery(one_replica: Replica, conn: Connection) -> None:
    turn = named("m1", platform="api")
    await ended(one_replica.app, turn)
    assert await one_replica.deliveries.send(turn, Event(stream="conv-1", seq=1, kind="delta", body={})) is None
    assert await one(conn, "select count(*) from queue_service.runs") == 0
    with pytest.raises(ConfigError, match="the event in the stream is the delivery"):
        one_replica.deliveries.register("api", Screen())


@pytest.mark.parametrize("kind", ["reply", "error", "gap"])
async def test_endings_are_not_for_sending(one_replica: Replica, kind: str) -> None:
    with pytest.raises(ConfigError, match="endings are delivered by themselves"):
        await one_replica.deliveries.send(CHAT, Event(stream="conv-1", seq=1, kind=kind, body={}))


async def test_an_event_of_another_stream_is_refused(one_replica: Replica) -> None:
    with pytest.raises(ConfigError, match="is not of the turn's, 'conv-1'"):
        await one_replica.deliveries.send(CHAT, Event(stream="conv-2", seq=1, kind="delta", body={}))


@pytest.mark.direct("its connections to the server are the pooler's")
async def test_sending_is_given_up_where_the_database_is_away(replica: Make, caplog: pytest.LogCaptureFixture) -> None:
    here = await replica(QUICK)
    await here.app.pool.close()
    assert await here.deliveries.send(CHAT, Event(stream="conv-1", seq=1, kind="delta", body={})) is None
    assert "an event will not be delivered" in [record.message for record in caplog.records]


# Registering


def test_a_platform_has_one_renderer(database: str) -> None:
    deliveries = Deliveries(App(database))
    deliveries.register("chat", Screen())
    with pytest.raises(ConfigError, match="has a renderer already"):
        deliveries.register("chat", Screen())


def test_a_renderer_that_lacks_handlers_is_refused(database: str) -> None:
    class Half:
        async def handle_delta(self, delivery: Delivery) -> None: ...

    with pytest.raises(
        ConfigError, match="Half is no renderer: it lacks handle_completion, handle_ephemeral, handle_error"
    ):
        Deliveries(App(database)).register("chat", Half())  # type: ignore[arg-type]


def test_an_app_has_its_deliveries_once(database: str) -> None:
    app = App(database)
    Deliveries(app)
    with pytest.raises(ConfigError, match="Two functions want the task name 'deliver'"):
        Deliveries(app)


def test_one_text_is_no_list_of_sources(database: str) -> None:
    with pytest.raises(ConfigError, match="not the one text 'schedule'"):
        Deliveries(App(database), headless="schedule")


# Connections


async def test_a_connection_is_held_by_one_process_until_it_lets_go(replica: Make) -> None:
    here, there = await replica(), await replica()
    assert await here.deliveries.connect("chat", "c1")
    assert not await there.deliveries.connect("chat", "c1")
    assert await here.deliveries.connect("chat", "c1")
    assert (here.deliveries.holds("chat", "c1"), there.deliveries.holds("chat", "c1")) == (True, False)
    assert not await there.deliveries.disconnect("chat", "c1")
    assert await here.deliveries.disconnect("chat", "c1")
    assert not here.deliveries.holds("chat", "c1")
    assert await there.deliveries.connect("chat", "c1")


async def test_a_connection_is_renewed_for_as_long_as_its_process_lives(replica: Make, conn: Connection) -> None:
    here = await replica()
    await here.deliveries.connect("chat", "c1")
    expiry = "select expires_at from queue_service.connections"
    first = await one(conn, expiry)
    # More than its whole lease was added.
    await eventually(lambda: one(conn, f"select ({expiry}) > %s", first + timedelta(seconds=3.2)), within=30)
    assert here.deliveries.holds("chat", "c1")
    assert here.lost == []


async def test_a_connection_that_went_to_another_process_is_reported(
    replica: Make, conn: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    here, there = await replica(PATIENT), await replica(PATIENT)
    for channel in ("c1", "c2"):
        await here.deliveries.connect("chat", channel)
    await conn.execute(
        "update queue_service.connections set expires_at = clock_timestamp() - interval '1 s' where channel_id = 'c1'"
    )
    assert await there.deliveries.connect("chat", "c1")
    await here.deliveries.renew()
    assert here.lost == [("chat", "c1")]
    assert (here.deliveries.holds("chat", "c1"), here.deliveries.holds("chat", "c2")) == (False, True)
    (reported,) = [record for record in caplog.records if record.message == "lost the connection to a channel"]
    assert (vars(reported)["platform"], vars(reported)["channel_id"]) == ("chat", "c1")


async def test_connecting_where_the_connection_went_to_another_process_says_so(replica: Make, conn: Connection) -> None:
    here, there = await replica(PATIENT), await replica(PATIENT)
    await here.deliveries.connect("chat", "c1")
    await conn.execute("update queue_service.connections set expires_at = clock_timestamp() - interval '1 s'")
    assert await there.deliveries.connect("chat", "c1")
    assert not await here.deliveries.connect("chat", "c1")


async def test_a_callback_that_raises_ends_nothing(database: str, conn: Connection) -> None:
    reported = []

    def broken(platform: str, channel_id: str) -> None:
        reported.append(channel_id)
        raise RuntimeError("on purpose")

    async with Deliveries(App(database), lost=broken) as deliveries:
        for channel in ("c1", "c2", "c3"):
            await deliveries.connect("chat", channel)
        await conn.execute("delete from queue_service.connections where channel_id <> 'c3'")
        await deliveries.renew()
        assert reported == ["c1", "c2"]
        assert deliveries.holds("chat", "c3")


async def test_a_renewal_that_fails_is_logged_and_goes_on(
    replica: Make, conn: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    here = await replica(QUICK | {"LEASE": "1h"})
    await here.deliveries.connect("chat", "c1")
    first = await one(conn, "select expires_at from queue_service.connections")
    services = Services()
    service = services.ensure("renewal", every(timedelta(milliseconds=20), here.deliveries.renew))
    try:
        await conn.execute("alter table queue_service.connections rename to elsewhere")
        await eventually(lambda: service.why is not None)
        await conn.execute("alter table queue_service.elsewhere rename to connections")
        await eventually(lambda: service.why is None)
    finally:
        await services.close()
    assert here.lost == []
    assert here.deliveries.holds("chat", "c1")
    assert await one(conn, "select expires_at > %s from queue_service.connections", first)
    assert any(record.levelname == "ERROR" and "is tried again" in record.message for record in caplog.records)


async def test_leaving_lets_go_of_every_connection(database: str, conn: Connection) -> None:
    async with Deliveries(App(database)) as deliveries:
        await deliveries.connect("chat", "c1")
        await deliveries.connect("chat", "c2")
        assert await one(conn, "select count(*) from queue_service.connections") == 2
    assert await one(conn, "select count(*) from queue_service.connections") == 0
    assert not deliveries.holds("chat", "c1")


async def test_connections_are_held_inside_async_with_only(app: App) -> None:
    deliveries = Deliveries(app)
    with pytest.raises(ConfigError, match="Enter it first"):
        await deliveries.connect("chat", "c1")
    async with deliveries:
        with pytest.raises(ConfigError, match="in use already"):
            await deliveries.__aenter__()
        assert await deliveries.connect("chat", "c1")


async def test_what_only_renders_need_not_be_entered(app: App) -> None:
    deliveries, screen = Deliveries(app), Screen()
    deliveries.register("chat", screen)
    await ended(app)
    await Worker(app, QUEUE).run(once=True)
    assert screen.ids == ["m1"]


OWNER = """
import asyncio, sys
from queue_service import App
from queue_service.deliveries import Deliveries

async def main():
    async with Deliveries(App(sys.argv[1])) as deliveries:
        print(await deliveries.connect("chat", "c1"), flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_killed_owner_delays_a_delivery_and_no_more(replica: Make, database: str, conn: Connection) -> None:
    here: Replica = await replica()
    environment = {**os.environ, "QUEUE_SERVICE_LEASE": "3s"}
    owner = await asyncio.create_subprocess_exec(
        sys.executable, "-c", OWNER, database, stdout=subprocess.PIPE, env=environment
    )
    assert owner.stdout is not None
    assert await owner.stdout.readline() == b"True\n"
    assert not await here.deliveries.connect("chat", "c1")
    owner.send_signal(signal.SIGKILL)
    await owner.wait()
    await ended(here.app)
    assert await one(conn, "select reserved_for is not null from queue_service.runs")
    async with working(here.app, QUEUE):
        await eventually(lambda: here.deliveries.connect("chat", "c1"), within=30)
        await eventually(lambda: here.screen.ids == ["m1"])
    assert await rows(conn, "select state, failures from queue_service.finished_runs") == [("succeeded", 0)]
