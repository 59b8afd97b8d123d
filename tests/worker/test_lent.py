"""What handlers get of us for their transactions: as many as they need, waited for at no cost, and given back as new."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql, waiting
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import dict_row

from queue_service import App, Retry, Run, RunState, Worker
from queue_service.db import lending, lent
from queue_service.db.execute import Connection
from queue_service.db.lending import Lender
from queue_service.db.session import Address
from queue_service.errors import DatabaseUnavailable
from queue_service.settings import load
from tests.chaos.proxy import Proxy
from tests.support import eventually, one, rows, working
from tests.worker import tasks_for_tests
from tests.worker.conftest import Start

ONCE = Retry(max_attempts=1)
KINDS = ["coroutine", "thread", "process"]
WRITE = "insert into public.effects values (%s, %s)"
LENT = (
    "select count(*) from pg_stat_activity "
    "where datname = current_database() and application_name = 'queue_service handler'"
)

NONE_LENT = f"select not exists (select 1 from ({LENT}) as lent (number) where number > 0)"


@pytest.fixture(autouse=True)
async def effects(conn: Connection) -> None:
    await conn.execute("create table public.effects (run_id bigint not null, attempt integer not null)")


@dataclass
class Borrower:
    """A run, as far as a Lender knows it."""

    id: int = 1
    attempt: int = 1
    task: str = "spend"
    queue: str = "default"
    cancelled: bool = False


@asynccontextmanager
async def opened(database: str, **settings: str) -> AsyncIterator[App]:
    """An App with quick clocks and these settings."""
    quick = {"LEASE": "3s", "POLL_INTERVAL": "100ms", "SWEEP_INTERVAL": "100ms", "DRAIN_TIMEOUT": "5s"} | settings
    async with App(database, settings=load({f"QUEUE_SERVICE_{name}": value for name, value in quick.items()})) as app:
        yield app


def holding(app: App, *, queue: str = "default") -> tuple[asyncio.Event, asyncio.Event]:
    """A task `hold`, which is inside of a transaction until it may go on."""
    inside, go_on = asyncio.Event(), asyncio.Event()

    @app.task(queue=queue)
    async def hold(run: Run) -> None:
        async with run.transaction():
            inside.set()
            await go_on.wait()

    return inside, go_on


@asynccontextmanager
async def lending_from(where: str | Address, *, at_once: int = 5, seconds: float = 30.0) -> AsyncIterator[Lender]:
    lender = Lender(
        where, limit_of=lambda _: at_once, statement_timeout=timedelta(seconds=seconds), loop=asyncio.get_running_loop()
    )
    try:
        yield lender
    finally:
        lender.close()


@pytest.fixture
async def proxy(database: str) -> AsyncIterator[Proxy]:
    where = conninfo_to_dict(database)
    async with Proxy(f"{where['host']}/.s.PGSQL.{where.get('port', 5432)}").open() as between:
        yield between


def through(proxy: Proxy, database: str) -> str:
    return make_conninfo(database, host="127.0.0.1", port=proxy.port)


def spending(app: App, kind: str, name: str = "spend", *, timeout: float | None = None) -> None:
    """Register a task of this kind that leaves a row in `effects` as its run ends."""
    if kind == "process":
        app.tasks.add(getattr(tasks_for_tests, name))
    elif kind == "coroutine":

        @app.task(name=name, retry=ONCE, timeout=timeout)
        async def spend(run: Run) -> None:
            async with run.transaction() as mine:
                await mine.execute(WRITE, [run.id, run.attempt])
    else:

        @app.task(name=name, retry=ONCE, timeout=timeout)
        def spend_in_a_thread(run: Run) -> None:
            with run.transaction() as mine:
                mine.execute(WRITE, [run.id, run.attempt])


async def written(conn: Connection) -> list[int]:
    return [row[0] for row in await rows(conn, "select run_id from public.effects order by 1")]


def waiting_for(worker: Worker, run_id: int, *, queue: str = "default") -> float:
    """For how long the run has been waiting for something of ours; 0 if it does not."""
    assert worker._parts is not None
    executor = worker._parts.executors[queue]
    run = next((held.run for held, _ in executor.executing() if held.run.id == run_id), None)
    execution = None if run is None else executor.execution_of(run)
    since = None if execution is None else execution.waiting_since
    return 0.0 if since is None else time.monotonic() - since


class TestHowMany:
    async def test_as_many_as_run_at_once_also_where_the_pool_is_small(
        self, database: str, conn: Connection, start: Start, tmp_path: Path
    ) -> None:
        started = tmp_path / "started"
        async with App(database) as app:
            ids = await app.enqueue_many("hold_in_transaction", [{"directory": str(tmp_path)}] * 10, queue="slow")
            start("-q", "slow:10", QUEUE_SERVICE_POOL_SIZE="1")
            await eventually(lambda: started.exists() and len(started.read_text().split()) == 10, within=30)
            assert await one(conn, LENT) == 10
            (tmp_path / "release").touch()
            runs = await app.wait_many(ids, timeout=20)
        assert {run.state for run in runs} == {RunState.SUCCEEDED}

    @pytest.mark.parametrize("at_once", [1, 3])
    async def test_as_many_as_the_setting_says_and_first_come_first_served(
        self, database: str, conn: Connection, at_once: int
    ) -> None:
        inside: list[int] = []
        most, order = 0, []
        go_on = asyncio.Event()
        async with opened(database, LENT_CONNECTIONS=str(at_once)) as app:

            @app.task
            async def spend(run: Run, n: int) -> None:
                nonlocal most
                asked.append(n)
                async with run.transaction():
                    inside.append(n)
                    order.append(n)
                    most = max(most, len(inside))
                    await go_on.wait()
                    inside.remove(n)

            asked: list[int] = []
            ids = await app.enqueue_many("spend", [{"n": n} for n in range(12)])
            async with working(app, {"default": 12}):
                await eventually(lambda: len(asked) == 12 and len(inside) == at_once)
                go_on.set()
                await app.wait_many(ids, timeout=10)
            assert most == at_once
            assert (sorted(order), order if at_once == 1 else asked) == (sorted(asked), asked)
            assert await one(conn, LENT) <= at_once

    async def test_the_blocks_of_one_queue_keep_nobody_waiting_in_another(self, database: str) -> None:
        async with opened(database, LENT_CONNECTIONS="1") as app:
            inside, go_on = holding(app, queue="slow")
            spending(app, "coroutine")
            async with working(app, {"slow": 2, "default": 2}):
                held = await app.enqueue("hold", {})
                await inside.wait()
                assert (await app.wait(await app.enqueue("spend", {}), timeout=10)).state is RunState.SUCCEEDED
                go_on.set()
                await app.wait(held, timeout=10)

    async def test_none_is_open_before_one_is_asked_for_and_none_long_after(
        self, database: str, conn: Connection, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lending, "IDLE", 0.3)
        async with opened(database) as app:
            spending(app, "coroutine")
            async with working(app):
                assert await one(conn, LENT) == 0
                ids = await app.enqueue_many("spend", [{}] * 5)
                await app.wait_many(ids, timeout=10)
                assert await one(conn, LENT) > 0
                await eventually(lambda: one(conn, NONE_LENT))
                # And then there are some again.
                assert (await app.wait(await app.enqueue("spend", {}), timeout=10)).state is RunState.SUCCEEDED

    @pytest.mark.parametrize("kind", ["coroutine", "thread"])
    async def test_blocks_inside_of_blocks_wait_for_no_other_run(self, database: str, kind: str) -> None:
        both = threading.Barrier(2)
        async with opened(database, LENT_CONNECTIONS="2") as app:
            if kind == "coroutine":

                @app.task(name="spend", retry=ONCE)
                async def spend(run: Run) -> None:
                    async with run.transaction():
                        await asyncio.to_thread(both.wait, 10)
                        async with run.step("inner") as step:
                            step.result = step.done
                        await asyncio.gather(*(run.step(str(n), int) for n in range(3)))
            else:

                @app.task(name="spend", retry=ONCE)
                def spend_in_a_thread(run: Run) -> None:
                    def inner(name: str) -> None:
                        with run.step(name) as step:
                            step.result = step.done

                    with run.transaction():
                        both.wait(10)
                        inner("inner")
                        # Which knows nothing of the block that it is inside of.
                        with ThreadPoolExecutor(2) as pool:
                            list(pool.map(inner, ["another", "a third"]))

            ids = await app.enqueue_many("spend", [{}] * 6)
            async with working(app, {"default": 6}):
                runs = await app.wait_many(ids, timeout=20)
            assert [run.error for run in runs] == [None] * 6


class TestWaiting:
    @pytest.mark.parametrize("kind", ["coroutine", "thread", "batch"])
    async def test_costs_nothing_of_a_runs_time(self, database: str, conn: Connection, kind: str) -> None:
        async with opened(database, LENT_CONNECTIONS="1") as app:
            inside, go_on = holding(app)

            if kind == "batch":

                @app.task(name="spend", batch=10, retry=Retry(max_attempts=2, base=0), timeout=0.5)
                async def spend(runs: list[Run]) -> None:
                    for run in runs:
                        async with run.transaction() as mine:
                            await mine.execute(WRITE, [run.id, run.attempt])
            else:
                spending(app, kind, timeout=0.5)
            async with working(app, {"default": 5}) as worker:
                held = await app.enqueue("hold", {})
                await inside.wait()
                ids = await app.enqueue_many("spend", [{}] * 2)
                await eventually(lambda: waiting_for(worker, ids[0]) > 1.0)
                go_on.set()
                runs = await app.wait_many([held, *ids], timeout=10)
            assert [(run.error, run.failures) for run in runs] == [(None, 0)] * 3
            assert await written(conn) == ids

    @pytest.mark.parametrize("kind", KINDS)
    async def test_lasts_as_long_as_an_outage(
        self, database: str, conn: Connection, proxy: Proxy, kind: str, caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(lending, "LONG", 0.5)
        caplog.set_level("INFO")
        name = "effect_in_time" if kind == "process" else "spend"
        async with opened(through(proxy, database)) as app:
            spending(app, kind, name, timeout=1)
            proxy.refused = b"queue_service handler"
            async with working(app, processes=1) as worker:
                run_id = await app.enqueue(name, {})
                await eventually(lambda: waiting_for(worker, run_id) > 1.5, within=20)
                assert (await app.get(run_id) or pytest.fail("it is gone")).state is RunState.RUNNING
                proxy.refused = None
                run = await app.wait(run_id, timeout=20)
        assert run.error is None
        assert await written(conn) == [run_id]
        if kind != "process":
            logged = [record for record in caplog.records if record.getMessage().startswith("runs wait for a conn")]
            assert [vars(record)["run_id"] for record in logged] == [run_id]
            assert "cannot be reached" in vars(logged[0])["why"]
            assert "runs get connections again" in caplog.messages

    async def test_lasts_as_long_as_there_are_too_many_connections(self, database: str, conn: Connection) -> None:
        # Roles are of the whole server, which other tests use as well.
        name = f"of_{conninfo_to_dict(database)['dbname']}"
        role = sql.Identifier(name)
        await conn.execute(sql.SQL("create role {} login connection limit 0").format(role))
        try:
            async with lending_from(make_conninfo(database, user=name)) as lender:
                refused = counting_failures(lender)

                async def borrow() -> None:
                    async with lender.transaction(Borrower()) as mine:
                        await mine.execute("select 1")

                borrowing = asyncio.create_task(borrow())
                await eventually(lambda: len(refused) > 2)
                assert not borrowing.done()
                await conn.execute(sql.SQL("alter role {} connection limit 5").format(role))
                await asyncio.wait_for(borrowing, 10)
        finally:
            await eventually(lambda: one(conn, "select count(*) = 0 from pg_stat_activity where usename = %s", name))
            await conn.execute(sql.SQL("drop role {}").format(role))

    @pytest.mark.parametrize("kind", ["coroutine", "thread"])
    @pytest.mark.parametrize("how", ["cancelled", "stopped"])
    async def test_ends_when_the_run_is_no_longer_its_handlers(self, database: str, kind: str, how: str) -> None:
        go_on, inside = asyncio.Event(), asyncio.Event()
        raised: list[str] = []
        async with opened(database, LENT_CONNECTIONS="1") as app:

            @app.task
            async def hold(run: Run) -> None:
                async with run.transaction():
                    inside.set()
                    with contextlib.suppress(asyncio.CancelledError):
                        await go_on.wait()

            if kind == "coroutine":

                @app.task(name="spend", retry=ONCE)
                async def spend(run: Run) -> None:
                    try:
                        async with run.transaction():
                            raised.append("never")
                    except BaseException as error:
                        raised.append(type(error).__name__)
                        raise
            else:

                @app.task(name="spend", retry=ONCE)
                def spend_in_a_thread(run: Run) -> None:
                    try:
                        with run.transaction():
                            raised.append("never")
                    except BaseException as error:
                        raised.append(type(error).__name__)
                        raise

            async with working(app, {"default": 5}) as worker:
                await app.enqueue("hold", {})
                await inside.wait()
                run_id = await app.enqueue("spend", {})
                await eventually(lambda: waiting_for(worker, run_id) > 0)
                if how == "cancelled":
                    await app.cancel(run_id)
                else:
                    worker.stop(now=True)
                await eventually(lambda: raised)
                go_on.set()
            assert raised == ["CancelledError" if kind == "coroutine" else "ClaimLost"]
            run = await app.get(run_id)
            assert run is not None
            assert run.state is (RunState.CANCELLED if how == "cancelled" else RunState.QUEUED)

    async def test_is_seen_in_the_dump_and_in_the_log(
        self, database: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lending, "LONG", 0.2)
        async with opened(database, LENT_CONNECTIONS="1") as app:
            inside, go_on = holding(app)

            spending(app, "thread")
            async with working(app, {"default": 5}) as worker:
                await app.enqueue("hold", {})
                await inside.wait()
                ids = await app.enqueue_many("spend", [{}] * 3)
                told = "runs wait for a connection, and their time stands still meanwhile"
                await eventually(lambda: told in caplog.messages)
                await eventually(lambda: all(waiting_for(worker, run_id) > 0 for run_id in ids))
                await asyncio.to_thread(worker.dump)
                go_on.set()
                await app.wait_many(ids, timeout=10)
        (line,) = [vars(record) for record in caplog.records if record.getMessage() == told]
        assert (line["why"], line["lent"], line["queue"]) == ("all are lent", 1, "default")
        dumped = {each["run_id"]: each for record in caplog.records if (each := vars(record)).get("msg") == "a run"}
        assert all(dumped[run_id]["waits_for_connection"] > 0 for run_id in ids)
        assert len([each for each in dumped.values() if "waits_for_connection" in each]) == 3


class TestSilence:
    @pytest.mark.parametrize("kind", KINDS)
    async def test_ends_the_attempt_in_a_sentence_and_keeps_nobody_waiting(
        self, database: str, conn: Connection, proxy: Proxy, kind: str
    ) -> None:
        async with opened(through(proxy, database), LENT_CONNECTIONS="1", LENT_STATEMENT_TIMEOUT="500ms") as app:
            if kind == "process":
                app.tasks.add(tasks_for_tests.sleep_in_database)
            elif kind == "coroutine":

                @app.task(name="sleep_in_database", retry=ONCE)
                async def sleep_in_database(run: Run) -> None:
                    async with run.transaction() as mine:
                        await mine.execute(WRITE, [run.id, run.attempt])
                        await mine.execute("select pg_sleep(%s)", [3600])
            else:

                @app.task(name="sleep_in_database", retry=ONCE)
                def sleep_in_a_thread(run: Run) -> None:
                    with run.transaction() as mine:
                        mine.execute(WRITE, [run.id, run.attempt])
                        mine.execute("select pg_sleep(%s)", [3600])

            spending(app, "thread" if kind == "thread" else "coroutine")
            # Not as the source has it: the ending of the run has a traceback.
            proxy.swallowed_after = b"pg_sleep($1)"
            async with working(app, {"default": 5}, processes=1):
                silent = await app.enqueue("sleep_in_database", {})
                await eventually(lambda: proxy.faults["silenced"], within=20)
                other = await app.enqueue("spend", {})
                ended = await app.wait_many([silent, other], timeout=20)
        failed, went_on = ended
        assert (failed.state, went_on.state) == (RunState.FAILED, RunState.SUCCEEDED)
        assert failed.error is not None
        assert failed.error["message"].startswith("The database has said nothing for 0.5 s about a statement")
        assert await written(conn) == [other]

    @pytest.mark.parametrize("kind", ["coroutine", "thread"])
    async def test_of_a_commit_is_looked_up(self, database: str, conn: Connection, proxy: Proxy, kind: str) -> None:
        async with opened(through(proxy, database), LENT_STATEMENT_TIMEOUT="500ms") as app:
            if kind == "coroutine":

                @app.task(name="spend", retry=ONCE)
                async def spend(run: Run) -> None:
                    async with run.transaction() as mine:
                        await mine.execute(WRITE, [run.id, run.attempt])
                        proxy.swallowed_after = b"COMMIT"
            else:

                @app.task(name="spend", retry=ONCE)
                def spend_in_a_thread(run: Run) -> None:
                    with run.transaction() as mine:
                        mine.execute(WRITE, [run.id, run.attempt])
                        proxy.swallowed_after = b"COMMIT"

            async with working(app) as worker:
                run_id = await app.enqueue("spend", {})
                await eventually(lambda: proxy.faults["silenced"])
                # The look commits, too.
                proxy.swallowed_after = None
                assert (await app.wait(run_id, timeout=10)).state is RunState.SUCCEEDED
                assert (worker.tally.failed, worker.tally.lost) == (0, 0)
        assert await written(conn) == [run_id]

    async def test_between_two_statements_is_the_handlers_own(self, database: str) -> None:
        async with lending_from(database, seconds=0.2) as lender, lender.transaction(Borrower()) as mine:
            await mine.execute("select 1")
            await asyncio.sleep(0.5)  # what a handler does itself
            await mine.execute("select 1")

    @pytest.mark.parametrize("what", ["copy in", "copy out", "a server's cursor", "many", "a savepoint", "a commit"])
    async def test_is_bounded_in_whatever_a_handler_does(self, database: str, proxy: Proxy, what: str) -> None:
        async with lending_from(through(proxy, database), seconds=0.3) as lender:

            async def spend() -> None:
                async with lender.transaction(Borrower()) as mine:
                    await mine.execute("create temp table t on commit drop as select 1 as n")
                    proxy.swallowed_after = {"a commit": b"COMMIT", "a savepoint": b"SAVEPOINT"}.get(what, b"mark")
                    await do(what, mine)

            with pytest.raises(DatabaseUnavailable, match=r"said nothing for 0\.3 s"):
                await spend()

    async def test_a_statement_that_is_cut_off_is_ended_on_the_server(self, database: str, conn: Connection) -> None:
        async with lending_from(database, seconds=0.3) as lender:
            with pytest.raises(DatabaseUnavailable):
                async with lender.transaction(Borrower()) as mine:
                    await mine.execute("select pg_sleep(3600)")
            await eventually(lambda: one(conn, NONE_LENT))


class TestCancelled:
    async def test_a_statement_is_cancelled_and_its_connection_used_again(
        self, database: str, conn: Connection
    ) -> None:
        async with lending_from(database) as lender:
            pids = []
            for _ in range(2):
                async with lender.transaction(Borrower()) as mine:
                    pids.append(mine.info.backend_pid)
                    with contextlib.suppress(TimeoutError):
                        async with mine.transaction(), asyncio.timeout(0.1):
                            await mine.execute("select pg_sleep(3600)")
                    await mine.execute(WRITE, [1, 1])
            assert pids[0] == pids[1]
            assert len(await written(conn)) == 2

    @pytest.mark.parametrize("how", ["as the block is left", "by the handler itself"])
    async def test_a_commit_is_left_to_the_server(self, database: str, conn: Connection, how: str) -> None:
        await conn.execute(
            "create function public.gate() returns trigger language plpgsql as "
            "'begin perform pg_advisory_xact_lock_shared(7); return null; end'"
        )
        await conn.execute(
            "create constraint trigger gate after insert on public.effects initially deferred "
            "for each row execute function public.gate()"
        )

        async def spend() -> None:
            async with lender.transaction(Borrower()) as mine:
                await mine.execute(WRITE, [1, 1])
                if how == "by the handler itself":
                    await mine.execute("commit")

        async with lending_from(database) as lender:
            await conn.execute("select pg_advisory_lock(7)")
            spending = asyncio.create_task(spend())
            await eventually(lambda: one(conn, "select exists (select from pg_locks where not granted and objid = 7)"))
            spending.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await spending
            await conn.execute("select pg_advisory_unlock(7)")
            await eventually(lambda: written(conn))

    async def test_a_cancellation_that_the_driver_loses_is_raised(
        self, database: str, conn: Connection, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As one that comes at the same moment as the answer, before Python 3.12."""
        wait = waiting.wait_async

        async def losing(*args: Any, **options: Any) -> Any:
            answer = asyncio.ensure_future(wait(*args, **options))
            while not answer.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.shield(answer)
            return answer.result()

        async with lending_from(database) as lender:

            async def sleep() -> None:
                async with lender.transaction(Borrower()) as mine:
                    monkeypatch.setattr(lent, "wait_async", losing)
                    await mine.execute("select pg_sleep(0.5)")

            sleeping = asyncio.create_task(sleep())
            await eventually(
                lambda: one(conn, "select count(*) = 1 from pg_stat_activity where wait_event = 'PgSleep'")
            )
            sleeping.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sleeping

    async def test_a_thread_that_was_given_up_has_lost_its_connection(self, database: str, conn: Connection) -> None:
        go_on = threading.Event()
        raised: list[BaseException] = []
        async with opened(database, LENT_CONNECTIONS="1") as app:

            @app.task(retry=ONCE)
            def stick(run: Run) -> None:
                try:
                    with run.transaction() as mine:
                        mine.execute("lock table public.effects")
                        go_on.wait(30)
                        mine.execute(WRITE, [run.id, run.attempt])
                except BaseException as error:
                    raised.append(error)
                    raise

            spending(app, "thread")
            async with working(app, {"default": 5}):
                stuck = await app.enqueue("stick", {})
                await eventually(
                    lambda: one(conn, "select exists (select from pg_locks where mode = 'AccessExclusiveLock' "
                                      "and granted and relation = 'public.effects'::regclass)")
                )  # fmt: skip
                other = await app.enqueue("spend", {})
                await app.cancel(stuck)
                assert (await app.wait(other, timeout=10)).state is RunState.SUCCEEDED
                go_on.set()
                await eventually(lambda: raised)
        assert isinstance(raised[0], psycopg.OperationalError)
        assert await written(conn) == [other]


