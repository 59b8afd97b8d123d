"""Lanes on a real database: of the runs of one queue with one ordering key one runs at a time, in the order of enqueueing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine

from queue_service import App, Run, RunState
from queue_service.db.execute import Connection, fetch
from queue_service.db.query import Query
from queue_service.errors import Deadlock
from queue_service.runs import lanes, lost, queries, settling, walks
from queue_service.runs.model import Ending, NewRun, Return
from queue_service.runs.queries import Claimant, Scan
from tests.support import LEASE, blocked, claim, enqueued, eventually, lapse, one, rows

Session = Callable[[], Awaitable[Connection]]
HEADS = claim(laned=True)


async def laned(conn: Connection, key: str = "k", **fields: Any) -> int:
    return await enqueued(conn, ordering_key=key, **fields)


async def heads(conn: Connection, **options: Any) -> list[Run]:
    """What a worker gets, which tends what gave it nothing."""
    tasks = options.pop("tasks", ("noop",))
    queue, limit = options.pop("queue", "default"), options.pop("limit", 10)
    taken = await fetch(conn, queries.claim_lanes([(queue, limit)], Claimant(tasks, 1, LEASE)))
    if taken.barren:
        await fetch(conn, lanes.tend_lanes(sorted(taken.barren), tasks, limit=100))
    return [run for run, _ in taken.runs]


async def finished(conn: Connection, run: Run, state: RunState = RunState.SUCCEEDED) -> None:
    assert await fetch(conn, settling.finish([Ending(run.claim, state)], worker_id=1)) == {run.claim}


async def back(conn: Connection, run: Run, delay: float | None = None, *, failed: bool = False) -> None:
    assert await fetch(conn, settling.give_back([Return(run.claim, delay, failed=failed)], worker_id=1)) == {run.claim}


async def scanned(conn: Connection) -> Scan:
    return await fetch(conn, queries.scan(["default", "other"], ["noop"]))


async def tend(conn: Connection) -> int:
    tended = await fetch(conn, lanes.tend_after(lanes.Lane("", ""), limit=1_000))
    return 0 if tended is None else tended[1]


async def assert_sound(conn: Connection) -> None:
    """Each lane's row says of its runs what is true, and there is none without runs, once it is tended."""
    counted = await rows(
        conn,
        "select queue, ordering_key, count(*) filter (where state = 'running') from queue_service.runs "
        "where ordering_key is not null group by queue, ordering_key order by 1, 2",
    )
    kept = await rows(conn, "select queue, ordering_key, running from queue_service.lanes order by 1, 2")
    assert [lane for lane in kept if lane in counted] == counted
    await tend(conn)
    kept = await rows(conn, "select queue, ordering_key, running from queue_service.lanes order by 1, 2")
    assert kept == counted
    overlaps = await one(
        conn,
        "select count(*) from (select from queue_service.runs where ordering_key is not null and state = 'running' "
        "group by queue, ordering_key having count(*) > 1) as twice",
    )
    assert overlaps == 0


@pytest.fixture
async def sound(conn: Connection) -> Any:
    yield
    await assert_sound(conn)


@pytest.mark.usefixtures("sound")
class TestALane:
    async def test_gives_its_runs_one_at_a_time_in_the_order_they_were_enqueued(self, conn: Connection) -> None:
        ids = [await laned(conn) for _ in range(5)]
        for run_id in ids:
            (run,) = await heads(conn)
            assert run.id == run_id
            assert await heads(conn) == []
            await finished(conn, run)
        assert await one(conn, "select count(*) from queue_service.lanes") == 0

    async def test_does_not_wait_for_another_key_or_queue(self, conn: Connection) -> None:
        await laned(conn, "a")
        b, other = await laned(conn, "b"), await laned(conn, "a", queue="other")
        assert len(await heads(conn)) == 2
        assert [run.id for run in await heads(conn, queue="other")] == [other]
        assert b

    async def test_is_not_claimed_from_by_the_claim_of_other_runs(self, conn: Connection) -> None:
        await laned(conn)
        plain = await enqueued(conn)
        assert [run.id for run, _ in await fetch(conn, claim())] == [plain]
        assert await fetch(conn, queries.claim_suspect(["default"], Claimant(["noop"], 1, LEASE))) == []

    async def test_does_not_care_about_priorities_within_it(self, conn: Connection) -> None:
        first = await laned(conn)
        await laned(conn, priority=9)
        assert [run.id for run in await heads(conn)] == [first]

    async def test_is_found_by_a_scan_while_it_is_free(self, conn: Connection) -> None:
        assert (await scanned(conn)).laned == set()
        await laned(conn)
        await laned(conn, queue="other", delay=timedelta(hours=1))
        assert (await scanned(conn)).laned == {"default"}
        (run,) = await heads(conn)
        assert (await scanned(conn)).laned == set()
        await laned(conn)
        assert (await scanned(conn)).laned == set()
        await finished(conn, run)
        assert (await scanned(conn)).laned == {"default"}

    async def test_of_a_paused_queue_gives_nothing(self, conn: Connection) -> None:
        await laned(conn)
        await conn.execute("insert into queue_service.queues (name, paused_at) values ('default', now())")
        assert await heads(conn) == []
        assert (await scanned(conn)).laned == set()

    @pytest.mark.parametrize("state", [state for state in RunState if state.finished and state is not RunState.EXPIRED])
    async def test_is_free_as_soon_as_its_head_has_ended(self, conn: Connection, state: RunState) -> None:
        await laned(conn)
        second = await laned(conn)
        (run,) = await heads(conn)
        await finished(conn, run, state)
        assert [run.id for run in await heads(conn)] == [second]


