"""Steps of handlers: what one attempt has done and stored, no later attempt does again, whatever dies in between."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, assert_type

import psycopg
import pytest
from sqlalchemy import Engine, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from queue_service import App, Retry, Run, RunState, Worker
from queue_service.db.execute import Connection, fetch
from queue_service.errors import ClaimLost, ConfigError, DatabaseUnavailable, PayloadRefused
from queue_service.services import combiner
from queue_service.steps import queries as steps
from tests.support import eventually, lapse, one, rows, working
from tests.worker import tasks_for_tests
from tests.worker.conftest import Start
from tests.worker.test_transactions import SWEEP, WRITE, executed, not_disturbing, written

AGAIN = Retry(max_attempts=2, base=0)
ONCE = Retry(max_attempts=1)
# The first statement that stores a step loses its connection. A sequence is not rolled back.
CUT = """
create sequence cuts;
create function cut() returns trigger language plpgsql as $$ begin
    if nextval('public.cuts') = 1 then
        perform pg_terminate_backend(pg_backend_pid());
        perform pg_sleep(1);
    end if;
    return new;
end $$;
create trigger cut before insert on queue_service.steps for each row execute function cut()
"""
# No step is stored while somebody has this lock.
GATE = """
create sequence tries;
create function gate() returns trigger language plpgsql as
    'begin perform nextval(''public.tries''), pg_advisory_xact_lock_shared(7); return new; end';
create trigger gate before insert on queue_service.steps for each row execute function gate()
"""


@pytest.fixture(autouse=True)
async def effects(conn: Connection) -> None:
    await conn.execute("create table effects (run_id bigint not null, attempt integer not null)")


class Effects:
    """What was called, in order."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def plain(self, value: Any = None) -> Any:
        self.calls.append(value)
        return value

    async def awaited(self, value: Any = None) -> Any:
        await asyncio.sleep(0)
        return self.plain(value)


@pytest.fixture
def calls() -> Effects:
    return Effects()


async def stored(conn: Connection) -> list[tuple[str, int, Any]]:
    found = await rows(conn, "select name, attempt, result from queue_service.steps order by run_id, name")
    return [(name, attempt, result) for name, attempt, result in found]


async def sweep(conn: Connection, run: Run) -> None:
    """Take the run from its worker."""
    await lapse(conn)
    assert [each.run_id for each in await fetch(conn, SWEEP)] == [run.id]


