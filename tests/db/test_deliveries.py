"""Reserved runs and connections, statement by statement."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest

from queue_service.connections import queries as connections
from queue_service.connections.queries import NewDelivery
from queue_service.db.execute import Connection, fetch
from queue_service.runs import lanes, queries, settling
from queue_service.runs.model import Ending, Return, Run, RunState
from queue_service.runs.queries import Claimant, Wanted
from queue_service.worker.floors import FRONT
from tests.support import LEASE, blocked, claimed, enqueued, eventually, lapse, one, rows

CHANNEL = ("chat", "c1")
OPEN = "select run_at <= clock_timestamp(), reserved_for, state, failures, attempt from queue_service.runs"


async def reserved(conn: Connection, owner: str | None, *, ago: float = 0.0) -> int:
    run_id = await enqueued(conn)
    await conn.execute(
        "update queue_service.runs set reserved_for = %s, run_at = clock_timestamp() - make_interval(secs => %s) "
        "where id = %s",
        [owner, ago, run_id],
    )
    return run_id


async def claimed_by(conn: Connection, owner: str | None) -> list[Run]:
    query = queries.claim([Wanted("default", 10, {0: FRONT})], Claimant(["noop"], 1, LEASE, owner))
    return [run for run, _ in await fetch(conn, query)]


async def found_by(conn: Connection, owner: str | None) -> list[int]:
    scan = await fetch(conn, queries.scan(["default"], ["noop"], owner=owner))
    return [lane.first.id for lane in scan.due]


async def given_back(conn: Connection, **fields: Any) -> None:
    ((run, lease),) = await claimed(conn)
    back = Return(run.claim, **fields)
    assert await fetch(conn, settling.give_back([back], worker_id=1, freed=[lease])) == {run.claim}


# Claims


@pytest.mark.parametrize("owner", ["b", None])
async def test_a_reserved_run_is_passed_over_by_others(conn: Connection, owner: str | None) -> None:
    await reserved(conn, "a")
    assert await found_by(conn, owner) == []
    assert await claimed_by(conn, owner) == []


async def test_a_reserved_run_is_its_owners_at_once(conn: Connection) -> None:
    run_id = await reserved(conn, "a")
    assert await found_by(conn, "a") == [run_id]
    assert [run.id for run in await claimed_by(conn, "a")] == [run_id]


@pytest.mark.parametrize(("ago", "free"), [(0.0, False), (1.01, True)])
async def test_a_reserved_run_is_anyones_a_second_after_it_is_due(conn: Connection, ago: float, free: bool) -> None:
    run_id = await reserved(conn, "a", ago=ago)
    assert await found_by(conn, "b") == [run_id][: int(free)]
    assert [run.id for run in await claimed_by(conn, "b")] == [run_id][: int(free)]


async def test_what_stands_behind_a_reserved_run_is_found_and_claimed(conn: Connection) -> None:
    await reserved(conn, "a")
    behind = await reserved(conn, None)
    mine = await reserved(conn, "b")
    assert await found_by(conn, "b") == [behind]
    assert [run.id for run in await claimed_by(conn, "b")] == [behind, mine]


async def test_a_reserved_run_whose_worker_was_lost_is_anyones(conn: Connection) -> None:
    run_id = await reserved(conn, "a")
    await claimed_by(conn, "a")
    await lapse(conn)
    await fetch(conn, queries.sweep(limit=10, max_losses=3))
    ((run, _),) = await fetch(conn, queries.claim_suspect(["default"], Claimant(["noop"], 2, LEASE)))
    assert run.id == run_id


# Lanes


class TestALaneWhoseHeadIsReserved:
    """Others do not look at it for a second: a look locks it, and the owner would step over it."""

    async def head(self, conn: Connection, owner: str | None = "a") -> int:
        inserted = "insert into queue_service.runs (queue, task, payload, ordering_key, reserved_for) "
        return int(await one(conn, f"{inserted} values ('default', 'noop', '{{}}', 'k', %s) returning id", owner))

    async def claimed_by(self, conn: Connection, owner: str) -> list[int]:
        """As a worker claims: what gives it nothing is tended."""
        taken = await fetch(conn, queries.claim_lanes([("default", 10)], Claimant(["noop"], 1, LEASE, owner)))
        if taken.barren:
            await fetch(conn, lanes.tend_lanes(["default"], ["noop"], limit=100, owner=owner))
        return [run.id for run, _ in taken.runs]

    async def sees(self, conn: Connection, owner: str) -> bool:
        return bool((await fetch(conn, queries.scan(["default"], ["noop"], owner=owner))).laned)

    async def assert_is_for(self, conn: Connection, owner: str, run_id: int) -> None:
        """For a second it is this owner's alone, and then anybody's."""
        assert await self.sees(conn, owner)
        assert not await self.sees(conn, "b")
        assert await self.claimed_by(conn, "b") == []
        await fetch(conn, lanes.tend_after(lanes.Lane("", ""), limit=10))
        assert not await self.sees(conn, "b")
        assert await self.sees(conn, owner)
        async with conn.transaction(force_rollback=True):
            assert await self.claimed_by(conn, owner) == [run_id]
        async with conn.transaction(force_rollback=True):
            # As if a second had passed: no trigger is to hear of it.
            await conn.execute("set local session_replication_role = replica")
            await conn.execute("update queue_service.runs set run_at = run_at - interval '1.1 s'")
            await conn.execute("update queue_service.lanes set next_at = next_at - interval '1.1 s'")
            await conn.execute("set local session_replication_role = origin")
            assert await self.sees(conn, "b")
            assert await self.claimed_by(conn, "b") == [run_id]

    async def test_is_its_owners_for_a_second(self, conn: Connection) -> None:
        await self.assert_is_for(conn, "a", await self.head(conn))

    async def test_is_its_owners_when_it_is_handed_over(self, conn: Connection) -> None:
        run_id = await self.head(conn, None)
        behind = await self.head(conn, None)
        ((run, lease),) = await claimed(conn, laned=True)
        handed = Return(run.claim, delay=0.0, reserved_for="a")
        await fetch(conn, settling.give_back([handed], worker_id=1, freed=[lease]))
        await self.assert_is_for(conn, "a", run_id)
        assert behind

    async def test_is_the_owners_of_the_next_head_when_the_one_before_has_ended(self, conn: Connection) -> None:
        await self.head(conn, "c")
        behind = await self.head(conn, "a")
        ((run, _),) = await claimed(conn, laned=True, owner="c")
        await fetch(conn, settling.finish([Ending(run.claim, RunState.SUCCEEDED)], worker_id=1))
        await self.assert_is_for(conn, "a", behind)

    async def test_is_its_owners_when_the_one_before_was_cancelled(self, conn: Connection) -> None:
        first = await self.head(conn, None)
        await conn.execute("update queue_service.runs set run_at = clock_timestamp() - interval '5 s'")
        behind = await self.head(conn, "a")
        await fetch(conn, queries.cancel(first))
        assert await self.claimed_by(conn, "b") == []
        await self.assert_is_for(conn, "a", behind)

    async def test_is_anyones_when_it_has_waited_behind_another_for_longer(self, conn: Connection) -> None:
        await self.head(conn, None)
        behind = await self.head(conn, "a")
        ((run, _),) = await claimed(conn, laned=True)
        await conn.execute("update queue_service.runs set run_at = clock_timestamp() - interval '5 s'")
        await fetch(conn, settling.finish([Ending(run.claim, RunState.SUCCEEDED)], worker_id=1))
        assert await self.claimed_by(conn, "b") == [behind]

    async def test_is_not_locked_by_a_claim_of_another(
        self, conn: Connection, session: Callable[[], Awaitable[Connection]]
    ) -> None:
        run_id, other = await self.head(conn, "a"), await session()
        async with other.transaction():
            assert await self.claimed_by(other, "b") == []
            assert await self.claimed_by(conn, "a") == [run_id]

    async def test_gives_nothing_that_stands_behind_it(self, conn: Connection) -> None:
        await self.head(conn, "a")
        await self.head(conn, "b")
        assert await self.claimed_by(conn, "b") == []
        assert await self.claimed_by(conn, "b") == []

    async def test_waits_with_one_that_is_handed_over_for_later(self, conn: Connection) -> None:
        await self.head(conn, None)
        ((run, lease),) = await claimed(conn, laned=True)
        later = Return(run.claim, delay=60.0, reserved_for="a")
        await fetch(conn, settling.give_back([later], worker_id=1, freed=[lease]))
        await self.head(conn, None)
        for owner in ("a", "b"):
            assert await self.claimed_by(conn, owner) == []
        assert await rows(
            conn, "select next_at > clock_timestamp() + interval '50 s', reserved_for from queue_service.lanes"
        ) == [(True, "a")]  # fmt: skip


# Giving back


async def test_a_run_that_is_handed_over_waits_for_its_owner_and_counts_no_failure(conn: Connection) -> None:
    await enqueued(conn)
    await given_back(conn, delay=0.0, reserved_for='o"wner \\')
    assert await rows(conn, OPEN) == [(True, 'o"wner \\', "queued", 0, 1)]


@pytest.mark.parametrize("fields", [{}, {"delay": 1.0}, {"delay": 2.0, "failed": True}], ids=str)
async def test_a_run_that_is_given_back_in_any_other_way_is_anyones(conn: Connection, fields: dict[str, Any]) -> None:
    await reserved(conn, "a", ago=2)
    await given_back(conn, **fields)
    assert await rows(conn, OPEN) == [(not fields, None, "queued", int("failed" in fields), 1)]


async def test_the_owner_of_a_run_that_is_handed_over_hears_of_it_when_that_commits(
    conn: Connection, session: Callable[[], Awaitable[Connection]]
) -> None:
    other = await session()
    await other.execute("listen queue_service_runs")
    await enqueued(conn, priority=3)
    ((run, lease),) = await claimed(conn, priorities=(3,))
    handed = Return(run.claim, delay=0.0, reserved_for="a")
    await fetch(conn, settling.give_back([handed], worker_id=1, freed=[lease]))
    assert [notice.payload async for notice in other.notifies(timeout=5, stop_after=1)] == ["3 default"]


async def test_a_run_that_is_snoozed_is_announced_to_nobody(
    conn: Connection, session: Callable[[], Awaitable[Connection]]
) -> None:
    other = await session()
    await other.execute("listen queue_service_runs")
    await enqueued(conn)
    await given_back(conn, delay=1.0)
    await conn.execute("select pg_notify('queue_service_runs', 'end')")
    assert [notice.payload async for notice in other.notifies(timeout=5, stop_after=1)] == ["end"]


async def test_a_run_that_is_handed_over_after_its_cancellation_was_asked_ends_so(conn: Connection) -> None:
    run_id = await enqueued(conn)
    ((run, lease),) = await claimed(conn)
    await fetch(conn, queries.cancel(run_id))
    back = Return(run.claim, delay=0.0, reserved_for="a")
    assert await fetch(conn, settling.give_back([back], worker_id=1, freed=[lease])) == {run.claim}
    assert await rows(conn, "select state from queue_service.finished_runs") == [("cancelled",)]


# Connections


async def lapse_connections(conn: Connection) -> None:
    await conn.execute("update queue_service.connections set expires_at = clock_timestamp() - interval '1 minute'")


async def test_a_connection_is_held_by_one_owner_at_a_time(conn: Connection) -> None:
    assert await fetch(conn, connections.hold(CHANNEL, "a", LEASE))
    assert not await fetch(conn, connections.hold(CHANNEL, "b", LEASE))
    assert await fetch(conn, connections.hold(CHANNEL, "a", LEASE))
    assert (await fetch(conn, connections.owner(CHANNEL)))[0] == "a"


async def test_of_two_that_want_a_connection_at_once_one_gets_it(
    conn: Connection, session: Callable[[], Awaitable[Connection]]
) -> None:
    other = await session()
    async with conn.transaction():
        assert await fetch(conn, connections.hold(CHANNEL, "a", LEASE))
        second = asyncio.create_task(fetch(other, connections.hold(CHANNEL, "b", LEASE)))
        await eventually(lambda: blocked(conn, other))
    assert not await second


async def test_a_connection_whose_lease_lapsed_has_no_owner_and_can_be_taken(conn: Connection) -> None:
    await fetch(conn, connections.hold(CHANNEL, "a", LEASE))
    await lapse_connections(conn)
    assert (await fetch(conn, connections.owner(CHANNEL)))[0] is None
    assert await fetch(conn, connections.hold(CHANNEL, "b", LEASE))
    assert (await fetch(conn, connections.owner(CHANNEL)))[0] == "b"


async def test_a_renewal_pushes_what_is_still_held_and_tells_what_is_not(conn: Connection) -> None:
    other = ("chat", "c2")
    for channel in (CHANNEL, other):
        await fetch(conn, connections.hold(channel, "a", LEASE))
    await lapse_connections(conn)
    await fetch(conn, connections.hold(other, "b", LEASE))
    assert await fetch(conn, connections.renew([CHANNEL, other], "a", LEASE)) == {CHANNEL}
    assert (await fetch(conn, connections.owner(CHANNEL)))[0] == "a"
    assert (await fetch(conn, connections.owner(other)))[0] == "b"


async def test_only_its_owner_lets_go_of_a_connection(conn: Connection) -> None:
    await fetch(conn, connections.hold(CHANNEL, "a", LEASE))
    assert await fetch(conn, connections.release([CHANNEL], "b")) == set()
    assert (await fetch(conn, connections.owner(CHANNEL)))[0] == "a"
    assert await fetch(conn, connections.release([CHANNEL], "a")) == {CHANNEL}
    assert (await fetch(conn, connections.owner(CHANNEL)))[0] is None


async def test_connections_long_lapsed_are_forgotten_and_no_others(conn: Connection) -> None:
    await fetch(conn, connections.hold(CHANNEL, "a", LEASE))
    await lapse_connections(conn)
    await fetch(conn, connections.hold(("chat", "c2"), "a", LEASE))
    await fetch(conn, connections.prune(timedelta(hours=1)))
    assert await one(conn, "select count(*) from queue_service.connections") == 2
    await fetch(conn, connections.prune(timedelta(seconds=10)))
    assert await rows(conn, "select channel_id from queue_service.connections") == [("c2",)]


@pytest.mark.parametrize("held", [True, False])
async def test_a_delivery_is_reserved_for_whoever_is_connected(conn: Connection, held: bool) -> None:
    await fetch(conn, connections.hold(CHANNEL, "a", LEASE))
    if not held:
        await lapse_connections(conn)
    run_id = await fetch(conn, connections.deliver(NewDelivery("chat", "c1", '{"seq": 1}', "acme", 3)))
    assert await rows(
        conn, "select id, queue, task, payload, organization_id, reserved_for, run_at <= clock_timestamp() "
        "from queue_service.runs",
    ) == [(run_id, "thread_response", "deliver", {"seq": 1}, "acme", "a" if held else None, True)]  # fmt: skip


async def test_a_delivery_without_a_channel_is_anyones(conn: Connection) -> None:
    await fetch(conn, connections.hold(CHANNEL, "a", LEASE))
    await fetch(conn, connections.deliver(NewDelivery("chat", None, "{}", None, 3)))
    assert await rows(conn, "select reserved_for from queue_service.runs") == [(None,)]