@pytest.mark.usefixtures("sound")
class TestAHead:
    async def test_that_is_retried_keeps_its_place_and_the_lane_waits_with_it(self, conn: Connection) -> None:
        first = await laned(conn)
        await laned(conn)
        (run,) = await heads(conn)
        await back(conn, run, 60.0, failed=True)
        assert await heads(conn) == []
        assert (await scanned(conn)).laned == set()
        # The lane is looked at again for what came meanwhile, and still waits.
        await laned(conn)
        assert (await scanned(conn)).laned == {"default"}
        assert await heads(conn) == []
        assert (await scanned(conn)).laned == set()
        await conn.execute("update queue_service.runs set run_at = now() - interval '1 s' where id = %s", [first])
        assert [(run.id, run.attempt) for run in await heads(conn)] == [(first, 2)]

    async def test_that_was_handed_back_is_the_next_again(self, conn: Connection) -> None:
        first = await laned(conn)
        await laned(conn)
        (run,) = await heads(conn)
        await back(conn, run)
        assert [run.id for run in await heads(conn)] == [first]

    async def test_that_lost_its_worker_keeps_its_place(self, conn: Connection) -> None:
        first = await laned(conn)
        await laned(conn)
        await heads(conn)
        await lapse(conn)
        assert len(await fetch(conn, queries.sweep(limit=10, max_losses=3))) == 1
        assert [(run.id, run.losses) for run in await heads(conn)] == [(first, 1)]

    async def test_that_ends_for_losing_its_workers_frees_the_lane(self, conn: Connection) -> None:
        await laned(conn)
        second = await laned(conn)
        await heads(conn)
        await lapse(conn)
        await fetch(conn, queries.sweep(limit=10, max_losses=1))
        assert [run.id for run in await heads(conn)] == [second]

    async def test_that_was_enqueued_for_later_lets_others_pass_until_then(self, conn: Connection) -> None:
        later = await laned(conn, delay=timedelta(hours=1))
        second = await laned(conn)
        (run,) = await heads(conn)
        assert run.id == second
        await finished(conn, run)
        assert await heads(conn) == []
        assert (await scanned(conn)).laned == set()
        await conn.execute("update queue_service.runs set run_at = now() - interval '1 s' where id = %s", [later])
        assert [run.id for run in await heads(conn)] == [later]

    async def test_that_expired_lets_others_pass_and_is_ended_by_the_sweep(self, conn: Connection) -> None:
        expired = await laned(conn, expires_in=timedelta(microseconds=1))
        second = await laned(conn)
        assert [run.id for run in await heads(conn)] == [second]
        assert await fetch(conn, queries.expire(limit=10)) == [expired]

    async def test_alone_that_expired_leaves_no_lane(self, conn: Connection) -> None:
        await laned(conn, expires_in=timedelta(microseconds=1))
        assert await heads(conn) == []
        await fetch(conn, queries.expire(limit=10))
        assert await one(conn, "select count(*) from queue_service.lanes") == 0

    async def test_for_another_worker_is_left_to_it_and_stands_before_no_other_lane(self, conn: Connection) -> None:
        theirs = await laned(conn, "a", task="theirs")
        ours = await laned(conn, "b")
        assert [run.id for run in await heads(conn, limit=1)] == [ours]
        assert [run.id for run in await heads(conn, tasks=("theirs",))] == [theirs]

    async def test_for_another_worker_that_was_behind_one_of_ours_is_found_by_it_at_once(
        self, conn: Connection
    ) -> None:
        await laned(conn)
        second = await laned(conn, task="theirs")
        (run,) = await heads(conn)
        await finished(conn, run)
        assert await heads(conn) == []
        assert [run.id for run in await heads(conn, tasks=("theirs",))] == [second]

    @pytest.mark.parametrize("way", ["cancel", "delete", "expire", "purge", "replace"])
    async def test_that_nobody_here_knows_and_that_goes_lets_those_behind_it_begin(
        self, conn: Connection, way: str
    ) -> None:
        first = await laned(conn, task="unknown", singleton_key="s")
        second: int | None = await laned(conn)
        assert await heads(conn) == []
        if way == "cancel":
            await fetch(conn, queries.cancel(first))
        elif way == "delete":
            await fetch(conn, queries.delete(first))
        elif way == "expire":
            await conn.execute("update queue_service.runs set expires_at = now() where id = %s", [first])
            assert await fetch(conn, queries.expire(limit=10)) == [first]
        elif way == "purge":
            assert await fetch(conn, queries.purge("default", limit=1)) == 1
        else:
            new = NewRun(task="noop", queue="default", payload="{}", singleton_key="s", ordering_key="k")
            second = await fetch(conn, queries.replace(new))
        assert [run.id for run in await heads(conn)] == [second]

    async def test_that_was_begun_and_waits_lets_those_behind_it_begin_when_it_is_cancelled(
        self, conn: Connection
    ) -> None:
        first, second = await laned(conn), await laned(conn)
        (run,) = await heads(conn)
        await back(conn, run, 60.0, failed=True)
        assert await heads(conn) == []
        await fetch(conn, queries.cancel(first))
        assert [run.id for run in await heads(conn)] == [second]

    async def test_may_be_cancelled_or_deleted_and_so_may_those_behind_it(self, conn: Connection) -> None:
        ids = [await laned(conn) for _ in range(5)]
        assert await fetch(conn, queries.cancel(ids[0])) == "cancelled"
        assert await fetch(conn, queries.delete(ids[1]))
        assert await fetch(conn, queries.cancel(ids[3])) == "cancelled"
        for run_id in (ids[2], ids[4]):
            (run,) = await heads(conn)
            assert run.id == run_id
            await finished(conn, run)

    async def test_from_history_stands_where_it_stood(self, conn: Connection) -> None:
        first = await laned(conn)
        second = await laned(conn)
        (run,) = await heads(conn)
        await finished(conn, run, RunState.FAILED)
        await fetch(conn, queries.retry(first))
        assert [run.id for run in await heads(conn)] == [first]
        assert second