class TestFunctions:
    async def test_what_an_attempt_has_done_the_next_one_is_given(
        self, app: App, conn: Connection, calls: Effects
    ) -> None:
        @app.task(retry=AGAIN)
        async def pay(run: Run) -> list[Any]:
            first = await run.step("first", calls.awaited, {"paid": 30})
            second = await run.step("second", calls.plain, value=None)
            third = await run.step("third", lambda: calls.awaited("a coroutine"))
            if run.attempt == 1:
                raise RuntimeError("again")
            return [first, second, third, await run.step("fourth", calls.plain, run.attempt)]

        run = await executed(app, "pay")
        assert run.result == [{"paid": 30}, None, "a coroutine", 2]
        assert calls.calls == [{"paid": 30}, None, "a coroutine", 2]
        assert await stored(conn) == [
            ("first", 1, {"paid": 30}), ("fourth", 2, 2), ("second", 1, None), ("third", 1, "a coroutine"),
        ]  # fmt: skip

    async def test_the_first_attempt_is_given_what_a_later_one_would_be(self, app: App) -> None:
        given = {"tuple": (1, 2), 3: "key", "nan": float("nan"), "nul": "a\0b", "large": 10**30}
        got: list[Any] = []

        @app.task(retry=AGAIN)
        async def pay(run: Run) -> None:
            got.append(await run.step("first", lambda: given))
            if run.attempt == 1:
                raise RuntimeError("again")

        @app.task(retry=AGAIN)
        def pay_in_thread(run: Run) -> None:
            got.append(run.step("first", lambda: given))
            if run.attempt == 1:
                raise RuntimeError("again")

        for task in ("pay", "pay_in_thread"):
            await executed(app, task)
        assert got == [{"tuple": [1, 2], "3": "key", "nan": None, "nul": "a\ufffdb", "large": 10**30}] * 4

    async def test_what_a_function_raises_is_raised_and_it_may_be_tried_again_at_once(
        self, app: App, conn: Connection, calls: Effects
    ) -> None:
        async def broken() -> None:
            await calls.awaited("broken")
            raise ConnectionError("no answer")

        @app.task
        async def pay(run: Run) -> Any:
            for _ in range(2):
                with pytest.raises(ConnectionError, match="no answer"):
                    await run.step("pay", broken)
            assert await stored(conn) == []
            return await run.step("pay", calls.plain, "paid")

        assert (await executed(app, "pay")).result == "paid"
        assert calls.calls == ["broken", "broken", "paid"]

    @pytest.mark.parametrize(
        ("result", "why"),
        [
            (object(), "The result of step 'pay' is not JSON"),
            ("x" * 300_000, "The result of step 'pay' is 300,002 bytes, over the limit of 262,144"),
        ],
        ids=["an object", "a long text"],
    )
    async def test_a_result_that_cannot_be_stored_is_refused(
        self, app: App, conn: Connection, result: Any, why: str
    ) -> None:
        @app.task(retry=ONCE)
        async def pay(run: Run) -> None:
            await run.step("pay", lambda: result)

        run = await executed(app, "pay")
        assert run.error is not None
        assert run.error["type"] == "PayloadRefused"
        assert run.error["message"].startswith(why)
        assert "The step is not stored" in run.error["message"]
        assert await stored(conn) == []

    async def test_a_name_stands_for_one_step_of_an_attempt(self, app: App, calls: Effects) -> None:
        inside, go_on = asyncio.Event(), asyncio.Event()

        async def slow() -> str:
            inside.set()
            await go_on.wait()
            return "slow"

        @app.task
        async def pay(run: Run) -> str:
            under_way = asyncio.ensure_future(run.step("pay", slow))
            await inside.wait()
            for _ in range(2):
                with pytest.raises(ConfigError, match="has a step 'pay' already"):
                    await run.step("pay", calls.plain)
                with pytest.raises(ConfigError, match="has a step 'pay' already"):
                    async with run.step("pay"):
                        pass
                go_on.set()
                result = await under_way
            return str(result)

        assert (await executed(app, "pay")).result == "slow"
        assert calls.calls == []

    async def test_what_is_no_name_and_no_function(self, app: App, calls: Effects) -> None:
        @app.task
        async def pay(run: Run) -> None:
            bad: Any
            for bad in ("", None, 7, "x" * 2_000):
                with pytest.raises(ConfigError, match="The name of a step"):
                    await run.step(bad, calls.plain)
            with pytest.raises(PayloadRefused, match="NUL"):
                run.step("a\0b")
            bad = calls.awaited(1)
            with pytest.raises(ConfigError, match="takes a function, and its arguments after it, not coroutine"):
                run.step("called", bad)
            bad = None
            with pytest.raises(ConfigError, match="has arguments, but no function"):
                run.step("nothing", bad, 1)

        run = await executed(app, "pay")
        assert run.state is RunState.SUCCEEDED, run.error
        assert calls.calls == []

    async def test_outside_its_handler_and_after_its_ending_there_is_no_step(self, app: App, calls: Effects) -> None:
        kept: list[Run] = []

        @app.task
        async def pay(run: Run) -> None:
            async with run.transaction():
                pass
            kept.append(run)
            with pytest.raises(ConfigError, match="has ended with the transaction of its handler before"):
                await run.step("late", calls.plain)

        run = await executed(app, "pay")
        assert run.state is RunState.SUCCEEDED, run.error
        for each in (run, *kept):
            with pytest.raises(ConfigError, match="is not executed here"):
                await each.step("outside", calls.plain)
        assert calls.calls == []

    async def test_many_at_the_same_time_are_each_done_once_and_what_is_stored_is_read_once(
        self, app: App, calls: Effects, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loads: list[int] = []
        of_run = steps.of_run

        def counted(run_id: int) -> Any:
            loads.append(run_id)
            return of_run(run_id)

        monkeypatch.setattr(steps, "of_run", counted)

        @app.task(retry=AGAIN)
        async def pay(run: Run) -> list[int]:
            found = await asyncio.gather(*(run.step(f"part {n}", calls.awaited, n) for n in range(50)))
            if run.attempt == 1:
                assert loads == []
                raise RuntimeError("again")
            return found

        run = await executed(app, "pay")
        assert run.result == list(range(50))
        assert sorted(calls.calls) == list(range(50))
        assert loads == [run.id]

    async def test_what_was_stored_by_other_means_and_cannot_be_read_is_said(self, app: App, conn: Connection) -> None:
        @app.task(retry=AGAIN)
        async def pay(run: Run) -> None:
            if run.attempt == 1:
                await conn.execute(
                    f"insert into queue_service.steps (run_id, name, attempt, result) values (%s, 'pay', 1, '{'9' * 5_000}')",
                    [run.id],
                )
                raise RuntimeError("again")
            await run.step("pay", print)

        error = (await executed(app, "pay")).error
        assert error is not None
        assert (error["type"], error["message"][:27]) == ("PayloadRefused", "The result of step 'pay' of")

    async def test_the_types_are_those_that_are_documented(self) -> None:
        """Read by the type checker."""

        async def typed(run: Run, connection: psycopg.Connection[Any]) -> None:
            async with run.step("a") as step:
                assert_type(step.conn, psycopg.AsyncConnection[Any])
                assert_type(step.done, bool)
            with run.step("b") as begun:
                assert_type(begun.conn, psycopg.Connection[Any])
            with run.step("c", conn=connection) as own:
                assert_type(own.conn, psycopg.Connection[Any])

        assert callable(typed)


class TestBlocks:
    async def test_what_is_written_in_a_block_and_its_result_are_one(
        self, app: App, conn: Connection, calls: Effects
    ) -> None:
        @app.task(retry=AGAIN)
        async def pay(run: Run) -> Any:
            async with run.step("pay") as step:
                if not step.done:
                    await step.conn.execute(WRITE, [run.id, run.attempt])
                    step.result = {"paid": (30,)}
                    # Nobody sees the one without the other.
                    assert (await written(conn), await stored(conn)) == ([], [])
                calls.plain(step.result)
            assert step.done
            assert (await written(conn), await stored(conn)) == ([(run.id, 1)], [("pay", 1, {"paid": [30]})])
            with pytest.raises(ConfigError, match=r"(only within its block|is done, by attempt 1)"):
                _ = step.conn
            if run.attempt == 1:
                raise RuntimeError("again")
            return step.result

        run = await executed(app, "pay")
        assert (run.attempt, run.result) == (2, {"paid": [30]})
        assert calls.calls == [{"paid": (30,)}, {"paid": [30]}]

    async def test_a_block_that_raises_leaves_nothing_and_may_begin_again(self, app: App, conn: Connection) -> None:
        @app.task
        async def pay(run: Run) -> None:
            for number in range(3):
                try:
                    async with run.step("pay") as step:
                        assert not step.done
                        await step.conn.execute(WRITE, [run.id, number])
                        step.result = 1 // (number // 2)
                except ZeroDivisionError:
                    assert (await written(conn), await stored(conn)) == ([], [])

        run = await executed(app, "pay")
        assert run.state is RunState.SUCCEEDED, run.error
        assert await written(conn) == [(run.id, 2)]
        assert await stored(conn) == [("pay", 1, 1)]

    async def test_a_block_that_never_looks_whether_it_is_done_fails_at_its_first_attempt(
        self, app: App, conn: Connection
    ) -> None:
        @app.task(retry=ONCE)
        async def pay(run: Run) -> None:
            async with run.step("pay") as step:
                await step.conn.execute(WRITE, [run.id, run.attempt])
                step.result = 30

        run = await executed(app, "pay")
        assert run.error is not None
        assert (run.error["type"], "has never looked at `done`" in run.error["message"]) == ("ConfigError", True)
        assert (await written(conn), await stored(conn)) == ([], [])

    async def test_a_step_that_is_done_lends_no_connection_and_takes_no_result(
        self, app: App, conn: Connection
    ) -> None:
        @app.task(retry=AGAIN)
        async def pay(run: Run) -> str:
            async with run.step("pay") as step:
                if run.attempt == 1:
                    assert not step.done
                    await step.conn.execute(WRITE, [run.id, run.attempt])
                    step.result = "paid"
                else:
                    with pytest.raises(ConfigError, match=r"is done, by attempt 1\. Look at `done` before"):
                        await step.conn.execute(WRITE, [run.id, run.attempt])
                    with pytest.raises(ConfigError, match=r"is done, by attempt 1\. Its result stays"):
                        step.result = "again"
            if run.attempt == 1:
                raise RuntimeError("again")
            return str(step.result)

        run = await executed(app, "pay")
        assert run.result == "paid", run.error
        assert await written(conn) == [(run.id, 1)]

    async def test_a_result_that_cannot_be_stored_rolls_all_back(self, app: App, conn: Connection) -> None:
        @app.task(retry=ONCE)
        async def pay(run: Run) -> None:
            async with run.step("pay") as step:
                if not step.done:
                    await step.conn.execute(WRITE, [run.id, run.attempt])
                    step.result = object()

        run = await executed(app, "pay")
        assert (run.error or {})["type"] == "PayloadRefused"
        assert (await written(conn), await stored(conn)) == ([], [])

    async def test_on_a_session_of_sqlalchemy(self, app: App, conn: Connection, async_engine: AsyncEngine) -> None:
        @app.task(retry=AGAIN)
        async def pay(run: Run) -> None:
            async with AsyncSession(async_engine) as session, run.step("pay", conn=session) as step:
                if not step.done:
                    assert step.conn is session
                    await session.execute(text(f"insert into effects values ({run.id}, {run.attempt})"))
            if run.attempt == 1:
                raise RuntimeError("again")

        run = await executed(app, "pay")
        assert run.state is RunState.SUCCEEDED, run.error
        assert await written(conn) == [(run.id, 1)]

    async def test_functions_are_steps_inside_of_blocks_too(self, app: App, conn: Connection, calls: Effects) -> None:
        @app.task
        async def pay(run: Run) -> None:
            async with run.step("outer") as step:
                if not step.done:
                    await run.step("inner", calls.plain, 1)
                    await step.conn.execute(WRITE, [run.id, run.attempt])
            async with run.transaction() as mine:
                await run.step("before the end", calls.plain, 2)
                await mine.execute(WRITE, [run.id, run.attempt])

        run = await executed(app, "pay")
        assert run.state is RunState.SUCCEEDED, run.error
        assert [name for name, *_ in await stored(conn)] == ["before the end", "inner", "outer"]
        assert len(await written(conn)) == 2


class TestThreads:
    async def test_a_plain_handler_has_steps_without_await(
        self, app: App, conn: Connection, calls: Effects, engine: Engine
    ) -> None:
        @app.task(retry=AGAIN)
        def pay(run: Run) -> list[Any]:
            first = run.step("first", calls.plain, {"paid": 30})
            with run.step("second") as step:
                if not step.done:
                    step.conn.execute(WRITE, [run.id, run.attempt])
                    step.result = "written"
            with Session(engine) as session, run.step("third", conn=session) as third:
                if not third.done:
                    session.execute(text(f"insert into effects values ({run.id}, {run.attempt})"))
            if run.attempt == 1:
                raise RuntimeError("again")
            with pytest.raises(ConfigError, match="has a step 'first' already"):
                run.step("first", calls.plain)
            return [first, step.result, run.step("thread", lambda: threading.current_thread().name)]

        run = await executed(app, "pay")
        assert run.result == [{"paid": 30}, "written", "queue_service handler"], run.error
        assert calls.calls == [{"paid": 30}]
        assert await written(conn) == [(run.id, 1)] * 2

    async def test_what_is_asynchronous_is_refused_before_it_has_begun(self, app: App, calls: Effects) -> None:
        async def on_a_loop(run: Run) -> None:
            with pytest.raises(ConfigError, match="would block an event loop"):
                await run.step("first", calls.awaited)
            with pytest.raises(ConfigError, match="would block an event loop"):
                with run.step("second"):
                    pass
            with pytest.raises(ConfigError, match="not the worker's event loop"):
                async with run.step("third"):
                    pass

        @app.task
        def pay(run: Run) -> None:
            with pytest.raises(ConfigError, match="is asynchronous, and this handler is a plain function"):
                run.step("first", calls.awaited)
            asyncio.run(on_a_loop(run))

        @app.task
        async def block(run: Run) -> None:
            with pytest.raises(ConfigError, match="would block an event loop"):
                with run.step("first"):
                    pass

        for task in ("pay", "block"):
            run = await executed(app, task)
            assert run.state is RunState.SUCCEEDED, run.error
        assert calls.calls == []

    async def test_a_thread_that_was_given_up_stores_nothing_once_its_run_is_taken(
        self, app: App, conn: Connection
    ) -> None:
        inside, go_on, errors = threading.Event(), threading.Event(), list[BaseException]()

        def slow() -> None:
            inside.set()
            assert go_on.wait(20)

        @app.task(retry=ONCE, timeout=0.5)
        def pay(run: Run) -> None:
            try:
                run.step("pay", slow)
            except BaseException as error:
                errors.append(error)
                raise

        run_id = await app.enqueue("pay", {})
        async with working(app):
            assert (await app.wait(run_id, timeout=10)).state is RunState.FAILED
            go_on.set()
            await eventually(lambda: bool(errors))
        assert [type(each) for each in errors] == [ClaimLost]
        assert await stored(conn) == []


class TestBatches:
    async def test_each_run_of_a_batch_has_steps_of_its_own(self, app: App, conn: Connection, calls: Effects) -> None:
        @app.task(batch=10, retry=Retry(max_attempts=3, base=0))
        async def pay(runs: list[Run]) -> dict[int, Any]:
            results: dict[int, Any] = {}
            for run in runs:
                results[run.id] = await run.step("pay", calls.plain, run.payload["n"])
                if run.payload["n"] == 2 and run.attempt == 1:
                    raise RuntimeError("on purpose")
            return results

        ids = await app.enqueue_many("pay", [{"n": n} for n in range(5)])
        await Worker(app, {"default": 1}).run(once=True)
        runs = await app.wait_many(ids, timeout=5)
        assert [run.result for run in runs] == list(range(5))
        # The first three were done when the batch failed.
        assert sorted(calls.calls) == list(range(5))
        assert [attempt for _, attempt, _ in await stored(conn)] == [1, 1, 1, 2, 2]


class TestLost:
    @pytest.fixture
    async def app(self, database: str) -> AsyncIterator[App]:
        """One whose worker neither sweeps nor extends anything meanwhile."""
        async with not_disturbing(database) as opened:
            yield opened

    async def assert_done_by_the_second(self, app: App, conn: Connection, caught: list[ClaimLost]) -> None:
        """The first attempt of `pay` is swept while it is in a step."""
        run_id = await app.enqueue("pay", {})
        await Worker(app).run(once=True)
        run = await app.wait(run_id, timeout=10)
        assert (run.state, run.attempt, run.losses, run.failures) == (RunState.SUCCEEDED, 2, 1, 0), run.error
        assert [str(each).split(":")[0] for each in caught] == [f"Attempt 1 of run {run_id} is over"]
        assert await stored(conn) == [("pay", 2, "second")]
        assert await written(conn) == []

    @pytest.mark.parametrize("kind", ["function", "block"])
    async def test_a_zombie_stores_nothing_and_gets_an_error(self, app: App, conn: Connection, kind: str) -> None:
        caught: list[ClaimLost] = []

        @app.task
        async def pay(run: Run) -> None:
            if run.attempt == 2:
                assert await run.step("pay", lambda: "second") == "second"
                return
            try:
                if kind == "function":
                    await run.step("pay", sweep, conn, run)
                else:
                    async with run.step("pay") as step:
                        assert not step.done
                        await step.conn.execute(WRITE, [run.id, run.attempt])
                        await sweep(conn, run)
            except ClaimLost as lost:
                caught.append(lost)
                raise

        await self.assert_done_by_the_second(app, conn, caught)

    @pytest.mark.parametrize("kind", ["function", "block"])
    async def test_a_zombie_in_a_thread_does_not_either(self, app: App, conn: Connection, kind: str) -> None:
        loop, caught = asyncio.get_running_loop(), list[ClaimLost]()

        def sweep_in_thread(run: Run) -> None:
            asyncio.run_coroutine_threadsafe(sweep(conn, run), loop).result()

        @app.task
        def pay(run: Run) -> None:
            if run.attempt == 2:
                assert run.step("pay", lambda: "second") == "second"
                return
            try:
                if kind == "function":
                    run.step("pay", sweep_in_thread, run)
                else:
                    with run.step("pay") as step:
                        assert not step.done
                        step.conn.execute(WRITE, [run.id, run.attempt])
                        sweep_in_thread(run)
            except ClaimLost as lost:
                caught.append(lost)
                raise

        await self.assert_done_by_the_second(app, conn, caught)

    async def test_a_run_that_was_handed_back_without_a_failure_has_its_steps(self, app: App, calls: Effects) -> None:
        inside = asyncio.Event()

        @app.task
        async def pay(run: Run) -> Any:
            result = await run.step("pay", calls.plain, run.attempt)
            if run.attempt == 1:
                inside.set()
                await asyncio.Event().wait()
            return result

        run_id = await app.enqueue("pay", {})
        async with working(app) as worker:
            await inside.wait()
            worker.stop(now=True)
        await Worker(app).run(once=True)
        run = await app.wait(run_id, timeout=10)
        assert (run.attempt, run.failures, run.losses, run.result) == (2, 0, 0, 1)
        assert calls.calls == [1]

    async def test_a_run_that_an_operator_retries_has_its_steps(
        self, app: App, conn: Connection, calls: Effects
    ) -> None:
        @app.task(retry=ONCE)
        async def pay(run: Run) -> Any:
            result = await run.step("pay", calls.plain, run.attempt)
            if run.attempt == 1:
                raise RuntimeError("on purpose")
            return result

        assert (await executed(app, "pay")).state is RunState.FAILED
        (run_id,) = [row[0] for row in await rows(conn, "select id from queue_service.finished_runs")]
        assert await app.retry(run_id)
        await Worker(app).run(once=True)
        run = await app.get(run_id)
        assert run is not None
        assert (run.result, calls.calls) == (1, [1])


class TestInterrupted:
    @pytest.mark.parametrize("where", ["a thread", "a coroutine"])
    async def test_what_is_done_is_stored_although_the_connection_was_lost(
        self, app: App, conn: Connection, calls: Effects, where: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        await conn.execute(CUT)

        async def pay(run: Run) -> Any:
            return await run.step("pay", calls.plain, "paid")

        def pay_in_thread(run: Run) -> Any:
            return run.step("pay", calls.plain, "paid")

        app.task(name="pay", retry=ONCE)(pay if where == "a coroutine" else pay_in_thread)
        run = await executed(app, "pay")
        assert (run.state, run.result) == (RunState.SUCCEEDED, "paid"), run.error
        assert calls.calls == ["paid"]
        assert await one(conn, "select last_value from cuts") == 2
        assert "cannot store a step that is done; trying until it works" in [
            each.getMessage() for each in caplog.records
        ]

    async def test_what_is_done_is_stored_although_the_time_of_its_handler_is_over(
        self, app: App, conn: Connection, session: Callable[[], Awaitable[Connection]], calls: Effects
    ) -> None:
        await conn.execute(GATE)
        gate = await session()
        await gate.execute("select pg_advisory_lock(7)")

        @app.task(retry=ONCE, timeout=0.5)
        async def pay(run: Run) -> None:
            await run.step("pay", calls.plain, "paid")

        run_id = await app.enqueue("pay", {})
        async with working(app):
            # The first statement ends with its handler's time.
            await eventually(lambda: one(conn, "select last_value = 2 from tries"))
            await gate.execute("select pg_advisory_unlock(7)")
            run = await app.wait(run_id, timeout=10)
        assert (run.state, run.error and run.error["reason"]) == (RunState.FAILED, "timeout")
        assert await stored(conn) == [("pay", 1, "paid")]

    async def test_a_handler_that_has_locked_its_own_run_is_told_so(
        self, app: App, database: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(combiner, "LOCK_SECONDS", 0.2)

        @app.task(retry=ONCE)
        async def pay(run: Run) -> None:
            async with await psycopg.AsyncConnection.connect(database) as mine:
                await run.assert_held(mine)
                with pytest.raises(DatabaseUnavailable, match=r"has held what this needs \(step\)"):
                    await run.step("pay", lambda: "paid")

        run = await executed(app, "pay")
        assert run.state is RunState.SUCCEEDED, run.error

    async def test_a_run_without_steps_never_touches_them(
        self, app: App, session: Callable[[], Awaitable[Connection]]
    ) -> None:
        @app.task(retry=AGAIN)
        async def pay(run: Run) -> None:
            if run.attempt == 1:
                raise RuntimeError("again")

        locking = await session()
        async with locking.transaction(force_rollback=True):
            await locking.execute("lock table queue_service.steps in access exclusive mode")
            run = await executed(app, "pay")
        assert (run.state, run.attempt) == (RunState.SUCCEEDED, 2)


class TestProcesses:
    @pytest.fixture
    def app(self, app: App) -> App:
        app.tasks.add(tasks_for_tests.pay_in_process)
        return app

    @pytest.mark.parametrize("dies", [False, True], ids=["raises", "dies"])
    async def test_a_handler_in_a_process_has_steps_as_one_in_a_thread(
        self, app: App, conn: Connection, tmp_path: Path, dies: bool
    ) -> None:
        path = tmp_path / "lines"
        run_id = await app.enqueue("pay_in_process", {"path": str(path), "dies": dies})
        await Worker(app, processes=1).run(once=True)
        run = await app.wait(run_id, timeout=10)
        assert (run.state, run.attempt) == (RunState.SUCCEEDED, 2), run.error
        assert run.result == ["first", not dies, "ConfigError", "ConfigError"]
        assert path.read_text().split() == ["first", "inner"]
        assert await written(conn) == [(run_id, 1)]


@pytest.mark.parametrize("where", ["first", "second", "in the third", "third"])
async def test_a_worker_that_is_killed_between_steps_has_each_effect_counted_once(
    app: App, conn: Connection, start: Start, tmp_path: Path, where: str
) -> None:
    path = tmp_path / "lines"
    run_id = await app.enqueue("pay_in_steps", {"path": str(path), "dies_behind": where})
    first = start("--once")
    assert await asyncio.to_thread(first.wait, 60) == -signal.SIGKILL
    before = [step.name for step in await app.fetch(steps.of_run(run_id))]
    assert before == ["first", "second", "third"][: {"first": 1, "third": 3}.get(where, 2)]
    start()
    run = await app.wait(run_id, timeout=60)
    assert (run.state, run.losses, run.result) == (RunState.SUCCEEDED, 1, ["first", "second", "third"]), run.error
    assert path.read_text().split() == ["first", "second"]
    assert await written(conn) == [(run_id, 1 if where == "third" else 2)]
