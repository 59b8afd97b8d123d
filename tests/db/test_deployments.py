"""Who holds a deployment, statement by statement."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta

from queue_service.db.execute import Connection, fetch
from queue_service.deployments import queries
from queue_service.deployments.queries import Holder
from tests.support import LEASE, blocked, eventually, one

Session = Callable[[], Awaitable[Connection]]


async def hold(conn: Connection, holding: str, *, ask: bool = False) -> Holder:
    holder = await fetch(conn, queries.hold("d", f"owner of {holding}", holding, LEASE, ask=ask))
    assert holder is not None
    return holder


async def lapse_deployments(conn: Connection) -> None:
    await conn.execute("update queue_service.deployments set expires_at = clock_timestamp() - interval '1 minute'")


async def test_one_holds_a_deployment_and_the_other_hears_who(conn: Connection) -> None:
    assert (await hold(conn, "a")).is_ours
    other = await hold(conn, "b")
    assert (other.owner, other.is_ours) == ("owner of a", False)
    assert 0 < other.seconds_left <= LEASE.total_seconds()
    # Of one process, too: what counts is the start, not the owner.
    again = await fetch(conn, queries.hold("d", "owner of a", "a2", LEASE, ask=False))
    assert again is not None and not again.is_ours
    assert (await hold(conn, "a")).is_ours


async def test_of_two_that_come_at_once_one_holds_it(conn: Connection, session: Session) -> None:
    other = await session()
    async with conn.transaction():
        assert (await hold(conn, "a")).is_ours
        second = asyncio.create_task(fetch(other, queries.hold("d", "b", "b", LEASE, ask=True)))
        await eventually(lambda: blocked(conn, other))
    # Its snapshot is older than the row: it is to ask again.
    assert await second is None
    assert not (await hold(other, "b")).is_ours


async def test_a_renewal_that_comes_first_wins_over_who_waits_to_take_over(conn: Connection, session: Session) -> None:
    other = await session()
    await hold(conn, "a")
    await lapse_deployments(conn)
    async with conn.transaction():
        assert await fetch(conn, queries.renew("d", "a", LEASE)) is False
        second = asyncio.create_task(fetch(other, queries.hold("d", "b", "b", LEASE, ask=False)))
        await eventually(lambda: blocked(conn, other))
    holder = await second
    assert holder is not None and not holder.is_ours


async def test_what_lapsed_is_taken_over_and_its_holder_learns_so_at_its_renewal(conn: Connection) -> None:
    await hold(conn, "a")
    await lapse_deployments(conn)
    assert (await hold(conn, "b")).is_ours
    assert await fetch(conn, queries.renew("d", "a", LEASE)) is None
    assert not await fetch(conn, queries.release("d", "a"))
    assert (await hold(conn, "c")).owner == "owner of b"


async def test_what_lapsed_and_was_not_taken_over_is_still_its_holders(conn: Connection) -> None:
    await hold(conn, "a")
    await lapse_deployments(conn)
    assert await fetch(conn, queries.renew("d", "a", LEASE)) is False
    assert not (await hold(conn, "b")).is_ours


async def test_who_holds_it_hears_that_another_wants_it_for_as_long_as_that_asks(conn: Connection) -> None:
    await hold(conn, "a")
    await hold(conn, "b")
    assert await fetch(conn, queries.renew("d", "a", LEASE)) is False
    await hold(conn, "b", ask=True)
    assert await fetch(conn, queries.renew("d", "a", LEASE)) is True
    await conn.execute("update queue_service.deployments set wanted_at = wanted_at - interval '1 minute'")
    assert await fetch(conn, queries.renew("d", "a", LEASE)) is False


async def test_what_was_released_is_free_and_wanted_by_nobody(conn: Connection) -> None:
    await hold(conn, "a")
    await hold(conn, "b", ask=True)
    assert await fetch(conn, queries.release("d", "a"))
    assert (await hold(conn, "b")).is_ours
    assert await fetch(conn, queries.renew("d", "b", LEASE)) is False


async def test_what_lapsed_long_ago_is_forgotten(conn: Connection) -> None:
    await hold(conn, "a")
    await fetch(conn, queries.prune(timedelta(seconds=30)))
    assert await one(conn, "select count(*) from queue_service.deployments") == 1
    await lapse_deployments(conn)
    await fetch(conn, queries.prune(timedelta(seconds=30)))
    assert await one(conn, "select count(*) from queue_service.deployments") == 0
