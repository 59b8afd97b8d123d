"""What a renderer answers is carried out, or refused in sight: nothing that it did not say is shown counts as shown."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from queue_service import (
    App,
    Cancel,
    Defer,
    Delivery,
    Event,
    FailedDelivery,
    Retry,
    RetryLater,
    Shown,
    Snooze,
    TurnFailure,
)
from queue_service.connections import queries as connections
from queue_service.db.execute import Connection, fetch
from queue_service.deliveries import MAX_ATTEMPTS, NOT_MINE, Deliveries
from queue_service.errors import ConfigError, PayloadRefused
from tests.support import eventually, one, rows, working
from tests.worker.test_deliveries import (
    CHAT,
    ENDED,
    LIVE,
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

NOTED = "select (metadata ->> 'uncounted_attempts')::int, (metadata ->> 'snoozed_seconds')::float8 from queue_service."


def raises(_: Delivery) -> object:
    raise ConnectionError("the platform is down")


@pytest.fixture
async def failing(replica: Make) -> tuple[Replica, list[FailedDelivery]]:
    """A replica whose first failure is the last, and what its hook was called with."""
    failed: list[FailedDelivery] = []
    return await replica(retry=Retry(max_attempts=1), failed=failed.append), failed


# Not yet


async def test_a_snooze_comes_back_when_it_says_and_costs_no_failure(one_replica: Replica, conn: Connection) -> None:
    one_replica.screen.answer = lambda _: Snooze(60)
    await ended(one_replica.app)
    await one_replica.work()
    ((state, attempt, failures, owner, due_in),) = await rows(conn, LIVE)
    assert (state, attempt, failures, owner) == ("queued", 1, 0, None)
    assert 50 < due_in <= 60
    one_replica.screen.answer = lambda _: None
    await make_due(conn)
    await one_replica.work()
    assert one_replica.screen.ids == ["m1"]
    assert await rows(conn, ENDED) == [("succeeded", 2, 0)]


async def test_a_defer_names_who_comes_first(one_replica: Replica, conn: Connection) -> None:
    one_replica.screen.answer = lambda _: Defer(60, "somebody")
    await ended(one_replica.app)
    await one_replica.work()
    ((state, attempt, failures, owner, due_in),) = await rows(conn, LIVE)
    assert (state, attempt, failures, owner) == ("queued", 1, 0, "somebody")
    assert 50 < due_in <= 60


async def test_retry_later_waits_as_it_says_and_is_a_failure(one_replica: Replica, conn: Connection) -> None:
    def limited(_: Delivery) -> object:
        raise RetryLater(60)

    one_replica.screen.answer = limited
    await ended(one_replica.app)
    await one_replica.work()
    ((state, attempt, failures, _, due_in),) = await rows(conn, LIVE)
    assert (state, attempt, failures, due_in > 50) == ("queued", 1, 1, True)


async def test_snoozes_bring_the_last_try_no_nearer(one_replica: Replica, conn: Connection) -> None:
    one_replica.screen.answer = lambda _: Snooze(1)
    await ended(one_replica.app)
    for _ in range(MAX_ATTEMPTS + 5):
        await one_replica.work()
        await make_due(conn)
    assert [delivery.last for _, delivery in one_replica.screen.asked] == [False] * 35
    assert await rows(conn, NOTED + "runs") == [(35, 35.0)]
    # As if it had been left to others as often as it can be.
    one_replica.screen.answer = lambda _: NOT_MINE
    await make_due(conn, attempt=35 + MAX_ATTEMPTS - 2)
    await one_replica.work()
    one_replica.screen.answer = lambda _: None
    await make_due(conn)
    await one_replica.work()
    assert [delivery.last for _, delivery in one_replica.screen.asked[35:]] == [False, True]


async def test_snoozes_end_when_their_time_is_used_up(replica: Make, conn: Connection) -> None:
    failed: list[FailedDelivery] = []
    here = await replica(snooze_limit=100, failed=failed.append)
    here.screen.answer = lambda _: Snooze(40)
    await ended(here.app)
    for _ in range(3):
        assert failed == []
        await here.work()
        await make_due(conn)
    run = await only_run(here.app, conn)
    assert (run.state, run.attempt) == ("failed", 3)
    assert "'chat' wants to put this off for 120 s in all; the limit is 100 s" in error_of(run)
    assert [each.reason for each in failed] == [error_of(run)]


async def test_a_snooze_of_no_time_is_counted_as_a_second(replica: Make, conn: Connection) -> None:
    here = await replica(snooze_limit=5)
    here.screen.answer = lambda _: Snooze(0)
    await ended(here.app)
    async with asyncio.timeout(30):
        await here.work()
    assert len(here.screen.asked) == 6
    assert (await only_run(here.app, conn)).state == "failed"


@pytest.mark.parametrize(
    "stored", ['{"uncounted_attempts": "x", "snoozed_seconds": -5}', '{"uncounted_attempts": 1e300}']
)
async def test_metadata_that_somebody_has_spoilt_costs_no_delivery(
    one_replica: Replica, conn: Connection, stored: str
) -> None:
    one_replica.screen.answer = lambda _: None if len(one_replica.screen.asked) > 1 else Snooze(60)
    await ended(one_replica.app)
    await conn.execute("update queue_service.runs set metadata = %s", [stored])
    await one_replica.work()
    assert await rows(conn, NOTED + "runs") == [(1, 60.0)]
    await make_due(conn)
    await one_replica.work()
    assert [delivery.last for _, delivery in one_replica.screen.asked] == [False, False]
    assert await rows(conn, ENDED) == [("succeeded", 2, 0)]


async def test_the_time_of_a_snooze_that_is_none_is_an_error(one_replica: Replica, conn: Connection) -> None:
    snooze = Snooze(1)
    snooze.delay = "soon"  # type: ignore[assignment]
    one_replica.screen.answer = lambda _: snooze
    await ended(one_replica.app)
    await one_replica.work()
    run = await only_run(one_replica.app, conn)
    assert (run.state, run.failures) == ("queued", 1)
    assert "The delay of a Snooze must be" in error_of(run)


# Never


async def test_a_delivery_that_is_dropped_ends_cancelled_and_is_logged(
    one_replica: Replica, conn: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    one_replica.screen.answer = lambda _: Cancel("The channel was archived.")
    await ended(one_replica.app)
    await one_replica.work()
    run = await only_run(one_replica.app, conn)
    assert (run.state, error_of(run)) == ("cancelled", "The channel was archived.")
    (reported,) = [record for record in caplog.records if record.message == "a renderer dropped a delivery"]
    assert (vars(reported)["run_id"], vars(reported)["platform"], vars(reported)["seq"]) == (run.id, "chat", 1)


class Odd:
    """Says that it is something else."""

    __class__ = Snooze  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("answer", "name"),
    [
        (True, "bool"),
        ({"ok": True}, "dict"),
        ("1733.42", "str"),
        (Snooze, "type"),
        (ValueError("x"), "ValueError"),
        (Odd(), "Odd"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_an_answer_that_says_nothing_fails_the_delivery_at_once(
    one_replica: Replica, conn: Connection, answer: object, name: str
) -> None:
    one_replica.screen.answer = lambda _: answer
    await ended(one_replica.app)
    await ended(one_replica.app, named("m2"))
    await one_replica.work()
    assert [delivery.message_id for _, delivery in one_replica.screen.asked] == ["m1", "m2"]
    assert await rows(conn, ENDED) == [("failed", 1, 1)] * 2
    error = await one(conn, "select error from queue_service.finished_runs limit 1")
    assert error["type"] == "AnswerRefused"
    assert f"answered with {name}, which says neither that the event is shown nor what else" in error["message"]
    assert "Allowed are None, NOT_MINE, Shown(platform_message_id), Snooze(delay), " in error["message"]


async def test_a_renderer_that_takes_too_long_is_stopped_and_fails(replica: Make, conn: Connection) -> None:
    class Slow(Screen):
        async def handle_completion(self, delivery: Delivery) -> Any:
            self.asked.append(("completion", delivery))
            await asyncio.Event().wait()

    failed: list[FailedDelivery] = []
    here = await replica(timeout=0.05, retry=Retry(max_attempts=1), failed=failed.append)
    here.deliveries.register("slow", Slow())
    await ended(here.app, named("m1", platform="slow"))
    await here.work()
    run = await only_run(here.app, conn)
    assert (run.state, error_of(run)) == ("failed", "The renderer of platform 'slow' took longer than 0.05 s.")
    assert [each.reason for each in failed] == [error_of(run)]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"timeout": 0}, "timeout must be positive"),
        ({"snooze_limit": -1}, "snooze_limit must not be negative"),
        ({"retry": 3}, "retry must be a Retry"),
    ],
    ids=["timeout", "snooze_limit", "retry"],
)
def test_limits_that_are_none_are_refused(database: str, options: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Deliveries(App(database), **options)


# Failed for good


async def test_the_hook_hears_of_a_delivery_that_failed_for_good_and_of_no_other(
    replica: Make, conn: Connection
) -> None:
    failed: list[FailedDelivery] = []
    here = await replica(retry=Retry(max_attempts=3), failed=failed.append)
    here.screen.answer = raises
    await ended(here.app, named("m1", metadata={"thread": 7}))
    for _ in range(3):
        assert failed == []
        await make_due(conn)
        await here.work()
    (told,) = failed
    run = await only_run(here.app, conn)
    assert (run.state, run.failures) == ("failed", 3)
    assert told == FailedDelivery(
        run_id=run.id, stream="conv-1", seq=1, kind="reply", platform="chat", channel_id="c1", user_id="u1", message_id="m1",
        deployment="dep-1", metadata={"thread": 7}, reason="the platform is down", error=told.error,
    )  # fmt: skip
    assert isinstance(told.error, ConnectionError)


async def test_a_hook_may_be_a_coroutine(replica: Make, conn: Connection) -> None:
    heard = asyncio.Event()

    async def note(failed: FailedDelivery) -> None:
        await here.app.events.append(failed.stream, "status", {"undelivered": failed.seq})
        heard.set()

    here: Replica = await replica(retry=Retry(max_attempts=1), failed=note)
    here.screen.answer = raises
    await ended(here.app)
    await here.work()
    assert heard.is_set()
    assert (await here.app.events.read("conv-1"))[-1].body == {"undelivered": 1}


async def test_a_hook_that_raises_or_hangs_hurts_nobody(
    replica: Make, conn: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(failed: FailedDelivery) -> None:
        if failed.message_id == "m1":
            raise SystemExit("on purpose")
        await asyncio.Event().wait()

    here: Replica = await replica(timeout=0.05, retry=Retry(max_attempts=1), failed=broken)
    here.screen.answer = lambda delivery: None if delivery.message_id == "m3" else raises(delivery)
    for message_id in ("m1", "m2", "m3"):
        await ended(here.app, named(message_id))
    await here.work()
    assert here.screen.ids == ["m3"]
    logged = [
        vars(record) for record in caplog.records if record.message == "the callback for a failed delivery raised"
    ]
    assert [each["error"] for each in logged] == ["SystemExit", "TimeoutError"]


async def test_a_platform_without_a_renderer_is_reported_too(failing: tuple[Replica, list[FailedDelivery]]) -> None:
    here, failed = failing
    await ended(here.app, named("m1", platform="mail"))
    await here.work()
    assert [(each.platform, type(each.error)) for each in failed] == [("mail", ConfigError)]


async def test_who_has_lost_the_claim_tells_nobody(
    failing: tuple[Replica, list[FailedDelivery]], conn: Connection
) -> None:
    here, failed = failing

    class Zombie(Screen):
        async def handle_completion(self, delivery: Delivery) -> Any:  # noqa: ARG002
            # As if it had been swept, and claimed by another one.
            await conn.execute("update queue_service.runs set attempt = attempt + 1 where state = 'running'")
            raise ConnectionError("late")

    here.deliveries.register("mail", Zombie())
    await ended(here.app, named("m1", platform="mail"))
    async with working(here.app, QUEUE):
        await eventually(lambda: one(conn, "select attempt = 2 from queue_service.runs"))
        await ended(here.app, named("m2", channel_id=None))
        await eventually(lambda: here.screen.ids == ["m2"])
    assert failed == []


async def test_a_worker_that_stops_gives_up_no_delivery(
    failing: tuple[Replica, list[FailedDelivery]], conn: Connection
) -> None:
    here, failed = failing
    begun = asyncio.Event()

    class Slow(Screen):
        async def handle_completion(self, delivery: Delivery) -> Any:  # noqa: ARG002
            begun.set()
            await asyncio.Event().wait()

    here.deliveries.register("slow", Slow())
    await ended(here.app, named("m1", platform="slow"))
    async with working(here.app, QUEUE) as worker:
        await begun.wait()
        worker.stop(now=True)
    assert failed == []
    assert await rows(conn, "select state, failures from queue_service.runs") == [("queued", 0)]


async def test_what_failed_for_good_is_tried_afresh_when_it_is_retried(replica: Make, conn: Connection) -> None:
    here = await replica(snooze_limit=100)
    here.screen.answer = lambda _: Snooze(101)
    await ended(here.app)
    await make_due(conn, attempt=MAX_ATTEMPTS - 1)
    await here.work()
    run = await only_run(here.app, conn)
    assert (run.state, run.attempt) == ("failed", MAX_ATTEMPTS)
    assert await here.app.retry(run.id)
    here.screen.answer = lambda _: Snooze(99)
    await here.work()
    assert [delivery.last for _, delivery in here.screen.asked] == [True, False]
    assert await rows(conn, NOTED + "runs") == [(MAX_ATTEMPTS + 1, 99.0)]


# The platform's own id


async def test_the_next_deliveries_of_a_turn_get_the_id_it_is_shown_under(replica: Make, conn: Connection) -> None:
    here, there = await replica(), await replica()
    here.screen.answer = there.screen.answer = lambda delivery: (
        None if delivery.platform_message_id else Shown(f"ts-{delivery.message_id}")
    )
    turns = [CHAT, named("m2"), named("m3", deployment="dep-2")]
    for turn in turns:
        await here.app.turns.arm(turn)
        for _ in range(2):
            await here.deliveries.send(turn, await here.app.events.append("conv-1", "status", {}))
    await here.work()
    await here.app.turns.commit_reply("dep-1", ["m1", "m2"], {})
    await here.app.turns.fail("dep-2", "m3", TurnFailure("worker_died"))
    await there.work()
    seen = [(delivery.message_id, delivery.platform_message_id) for _, delivery in here.screen.shown]
    assert seen == [(f"m{n}", known) for n in (1, 2, 3) for known in (None, f"ts-m{n}")]
    assert [(d.message_id, d.platform_message_id) for _, d in there.screen.shown] == [
        ("m1", "ts-m1"), ("m2", "ts-m2"), ("m3", "ts-m3")
    ]  # fmt: skip


async def test_another_id_takes_the_place_of_the_first(one_replica: Replica, conn: Connection) -> None:
    numbers = iter([17, 18])
    one_replica.screen.answer = lambda _: Shown(next(numbers))
    await one_replica.app.turns.arm(CHAT)
    for _ in range(2):
        await one_replica.deliveries.send(CHAT, await one_replica.app.events.append("conv-1", "status", {}))
    await one_replica.work()
    assert [delivery.platform_message_id for _, delivery in one_replica.screen.shown] == [None, "17"]
    assert await rows(conn, "select platform_message_id from queue_service.renderings") == [("18",)]


@pytest.mark.parametrize(
    ("bad", "refused"),
    [("", ConfigError), (True, ConfigError), (None, ConfigError), (1.5, ConfigError), ("\x00", PayloadRefused)],
)
def test_what_is_no_id_is_refused(bad: Any, refused: type[Exception]) -> None:
    with pytest.raises(refused, match="The id of a Shown"):
        Shown(bad)


async def test_the_id_of_a_turn_that_nobody_armed_is_not_kept_and_that_is_logged(
    one_replica: Replica, conn: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    one_replica.screen.answer = lambda _: Shown("ts")
    seq = await one_replica.app.events.append("conv-1", "status", {})
    await one_replica.deliveries.send(CHAT, seq)
    await one_replica.work()
    assert await rows(conn, ENDED) == [("succeeded", 1, 0)]
    assert await one(conn, "select count(*) from queue_service.renderings") == 0
    assert any("its turn is not remembered" in record.message for record in caplog.records)


async def test_a_process_that_has_lost_its_claim_writes_no_id(conn: Connection, one_replica: Replica) -> None:
    await one_replica.app.turns.arm(CHAT)
    await one_replica.app.turns.commit_reply("dep-1", ["m1"], {})
    run_id = await one(conn, "update queue_service.runs set state = 'running', attempt = 2, lease_id = 1 returning id")
    for attempt, stored in ((1, False), (2, True)):
        claim = (run_id, attempt)
        assert await fetch(conn, connections.shown(claim, "dep-1", "m1", "ts")) is stored
        assert await fetch(conn, connections.note(claim, "{}")) is stored
        assert await one(conn, "select count(*) from queue_service.renderings") == int(stored)


# By its seq


async def test_an_event_is_sent_by_its_seq(one_replica: Replica, conn: Connection) -> None:
    await one_replica.deliveries.connect("chat", "c1")
    seq = await one_replica.app.events.append("conv-1", "delta", {"text": "…"})
    run_id = await one_replica.deliveries.send(CHAT, seq)
    by_seq = await one(conn, "select payload from queue_service.runs where id = %s", run_id)
    (event,) = await one_replica.app.events.read("conv-1")
    run_id = await one_replica.deliveries.send(CHAT, event)
    assert by_seq == await one(conn, "select payload from queue_service.runs where id = %s", run_id)
    assert await rows(conn, "select distinct reserved_for, max_attempts from queue_service.runs") == [
        (one_replica.app.identity, 3)
    ]
    await one_replica.work()
    assert [(name, delivery.event.seq) for name, delivery in one_replica.screen.shown] == [("delta", seq)] * 2


@pytest.mark.parametrize("platform", ["chat", "api"])
async def test_an_ending_cannot_be_sent_by_its_seq_either(
    one_replica: Replica, conn: Connection, platform: str
) -> None:
    turn = named("m1", platform=platform)
    await ended(one_replica.app, turn)
    before = await one(conn, "select count(*) from queue_service.runs")
    with pytest.raises(ConfigError, match="of kind 'reply' is not for sending: endings are delivered by themselves"):
        await one_replica.deliveries.send(turn, 1)
    with pytest.raises(ConfigError, match="Stream 'conv-1' has no event 2"):
        await one_replica.deliveries.send(turn, 2)
    assert await one(conn, "select count(*) from queue_service.runs") == before


async def test_the_api_needs_no_delivery_by_seq_either(one_replica: Replica, conn: Connection) -> None:
    seq = await one_replica.app.events.append("conv-1", "delta", {})
    assert await one_replica.deliveries.send(named("m1", platform="api"), seq) is None
    assert await one(conn, "select count(*) from queue_service.runs") == 0


@pytest.mark.parametrize("what", [0, -1, 2**63, True, "1", None, 1.0])
async def test_what_is_no_seq_is_refused(one_replica: Replica, what: Any) -> None:
    with pytest.raises(ConfigError, match="is an Event of the turn's stream, or its seq"):
        await one_replica.deliveries.send(CHAT, what)


async def test_a_retry_policy_with_fewer_tries_is_that_of_what_is_sent_too(replica: Make, conn: Connection) -> None:
    here = await replica(retry=Retry(max_attempts=2))
    await here.deliveries.send(CHAT, Event(stream="conv-1", seq=1, kind="delta", body={}))
    assert await one(conn, "select max_attempts from queue_service.runs") == 2