class TestGivenBack:
    async def test_nothing_of_one_block_is_met_by_the_next(self, database: str) -> None:
        async with lending_from(database, at_once=1) as lender:
            async with lender.transaction(Borrower()) as first:
                pid = first.info.backend_pid
                before = await settings_of(first)
                for statement in (
                    "set search_path to pg_temp", "set timezone to 'Asia/Tokyo'", "set statement_timeout to '1s'",
                    "create temp table left_behind ()", "prepare left_behind as select 1", "listen left_behind",
                    "select pg_advisory_lock(11)", "declare left_behind cursor with hold for select 1",
                    "set synchronous_commit to off",
                ):  # fmt: skip
                    await first.execute(statement.encode())
                first.row_factory = dict_row
                for _ in range(7):
                    await first.execute("select %s::int", [1])
            async with lender.transaction(Borrower()) as second:
                assert second.info.backend_pid == pid
                assert await settings_of(second) == before
                found = await (await second.execute(
                    "select to_regclass('pg_temp.left_behind'), (select count(*) from pg_prepared_statements), "
                    "(select count(*) from pg_listening_channels()), (select count(*) from pg_cursors where is_holdable), "
                    "(select count(*) from pg_locks where locktype = 'advisory')"
                )).fetchone()  # fmt: skip
                assert found == (None, 0, 0, 0, 0)
                for _ in range(7):
                    await second.execute("select %s::int", [1])
                # Who has kept the first can do nothing with it.
                with pytest.raises(psycopg.OperationalError, match="closed"):
                    await first.execute("select 1")

    @pytest.mark.parametrize("verb", ["commit", "rollback"])
    async def test_a_block_ends_its_transaction_itself(self, database: str, verb: str) -> None:
        async with lending_from(database) as lender, lender.transaction(Borrower()) as mine:
            with pytest.raises(psycopg.ProgrammingError, match="not for this connection"):
                await getattr(mine, verb)()

    async def test_what_died_while_nobody_had_it_is_replaced(self, database: str, conn: Connection) -> None:
        async with lending_from(database) as lender:
            for _ in range(3):
                async with lender.transaction(Borrower()) as mine:
                    await mine.execute(WRITE, [1, 1])
                await conn.execute(
                    "select pg_terminate_backend(pid, 10000) from pg_stat_activity "
                    "where datname = current_database() and application_name = 'queue_service handler'"
                )
        assert len(await written(conn)) == 3

    async def test_one_that_takes_no_writes_is_not_lent(self, database: str, conn: Connection) -> None:
        name = sql.Identifier(str(conninfo_to_dict(database)["dbname"]))
        setting = sql.SQL("alter database {} set default_transaction_read_only to {}").format
        async with lending_from(database) as lender:
            refused = counting_failures(lender)

            async def borrow() -> None:
                async with lender.transaction(Borrower()) as mine:
                    await mine.execute(WRITE, [1, 1])

            await conn.execute(setting(name, sql.SQL("on")))
            borrowing = asyncio.create_task(borrow())
            await eventually(lambda: len(refused) > 1)
            assert all(isinstance(each, lent.Unfit) for each in refused)
            await conn.execute(setting(name, sql.SQL("off")))
            await asyncio.wait_for(borrowing, 10)
        assert await written(conn) == [1]

    @pytest.mark.parametrize("kind", ["coroutine", "thread"])
    async def test_behind_a_pooler_nothing_is_set_or_prepared_that_stays(
        self, database: str, kind: str, conn: Connection
    ) -> None:
        """As far as the worker can tell: the process that answers is not the one that has shaken hands."""
        async with lending_from(Address(database, pooler="transaction"), at_once=1) as lender:

            def in_a_thread() -> Any:
                with lender.blocking_transaction(Borrower()) as mine:
                    for _ in range(7):
                        mine.execute("select %s::int", [1])
                    found = mine.execute("select current_setting('idle_in_transaction_session_timeout')").fetchone()
                    return mine.info.backend_pid, found

            if kind == "thread":
                pid, inside = await asyncio.to_thread(in_a_thread)
            else:
                async with lender.transaction(Borrower()) as mine:
                    for _ in range(7):
                        await mine.execute("select %s::int", [1])
                    pid = mine.info.backend_pid
                    inside = await (
                        await mine.execute("select current_setting('idle_in_transaction_session_timeout')")
                    ).fetchone()
            assert inside == ("1min",)
            last = await one(conn, "select query from pg_stat_activity where pid = %s", pid)
            assert last == "COMMIT"
            kept = lender._taken()
            assert kept is not None
            with psycopg.Connection(kept.pgconn) as bare:
                found = bare.execute(
                    "select current_setting('idle_in_transaction_session_timeout'), "
                    "(select count(*) from pg_prepared_statements)"
                ).fetchone()
            assert found == ("0", 0)