@pytest.mark.usefixtures("sound")
class TestEveryWayIn:
    async def test_leads_into_the_lane(self, app: App, conn: Connection) -> None:
        await app.enqueue("noop", {}, ordering_key="k")
        await app.enqueue_many("noop", [{"n": n} for n in range(10)], ordering_key="k")
        await app.enqueue("noop", {}, ordering_key="k", singleton_key="s")
        await asyncio.gather(*(app.enqueue("noop", {}, ordering_key=f"k{n % 3}") for n in range(20)))
        await app.enqueue("noop", {}, ordering_key="k", conn=conn)
        assert await one(conn, "select count(*) from queue_service.runs where ordering_key = 'k'") == 13

    async def test_that_replaces_a_run_moves_it_from_lane_to_lane(self, conn: Connection) -> None:
        def put(key: str | None) -> Any:
            new = NewRun(task="noop", queue="default", payload="{}", singleton_key="s", ordering_key=key)
            return fetch(conn, queries.replace(new))

        for key in ("a", "b", None, "c", "c"):
            await put(key)
            await assert_sound(conn)
        assert await rows(conn, "select ordering_key from queue_service.lanes") == [("c",)]

    async def test_that_is_rolled_back_leaves_no_lane(self, conn: Connection) -> None:
        await conn.execute("begin")
        await laned(conn)
        await conn.execute("rollback")
        assert await one(conn, "select count(*) from queue_service.lanes") == 0


