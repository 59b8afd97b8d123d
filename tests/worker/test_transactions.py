"""Handlers that end their runs in transactions of their own: what they wrote counts exactly as often as the run succeeds."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from queue_service import App, Cancel, Retry, Run, RunState, Worker
from queue_service.db.execute import Connection, fetch
from queue_service.db.lent import LentAsyncConnection, LentConnection
from queue_service.errors import ClaimLost, ConfigError
from queue_service.runs import queries
from queue_service.services.sweeper import Sweeper
from queue_service.settings import load
from tests.support import blocked, eventually, lapse, one, rows, working
from tests.worker import tasks_for_tests

Open = Callable[[], Awaitable[Connection]]

ONCE = Retry(max_attempts=1)
SWEEP = queries.sweep(limit=10, max_losses=3)
WRITE = "insert into effects values (%s, %s)"
DROPPED = "a run has ended with the transaction of its handler; what that returned or raised afterwards is dropped"
# Holds up a commit for as long as somebody has this lock.
GATE = """
create function gate() returns trigger language plpgsql as 'begin perform pg_advisory_xact_lock_shared(7); return null; end';
create constraint trigger gate after insert on effects initially deferred for each row execute function gate()
"""


@pytest.fixture(autouse=True)
async def effects(conn: Connection) -> None:
    await conn.execute("create table effects (run_id bigint not null, attempt integer not null)")


async def executed(app: App, task: str, **options: Any) -> Run:
    """The run, after a worker had nothing more to do."""
    run_id = await app.enqueue(task, {}, **options)
    await Worker(app).run(once=True)
    run = await app.get(run_id)
    assert run is not None
    return run


async def written(conn: Connection) -> list[tuple[int, int]]:
    return [(row[0], row[1]) for row in await rows(conn, "select run_id, attempt from effects order by 1, 2")]


async def is_settled(conn: Connection) -> bool:
    """Whether nothing runs and nothing is held."""
    live = await one(conn, "select count(*) from queue_service.runs where state = 'running'")
    return (live, await one(conn, "select count(*) from queue_service.leases")) == (0, 0)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged that somebody should look at."""
    ours = [record for record in caplog.records if record.name.startswith("queue_service")]
    return [record.getMessage() for record in ours if record.levelname != "INFO"]


@asynccontextmanager
async def shut(conn: Connection) -> AsyncIterator[None]:
    """For the length of the block, what has written an effect cannot be committed."""
    await conn.execute("select pg_advisory_lock(7)")
    try:
        yield
    finally:
        await conn.execute("select pg_advisory_unlock(7)")


@asynccontextmanager
async def not_disturbing(database: str) -> AsyncIterator[App]:
    """An App whose workers extend no lease for an hour and sweep none, so that tests can."""

    async def nothing(_: Sweeper) -> None: ...

    settings = load({"QUEUE_SERVICE_LEASE": "1h", "QUEUE_SERVICE_POLL_INTERVAL": "100ms"})
    with pytest.MonkeyPatch.context() as patched:
        # Not by its interval: the first sweep comes as soon as a worker starts, or later where it starts slowly.
        patched.setattr(Sweeper, "once", nothing)
        async with App(database, settings=settings) as opened:
            yield opened


