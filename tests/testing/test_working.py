"""`drain` and `process`: the runs a test wants worked off, here and now, as a worker would."""

from __future__ import annotations

import asyncio

import psycopg
import pytest

from queue_service import App, Cancel, Retry, Run, RunState, Snooze
from queue_service.errors import ConfigError, PayloadRefused, TaskUnknown
from queue_service.testing import HandlerFailed, assert_enqueued, drain, on_database, process, refute_enqueued
from tests.testing import computing


class TestDrain:
    async def test_works_off_what_is_due_and_what_that_enqueues(self, app: App) -> None:
        seen = []

        @app.task
        async def first(n: int) -> None:
            await app.enqueue("second", {"n": n}, queue="nobody named it")

        @app.task(queue="later")
        def second(n: int) -> None:
            seen.append(n)

        await app.enqueue_many("first", [{"n": n} for n in range(20)])
        tally = await drain(app)
        assert (tally.succeeded, tally.failed, sorted(seen)) == (40, 0, list(range(20)))
        assert (await drain(app)).succeeded == 0

    async def test_leaves_what_is_due_later_and_what_nobody_here_knows(self, app: App) -> None:
        @app.task
        async def noop() -> None:
            return

        await app.enqueue("noop", {}, delay=60)
        await app.enqueue("unknown", {})
        assert (await drain(app)).succeeded == 0
        await assert_enqueued(app, "noop")
        await assert_enqueued(app, "unknown")

    async def test_takes_only_the_queues_it_is_given(self, app: App) -> None:
        @app.task
        async def noop() -> None:
            return

        await app.enqueue("noop", {}, queue="a")
        await app.enqueue("noop", {}, queue="b")
        assert (await drain(app, ["a"])).succeeded == 1
        await refute_enqueued(app, "noop", queue="a")
        await assert_enqueued(app, "noop", queue="b")

    async def test_refuses_one_text_for_its_list_of_queues(self, app: App) -> None:
        with pytest.raises(ConfigError, match="list of names"):
            await drain(app, "default")

    async def test_with_a_concurrency_of_one_keeps_the_order(self, app: App) -> None:
        seen = []

        @app.task
        async def slow(n: int) -> None:
            await asyncio.sleep(0)
            seen.append(n)

        await app.enqueue_many("slow", [{"n": n} for n in range(50)])
        await drain(app, concurrency=1)
        assert seen == list(range(50))

    async def test_says_in_its_tally_what_failed_and_goes_on(self, app: App) -> None:
        @app.task(retry=Retry(max_attempts=1))
        async def fail(n: int) -> None:
            raise ValueError(n)

        @app.task(retry=Retry(base=60))
        async def retried() -> None:
            raise ValueError

        await app.enqueue_many("fail", [{"n": n} for n in range(3)])
        await app.enqueue("retried", {})
        tally = await drain(app)
        assert (tally.failed, tally.returned, tally.succeeded) == (3, 1, 0)
        await assert_enqueued(app, "retried", failures=1)

    @pytest.mark.parametrize("attempts", [1, 3])
    async def test_raises_the_very_exception_of_an_async_handler_if_asked(self, app: App, attempts: int) -> None:
        mine = ValueError("mine")

        @app.task(retry=Retry(max_attempts=attempts))
        async def fail(run: Run) -> None:
            raise mine

        await app.enqueue("fail", {})
        with pytest.raises(ValueError, match="mine") as raised:
            await drain(app, raising=True)
        assert raised.value is mine

    async def test_raises_the_very_exception_of_a_sync_handler_if_asked(self, app: App) -> None:
        mine = SystemExit("mine")

        @app.task
        def fail() -> None:
            raise mine

        @app.task
        def noop() -> None:
            return

        await app.enqueue("fail", {})
        await app.enqueue("noop", {})
        with pytest.raises(SystemExit) as raised:
            await drain(app, raising=True)
        assert raised.value is mine
        await assert_enqueued(app, "noop", state="succeeded")

    async def test_raises_the_very_exception_that_a_batch_returned_for_one_of_its_runs(self, app: App) -> None:
        mine = ValueError("mine")

        @app.task(batch=10, queue="a")
        async def index(runs: list[Run]) -> dict[int, object]:
            return {run.id: mine if run.payload["n"] == 2 else "fine" for run in runs}

        @app.task(batch=10, queue="b")
        def in_thread(runs: list[Run]) -> list[object]:
            return [mine, *["fine"] * (len(runs) - 1)]

        for task in ("index", "in_thread"):
            await app.enqueue_many(task, [{"n": n} for n in range(5)])
            with pytest.raises(ValueError, match="mine") as raised:
                await drain(app, raising=True)
            assert raised.value is mine
            await assert_enqueued(app, task, state="succeeded", count=4)

    async def test_raises_for_a_failure_that_left_no_exception(self, app: App) -> None:
        @app.task(timeout=0.01, retry=Retry(max_attempts=1))
        async def hang() -> None:
            await asyncio.Event().wait()

        @app.task
        async def no_json() -> object:
            return object()

        run_id = await app.enqueue("hang", {})
        with pytest.raises(HandlerFailed, match=r"'hang' failed \(timeout\)") as raised:
            await drain(app, raising=True)
        assert raised.value.run.id == run_id
        await app.enqueue("no_json", {})
        with pytest.raises(HandlerFailed, match="result_refused"):
            await drain(app, raising=True)

    async def test_raises_for_a_handler_that_failed_in_a_process_of_its_own(self, database: str) -> None:
        with on_database(computing.app, database) as app:
            async with app:
                await app.enqueue("divide", {"a": 1, "b": 0})
                assert (await drain(app)).failed == 1
                await app.enqueue("divide", {"a": 1, "b": 2})
                assert (await drain(app, raising=True)).succeeded == 1
                failing = await app.enqueue("divide", {"a": 2, "b": 0})
                with pytest.raises(HandlerFailed, match="division by zero") as raised:
                    await drain(app, raising=True)
        assert raised.value.run.id == failing

    async def test_raises_nothing_where_nothing_failed(self, app: App) -> None:
        @app.task
        async def outcome(run: Run, word: str) -> Snooze | Cancel | None:
            if word == "snooze":
                return Snooze(60)
            return Cancel("so") if word == "cancel" else None

        await app.enqueue_many("outcome", [{"word": word} for word in ("snooze", "cancel", "succeed")])
        tally = await drain(app, raising=True)
        assert (tally.returned, tally.cancelled, tally.succeeded) == (1, 1, 1)

    async def test_does_not_raise_what_failed_before_it(self, app: App) -> None:
        @app.task(retry=Retry(max_attempts=2))
        async def fail_first(run: Run) -> None:
            if not run.failures:
                raise ValueError

        run_id = await app.enqueue("fail_first", {}, retry_delay=60)
        await drain(app)
        with psycopg.connect(app.conninfo) as beside:
            beside.execute("update queue_service.runs set run_at = clock_timestamp()")
        assert (await drain(app, raising=True)).succeeded == 1
        await assert_enqueued(app, "fail_first", id=run_id, state="succeeded", failures=1)

    def test_opens_an_app_that_is_not_open(self, database: str) -> None:
        app = App(database)

        @app.task
        def noop() -> None:
            return

        with app.sync as q:
            run_id = q.enqueue("noop", {})
            assert asyncio.run(drain(app)).succeeded == 1
            run = q.get(run_id)
        assert run is not None and run.state is RunState.SUCCEEDED

    async def test_leaves_the_app_as_it_was(self, app: App) -> None:
        @app.task
        async def noop() -> None:
            return

        before = dict(app.tasks)
        await drain(app, raising=True)
        assert dict(app.tasks) == before
        assert await app.get(1) is None, "it is still open"