@pytest.mark.parametrize("commit", [True, False], ids=["commit", "rollback"])
@pytest.mark.usefixtures("sound")
class TestRace:
    async def test_two_claims_never_take_from_the_same_lane(
        self, conn: Connection, session: Session, commit: bool
    ) -> None:
        a, b = await session(), await session()
        for key in ("k", "k", "j"):
            await laned(conn, key)
        await a.execute("begin")
        taken = await fetch(a, claim(laned=True, limit=1))
        assert len(taken) == 1
        others = await fetch(b, HEADS)
        assert {run.ordering_key for run, _ in others}.isdisjoint({run.ordering_key for run, _ in taken})
        assert len(others) == 1
        await a.execute("commit" if commit else "rollback")

    async def test_a_lane_that_another_session_is_claiming_from_is_passed_over(
        self, conn: Connection, session: Session, commit: bool
    ) -> None:
        a = await session()
        await laned(conn)
        await a.execute("begin")
        await a.execute("select from queue_service.lanes for update")
        # Whichever run it takes: its snapshot may show another head than ours.
        assert await heads(conn) == []
        await a.execute("commit" if commit else "rollback")
        assert len(await heads(conn)) == 1

    async def test_an_enqueue_and_the_end_of_the_last_run_of_a_lane(
        self, conn: Connection, session: Session, commit: bool
    ) -> None:
        a, b = await session(), await session()
        await laned(conn)
        (run,) = await heads(conn)
        await a.execute("begin")
        await finished(a, run)
        waiting = asyncio.create_task(laned(b))
        await eventually(lambda: blocked(conn, b))
        await a.execute("commit" if commit else "rollback")
        second = await waiting
        if not commit:
            await finished(conn, run)
        assert [run.id for run in await heads(conn)] == [second]

    async def test_the_end_of_the_last_run_and_an_enqueue_before_it(
        self, conn: Connection, session: Session, commit: bool
    ) -> None:
        a, b = await session(), await session()
        await laned(conn)
        (run,) = await heads(conn)
        await a.execute("begin")
        second = await laned(a)
        waiting = asyncio.create_task(finished(b, run))
        await eventually(lambda: blocked(conn, b))
        await a.execute("commit" if commit else "rollback")
        await waiting
        assert [run.id for run in await heads(conn)] == ([second] if commit else [])

    async def test_a_cancellation_of_the_head_and_a_claim(
        self, conn: Connection, session: Session, commit: bool
    ) -> None:
        a = await session()
        first, second = await laned(conn), await laned(conn)
        await a.execute("begin")
        await a.execute("select from queue_service.runs where id = %s for update", [first])
        # It is not passed over for the one behind it: the cancellation may be taken back.
        assert await heads(conn) == []
        await fetch(a, queries.cancel(first))
        await a.execute("commit" if commit else "rollback")
        # The lane was put off, so as not to stand before others.
        await conn.execute("update queue_service.lanes set next_at = next_at - interval '1 s'")
        assert [run.id for run in await heads(conn)] == [second if commit else first]

    async def test_a_claim_and_a_cancellation_of_the_head(
        self, conn: Connection, session: Session, commit: bool
    ) -> None:
        a, b = await session(), await session()
        first = await laned(conn)
        await a.execute("begin")
        await fetch(a, HEADS)
        waiting = asyncio.create_task(fetch(b, queries.cancel(first)))
        await eventually(lambda: blocked(conn, b))
        await a.execute("commit" if commit else "rollback")
        assert await waiting == ("requested" if commit else "cancelled")

    async def test_two_statements_that_enqueue_into_the_same_lanes(
        self, conn: Connection, session: Session, commit: bool
    ) -> None:
        a, b, c = await session(), await session(), await session()
        await a.execute("begin")
        await laned(a, "m")
        news = [NewRun("noop", "default", "{}", ordering_key=key) for key in "zmazm"]
        there = asyncio.create_task(fetch(b, queries.enqueue_all(news)))
        await eventually(lambda: blocked(conn, b))
        and_back = asyncio.create_task(fetch(c, queries.enqueue_all(news[::-1])))
        await eventually(lambda: blocked(conn, c))
        await a.execute("commit" if commit else "rollback")
        # Neither is a deadlock, which the server notices after a second only; and each lane keeps the order of the calls.
        ids = [*(await there), *(await and_back)]
        assert ids == sorted(ids)
        assert len(ids) == 10


async def stopped_by_its_clock(conn: Connection, slow: Connection) -> Connection:
    """A session whose claims stop once they have their snapshot, while `conn` has an advisory lock."""
    await conn.execute(
        "create schema slow; create function slow.clock_timestamp() returns timestamptz language plpgsql as $$ begin "
        "perform pg_advisory_xact_lock_shared(1); return pg_catalog.clock_timestamp(); end $$"
    )
    await slow.execute("set search_path = slow, pg_catalog")
    return slow