class TestTogether:
    async def test_what_a_handler_wrote_and_its_ending_are_one(
        self, app: App, conn: Connection, caplog: pytest.LogCaptureFixture
    ) -> None:
        @app.task
        async def spend(run: Run) -> None:
            transaction = run.transaction()
            async with transaction as mine:
                await mine.execute(WRITE, [run.id, run.attempt])
                transaction.result = {"by": "transaction"}
                # Nobody sees the one without the other.
                assert await one(conn, "select count(*) from effects") == 0
            stored = await rows(conn, "select state, (select count(*) from effects) from queue_service.finished_runs")
            assert stored == [("succeeded", 1)]

        run_id = await app.enqueue("spend", {})
        tally = await Worker(app).run(once=True)
        run = await app.wait(run_id, timeout=5)
        assert (run.state, run.result, run.attempt, run.failures) == (RunState.SUCCEEDED, {"by": "transaction"}, 1, 0)
        assert run.worker_id is not None
        assert await written(conn) == [(run_id, 1)]
        assert (tally.succeeded, tally.lost) == (1, 0)
        assert await is_settled(conn)
        assert said(caplog) == []

    async def test_a_handler_in_a_thread_has_a_blocking_connection(
        self, app: App, conn: Connection, caplog: pytest.LogCaptureFixture
    ) -> None:
        @app.task
        def spend(run: Run) -> None:
            transaction = run.transaction()
            with transaction as mine:
                mine.execute(WRITE, [run.id, run.attempt])
                transaction.result = threading.current_thread().name

        run = await executed(app, "spend")
        assert (run.state, run.result) == (RunState.SUCCEEDED, "queue_service handler")
        assert await written(conn) == [(run.id, 1)]
        assert await is_settled(conn)
        assert said(caplog) == []

    async def test_a_handler_in_a_process_does_as_one_in_a_thread(
        self, app: App, conn: Connection, caplog: pytest.LogCaptureFixture
    ) -> None:
        app.tasks.add(tasks_for_tests.effect)
        run_id = await app.enqueue("effect", {})
        failing = await app.enqueue("effect", {"raises": True})
        tally = await Worker(app, processes=1).run(once=True)
        run, failed = await app.wait_many([run_id, failing], timeout=5)
        assert (run.state, type(run.result)) == (RunState.SUCCEEDED, int)
        assert run.result != os.getpid()
        assert (failed.state, failed.error and failed.error["message"]) == (RunState.FAILED, "on purpose")
        assert await written(conn) == [(run_id, 1)]
        assert (tally.succeeded, tally.failed, tally.lost) == (1, 1, 0)
        assert await is_settled(conn)
        assert said(caplog) == ["run failed"]

    async def test_a_process_that_dies_after_its_transaction_changes_nothing(
        self, app: App, conn: Connection, caplog: pytest.LogCaptureFixture
    ) -> None:
        app.tasks.add(tasks_for_tests.effect)
        run_id = await app.enqueue("effect", {"dies": True})
        tally = await Worker(app, processes=1).run(once=True)
        assert (await app.wait(run_id, timeout=5)).state is RunState.SUCCEEDED
        assert await written(conn) == [(run_id, 1)]
        assert (tally.succeeded, tally.failed, tally.lost) == (1, 0, 0)
        assert said(caplog) == [DROPPED]

    async def test_on_a_session_of_sqlalchemy(self, app: App, conn: Connection, async_engine: AsyncEngine) -> None:
        @app.task
        async def spend(run: Run) -> None:
            async with AsyncSession(async_engine) as session, run.transaction(session) as same:
                assert same is session
                await session.execute(text("insert into effects values (:id, :attempt)"), {"id": run.id, "attempt": 1})

        @app.task
        async def spend_on_a_connection(run: Run) -> None:
            async with async_engine.connect() as connection, run.transaction(connection):
                await connection.execute(text(f"insert into effects values ({run.id}, 1)"))

        for name in ("spend", "spend_on_a_connection"):
            run = await executed(app, name)
            assert run.state is RunState.SUCCEEDED, run.error
            assert (run.id, 1) in await written(conn)
        assert await is_settled(conn)

    async def test_on_a_blocking_session_of_sqlalchemy(self, app: App, conn: Connection, engine: Engine) -> None:
        @app.task(retry=Retry(max_attempts=2, base=0))
        def spend(run: Run) -> None:
            with Session(engine) as session, run.transaction(session):
                session.execute(text(f"insert into effects values ({run.id}, {run.attempt})"))
                if run.attempt == 1:
                    raise RuntimeError("again")

        run = await executed(app, "spend")
        assert (run.state, run.attempt) == (RunState.SUCCEEDED, 2)
        assert await written(conn) == [(run.id, 2)]

    async def test_on_a_connection_of_the_handlers_own(self, app: App, conn: Connection, database: str) -> None:
        @app.task
        def spend(run: Run) -> None:
            for autocommit in (True, False):
                with psycopg.connect(database, autocommit=autocommit) as mine:
                    if autocommit:
                        with contextlib.suppress(ZeroDivisionError), run.transaction(mine):
                            mine.execute(WRITE, [run.id, 0])
                            raise ZeroDivisionError
                    else:
                        with run.transaction(mine):
                            mine.execute(WRITE, [run.id, 1])

        run = await executed(app, "spend")
        assert run.state is RunState.SUCCEEDED, run.error
        assert await written(conn) == [(run.id, 1)]

    async def test_the_connection_is_as_the_database_configures_it(self, app: App) -> None:
        ours = {"enable_seqscan": "on", "statement_timeout": "0", "idle_in_transaction_session_timeout": "1min"}

        @app.task
        async def look(run: Run) -> None:
            transaction = run.transaction()
            async with transaction as mine:
                found = {name: (await (await mine.execute(f"show {name}")).fetchone() or [""])[0] for name in ours}
                transaction.result = found

        for _ in range(2):
            assert (await executed(app, "look")).result == ours

    @pytest.mark.direct("the transactions of its handlers take the whole pool")
    async def test_more_handlers_than_connections_take_turns_and_can_still_enqueue(
        self, app: App, conn: Connection
    ) -> None:
        @app.task
        async def spend(run: Run) -> None:
            async with run.transaction() as mine:
                await mine.execute(WRITE, [run.id, run.attempt])
                await app.enqueue("other", {}, queue="other")

        run_ids = await app.enqueue_many("spend", [{}] * 40)
        tally = await Worker(app, {"default": 40}).run(once=True)
        assert tally.succeeded == 40
        assert await written(conn) == [(run_id, 1) for run_id in run_ids]