class TestProcess:
    async def test_returns_the_finished_run_with_its_result(self, app: App) -> None:
        @app.task(queue="paused")
        async def add(run: Run, a: int, b: int) -> dict[str, object]:
            return {"sum": a + b, "metadata": run.metadata}

        await app.queues.pause("paused")
        run = await process(app, add, {"a": 1, "b": 2}, metadata={"m": 1}, organization_id="acme")
        assert (run.state, run.result) == (RunState.SUCCEEDED, {"sum": 3, "metadata": {"m": 1}})
        assert (run.payload, run.attempt, run.organization_id) == ({"a": 1, "b": 2}, 1, "acme")

    async def test_gives_the_handler_of_a_batch_one_run(self, app: App) -> None:
        @app.task(batch=10)
        async def index(runs: list[Run]) -> list[object]:
            return [run.payload["n"] for run in runs]

        run = await process(app, index, {"n": 7})
        assert (run.state, run.result) == (RunState.SUCCEEDED, 7)

    async def test_runs_nothing_else(self, app: App) -> None:
        @app.task
        async def fan_out() -> None:
            await app.enqueue("fan_out", {})

        await app.enqueue("fan_out", {})
        await process(app, "fan_out")
        await assert_enqueued(app, "fan_out", count=2)

    async def test_a_handler_that_raises_has_failed_at_once(self, app: App) -> None:
        @app.task
        async def fail() -> None:
            raise ValueError("mine")

        run = await process(app, fail)
        assert run.state is RunState.FAILED
        assert run.error is not None and run.error["message"] == "mine"
        with pytest.raises(ValueError, match="mine"):
            await process(app, fail, raising=True)

    def test_opens_an_app_that_is_not_open(self, database: str) -> None:
        app = App(database)

        @app.task
        def noop() -> None:
            return

        async def test() -> Run:
            await process(app, noop)
            return await assert_enqueued(app, noop, state="succeeded")

        assert asyncio.run(test()).task == "noop"

    async def test_a_snooze_leaves_it_queued(self, app: App) -> None:
        @app.task
        async def snooze() -> Snooze:
            return Snooze(60)

        run = await process(app, snooze)
        assert (run.state, run.failures) == (RunState.QUEUED, 0)

    async def test_what_could_never_run_is_refused(self, app: App) -> None:
        @app.task
        async def add(a: int) -> int:
            return a

        with pytest.raises(TaskUnknown, match="Did you mean 'add'"):
            await process(app, "ad", {})
        with pytest.raises(PayloadRefused, match="argument: 'a'"):
            await process(app, "add", {"b": 1})


async def test_a_worker_of_the_tests_is_gone_from_the_roster(app: App, database: str) -> None:
    @app.task
    async def noop() -> None:
        return

    await process(app, noop)
    with psycopg.connect(database) as beside:
        assert beside.execute("select count(*) from queue_service.workers").fetchone() == (0,)
