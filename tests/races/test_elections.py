"""Two real sessions collide over one run; one holds its transaction open while the other waits for the lock."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest

from queue_service.db.execute import Connection, fetch
from queue_service.db.query import Query
from queue_service.runs import queries, settling
from queue_service.runs.claim import Claim
from queue_service.runs.model import Ending, NewRun, Return, RunState
from queue_service.runs.queries import Claimant
from tests.support import blocked, claim, claimed, enqueued, eventually, lapse, one, rows

LEASE = timedelta(seconds=30)


class Collision:
    """`first` runs in an open transaction, `second` waits for it; then the first commits or rolls back."""

    def __init__(self, a: Connection, b: Connection, onlooker: Connection) -> None:
        self.a, self.b, self.onlooker = a, b, onlooker

    async def of(self, first: Query[Any], second: Query[Any], *, commit: bool, waits: bool = True) -> tuple[Any, Any]:
        await self.a.execute("begin")
        won = await fetch(self.a, first)
        contender = asyncio.ensure_future(fetch(self.b, second))
        if waits:
            await eventually(lambda: blocked(self.onlooker, self.b))
        else:
            await contender
        await self.a.execute("commit" if commit else "rollback")
        return won, await contender


@pytest.fixture
async def collide(session: Callable[[], Awaitable[Connection]]) -> Collision:
    return Collision(await session(), await session(), await session())


async def assert_sound(conn: Connection) -> None:
    """Each run is in one place, once; each running run is listed by the lease that holds it."""
    places = await rows(
        conn,
        "select id, count(*) from (select id from queue_service.runs union all select id from queue_service.finished_runs)"
        " as place group by id having count(*) > 1",
    )
    assert places == []
    orphans = await one(
        conn,
        "select count(*) from queue_service.runs where state = 'running' and not exists ("
        "select from queue_service.leases where leases.id = runs.lease_id and runs.id = any(leases.run_ids))",
    )
    assert orphans == 0


@pytest.mark.parametrize("commit", [True, False], ids=["commit", "rollback"])
class TestRace:
    async def test_two_claims_never_take_the_same_run(self, conn: Connection, collide: Collision, commit: bool) -> None:
        for _ in range(4):
            await enqueued(conn)
        first, second = await collide.of(claim(limit=2), claim(limit=3, worker_id=2), commit=commit, waits=False)
        assert {run.id for run, _ in first} & {run.id for run, _ in second} == set()
        assert len(second) == 2
        await assert_sound(conn)

    async def test_a_finish_comes_before_a_sweep(self, conn: Connection, collide: Collision, commit: bool) -> None:
        await enqueued(conn)
        ((run, lease),) = await claimed(conn)
        await lapse(conn)
        finish = settling.finish([Ending(run.claim, RunState.SUCCEEDED)], worker_id=1, freed=[lease])
        done, swept = await collide.of(finish, queries.sweep(limit=10, max_losses=3), commit=commit, waits=False)
        assert (done, swept) == ({run.claim}, [])
        await assert_sound(conn)
        again = await fetch(conn, queries.sweep(limit=10, max_losses=3))
        assert len(again) == (0 if commit else 1)
        assert await one(conn, "select count(*) from queue_service.finished_runs") == (1 if commit else 0)

    async def test_a_finish_that_frees_no_lease_comes_before_a_sweep(
        self, conn: Connection, collide: Collision, commit: bool
    ) -> None:
        for _ in range(2):
            await enqueued(conn)
        taken = await claimed(conn)
        await lapse(conn)
        finish = settling.finish([Ending(taken[0][0].claim, RunState.SUCCEEDED)], worker_id=1)
        _, swept = await collide.of(finish, queries.sweep(limit=10, max_losses=3), commit=commit)
        assert len(swept) == (1 if commit else 2)
        await assert_sound(conn)

    async def test_a_sweep_comes_before_a_finish(self, conn: Connection, collide: Collision, commit: bool) -> None:
        await enqueued(conn)
        ((run, lease),) = await claimed(conn)
        await lapse(conn)
        finish = settling.finish([Ending(run.claim, RunState.SUCCEEDED)], worker_id=1, freed=[lease])
        swept, done = await collide.of(queries.sweep(limit=10, max_losses=3), finish, commit=commit)
        assert len(swept) == 1
        assert done == (set() if commit else {run.claim})
        assert await one(conn, "select count(*) from queue_service.finished_runs") == (0 if commit else 1)
        await assert_sound(conn)

    async def test_an_extend_comes_before_a_sweep(self, conn: Connection, collide: Collision, commit: bool) -> None:
        await enqueued(conn)
        ((_, lease),) = await claimed(conn)
        await lapse(conn)
        held, swept = await collide.of(
            queries.extend([lease], LEASE), queries.sweep(limit=10, max_losses=3), commit=commit, waits=False
        )
        assert (held, swept) == ({lease}, [])
        assert len(await fetch(conn, queries.sweep(limit=10, max_losses=3))) == (0 if commit else 1)
        await assert_sound(conn)

    async def test_a_sweep_comes_before_an_extend(self, conn: Connection, collide: Collision, commit: bool) -> None:
        await enqueued(conn)
        ((_, lease),) = await claimed(conn)
        await lapse(conn)
        swept, held = await collide.of(
            queries.sweep(limit=10, max_losses=3), queries.extend([lease], LEASE), commit=commit
        )
        assert len(swept) == 1
        assert held == (set() if commit else {lease})
        await assert_sound(conn)

    async def test_a_cancel_comes_before_a_finish(self, conn: Connection, collide: Collision, commit: bool) -> None:
        run_id = await enqueued(conn)
        ((run, lease),) = await claimed(conn)
        finish = settling.finish([Ending(run.claim, RunState.SUCCEEDED)], worker_id=1, freed=[lease])
        asked, done = await collide.of(queries.cancel(run_id), finish, commit=commit)
        assert (asked, done) == ("requested", {run.claim})
        assert await rows(conn, "select id, state from queue_service.finished_runs") == [(run_id, "succeeded")]
        await assert_sound(conn)

    async def test_a_finish_comes_before_a_cancel(self, conn: Connection, collide: Collision, commit: bool) -> None:
        run_id = await enqueued(conn)
        ((run, lease),) = await claimed(conn)
        finish = settling.finish([Ending(run.claim, RunState.SUCCEEDED)], worker_id=1, freed=[lease])
        _, asked = await collide.of(finish, queries.cancel(run_id), commit=commit)
        assert asked == (None if commit else "requested")
        await assert_sound(conn)

    async def test_a_claim_comes_before_a_cancel(self, conn: Connection, collide: Collision, commit: bool) -> None:
        run_id = await enqueued(conn)
        taken, answer = await collide.of(claim(), queries.cancel(run_id), commit=commit)
        assert len(taken) == 1
        assert answer == ("requested" if commit else "cancelled")
        await assert_sound(conn)

    async def test_a_cancel_comes_before_a_claim(self, conn: Connection, collide: Collision, commit: bool) -> None:
        run_id = await enqueued(conn)
        answer, taken = await collide.of(queries.cancel(run_id), claim(), commit=commit, waits=False)
        assert (answer, taken) == ("cancelled", [])
        assert len(await claimed(conn)) == (0 if commit else 1)
        await assert_sound(conn)

    async def test_a_cancellation_asked_for_while_a_run_is_handed_back_is_not_lost(
        self, conn: Connection, collide: Collision, commit: bool
    ) -> None:
        run_id = await enqueued(conn)
        ((run, lease),) = await claimed(conn)
        back = settling.give_back([Return(run.claim, 1.0)], worker_id=1, freed=[lease])
        asked, returned = await collide.of(queries.cancel(run_id), back, commit=commit)
        assert (asked, returned) == ("requested", {run.claim})
        found = await fetch(conn, queries.get(run_id))
        assert found is not None
        assert found.state is (RunState.CANCELLED if commit else RunState.QUEUED)
        await assert_sound(conn)

    async def test_two_enqueues_of_one_singleton_key_make_one_run(
        self, conn: Connection, collide: Collision, commit: bool
    ) -> None:
        new = NewRun("noop", "default", "{}", singleton_key="only")
        first, second = await collide.of(queries.enqueue(new), queries.enqueue(new), commit=commit)
        assert first is not None
        assert (second is None) == commit
        assert await one(conn, "select count(*) from queue_service.runs") == 1

    async def test_two_sweeps_never_take_the_same_lease(
        self, conn: Connection, collide: Collision, commit: bool
    ) -> None:
        for _ in range(2):
            await enqueued(conn)
            await claimed(conn, limit=1)
        await lapse(conn)
        sweep = queries.sweep(limit=1, max_losses=3)
        first, second = await collide.of(sweep, sweep, commit=commit, waits=False)
        assert {run.run_id for run in first} & {run.run_id for run in second} == set()
        assert len(first) == len(second) == 1
        await assert_sound(conn)

    async def test_an_expiry_and_a_claim_never_both_take_a_run(
        self, conn: Connection, collide: Collision, commit: bool
    ) -> None:
        await enqueued(conn)
        await conn.execute("update queue_service.runs set expires_at = clock_timestamp() - interval '1 s'")
        gone, taken = await collide.of(queries.expire(limit=5), claim(), commit=commit, waits=False)
        assert (len(gone), taken) == (1, [])
        await assert_sound(conn)


async def test_a_retry_meets_a_live_run_with_its_singleton_key_and_loses_nothing(conn: Connection) -> None:
    old = await enqueued(conn, singleton_key="only")
    ((run, lease),) = await claimed(conn)
    await fetch(conn, settling.finish([Ending(run.claim, RunState.FAILED)], worker_id=1, freed=[lease]))
    await enqueued(conn, singleton_key="only")
    assert await fetch(conn, queries.retry(old)) == queries.Retriable("default", 0, "only", None, has_moved=False)
    assert await one(conn, "select state from queue_service.finished_runs where id = %s", old) == "failed"


async def test_a_claim_made_again_after_a_sweep_has_another_attempt(conn: Connection) -> None:
    run_id = await enqueued(conn)
    ((first, _),) = await claimed(conn)
    await lapse(conn)
    await fetch(conn, queries.sweep(limit=10, max_losses=3))
    assert await claimed(conn) == []
    ((second, _),) = await fetch(conn, queries.claim_suspect(["default"], Claimant(["noop"], 2, LEASE)))
    assert (first.claim, second.claim) == (Claim(run_id, 1), Claim(run_id, 2))
    assert second.losses == 1