class TestBatches:
    async def test_each_run_of_a_batch_may_be_ended_by_a_transaction_of_its_own(
        self, app: App, conn: Connection, caplog: pytest.LogCaptureFixture
    ) -> None:
        @app.task(batch=10, retry=Retry(max_attempts=2, base=0))
        async def spend(runs: list[Run]) -> None:
            for run in runs:
                if run.payload["n"] == 2 and run.attempt == 1:
                    raise RuntimeError("on purpose")
                if run.payload["n"] < 4:
                    async with run.transaction() as mine:
                        await mine.execute(WRITE, [run.id, run.attempt])

        ids = await app.enqueue_many("spend", [{"n": n} for n in range(5)])
        tally = await Worker(app, {"default": 1}).run(once=True)
        runs = await app.wait_many(ids, timeout=5)
        assert [(run.state.value, run.attempt) for run in runs] == [("succeeded", n) for n in (1, 1, 2, 2, 2)]
        assert await written(conn) == [(run_id, attempt) for run_id, attempt in zip(ids, (1, 1, 2, 2), strict=False)]
        assert (tally.succeeded, tally.returned, tally.lost) == (5, 3, 0)
        assert await is_settled(conn)
        # It raised when two of its runs had ended.
        assert said(caplog).count(DROPPED) == 2

    async def test_a_run_that_was_lost_is_no_excuse_for_the_others_of_its_batch(
        self, app: App, conn: Connection
    ) -> None:
        @app.task(batch=10, retry=Retry(max_attempts=2, base=0))
        async def spend(runs: list[Run]) -> None:
            if len(runs) > 1:
                # As if only the first had been taken from this worker.
                raise ClaimLost(*runs[0].claim)
            raise RuntimeError("on purpose")

        ids = await app.enqueue_many("spend", [{}] * 2)
        await Worker(app, {"default": 1}).run(once=True)
        runs = await app.wait_many(ids, timeout=5)
        assert [(run.state.value, run.attempt, run.failures) for run in runs] == [("failed", 3, 2), ("failed", 2, 2)]
        assert await is_settled(conn)