async def begun(conn: Connection, slow: Connection) -> asyncio.Task[list[Run]]:
    """A claim that has begun to look."""
    await conn.execute("select pg_advisory_lock(1)")
    claiming = asyncio.create_task(heads(slow))
    await eventually(lambda: one(conn, "select count(*) > 0 from pg_locks where locktype = 'advisory' and not granted"))
    return claiming


async def test_a_wide_lane_that_has_changed_since_a_claim_began_to_look_is_left_for_the_next(
    app: App, conn: Connection, session: Session
) -> None:
    slow = await stopped_by_its_clock(conn, await session())
    await app.queues.limit("default", max_running_per_key=2)
    ids = [await laned(conn) for _ in range(3)]
    (first,) = await heads(conn, limit=1)
    claiming = await begun(conn, slow)
    # What it sees is a lane of which the first run is running; by now that is the head again.
    await back(conn, first)
    await conn.execute("select pg_advisory_unlock(1)")
    assert await claiming == []
    assert [run.id for run in await heads(conn)] == ids[:2]


@pytest.mark.usefixtures("sound")
@pytest.mark.parametrize(
    "by", [{"ordering_key": "other"}, {"delay": timedelta(hours=1)}, {"task": "unknown"}], ids=["lane", "time", "task"]
)
async def test_a_head_that_was_replaced_since_a_claim_began_to_look_is_left_alone(
    conn: Connection, session: Session, by: dict[str, Any]
) -> None:
    slow = await stopped_by_its_clock(conn, await session())
    await laned(conn, "other")
    assert len(await heads(conn)) == 1
    first = await laned(conn, "k", singleton_key="only")
    second = await laned(conn, "k")
    claiming = await begun(conn, slow)
    fields: dict[str, Any] = {"task": "noop", "singleton_key": "only", "ordering_key": "k"} | by
    assert await fetch(conn, queries.replace(NewRun(queue="default", payload="{}", **fields))) == first
    await conn.execute("select pg_advisory_unlock(1)")
    assert await claiming == []
    # One of a task that nobody here knows keeps its place.
    assert [run.id for run in await heads(conn)] == ([] if "task" in by else [second])


@pytest.mark.parametrize("what", ["finish", "give_back", "sweep", "release_unheard", "purge", "retry_many"])
async def test_all_statements_lock_the_lanes_they_share_in_one_order(
    conn: Connection, session: Session, what: str
) -> None:
    a, b, c = await session(), await session(), await session()
    # Their ids ascend, their keys descend.
    for key in "zma":
        await laned(conn, key)
    runs = [] if what == "purge" else await heads(conn)
    query: Query[Any]
    if what == "finish":
        query = settling.finish([Ending(run.claim, RunState.SUCCEEDED) for run in runs], worker_id=1)
    elif what == "give_back":
        # One ends, and two go back.
        await fetch(conn, queries.cancel(runs[0].id))
        query = settling.give_back([Return(run.claim) for run in runs], worker_id=1)
    elif what == "sweep":
        await lapse(conn)
        query = queries.sweep(limit=10, max_losses=3)
    elif what == "release_unheard":
        query = lost.release_unheard(1, known=[])
    elif what == "purge":
        query = queries.purge("default", limit=10)
    else:
        await fetch(conn, settling.finish([Ending(run.claim, RunState.FAILED) for run in runs], worker_id=1))
        query = walks.retry_many(walks.Filter(RunState.FAILED), walks.Place(), limit=10)
    await a.execute("begin")
    await laned(a, "m")
    there = asyncio.create_task(fetch(b, query))
    await eventually(lambda: blocked(conn, b))
    news = [NewRun("noop", "default", "{}", ordering_key=key) for key in "amz"]
    and_back = asyncio.create_task(fetch(c, queries.enqueue_all(news)))
    await eventually(lambda: blocked(conn, c))
    await a.execute("commit")
    # The server notices a deadlock after a second, and ends one of them.
    await there
    await and_back
    await assert_sound(conn)


async def test_a_transaction_of_the_caller_that_meets_a_deadlock_is_told_so(
    app: App, database: str, engine: Engine
) -> None:
    with app.sync as q, psycopg.connect(database) as there, engine.connect() as and_back:
        q.enqueue("noop", {}, ordering_key="x", conn=there)
        q.enqueue("noop", {}, ordering_key="y", conn=and_back)
        calls = [
            asyncio.to_thread(q.enqueue, "noop", {}, ordering_key=key, conn=mine)
            for mine, key in ((there, "y"), (and_back, "x"))
        ]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        (told,) = [each for each in outcomes if isinstance(each, BaseException)]
        assert isinstance(told, Deadlock)
        assert "nothing of it is stored" in str(told)
