"""The statements about steps: what is stored is fenced by its claim, once, and goes when its run is gone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg

from queue_service import App
from queue_service.db.execute import Connection, fetch
from queue_service.runs import settling
from queue_service.runs.claim import Claim, hold
from queue_service.runs.model import Ending, Return, RunState
from queue_service.services.pruner import Pruner
from queue_service.steps import queries
from queue_service.steps.model import NewStep
from tests.services.test_partitions import ago, fill, make, name
from tests.support import claimed, enqueued, rows

STEP = "insert into queue_service.steps (run_id, name, attempt, result) values (%s, 'a', 1, '1')"
OLD = "update queue_service.steps set created_at = clock_timestamp() - interval '15 days'"


async def held(conn: Connection, count: int = 1) -> list[tuple[int, int]]:
    """The claims of so many running runs."""
    for _ in range(count):
        await enqueued(conn)
    return [(run.id, run.attempt) for run, _ in await claimed(conn)]


async def results(conn: Connection) -> dict[tuple[int, str], Any]:
    found = await rows(conn, "select run_id, name, result from queue_service.steps")
    return {(run_id, name): result for run_id, name, result in found}


class TestStoring:
    async def test_a_batch_stores_the_steps_whose_claims_are_held_and_no_other(self, conn: Connection) -> None:
        claims = await held(conn, 3)
        stale = NewStep(claims[1][0], 7, "a", "1")
        unknown = NewStep(10**9, 1, "a", "1")
        news = [NewStep(*claims[0], "a", '{"n":1}'), stale, NewStep(*claims[2], "b", "null"), unknown]
        news.append(NewStep(*claims[0], 'ä "quoted" \\ name', '"x"'))
        answers = await fetch(conn, queries.store(news))
        assert answers == {step[:3]: True for step in (news[0], news[2], news[4])}
        assert await results(conn) == {
            (claims[0][0], "a"): {"n": 1}, (claims[2][0], "b"): None, (claims[0][0], 'ä "quoted" \\ name'): "x",
        }  # fmt: skip

    async def test_what_the_same_attempt_stores_again_is_stored_as_it_was(self, conn: Connection) -> None:
        (claim,) = await held(conn)
        for result in ("1", "2"):
            assert await fetch(conn, queries.store([NewStep(*claim, "a", result)])) == {(*claim, "a"): True}
        assert list((await results(conn)).values()) == [1]

    async def test_what_another_attempt_has_stored_is_not_stored_again(self, conn: Connection) -> None:
        (claim,) = await held(conn)
        await fetch(conn, queries.store([NewStep(*claim, "a", "1")]))
        await fetch(conn, settling.give_back([Return(Claim(*claim))], worker_id=1))
        ((run, _),) = await claimed(conn)
        assert run.attempt == 2
        assert await fetch(conn, queries.store([NewStep(*run.claim, "a", "2"), NewStep(*run.claim, "b", "3")])) == {
            (*run.claim, "b"): True
        }
        found = await fetch(conn, queries.of_run(run.id))
        assert [(step.name, step.attempt, step.result) for step in found] == [("a", 1, 1), ("b", 2, 3)]

    async def test_a_run_that_another_session_has_locked_holds_up_no_other(
        self, conn: Connection, session: Any
    ) -> None:
        other = await session()
        claims = await held(conn, 2)
        await other.execute("begin")
        assert await fetch(other, hold(Claim(*claims[0])))
        await conn.execute("set lock_timeout = '100ms'")
        answers = await fetch(conn, queries.store([NewStep(*claim, "a", "1") for claim in claims]))
        assert answers == {(*claims[0], "a"): False, (*claims[1], "a"): True}
        await other.execute("rollback")
        assert await fetch(conn, queries.store([NewStep(*claims[0], "a", "1")])) == {(*claims[0], "a"): True}

    async def test_what_cannot_be_read_of_a_step_is_said_and_the_others_are_read(self, conn: Connection) -> None:
        await conn.execute(
            "insert into queue_service.steps (run_id, name, attempt, created_at, result) values "
            f"(1, 'a', 1, '2020-01-01Z', '{'9' * 5_000}'), (1, 'b', 1, 'infinity', '2')"
        )
        large, timeless = await fetch(conn, queries.of_run(1))
        assert (large.result, timeless.result) == (None, 2)
        assert large.unreadable
        assert timeless.unreadable
        assert "created_at" in timeless.unreadable


class TestForgetting:
    def make(self, app: App) -> Pruner:
        return Pruner(app.pool, retention=timedelta(days=14))

    async def stored(self, conn: Connection, count: int) -> list[int]:
        """Running runs with two steps each."""
        claims = await held(conn, count)
        await fetch(conn, queries.store([NewStep(*claim, each, "1") for claim in claims for each in ("a", "b")]))
        return [run_id for run_id, _ in claims]

    async def left(self, conn: Connection) -> list[int]:
        return [row[0] for row in await rows(conn, "select distinct run_id from queue_service.steps order by 1")]

    async def test_the_steps_of_a_day_that_is_dropped_go_with_it(self, app: App, conn: Connection) -> None:
        (live,) = await self.stored(conn, 1)
        for days in (20, 1):
            await make(conn, ago(days))
        await fill(conn, ago(20), {1_001: "succeeded"})
        await fill(conn, ago(1), {1_002: "succeeded"})
        for run_id in (1_001, 1_002):
            await conn.execute(STEP, [run_id])
        await conn.execute(OLD)
        pruned = await self.make(app).once()
        assert (pruned.dropped, pruned.steps) == ([name(ago(20))], 1)
        assert await self.left(conn) == [live, 1_002]

    async def test_where_failed_runs_are_kept_for_longer_so_are_their_steps(self, app: App, conn: Connection) -> None:
        for days in (20, 1):
            await make(conn, ago(days))
        await fill(conn, ago(20), {1_001: "succeeded", 1_002: "failed"})
        for run_id in (1_001, 1_002):
            await conn.execute(STEP, [run_id])
        await conn.execute(OLD)
        pruner = Pruner(app.pool, retention=timedelta(days=14), retention_failed=timedelta(days=30))
        pruned = await pruner.once()
        assert (pruned.thinned, pruned.steps) == ([name(ago(20))], 1)
        assert await self.left(conn) == [1_002]

    async def test_steps_of_runs_that_are_nowhere_go_once_they_are_as_old_as_history(
        self, app: App, conn: Connection
    ) -> None:
        gone, live = await self.stored(conn, 2)
        await conn.execute("delete from queue_service.runs where id = %s", [gone])
        assert (await self.make(app).once()).steps == 0
        await conn.execute(OLD)
        assert (await self.make(app).once()).steps == 2
        assert await self.left(conn) == [live]

    async def test_they_are_looked_at_in_batches_and_all_of_them(self, app: App, conn: Connection) -> None:
        await conn.execute(
            "insert into queue_service.steps (run_id, name, attempt, created_at, result) "
            "select n, 'a', 1, clock_timestamp() - interval '20 days' + n * interval '1 ms', '1' from generate_series(1, 2500) as n"
        )
        first = await fetch(conn, queries.prune(timedelta(days=14), queries.Place(), scan_limit=1_000))
        assert first.steps == 1_000
        assert first.following is not None
        assert first.following.run_id == 1_000
        assert (await self.make(app).once()).steps == 1_500
        assert await self.left(conn) == []

    async def test_a_walk_goes_on_in_a_session_that_writes_dates_otherwise(
        self, conn: Connection, database: str
    ) -> None:
        """As behind a pooler, where the next statement may meet another session, and none of them is ours."""
        await conn.execute(
            "insert into queue_service.steps (run_id, name, attempt, created_at, result)"
            " values (1, 'a', 1, '2020-02-03 04:05:06.789Z', '1'), (2, 'a', 1, '2020-02-04Z', '1')"
        )
        async with await psycopg.AsyncConnection.connect(database, autocommit=True) as stranger:
            await stranger.execute("set datestyle = 'SQL, DMY'; set timezone = 'Asia/Kolkata'")
            first = await fetch(stranger, queries.prune(timedelta(days=14), queries.Place(), scan_limit=1))
        assert first.following is not None
        assert datetime.fromisoformat(first.following.at or "") == datetime(2020, 2, 3, 4, 5, 6, 789_000, tzinfo=UTC)
        second = await fetch(conn, queries.prune(timedelta(days=14), first.following, scan_limit=1))
        assert (first.steps, second.steps) == (1, 1)

    async def test_a_run_that_is_deleted_takes_its_steps_along_and_one_that_runs_keeps_them(
        self, app: App, conn: Connection
    ) -> None:
        running, ended = await self.stored(conn, 2)
        await fetch(conn, settling.finish([Ending(Claim(ended, 1), RunState.FAILED)], worker_id=1))
        assert not await app.delete(running)
        assert await app.delete(ended)
        assert await self.left(conn) == [running]

    async def test_a_run_that_is_retried_keeps_its_steps(self, app: App, conn: Connection) -> None:
        (run_id,) = await self.stored(conn, 1)
        await fetch(conn, settling.finish([Ending(Claim(run_id, 1), RunState.FAILED)], worker_id=1))
        assert await app.retry(run_id)
        await conn.execute(OLD)
        assert (await self.make(app).once()).steps == 0
        assert {step.name for step in await app.fetch(queries.of_run(run_id))} == {"a", "b"}