class TestRolledBack:
    async def test_a_retry_has_nothing_left_of_the_attempt_before(self, app: App, conn: Connection) -> None:
        @app.task(retry=Retry(max_attempts=3, base=0))
        async def spend(run: Run) -> None:
            async with run.transaction() as mine:
                await mine.execute(WRITE, [run.id, run.attempt])
                if run.attempt < 3:
                    raise RuntimeError("again")

        run = await executed(app, "spend")
        assert (run.state, run.attempt, run.failures) == (RunState.SUCCEEDED, 3, 2)
        assert await written(conn) == [(run.id, 3)]

    @pytest.mark.parametrize("why", ["cancelled", "over its time", "handed back"])
    async def test_what_interrupts_the_block(self, app: App, conn: Connection, why: str) -> None:
        inside = asyncio.Event()

        @app.task(retry=ONCE, timeout=2 if why == "over its time" else None)
        async def spend(run: Run) -> None:
            async with run.transaction() as mine:
                await mine.execute(WRITE, [run.id, run.attempt])
                inside.set()
                await asyncio.sleep(30)  # until it is interrupted

        async with working(app) as worker:
            run_id = await app.enqueue("spend", {})
            await inside.wait()
            if why == "cancelled":
                await app.cancel(run_id)
            if why == "handed back":
                worker.stop(now=True)
                await eventually(lambda: is_settled(conn))
            else:
                await app.wait(run_id, timeout=10)
        run = await app.get(run_id)
        ends = {"cancelled": RunState.CANCELLED, "over its time": RunState.FAILED, "handed back": RunState.QUEUED}
        assert run is not None
        assert run.state is ends[why]
        assert await written(conn) == []

    async def test_a_refusal_that_comes_with_the_commit(self, app: App, conn: Connection) -> None:
        await conn.execute("alter table effects add constraint one unique (run_id) deferrable initially deferred")

        @app.task(retry=ONCE)
        async def spend(run: Run) -> None:
            async with run.transaction() as mine:
                for _ in range(2):
                    await mine.execute(WRITE, [run.id, run.attempt])

        run = await executed(app, "spend")
        assert (run.state, run.error and run.error["type"]) == (RunState.FAILED, "UniqueViolation")
        assert await written(conn) == []

    async def test_a_result_that_cannot_be_stored(self, app: App, conn: Connection) -> None:
        @app.task(retry=ONCE)
        async def spend(run: Run) -> None:
            transaction = run.transaction()
            async with transaction as mine:
                await mine.execute(WRITE, [run.id, run.attempt])
                transaction.result = object()

        run = await executed(app, "spend")
        assert (run.state, run.error and run.error["type"]) == (RunState.FAILED, "PayloadRefused")
        assert await written(conn) == []

    async def test_a_handler_that_rolls_back_on_purpose_ends_its_run_as_others_do(
        self, app: App, conn: Connection
    ) -> None:
        @app.task
        async def spend(run: Run) -> Cancel:
            async with run.transaction() as mine:
                await mine.execute(WRITE, [run.id, run.attempt])
                raise psycopg.Rollback
            return Cancel("thought better of it")

        assert (await executed(app, "spend")).state is RunState.CANCELLED
        assert await written(conn) == []


