"""The deliveries of one channel come one after the other, in the order in which they were stored, whatever is tried again."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta

import pytest

from queue_service import NOT_MINE, Defer, Delivery, RetryLater, Snooze
from queue_service.db.execute import Connection
from queue_service.deliveries import MAX_ATTEMPTS, RETRY_DELAY
from tests.support import eventually, one, rows, working
from tests.worker.test_deliveries import (
    CHAT,
    CLAIMED_BY_OTHERS_TOO_SOON,
    ENDED,
    OWNER,
    QUEUE,
    Make,
    Replica,
    ended,
    make_due,
    named,
    one_replica,
    replica,
)

__all__ = ["one_replica", "replica"]

LANES = "select payload ->> 'message_id', ordering_key from queue_service.runs order by id"


def raises(_: Delivery) -> object:
    raise ConnectionError("the platform is away")


def retries_later(_: Delivery) -> object:
    raise RetryLater(60)


def at_first(answer: Callable[[Delivery], object]) -> Callable[[Delivery], object]:
    """The first call is answered so, and every other one shows its event."""
    asked: list[Delivery] = []

    def once(delivery: Delivery) -> object:
        asked.append(delivery)
        return answer(delivery) if len(asked) == 1 else None

    return once


AGAIN: dict[str, Callable[[Delivery], object]] = {
    "raises": raises,
    "raises RetryLater": retries_later,
    "Snooze": lambda _: Snooze(60),
    "Defer": lambda _: Defer(60),
    "NOT_MINE": lambda _: NOT_MINE,
}


@pytest.mark.parametrize("name", AGAIN)
async def test_what_is_tried_again_is_not_overtaken(one_replica: Replica, conn: Connection, name: str) -> None:
    one_replica.screen.answer = at_first(AGAIN[name])
    for message_id in ("m1", "m2", "m3"):
        await ended(one_replica.app, named(message_id))
    await one_replica.work()
    assert one_replica.screen.ids == []
    # Nor by one that comes while it waits.
    await ended(one_replica.app, named("m4"))
    await one_replica.work()
    assert one_replica.screen.ids == []
    await make_due(conn)
    await one_replica.work()
    assert one_replica.screen.ids == ["m1", "m2", "m3", "m4"]


async def test_a_status_that_is_tried_again_comes_before_its_completion(one_replica: Replica, conn: Connection) -> None:
    one_replica.screen.answer = at_first(lambda _: Snooze(60))
    app = one_replica.app
    await app.turns.arm(CHAT)
    await one_replica.deliveries.send(CHAT, await app.events.append("conv-1", "status", {"text": "thinking"}))
    await app.turns.commit_reply("dep-1", ["m1"], {"text": "Hello"})
    await one_replica.work()
    await make_due(conn)
    await one_replica.work()
    assert [name for name, _ in one_replica.screen.shown] == ["status", "completion"]


async def test_two_workers_with_many_slots_keep_the_order_of_every_channel(replica: Make, conn: Connection) -> None:
    here, there = await replica(), await replica()
    shown: list[tuple[str | None, str]] = []
    failed: set[str] = set()

    def shows(delivery: Delivery) -> object:
        if delivery.message_id.endswith("3") and delivery.message_id not in failed:
            failed.add(delivery.message_id)
            return Snooze(0.05)
        shown.append((delivery.channel_id, delivery.message_id))
        return None

    here.screen.answer = there.screen.answer = shows
    expected = [(f"c{number % 3}", f"m{number:02}") for number in range(30)]
    async with working(here.app, QUEUE), working(there.app, QUEUE):
        for channel, message_id in expected:
            await ended(here.app, named(message_id, channel_id=channel))
        await eventually(lambda: len(shown) == 30, within=30)
    for channel in ("c0", "c1", "c2"):
        assert [each for each in shown if each[0] == channel] == [each for each in expected if each[0] == channel]


async def test_turns_that_one_statement_ends_are_shown_in_the_order_in_which_they_were_armed(
    one_replica: Replica,
) -> None:
    for message_id in ("m3", "m1", "m2"):
        # The streams would have them the other way round.
        await one_replica.app.turns.arm(named(message_id, stream=f"conv-{9 - int(message_id[1])}"))
    assert len(await one_replica.app.turns.commit_reply("dep-1", ["m1", "m2", "m3"], {})) == 3
    await one_replica.deliveries.connect("chat", "c1")
    await one_replica.work()
    assert one_replica.screen.ids == ["m3", "m1", "m2"]


async def test_no_two_channels_share_a_lane_whatever_they_are_called(one_replica: Replica, conn: Connection) -> None:
    names = [
        ("a:b", "c"),
        ("a", "b:c"),
        ("3:a", "b"),
        ("a", "1:b"),
        ("é", "c1"),
        ("chat", "é:" * 300),
        ("c" * 1024, "d" * 1024),
    ]
    for number, (platform, channel) in enumerate(names):
        await ended(one_replica.app, named(f"m{number}", platform=platform, channel_id=channel))
    keys = [key for _, key in await rows(conn, LANES)]
    assert len(set(keys)) == len(names)
    # What is sent stands in the lane of the endings.
    for number, (platform, channel) in enumerate(names):
        turn = named(f"m{number}", platform=platform, channel_id=channel)
        seq = await one_replica.app.events.append("conv-1", "status", {})
        await one_replica.deliveries.send(turn, seq)
        (event,) = await one_replica.app.events.read("conv-1", after=seq - 1)
        await one_replica.deliveries.send(turn, event)
    for_both = [key for _, key in await rows(conn, LANES)][len(names) :]
    assert for_both == [key for key in keys for _ in range(2)]


async def test_without_a_channel_there_is_no_lane(one_replica: Replica, conn: Connection) -> None:
    one_replica.screen.answer = lambda delivery: Snooze(60) if delivery.message_id == "m1" else None
    for message_id in ("m1", "m2"):
        await ended(one_replica.app, named(message_id, channel_id=None))
    seq = await one_replica.app.events.append("conv-1", "status", {})
    await one_replica.deliveries.send(named("m3", channel_id=None), seq)
    assert {key for _, key in await rows(conn, LANES)} == {None}
    await one_replica.work()
    assert sorted(one_replica.screen.ids) == ["m2", "m3"]


async def test_a_delivery_that_fails_for_good_lets_the_next_one_through(one_replica: Replica, conn: Connection) -> None:
    one_replica.screen.answer = lambda delivery: raises(delivery) if delivery.message_id == "m1" else None
    for message_id in ("m1", "m2"):
        await ended(one_replica.app, named(message_id))
    for _ in range(6):
        assert one_replica.screen.ids == []
        await make_due(conn)
        await one_replica.work()
    assert one_replica.screen.ids == ["m2"]
    assert await rows(conn, f"{ENDED} order by id") == [("failed", 6, 6), ("succeeded", 1, 0)]


async def test_one_that_kills_its_workers_lets_the_next_one_through(one_replica: Replica, conn: Connection) -> None:
    for message_id in ("m1", "m2"):
        await ended(one_replica.app, named(message_id))
    await conn.execute("update queue_service.runs set losses = 2 where payload ->> 'message_id' = 'm1'")
    lost = (
        "with taken as (update queue_service.runs set state = 'running', attempt = 1, lease_id = 1, claimed_at = now() "
        "where payload ->> 'message_id' = 'm1' returning id) "
        "insert into queue_service.leases (id, worker_id, expires_at, run_ids) overriding system value "
        "select 1, 99, now() - interval '1 minute', array_agg(id) from taken"
    )
    await conn.execute(lost.encode())
    await one_replica.deliveries.connect("chat", "c1")
    async with working(one_replica.app, QUEUE):
        await eventually(lambda: one_replica.screen.ids == ["m2"])
    assert await rows(
        conn, "select state, error ->> 'reason' from queue_service.finished_runs order by id limit 1"
    ) == [("failed", "worker_lost")]


# Owners


async def test_what_is_handed_over_keeps_its_place_and_its_owner_renders_first(replica: Make, conn: Connection) -> None:
    here, there = await replica(), await replica()
    for message_id in ("m1", "m2"):
        await ended(here.app, named(message_id))
    await there.deliveries.connect("chat", "c1")
    await here.work()
    # It asked once, and left the lane alone.
    assert [delivery.message_id for _, delivery in here.screen.asked] == ["m1"]
    await there.work()
    assert there.screen.ids == ["m1", "m2"]
    assert here.screen.shown == []


async def test_of_processes_that_look_at_the_same_time_the_owner_alone_claims_from_its_lane(
    replica: Make, conn: Connection
) -> None:
    here, there, third = await replica(), await replica(), await replica()
    await there.deliveries.connect("chat", "c1")
    async with working(here.app, QUEUE), working(there.app, QUEUE), working(third.app, QUEUE):
        for number in range(40):
            await ended(here.app, named(f"m{number:02}"))
        await eventually(lambda: one(conn, "select count(*) = 40 from queue_service.finished_runs"), within=30)
    assert there.screen.ids == [f"m{number:02}" for number in range(40)]
    assert await rows(conn, CLAIMED_BY_OTHERS_TOO_SOON) == []


async def test_an_owner_that_was_killed_delays_its_lane_by_a_second_and_no_more(
    replica: Make, database: str, conn: Connection
) -> None:
    here: Replica = await replica()
    here.screen.answer = lambda _: None
    owner = await asyncio.create_subprocess_exec(
        sys.executable, "-c", OWNER, database, stdout=subprocess.PIPE, env={**os.environ, "QUEUE_SERVICE_LEASE": "1h"}
    )
    assert owner.stdout is not None
    assert await owner.stdout.readline() == b"True\n"
    owner.send_signal(signal.SIGKILL)
    await owner.wait()
    for number in range(5):
        await ended(here.app, named(f"m{number}"))
    assert await one(conn, "select count(reserved_for) from queue_service.runs") == 5
    async with working(here.app, QUEUE):
        await eventually(lambda: len(here.screen.shown) == 5, within=30)
    assert here.screen.ids == [f"m{number}" for number in range(5)]
    waited = await rows(conn, "select finished_at - run_at from queue_service.finished_runs order by id")
    assert waited[0][0] >= timedelta(seconds=1)
    assert waited[-1][0] < timedelta(seconds=4)


# Those behind one that nobody is connected for


async def waiting(replica: Replica, conn: Connection, owner: Replica | None = None) -> None:
    """Three deliveries wait since all tries together, and the first of them has one left."""
    if owner is not None:
        await owner.deliveries.connect("chat", "c1")
    for message_id in ("m1", "m2", "m3"):
        await ended(replica.app, named(message_id))
    old = MAX_ATTEMPTS * RETRY_DELAY + 1
    await conn.execute("update queue_service.runs set created_at = created_at - make_interval(secs => %s)", [old])
    await make_due(conn)


async def test_what_has_waited_behind_others_for_long_enough_is_rendered_at_its_first_try(
    one_replica: Replica, conn: Connection
) -> None:
    await waiting(one_replica, conn)
    await one_replica.work()
    assert one_replica.screen.ids == ["m1", "m2", "m3"]
    assert [delivery.last for _, delivery in one_replica.screen.asked] == [False, True] * 3
    assert await rows(conn, f"{ENDED} group by 1, 2, 3") == [("succeeded", 1, 0)]


async def test_its_owner_is_asked_before_that(replica: Make, conn: Connection) -> None:
    here, there = await replica(), await replica()
    await waiting(here, conn, owner=there)
    await here.work()
    assert here.screen.shown == []
    await there.work()
    assert there.screen.ids == ["m1", "m2", "m3"]


async def test_an_owner_that_does_not_come_for_it_is_not_waited_for_again_and_again(
    replica: Make, conn: Connection
) -> None:
    here, there = await replica(), await replica()
    await waiting(here, conn, owner=there)
    for _ in range(2):
        await here.work()
        assert here.screen.shown == []
        await make_due(conn)
    await here.work()
    assert here.screen.ids == ["m1"]
