"""Two sessions meet over one run, one of them with its transaction open: whatever the other does, nothing is lost.

The collisions of single statements that `test_elections.py` leaves out, and those of three sessions.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest

from queue_service.db.execute import Connection, fetch
from queue_service.db.query import Query
from queue_service.runs import queries, settling
from queue_service.runs.model import Ending, NewRun, Return, Run, RunState
from queue_service.runs.queries import Claimant
from tests.support import LEASE, blocked, claim, claimed, enqueued, eventually, lapse, one, rows

Open = Callable[[], Awaitable[Connection]]

SWEEP = queries.sweep(limit=10, max_losses=3)
SUSPECT = queries.claim_suspect(["default"], Claimant(["noop"], 2, LEASE))
KEYED = NewRun("noop", "default", '{"by": "replace"}', singleton_key="only")
MOVED = queries.Retriable("default", 0, KEYED.singleton_key, None, has_moved=True)


class Table:
    """Three sessions: `a` acts first and keeps its transaction open, `b` comes second, `c` looks on."""

    def __init__(self, a: Connection, b: Connection, c: Connection) -> None:
        self.a, self.b, self.c = a, b, c

    async def waits(self, first: Query[Any], second: Query[Any], *, commit: bool) -> tuple[Any, Any]:
        """The answers, where the second has to wait for the first to commit or roll back."""
        await self.a.execute("begin")
        won = await fetch(self.a, first)
        contender = asyncio.ensure_future(fetch(self.b, second))
        await eventually(lambda: blocked(self.c, self.b))
        await self.a.execute("commit" if commit else "rollback")
        return won, await contender

    async def passes(self, first: Query[Any], second: Query[Any], *, commit: bool) -> tuple[Any, Any]:
        """The answers, where the second steps over what the first holds."""
        await self.a.execute("begin")
        answers = await fetch(self.a, first), await fetch(self.b, second)
        await self.a.execute("commit" if commit else "rollback")
        return answers

    async def state(self, run_id: int) -> str | None:
        """Where the run is. Fails unless it is in one place, and held by a lease if it is running."""
        found = await rows(
            self.c,
            "select state, state <> 'running' or exists (select from queue_service.leases where leases.id = lease_id "
            "and runs.id = any(leases.run_ids)) from queue_service.runs where id = %s "
            "union all select state, true from queue_service.finished_runs where id = %s",
            run_id, run_id,
        )  # fmt: skip
        assert len(found) <= 1
        assert all(is_held for _, is_held in found)
        return found[0][0] if found else None

    async def kept(self, run_id: int) -> list[tuple[Any, ...]]:
        """Number and reason of each attempt kept with the run."""
        return await rows(
            self.c,
            "select (each ->> 'attempt')::int, each -> 'error' ->> 'reason' from queue_service.runs, "
            "jsonb_array_elements(attempts) as each where id = %s",
            run_id,
        )

    @asynccontextmanager
    async def holding(self, run_id: int) -> AsyncIterator[None]:
        """Keep everyone from one run for the length of the block."""
        async with self.c.transaction():
            await self.c.execute("select from queue_service.runs where id = %s for update", [run_id])
            yield


@pytest.fixture
async def table(session: Open) -> Table:
    return Table(await session(), await session(), await session())


@pytest.fixture(params=[True, False], ids=["commit", "rollback"])
def commit(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
async def held(conn: Connection) -> tuple[Run, int]:
    """A running run whose lease has lapsed, and that lease."""
    await enqueued(conn, singleton_key="only")
    (taken,) = await claimed(conn)
    await lapse(conn)
    return taken


def finish(run: Run, *freed: int, state: RunState = RunState.SUCCEEDED) -> Query[set[settling.Done]]:
    return settling.finish([Ending(run.claim, state)], worker_id=1, freed=freed)


def give_back(run: Run, *freed: int) -> Query[set[settling.Done]]:
    return settling.give_back([Return(run.claim)], worker_id=1, freed=freed)


def failed(run: Run, *freed: int) -> Query[set[settling.Done]]:
    return settling.give_back([Return(run.claim, failed=True, error='{"reason": "raised"}')], worker_id=1, freed=freed)


class TestSweep:
    async def test_a_cancellation_asked_for_while_a_sweep_waits_is_obeyed_by_it(
        self, table: Table, held: tuple[Run, int], commit: bool
    ) -> None:
        run, _ = held
        asked, swept = await table.waits(queries.cancel(run.id), SWEEP, commit=commit)
        assert asked == "requested"
        assert [each.run_id for each in swept] == [run.id]
        assert await table.state(run.id) == ("cancelled" if commit else "queued")

    async def test_a_cancel_that_waits_for_a_sweep_ends_what_it_queued_again(
        self, table: Table, held: tuple[Run, int], commit: bool
    ) -> None:
        run, _ = held
        _, answer = await table.waits(SWEEP, queries.cancel(run.id), commit=commit)
        assert answer == ("cancelled" if commit else "requested")
        assert await table.state(run.id) == ("cancelled" if commit else "running")

    async def test_a_run_that_is_being_handed_back_is_not_swept(
        self, table: Table, held: tuple[Run, int], commit: bool
    ) -> None:
        run, lease = held
        back, swept = await table.passes(give_back(run, lease), SWEEP, commit=commit)
        assert (back, swept) == ({run.claim}, [])
        assert await table.state(run.id) == ("queued" if commit else "running")
        assert len(await fetch(table.b, SWEEP)) == (0 if commit else 1)

    async def test_a_hand_back_that_waits_for_a_sweep_changes_nothing(
        self, table: Table, held: tuple[Run, int], commit: bool
    ) -> None:
        run, lease = held
        swept, back = await table.waits(SWEEP, give_back(run, lease), commit=commit)
        assert len(swept) == 1
        assert back == (set() if commit else {run.claim})
        assert await table.state(run.id) == "queued"
        assert await one(table.c, "select losses from queue_service.runs") == (1 if commit else 0)

    async def test_a_finish_waits_for_a_sweep_that_is_followed_by_another_claim(
        self, table: Table, held: tuple[Run, int]
    ) -> None:
        run, lease = held
        await table.a.execute("begin")
        await fetch(table.a, SWEEP)
        ((again, _),) = await fetch(table.a, SUSPECT)
        late = asyncio.ensure_future(fetch(table.b, finish(run, lease)))
        await eventually(lambda: blocked(table.c, table.b))
        await table.a.execute("commit")
        assert await late == set()
        assert await table.state(run.id) == "running"
        assert await one(table.c, "select attempt from queue_service.runs") == again.attempt == run.attempt + 1


class TestFinalTasks:
    @pytest.fixture
    async def held(self, conn: Connection) -> tuple[Run, int]:
        await enqueued(conn)
        (taken,) = await fetch(conn, claim(final_tasks=("noop",)))
        await lapse(conn)
        return taken

    async def test_a_cancellation_asked_for_while_a_sweep_waits_is_obeyed_by_it(
        self, table: Table, held: tuple[Run, int], commit: bool
    ) -> None:
        run, _ = held
        _, swept = await table.waits(queries.cancel(run.id), SWEEP, commit=commit)
        assert [each.state for each in swept] == [RunState.CANCELLED if commit else RunState.FAILED]
        assert await table.state(run.id) == ("cancelled" if commit else "failed")

    async def test_a_finish_that_waits_for_a_sweep_changes_nothing(
        self, table: Table, held: tuple[Run, int], commit: bool
    ) -> None:
        run, lease = held
        swept, done = await table.waits(SWEEP, finish(run, lease), commit=commit)
        assert [each.state for each in swept] == [RunState.FAILED]
        assert done == (set() if commit else {run.claim})
        assert await table.state(run.id) == ("failed" if commit else "succeeded")

    async def test_an_extension_that_comes_first_saves_the_run(
        self, table: Table, held: tuple[Run, int], commit: bool
    ) -> None:
        run, lease = held
        _, swept = await table.passes(queries.extend([lease], LEASE), SWEEP, commit=commit)
        assert swept == []
        assert await table.state(run.id) == "running"
        assert len(await fetch(table.b, SWEEP)) == (0 if commit else 1)

    async def test_a_run_that_is_changed_while_a_sweep_waits_ends_all_the_same(
        self, table: Table, held: tuple[Run, int], commit: bool
    ) -> None:
        run, _ = held
        await table.a.execute("begin")
        await table.a.execute("update queue_service.runs set failures = 5")
        contender = asyncio.ensure_future(fetch(table.b, SWEEP))
        await eventually(lambda: blocked(table.c, table.b))
        await table.a.execute("commit" if commit else "rollback")
        assert [each.state for each in await contender] == [RunState.FAILED]
        assert await table.state(run.id) == "failed"


class TestAttempts:
    async def test_of_a_failure_and_a_loss_of_one_claim_one_is_kept(
        self, table: Table, held: tuple[Run, int], commit: bool
    ) -> None:
        run, lease = held
        await table.waits(SWEEP, failed(run, lease), commit=commit)
        assert await table.kept(run.id) == [(run.attempt, "worker_lost" if commit else "raised")]

    async def test_of_a_loss_that_comes_second_nothing_is_kept(
        self, table: Table, held: tuple[Run, int], commit: bool
    ) -> None:
        run, lease = held
        await table.passes(failed(run, lease), SWEEP, commit=commit)
        assert await table.kept(run.id) == ([(run.attempt, "raised")] if commit else [])

    @pytest.mark.parametrize("how", ["fails", "is lost"])
    async def test_a_run_that_is_changed_while_its_attempt_ends_keeps_both(
        self, table: Table, held: tuple[Run, int], how: str, commit: bool
    ) -> None:
        run, lease = held
        change = "update queue_service.runs set attempts = jsonb_build_array(jsonb_build_object('attempt', 0, 'error', null))"
        await table.a.execute("begin")
        await table.a.execute(change.encode())
        contender = asyncio.ensure_future(fetch(table.b, failed(run, lease) if how == "fails" else SWEEP))
        await eventually(lambda: blocked(table.c, table.b))
        await table.a.execute("commit" if commit else "rollback")
        assert len(await contender) == 1
        last = (run.attempt, "raised" if how == "fails" else "worker_lost")
        assert await table.kept(run.id) == ([(0, None), last] if commit else [last])

    async def test_a_failure_of_a_run_that_is_being_retried_from_history_is_not_added_twice(
        self, table: Table, held: tuple[Run, int], commit: bool
    ) -> None:
        run, lease = held
        await fetch(table.c, finish(run, lease, state=RunState.FAILED))
        first, second = await table.waits(queries.retry(run.id), queries.retry(run.id), commit=commit)
        assert (first, second) == (MOVED, None if commit else MOVED)
        assert await table.kept(run.id) == [(run.attempt, None)]


class TestEnding:
    async def test_two_finishes_of_one_claim_make_one_ending(
        self, table: Table, held: tuple[Run, int], commit: bool
    ) -> None:
        run, lease = held
        first, second = await table.waits(finish(run, lease), finish(run, lease, state=RunState.FAILED), commit=commit)
        assert first == {run.claim}
        assert second == (set() if commit else {run.claim})
        assert await table.state(run.id) == ("succeeded" if commit else "failed")

    async def test_a_finish_and_a_hand_back_of_one_claim_do_one_of_the_two(
        self, table: Table, held: tuple[Run, int], commit: bool
    ) -> None:
        run, lease = held
        _, back = await table.waits(finish(run, lease), give_back(run, lease), commit=commit)
        assert back == (set() if commit else {run.claim})
        assert await table.state(run.id) == ("succeeded" if commit else "queued")

    async def test_a_hand_back_and_a_finish_of_one_claim_do_one_of_the_two(
        self, table: Table, held: tuple[Run, int], commit: bool
    ) -> None:
        run, lease = held
        _, done = await table.waits(give_back(run, lease), finish(run, lease), commit=commit)
        assert done == (set() if commit else {run.claim})
        assert await table.state(run.id) == ("queued" if commit else "succeeded")

    async def test_a_lease_that_is_being_let_go_is_extended_only_if_it_stays(
        self, table: Table, held: tuple[Run, int], commit: bool
    ) -> None:
        run, lease = held
        _, extended = await table.waits(finish(run, lease), queries.extend([lease], LEASE), commit=commit)
        assert extended == (set() if commit else {lease})
        assert await table.state(run.id) == ("succeeded" if commit else "running")

    async def test_a_lease_that_is_being_extended_is_let_go_with_its_last_run(
        self, table: Table, held: tuple[Run, int], commit: bool
    ) -> None:
        run, lease = held
        _, done = await table.waits(queries.extend([lease], LEASE), finish(run, lease), commit=commit)
        assert done == {run.claim}
        assert await table.state(run.id) == "succeeded"
        assert await one(table.c, "select count(*) from queue_service.leases") == 0

    async def test_a_cancel_that_waits_for_a_hand_back_ends_the_queued_run(
        self, table: Table, held: tuple[Run, int], commit: bool
    ) -> None:
        run, lease = held
        _, answer = await table.waits(give_back(run, lease), queries.cancel(run.id), commit=commit)
        assert answer == ("cancelled" if commit else "requested")
        assert await table.state(run.id) == ("cancelled" if commit else "running")


class TestClaim:
    async def test_what_is_being_claimed_is_not_deleted(self, table: Table, commit: bool) -> None:
        run_id = await enqueued(table.c)
        _, is_gone = await table.waits(claim(), queries.delete(run_id), commit=commit)
        assert is_gone == (not commit)
        assert await table.state(run_id) == ("running" if commit else None)

    async def test_what_is_being_deleted_is_not_claimed(self, table: Table, commit: bool) -> None:
        run_id = await enqueued(table.c)
        assert await table.passes(queries.delete(run_id), claim(), commit=commit) == (True, [])
        assert await table.state(run_id) == (None if commit else "queued")

    async def test_what_is_being_claimed_is_not_expired(self, table: Table, commit: bool) -> None:
        run_id = await enqueued(table.c, expires_in=timedelta(hours=1))
        taken = await self.claim_as_it_expires(table, run_id, commit=commit)
        assert taken == ("running" if commit else "queued")
        assert await fetch(table.b, queries.expire(limit=5)) == ([] if commit else [run_id])

    async def claim_as_it_expires(self, table: Table, run_id: int, *, commit: bool) -> str | None:
        await table.a.execute("begin")
        assert len(await fetch(table.a, claim())) == 1
        await table.a.execute("update queue_service.runs set expires_at = clock_timestamp() - interval '1 s'")
        assert await fetch(table.b, queries.expire(limit=5)) == []
        await table.a.execute("commit" if commit else "rollback")
        state = await table.state(run_id)
        await table.a.execute("update queue_service.runs set expires_at = clock_timestamp() - interval '1 s'")
        return state

    async def test_what_is_being_claimed_is_not_replaced(self, table: Table, commit: bool) -> None:
        run_id = await enqueued(table.c, singleton_key="only")
        taken, replaced = await table.waits(claim(), queries.replace(KEYED), commit=commit)
        assert len(taken) == 1
        assert replaced == (None if commit else run_id)
        assert await table.state(run_id) == ("running" if commit else "queued")
        assert await one(table.c, "select payload from queue_service.runs") == ({} if commit else {"by": "replace"})

    async def test_what_is_being_replaced_is_not_claimed(self, table: Table, commit: bool) -> None:
        run_id = await enqueued(table.c, singleton_key="only")
        assert await table.passes(queries.replace(KEYED), claim(), commit=commit) == (run_id, [])
        ((run, _),) = await fetch(table.b, claim())
        assert run.payload == ({"by": "replace"} if commit else {})

    async def test_two_replacements_leave_one_run(self, table: Table, commit: bool) -> None:
        run_id = await enqueued(table.c, singleton_key="only")
        later = NewRun("noop", "default", '{"by": "second"}', singleton_key="only")
        assert await table.waits(queries.replace(KEYED), queries.replace(later), commit=commit) == (run_id, run_id)
        assert await rows(table.c, "select payload from queue_service.runs") == [({"by": "second"},)]

    async def test_two_workers_never_take_the_same_suspect(
        self, table: Table, held: tuple[Run, int], commit: bool
    ) -> None:
        run, _ = held
        await fetch(table.c, SWEEP)
        first, second = await table.passes(SUSPECT, SUSPECT, commit=commit)
        assert [each.id for each, _ in first] == [run.id]
        assert second == []
        assert await table.state(run.id) == ("running" if commit else "queued")

    async def test_eight_claimers_share_a_backlog_without_an_overlap(self, session: Open, table: Table) -> None:
        await table.c.execute(
            "insert into queue_service.runs (queue, task, payload) select 'default', 'noop', '{}' "
            "from generate_series(1, 600)"
        )
        taken: list[int] = []

        async def drain(conn: Connection) -> None:
            while found := await fetch(conn, claim(limit=7)):
                taken.extend(run.id for run, _ in found)

        sessions = [await session() for _ in range(8)]
        while len(taken) < 600:
            await asyncio.gather(*map(drain, sessions))
        assert sorted(taken) == sorted(set(taken))
        assert await one(table.c, "select sum(cardinality(run_ids)) from queue_service.leases") == 600


class TestHistory:
    @pytest.fixture
    async def failed(self, table: Table, held: tuple[Run, int]) -> int:
        run, lease = held
        await fetch(table.c, finish(run, lease, state=RunState.FAILED))
        return run.id

    async def test_two_retries_queue_a_run_once(self, table: Table, failed: int, commit: bool) -> None:
        first, second = await table.waits(queries.retry(failed), queries.retry(failed), commit=commit)
        assert first == MOVED
        assert second == (None if commit else MOVED)
        assert await table.state(failed) == "queued"

    async def test_what_is_being_retried_is_not_deleted_from_history(
        self, table: Table, failed: int, commit: bool
    ) -> None:
        _, is_gone = await table.waits(queries.retry(failed), queries.delete(failed), commit=commit)
        assert is_gone == (not commit)
        assert await table.state(failed) == ("queued" if commit else None)

    async def test_what_is_being_deleted_is_not_retried(self, table: Table, failed: int, commit: bool) -> None:
        _, lane = await table.waits(queries.delete(failed), queries.retry(failed), commit=commit)
        assert lane == (None if commit else MOVED)
        assert await table.state(failed) == (None if commit else "queued")

    async def test_a_delete_that_waits_for_a_cancel_says_truly_whether_the_run_is_gone(
        self, table: Table, commit: bool
    ) -> None:
        run_id = await enqueued(table.c)
        _, is_gone = await table.waits(queries.cancel(run_id), queries.delete(run_id), commit=commit)
        assert await table.state(run_id) == (None if is_gone else "cancelled")

    async def test_an_enqueue_that_waits_for_a_retry_of_its_singleton_key_gives_way_to_it(
        self, table: Table, failed: int, commit: bool
    ) -> None:
        _, stored = await table.waits(queries.retry(failed), queries.enqueue(KEYED), commit=commit)
        assert (stored is None) == commit
        assert await table.state(failed) == ("queued" if commit else "failed")
        assert await one(table.c, "select count(*) from queue_service.runs") == 1

    async def test_a_retry_that_waits_for_an_enqueue_of_its_singleton_key_loses_nothing(
        self, table: Table, failed: int, commit: bool
    ) -> None:
        _, retried = await table.waits(queries.enqueue(KEYED), queries.retry(failed), commit=commit)
        assert retried == MOVED._replace(has_moved=not commit)
        assert await table.state(failed) == ("failed" if commit else "queued")
        assert await one(table.c, "select count(*) from queue_service.runs") == 1

    async def test_an_enqueue_that_waits_for_the_end_of_the_keys_holder_follows_it(
        self, table: Table, held: tuple[Run, int], commit: bool
    ) -> None:
        run, lease = held
        _, stored = await table.waits(finish(run, lease), queries.enqueue(KEYED), commit=commit)
        assert (stored is not None) == commit
        assert await table.state(run.id) == ("succeeded" if commit else "running")


class TestThreeSessions:
    """A third one holds a run, so that the others stand in the middle of their statements when they meet."""

    @pytest.fixture
    async def batch(self, table: Table) -> list[tuple[Run, int]]:
        for _ in range(4):
            await enqueued(table.c)
        taken = await claimed(table.c)
        await lapse(table.c)
        return taken

    @staticmethod
    def ending(batch: list[tuple[Run, int]], *freed: int) -> Query[set[settling.Done]]:
        return settling.finish([Ending(run.claim, RunState.SUCCEEDED) for run, _ in batch], worker_id=1, freed=freed)

    @pytest.mark.parametrize("place", range(4))
    async def test_a_sweep_steps_over_a_lease_whose_finish_is_half_done(
        self, table: Table, batch: list[tuple[Run, int]], place: int, session: Open
    ) -> None:
        onlooker = await session()
        async with table.holding(batch[place][0].id):
            done = asyncio.ensure_future(fetch(table.a, self.ending(batch, batch[0][1])))
            await eventually(lambda: blocked(onlooker, table.a))
            assert await fetch(table.b, SWEEP) == []
        assert await done == {run.claim for run, _ in batch}
        assert [await table.state(run.id) for run, _ in batch] == 4 * ["succeeded"]

    @pytest.mark.parametrize("frees", [True, False], ids=["frees the lease", "frees nothing"])
    @pytest.mark.parametrize("place", range(4))
    async def test_a_finish_that_meets_a_half_done_sweep_waits_and_changes_nothing(
        self, table: Table, batch: list[tuple[Run, int]], place: int, frees: bool, session: Open
    ) -> None:
        onlooker = await session()
        freed = [batch[0][1]] if frees else []
        async with table.holding(batch[place][0].id):
            swept = asyncio.ensure_future(fetch(table.a, SWEEP))
            await eventually(lambda: blocked(onlooker, table.a))
            done = asyncio.ensure_future(fetch(table.b, self.ending(batch, *freed)))
            await eventually(lambda: blocked(onlooker, table.b))
        ended, lost = await done, {each.run_id for each in await swept}
        # A finish that frees no lease may be first to a run that the sweep has not reached.
        assert {run_id for run_id, _ in ended} | lost == {run.id for run, _ in batch}
        assert {run_id for run_id, _ in ended} & lost == set()
        assert ended == set() or not frees
        states = {run.id: await table.state(run.id) for run, _ in batch}
        assert states == {run_id: "queued" if run_id in lost else "succeeded" for run_id in states}

    @pytest.mark.parametrize("place", range(4))
    async def test_a_sweep_that_meets_a_half_done_finish_of_no_lease_takes_what_that_leaves(
        self, table: Table, batch: list[tuple[Run, int]], place: int, session: Open
    ) -> None:
        onlooker = await session()
        async with table.holding(batch[place][0].id):
            done = asyncio.ensure_future(fetch(table.a, self.ending(batch[1:])))
            await eventually(lambda: blocked(onlooker, table.a) if place else done.done())
            swept = asyncio.ensure_future(fetch(table.b, SWEEP))
            await eventually(lambda: blocked(onlooker, table.b))
        ended, lost = await done, {each.run_id for each in await swept}
        assert {run_id for run_id, _ in ended} | lost == {run.id for run, _ in batch}
        assert {run_id for run_id, _ in ended} & lost == set()
        assert await one(table.c, "select count(*) from queue_service.leases") == 0
        states = {run.id: await table.state(run.id) for run, _ in batch}
        assert states == {run_id: "queued" if run_id in lost else "succeeded" for run_id in states}