class TestLost:
    @pytest.fixture
    async def app(self, database: str) -> AsyncIterator[App]:
        """One whose worker neither sweeps nor extends anything meanwhile."""
        async with not_disturbing(database) as opened:
            yield opened

    async def test_a_zombie_commits_nothing_and_gets_an_error(self, app: App, conn: Connection) -> None:
        caught: list[BaseException] = []

        @app.task
        async def spend(run: Run) -> None:
            if run.attempt == 2:
                return
            try:
                async with run.transaction() as mine:
                    await mine.execute(WRITE, [run.id, run.attempt])
                    await lapse(conn)
                    assert [each.run_id for each in await fetch(conn, SWEEP)] == [run.id]
            except ClaimLost as lost:
                caught.append(lost)
                raise

        run_id = await app.enqueue("spend", {})
        tally = await Worker(app).run(once=True)
        run = await app.wait(run_id, timeout=10)
        assert (run.state, run.attempt, run.losses, run.failures) == (RunState.SUCCEEDED, 2, 1, 0)
        assert await written(conn) == []
        assert [str(each).split(":")[0] for each in caught] == [f"Attempt 1 of run {run_id} is over"]
        assert (tally.succeeded, tally.lost) == (1, 1)

    @pytest.mark.parametrize("commit", [True, False], ids=["commit", "rollback"])
    async def test_a_sweep_that_is_first_decides(self, app: App, conn: Connection, session: Open, commit: bool) -> None:
        sweeping = await session()
        backends: list[int] = []

        @app.task(retry=ONCE)
        async def spend(run: Run) -> None:
            if run.attempt > 1:
                return
            async with run.transaction() as mine:
                await mine.execute(WRITE, [run.id, run.attempt])
                await lapse(conn)
                await sweeping.execute("begin")
                assert len(await fetch(sweeping, SWEEP)) == 1
                cursor = await mine.execute("select pg_backend_pid()")
                backends.extend(pid for (pid,) in await cursor.fetchall())

        run_id = await app.enqueue("spend", {})
        working_off = asyncio.create_task(Worker(app).run(once=True))
        await eventually(lambda: bool(backends))
        await eventually(lambda: one(conn, "select cardinality(pg_blocking_pids(%s)) > 0", backends[0]))
        await sweeping.execute("commit" if commit else "rollback")
        await working_off
        assert await written(conn) == ([] if commit else [(run_id, 1)])
        run = await app.wait(run_id, timeout=10)
        assert (run.state, run.attempt) == (RunState.SUCCEEDED, 2 if commit else 1)

    async def test_a_sweep_that_comes_while_it_commits_finds_no_run(
        self, app: App, conn: Connection, session: Open
    ) -> None:
        sweeping = await session()
        await conn.execute(GATE)

        @app.task(retry=ONCE)
        async def spend(run: Run) -> None:
            async with run.transaction() as mine:
                await mine.execute(WRITE, [run.id, run.attempt])

        async with shut(conn):
            run_id = await app.enqueue("spend", {})
            working_off = asyncio.create_task(Worker(app).run(once=True))
            # The finish is done, and its commit waits.
            await eventually(lambda: one(conn, "select exists (select from pg_locks where not granted and objid = 7)"))
            await lapse(conn)
            sweep = asyncio.create_task(fetch(sweeping, SWEEP))
            await eventually(lambda: blocked(conn, sweeping))
        assert await sweep == []
        tally = await working_off
        assert (tally.succeeded, tally.lost) == (1, 0)
        assert await written(conn) == [(run_id, 1)]

    async def test_a_thread_that_was_given_up_commits_nothing(self, app: App, conn: Connection) -> None:
        go_on, outcomes = threading.Event(), list[BaseException]()

        @app.task(retry=ONCE, timeout=2)
        def spend(run: Run) -> None:
            try:
                with run.transaction() as mine:
                    mine.execute(WRITE, [run.id, run.attempt])
                    assert go_on.wait(20)
            except BaseException as error:
                outcomes.append(error)
                raise

        run_id = await app.enqueue("spend", {})
        async with working(app):
            run = await app.wait(run_id, timeout=10)
            go_on.set()
            await eventually(lambda: bool(outcomes))
        assert run.state is RunState.FAILED
        assert [type(each) for each in outcomes] == [ClaimLost]
        assert await written(conn) == []

    async def test_of_two_transactions_of_one_run_one_is_committed(self, app: App, conn: Connection) -> None:
        both = asyncio.Barrier(2)

        @app.task
        async def spend(run: Run) -> None:
            async def once() -> None:
                async with run.transaction() as mine:
                    await mine.execute(WRITE, [run.id, run.attempt])
                    await both.wait()

            answers = await asyncio.gather(once(), once(), return_exceptions=True)
            assert [type(each) for each in answers if each] == [ClaimLost]

        run = await executed(app, "spend")
        assert run.state is RunState.SUCCEEDED
        assert await written(conn) == [(run.id, 1)]