async def do(what: str, mine: psycopg.AsyncConnection[Any]) -> None:
    if what == "copy in":
        async with mine.cursor().copy("copy t from stdin /* mark */") as copy:
            for n in range(2_000_000):
                await copy.write_row([n])
    elif what == "copy out":
        async with mine.cursor().copy("copy (select 1 /* mark */) to stdout") as copy:
            async for _ in copy.rows():
                pass
    elif what == "a server's cursor":
        async with mine.cursor("mark") as cursor:
            await cursor.execute("select 1")
    elif what == "many":
        await mine.cursor().executemany("insert into t select %s /* mark */", [[n] for n in range(100)])
    elif what == "a savepoint":
        async with mine.transaction():
            pass


def counting_failures(lender: Lender) -> list[BaseException]:
    """What it meets from now on while it opens a connection."""
    met: list[BaseException] = []
    failed = lender._failed

    def noted(ticket: Any, conn: Any, lost: BaseException) -> None:
        met.append(lost)
        failed(ticket, conn, lost)

    lender._failed = noted  # type: ignore[method-assign]
    return met


async def settings_of(conn: psycopg.AsyncConnection[Any]) -> list[Any]:
    changing = "('transaction_isolation', 'in_hot_standby')"
    cursor = await conn.execute(
        f"select name, setting from pg_settings where name not in {changing} order by name".encode()
    )
    return await cursor.fetchall()