class TestAfterwards:
    @pytest.mark.direct("no notice comes through it")
    async def test_whoever_waits_hears_before_the_handler_is_over(
        self, app: App, conn: Connection, database: str
    ) -> None:
        heard = asyncio.Event()
        # One that would not look by itself in time.
        rarely = load({"QUEUE_SERVICE_POLL_INTERVAL": "1m"})

        @app.task
        async def spend(run: Run) -> None:
            async with run.transaction() as mine:
                await mine.execute(WRITE, [run.id, run.attempt])
            await heard.wait()

        async with working(app) as worker, App(database, settings=rarely) as waiter:
            run_id = await app.enqueue("spend", {}, delay=0.5)
            assert (await waiter.wait(run_id, timeout=20)).state is RunState.SUCCEEDED
            await eventually(lambda: worker.tally.succeeded == 1)
            await eventually(lambda: is_settled(conn))
            heard.set()

    async def test_its_lane_is_free_at_once(self, app: App, conn: Connection) -> None:
        second = asyncio.Event()

        @app.task
        async def spend(run: Run, first: bool) -> None:
            async with run.transaction() as mine:
                await mine.execute(WRITE, [run.id, run.attempt])
            if first:
                await second.wait()
            second.set()

        async with working(app):
            ids = [await app.enqueue("spend", {"first": n == 0}, ordering_key="k") for n in range(2)]
            await app.wait_many(ids, timeout=10)
        assert await written(conn) == [(run_id, 1) for run_id in ids]
        assert await one(conn, "select count(*) from queue_service.lanes") == 0

    async def test_a_lease_is_kept_until_the_last_of_its_runs_has_ended_however(
        self, app: App, conn: Connection
    ) -> None:
        go_on = asyncio.Event()

        @app.task(retry=ONCE)
        async def spend(run: Run, n: int) -> None:
            if n % 3 == 0:
                async with run.transaction() as mine:
                    await mine.execute(WRITE, [run.id, run.attempt])
            if n == 4:
                await go_on.wait()
            if n % 3 == 1:
                raise RuntimeError("on purpose")

        ids = await app.enqueue_many("spend", [{"n": n} for n in range(9)])
        async with working(app, {"default": 9}):
            await app.wait_many([run_id for n, run_id in enumerate(ids) if n != 4], timeout=10)
            held = "select run_ids from queue_service.leases where %s = any(run_ids)"
            assert await one(conn, held, ids[4]) is not None
            go_on.set()
            await app.wait(ids[4], timeout=10)
            await eventually(lambda: is_settled(conn))
        states = [run.state.value for run in await app.wait_many(ids, timeout=10)]
        assert states == ["succeeded", "failed", "succeeded"] * 3

    @pytest.mark.parametrize("what", ["raises", "returns another", "returns the same", "is over its time"])
    async def test_what_a_handler_does_then_is_dropped(
        self, app: App, conn: Connection, caplog: pytest.LogCaptureFixture, what: str
    ) -> None:
        @app.task(timeout=2 if what == "is over its time" else None)
        async def spend(run: Run) -> Any:
            transaction = run.transaction()
            async with transaction as mine:
                await mine.execute(WRITE, [run.id, run.attempt])
                transaction.result = {"n": 1}
            if what == "raises":
                raise RuntimeError("too late")
            if what == "is over its time":
                await asyncio.sleep(30)  # until it is interrupted
            return {"n": 1 if what == "returns the same" else 2}

        run_id = await app.enqueue("spend", {})
        tally = await Worker(app).run(once=True)
        run = await app.wait(run_id, timeout=5)
        assert (run.state, run.result, run.failures) == (RunState.SUCCEEDED, {"n": 1}, 0)
        assert (tally.succeeded, tally.failed, tally.returned, tally.lost) == (1, 0, 0, 0)
        assert said(caplog) == ([] if what == "returns the same" else [DROPPED])
        assert await is_settled(conn)

    async def test_there_is_no_second_transaction(self, app: App) -> None:
        refused: list[str] = []

        @app.task
        async def spend(run: Run) -> None:
            async with run.transaction() as mine:
                await mine.execute(WRITE, [run.id, run.attempt])
            with pytest.raises(ConfigError) as caught:
                run.transaction()
            refused.append(str(caught.value))
            assert run.progress(0.5) is False

        await executed(app, "spend")
        assert "has ended with the transaction" in refused[0]


class TestInDoubt:
    """The commit's answer does not come."""

    @pytest.mark.parametrize("is_async", [True, False], ids=["coroutine", "thread"])
    async def test_one_that_was_done_counts(
        self, app: App, conn: Connection, monkeypatch: pytest.MonkeyPatch, is_async: bool
    ) -> None:
        end, end_blocking = LentAsyncConnection.end, LentConnection.end
        commits_answered: list[bool] = []

        def lose_the_first(*, commits: bool) -> None:
            if commits:
                commits_answered.append(bool(commits_answered))
                if not commits_answered[-1]:
                    raise psycopg.OperationalError("the answer was lost")

        async def deaf(self: Any, *, commits: bool) -> None:
            await end(self, commits=commits)
            lose_the_first(commits=commits)

        def deaf_blocking(self: Any, *, commits: bool) -> None:
            end_blocking(self, commits=commits)
            lose_the_first(commits=commits)

        monkeypatch.setattr(LentAsyncConnection, "end", deaf)
        monkeypatch.setattr(LentConnection, "end", deaf_blocking)
        if is_async:

            @app.task(name="spend", retry=ONCE)
            async def spend(run: Run) -> None:
                async with run.transaction() as mine:
                    await mine.execute(WRITE, [run.id, run.attempt])
        else:

            @app.task(name="spend", retry=ONCE)
            def spend_in_a_thread(run: Run) -> None:
                with run.transaction() as mine:
                    mine.execute(WRITE, [run.id, run.attempt])

        run_id = await app.enqueue("spend", {})
        tally = await Worker(app).run(once=True)
        assert (await app.wait(run_id, timeout=5)).state is RunState.SUCCEEDED
        # The second is the commit of whoever has looked it up.
        assert commits_answered == [False, True]
        assert (tally.succeeded, tally.lost, tally.failed) == (1, 0, 0)
        assert await written(conn) == [(run_id, 1)]

    async def test_one_that_was_not_done_is_a_failure(self, app: App, conn: Connection) -> None:
        await conn.execute(GATE)

        @app.task(retry=Retry(max_attempts=2, base=0))
        async def spend(run: Run) -> None:
            async with run.transaction() as mine:
                await mine.execute(WRITE, [run.id, run.attempt])

        run_id = await app.enqueue("spend", {})
        async with shut(conn):
            working_off = asyncio.create_task(Worker(app).run(once=True))
            waiting = "select pid from pg_locks where not granted and objid = 7"
            pid = await eventually(lambda: one(conn, waiting))
            await conn.execute("select pg_terminate_backend(%s)", [pid])
            await eventually(lambda: one(conn, f"select not exists ({waiting} and pid = %s)", pid))
        await working_off
        run = await app.wait(run_id, timeout=5)
        assert (run.state, run.attempt, run.failures) == (RunState.SUCCEEDED, 2, 1)
        assert await written(conn) == [(run_id, 2)]

    async def test_one_that_is_still_under_way_is_waited_for(
        self, app: App, conn: Connection, caplog: pytest.LogCaptureFixture
    ) -> None:
        await conn.execute(GATE)
        sockets: list[int] = []

        @app.task(retry=ONCE)
        async def spend(run: Run) -> None:
            async with run.transaction() as mine:
                await mine.execute(WRITE, [run.id, run.attempt])
                sockets.append(os.dup(mine.fileno()))

        run_id = await app.enqueue("spend", {})
        async with shut(conn):
            working_off = asyncio.create_task(Worker(app).run(once=True))
            waiting = "select pid from pg_locks where not granted and objid = 7"
            committing = await eventually(lambda: one(conn, waiting))
            with socket.socket(fileno=sockets[0]) as cut:
                cut.shutdown(socket.SHUT_RDWR)
            # Whoever looks it up waits for the backend that has not heard of it.
            await eventually(
                lambda: one(
                    conn,
                    "select exists (select from pg_stat_activity where %s = any(pg_blocking_pids(pid)))",
                    committing,
                )
            )
        tally = await working_off
        assert (await app.wait(run_id, timeout=5)).state is RunState.SUCCEEDED
        assert (tally.succeeded, tally.lost) == (1, 0)
        assert await written(conn) == [(run_id, 1)]
        assert said(caplog) == []

    async def test_a_cancellation_waits_for_the_commit(self, app: App, conn: Connection) -> None:
        await conn.execute(GATE)
        after: list[str] = []

        @app.task(retry=ONCE, timeout=2)
        async def spend(run: Run) -> None:
            async with run.transaction() as mine:
                await mine.execute(WRITE, [run.id, run.attempt])
            after.append("went on")

        run_id = await app.enqueue("spend", {})
        async with shut(conn):
            working_off = asyncio.create_task(Worker(app).run(once=True))
            await eventually(lambda: one(conn, "select exists (select from pg_locks where not granted and objid = 7)"))
            await asyncio.sleep(2.2)  # its time is over meanwhile
        tally = await working_off
        assert (await app.wait(run_id, timeout=5)).state is RunState.SUCCEEDED
        assert (tally.succeeded, tally.failed) == (1, 0)
        assert after == []
        assert await written(conn) == [(run_id, 1)]


class TestRefused:
    async def test_outside_of_a_handler(self, app: App) -> None:
        run_id = await app.enqueue("spend", {})
        run = await app.get(run_id)
        assert run is not None
        with pytest.raises(ConfigError, match="not executed here"):
            run.transaction()
        with pytest.raises(ConfigError, match="not executed here"):
            run.progress(0.5)

    async def test_a_connection_of_the_wrong_kind_or_in_the_wrong_state(
        self, app: App, database: str, async_engine: AsyncEngine, engine: Engine
    ) -> None:
        refusals: list[str] = []

        async def refused(transaction: Any) -> None:
            with pytest.raises(ConfigError) as caught:
                async with transaction:
                    pytest.fail("the block was entered")
            refusals.append(str(caught.value))

        @app.task
        async def spend(run: Run) -> None:
            async with await psycopg.AsyncConnection.connect(database) as mine:
                await mine.execute("select 1")
                await refused(run.transaction(mine))
            async with AsyncSession(async_engine) as session:
                await session.execute(text("select 1"))
                await refused(run.transaction(session))
            async with async_engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
                await refused(run.transaction(connection))
            with psycopg.connect(database) as blocking:
                await refused(run.transaction(blocking))
                with pytest.raises(ConfigError, match="Use `async with"):
                    with run.transaction(mine):
                        pytest.fail("the block was entered")
                with blocking.transaction(), pytest.raises(ConfigError, match="middle of a transaction"):
                    with run.transaction(blocking):
                        pytest.fail("the block was entered")
            with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as plain:
                with pytest.raises(ConfigError, match="by itself"):
                    with run.transaction(plain):
                        pytest.fail("the block was entered")

        run = await executed(app, "spend")
        assert run.state is RunState.SUCCEEDED, run.error
        middle, begun, alone, kind = refusals
        assert "in the middle of a transaction" in middle
        assert "in the middle of a transaction" in begun
        assert "commits each statement by itself" in alone
        assert "is blocking" in kind

    @pytest.mark.parametrize("verb", ["commit", "rollback"])
    async def test_a_block_that_is_ended_from_within(
        self, app: App, conn: Connection, async_engine: AsyncEngine, verb: str
    ) -> None:
        answers: list[str] = []

        @app.task
        async def spend(run: Run) -> None:
            with pytest.raises(ConfigError, match="There is no transaction"):
                async with run.transaction() as mine:
                    await mine.execute(verb)
            async with AsyncSession(async_engine) as session:
                with pytest.raises(ConfigError, match="closed transaction"):
                    async with run.transaction(session):
                        await getattr(session, verb)()
            answers.append(await one(conn, "select state from queue_service.runs where id = %s", run.id))

        run = await executed(app, "spend")
        assert (run.state, answers) == (RunState.SUCCEEDED, ["running"])

    async def test_another_event_loop(self, app: App) -> None:
        @app.task(retry=ONCE)
        def spend(run: Run) -> None:
            async def elsewhere() -> None:
                async with run.transaction():
                    pytest.fail("the block was entered")

            asyncio.run(elsewhere())

        run = await executed(app, "spend")
        assert run.error is not None
        assert "not the worker's event loop" in run.error["message"]


class TestAssertHeld:
    @pytest.fixture
    async def app(self, database: str) -> AsyncIterator[App]:
        async with not_disturbing(database) as opened:
            yield opened

    async def test_nobody_takes_the_run_before_the_commit(
        self, app: App, conn: Connection, session: Open, database: str
    ) -> None:
        sweeping = await session()
        seen: list[Any] = []

        @app.task
        async def spend(run: Run) -> None:
            if run.attempt > 1:
                return
            async with await psycopg.AsyncConnection.connect(database) as mine:
                await run.assert_held(mine)
                await mine.execute(WRITE, [run.id, 1])
                await lapse(conn)
                sweep = asyncio.create_task(fetch(sweeping, SWEEP))
                await eventually(lambda: blocked(conn, sweeping))
                await mine.commit()
                seen.extend(await sweep)
                with pytest.raises(ClaimLost):
                    await run.assert_held(mine)
                await mine.rollback()

        run = await executed(app, "spend")
        assert [each.run_id for each in seen] == [run.id]
        assert await written(conn) == [(run.id, 1)]

    async def test_in_a_thread_and_on_any_kind_of_connection(
        self, app: App, engine: Engine, async_engine: AsyncEngine, database: str
    ) -> None:
        @app.task
        def spend(run: Run) -> None:
            with Session(engine) as session, psycopg.connect(database) as plain:
                run.assert_held(session)
                session.commit()
                run.assert_held(plain)
            with psycopg.connect(database, autocommit=True) as alone:
                with pytest.raises(ConfigError, match="Begin the transaction first"):
                    run.assert_held(alone)
                with alone.transaction():
                    run.assert_held(alone)

        run = await executed(app, "spend")
        assert run.state is RunState.SUCCEEDED, run.error
        async with AsyncSession(async_engine) as session:
            with pytest.raises(ClaimLost, match=f"Attempt 1 of run {run.id} is over"):
                await run.assert_held(session)
