"""Every way a handler can end, and what becomes of its run."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from queue_service import App, Cancel, Retry, Run, RunState, Snooze, Worker
from queue_service.db.execute import Connection
from queue_service.settings import load
from queue_service.worker.executor import Executor
from queue_service.worker.handlers import threads
from tests.support import enqueued, eventually, listening, one, rows, working

NEVER_AGAIN = Retry(max_attempts=1)


@dataclass
class Holder:
    """JSON for msgspec, yet nothing that our own walk through a value looks into."""

    text: str


async def ended(app: App, run_id: int) -> Run:
    return await app.wait(run_id, timeout=30)


async def executed(app: App, run_id: int, concurrency: int = 10) -> Run:
    """The run, after a worker had nothing more to do."""
    await Worker(app, {"default": concurrency}).run(once=True)
    run = await app.get(run_id)
    assert run is not None
    return run


def a_run() -> Run:
    now = datetime.now(UTC)
    return Run(
        id=1, queue="default", task="t", state=RunState.RUNNING, payload={}, attempt=1, failures=0, losses=0,
        priority=0, created_at=now, run_at=now,
    )  # fmt: skip


async def make_due(conn: Connection, run_id: int) -> None:
    await conn.execute(
        "update queue_service.runs set run_at = clock_timestamp() - interval '1 s' where id = %s", [run_id]
    )


def reason(run: Run) -> Any:
    assert run.error is not None
    return run.error["reason"]


def message(run: Run) -> str:
    assert run.error is not None
    text = run.error["message"]
    assert isinstance(text, str)
    return text


async def test_a_wrapped_handler_may_return_any_awaitable(app: App) -> None:
    def in_a_task(function: Callable[[int], Coroutine[Any, Any, int]]) -> Callable[[int], asyncio.Task[int]]:
        @functools.wraps(function)
        def wrapper(n: int) -> asyncio.Task[int]:
            return asyncio.create_task(function(n))

        return wrapper

    @app.task
    @in_a_task
    async def double(n: int) -> int:
        await asyncio.sleep(0)
        return 2 * n

    plain = await executed(app, await app.enqueue("double", {"n": 4}))
    limited = await executed(app, await app.enqueue("double", {"n": 5}, timeout=timedelta(seconds=10)))
    assert (plain.result, limited.result) == (8, 10)


# Success


@pytest.mark.parametrize(
    "value",
    [
        None, 0, "", False, [], {}, 1.5, "text", -(2**63), 2**63 - 1, 10**400, [1, [2, {"a": None}]], {"a": {"b": [True]}},
        "Grüße, 世界 🐘", 'quote " backslash \\ tab \t', "%s %(x)s {}", [None] * 300,
    ],
)  # fmt: skip
async def test_a_result_is_kept_as_it_was(app: App, value: Any) -> None:
    @app.task
    async def give() -> Any:
        return value

    run = await executed(app, await app.enqueue("give", {}))
    assert (run.state, run.result, run.error) == (RunState.SUCCEEDED, value, None)


async def test_the_payload_arrives_as_keywords(app: App) -> None:
    @app.task
    async def give(a: int, b: str = "default", **more: Any) -> Any:
        return [a, b, more]

    run = await executed(app, await app.enqueue("give", {"a": 1, "c": None, "d": [1.5]}))
    assert run.result == [1, "default", {"c": None, "d": [1.5]}]


async def test_a_sync_handler_runs_in_another_thread_and_leaves_the_loop_alone(app: App) -> None:
    here = threading.get_ident()
    loop_moved_on = threading.Event()

    @app.task
    def block() -> bool:
        assert threading.get_ident() != here
        return loop_moved_on.wait(10)

    @app.task
    async def move_on() -> None:
        loop_moved_on.set()

    blocking = await app.enqueue("block", {})
    await app.enqueue("move_on", {})
    run = await executed(app, blocking)
    assert run.result is True


async def test_sync_handlers_run_side_by_side(app: App) -> None:
    together = threading.Barrier(4)

    @app.task(retry=NEVER_AGAIN)
    def meet() -> None:
        together.wait(10)

    await app.enqueue_many("meet", [{}] * 4)
    tally = await Worker(app, {"default": 4}).run(once=True)
    assert (tally.succeeded, tally.failed) == (4, 0)


async def test_the_run_parameter_is_the_run_itself(app: App) -> None:
    @app.task
    async def describe(n: int, run: Run) -> Any:
        return [n, run.id, run.task, run.queue, run.attempt, run.state.value, run.metadata, run.priority]

    @app.task
    def describe_in_thread(me: Run) -> Any:
        return [me.id, me.organization_id, dict(me.payload)]

    first = await app.enqueue("describe", {"n": 7}, metadata={"who": "test"}, priority=3)
    second = await app.enqueue("describe_in_thread", {}, organization_id="acme")
    run = await executed(app, first)
    assert run.result == [7, first, "describe", "default", 1, "running", {"who": "test"}, 3]
    assert (await ended(app, second)).result == [second, "acme", {}]


# Failure and retry


async def test_a_failed_run_waits_for_its_backoff_and_is_then_tried_again(app: App, conn: Connection) -> None:
    attempts: list[int] = []

    @app.task
    async def stumble(run: Run) -> str:
        attempts.append(run.attempt)
        if run.attempt == 1:
            raise ValueError("not yet")
        return "done"

    run_id = await app.enqueue("stumble", {})
    run = await executed(app, run_id)
    assert (run.state, run.failures, run.losses, attempts) == (RunState.QUEUED, 1, 0, [1])
    assert (reason(run), message(run)) == ("raised", "not yet")
    assert run.error is not None
    assert run.error["type"] == "ValueError"
    assert "stumble" in run.error["traceback"]
    # 2 s, shortened by up to a fifth, from the moment of the failure.
    wait = await one(
        conn, "select extract(epoch from run_at - created_at)::float8 from queue_service.runs where id = %s", run_id
    )
    assert 1.6 <= wait < 30
    await make_due(conn, run_id)
    run = await executed(app, run_id)
    assert (run.state, run.result, run.attempt, run.failures) == (RunState.SUCCEEDED, "done", 2, 1)
    assert attempts == [1, 2]


async def test_a_run_that_is_due_later_is_not_started_before(app: App) -> None:
    started: list[str] = []

    @app.task
    async def note(name: str) -> None:
        started.append(name)

    async with working(app):
        await app.enqueue("note", {"name": "later"}, delay=3_600)
        for n in range(3):
            await ended(app, await app.enqueue("note", {"name": str(n)}))
    assert started == ["0", "1", "2"]


async def test_the_backoff_grows_with_the_failures(app: App, conn: Connection) -> None:
    @app.task(retry=Retry(max_attempts=50))
    async def stumble() -> None:
        raise ValueError("never")

    run_id = await app.enqueue("stumble", {})
    await conn.execute("update queue_service.runs set failures = 20, attempt = 20 where id = %s", [run_id])
    before = datetime.now(UTC)
    run = await executed(app, run_id)
    assert run.failures == 21
    assert timedelta(seconds=230) < run.run_at - before < timedelta(seconds=320)


async def test_a_fixed_retry_delay_comes_before_the_backoff(app: App) -> None:
    @app.task
    async def stumble() -> None:
        raise ValueError("never")

    before = datetime.now(UTC)
    run_id = await app.enqueue("stumble", {}, retry_delay=3_600)
    run = await executed(app, run_id)
    assert run.state is RunState.QUEUED
    assert timedelta(seconds=3_590) < run.run_at - before < timedelta(seconds=3_700)


async def test_a_retry_delay_of_nothing_tries_again_at_once(app: App) -> None:
    attempts: list[int] = []

    @app.task(retry=Retry(max_attempts=4))
    async def stumble(run: Run) -> None:
        attempts.append(run.attempt)
        raise ValueError("never")

    run = await executed(app, await app.enqueue("stumble", {}, retry_delay=0))
    assert (run.state, run.failures, attempts) == (RunState.FAILED, 4, [1, 2, 3, 4])


async def test_a_task_is_tried_three_times_unless_it_says_otherwise(app: App) -> None:
    @app.task
    async def usual() -> None:
        raise ValueError("never")

    @app.task(retry=Retry(max_attempts=2))
    async def twice() -> None:
        raise ValueError("never")

    first = await app.enqueue("usual", {}, retry_delay=0)
    second = await app.enqueue("twice", {}, retry_delay=0)
    third = await app.enqueue("twice", {}, retry_delay=0, max_attempts=5)
    fourth = await app.enqueue("usual", {}, retry_delay=0, max_attempts=1)
    tally = await Worker(app).run(once=True)
    runs = [await ended(app, run_id) for run_id in (first, second, third, fourth)]
    assert [run.failures for run in runs] == [3, 2, 5, 1]
    assert [run.attempt for run in runs] == [3, 2, 5, 1]
    assert {run.state for run in runs} == {RunState.FAILED}
    assert (tally.failed, tally.returned) == (4, 7)


async def test_the_last_error_of_a_run_that_came_through_is_kept(app: App) -> None:
    @app.task
    async def stumble(run: Run) -> None:
        if run.attempt == 1:
            raise ValueError("the first time")

    run = await executed(app, await app.enqueue("stumble", {}, retry_delay=0))
    assert run.state is RunState.SUCCEEDED
    assert message(run) == "the first time"


async def test_snooze_uses_up_no_failure(app: App, conn: Connection) -> None:
    @app.task(retry=NEVER_AGAIN)
    async def wait_for_it(run: Run) -> Any:
        return Snooze(0) if run.attempt < 6 else "awake"

    run = await executed(app, await app.enqueue("wait_for_it", {}))
    assert (run.state, run.result, run.attempt) == (RunState.SUCCEEDED, "awake", 6)
    assert (run.failures, run.losses) == (0, 0)


async def test_snooze_puts_a_run_off_for_its_delay(app: App) -> None:
    @app.task
    async def later() -> Snooze:
        return Snooze(timedelta(hours=1))

    before = datetime.now(UTC)
    run = await executed(app, await app.enqueue("later", {}))
    assert (run.state, run.failures, run.error) == (RunState.QUEUED, 0, None)
    assert timedelta(seconds=3_590) < run.run_at - before < timedelta(seconds=3_700)


async def test_cancel_ends_a_run_cancelled_with_its_reason(app: App) -> None:
    @app.task
    async def give_up() -> Cancel:
        return Cancel("the customer\x00 left")

    @app.task
    def give_up_in_thread() -> Cancel:
        return Cancel()

    first = await app.enqueue("give_up", {})
    second = await app.enqueue("give_up_in_thread", {})
    run = await executed(app, first)
    assert (run.state, reason(run), run.attempt) == (RunState.CANCELLED, "cancelled", 1)
    assert message(run) == "the customer\ufffd left"
    assert (await ended(app, second)).state is RunState.CANCELLED


class Odd(BaseException):
    def __str__(self) -> str:
        raise RuntimeError("not even this works")


@pytest.mark.parametrize(
    "make",
    [
        lambda: SystemExit(3),
        KeyboardInterrupt,
        asyncio.CancelledError,
        GeneratorExit,
        Odd,
        lambda: BaseExceptionGroup("many", [KeyboardInterrupt(), ValueError("x")]),
        StopAsyncIteration,
        StopIteration,
        lambda: TimeoutError("one of its own"),
        lambda: ValueError("x" * 1_000_000),
        lambda: ValueError("NUL \x00 and surrogate \ud800"),
    ],
)
@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_whatever_a_handler_raises_is_its_runs_failure_and_the_worker_lives(
    app: App, kind: str, make: Callable[[], BaseException]
) -> None:
    if kind == "async":

        @app.task(retry=NEVER_AGAIN)
        async def explode() -> None:
            await asyncio.sleep(0)
            raise make()

    else:

        @app.task(name="explode", retry=NEVER_AGAIN)
        def explode_in_thread() -> None:
            raise make()

    @app.task
    async def healthy() -> str:
        return "well"

    async with working(app, {"default": 1}) as worker:
        run = await ended(app, await app.enqueue("explode", {}))
        after = await ended(app, await app.enqueue("healthy", {}, timeout=10))
        assert (run.state, reason(run), run.failures) == (RunState.FAILED, "raised", 1)
        assert len(message(run)) < 10_000
        assert "\x00" not in message(run)
        assert after.result == "well"
        await eventually(lambda: (worker.tally.succeeded, worker.tally.failed) == (1, 1))


async def test_a_handler_that_raises_before_it_waits_fails_too(app: App) -> None:
    @app.task(retry=NEVER_AGAIN)
    async def explode() -> None:
        raise KeyboardInterrupt

    run = await executed(app, await app.enqueue("explode", {}))
    assert run.state is RunState.FAILED


async def test_a_handler_that_cancels_its_own_task_fails_and_leaves_its_slot_whole(app: App) -> None:
    @app.task(retry=NEVER_AGAIN)
    async def cancel_myself() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.Event().wait()

    @app.task
    async def healthy() -> str:
        return "well"

    async with working(app, {"default": 1}):
        run = await ended(app, await app.enqueue("cancel_myself", {}))
        after = await ended(app, await app.enqueue("healthy", {}, timeout=10))
    assert run.state is RunState.FAILED
    assert after.result == "well"


async def test_a_cancellation_that_a_handler_left_behind_does_not_hit_the_next_run(app: App) -> None:
    @app.task
    async def cancel_myself_and_return() -> str:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        return "returned"

    @app.task
    async def healthy() -> str:
        await asyncio.sleep(0)
        return "well"

    async with working(app, {"default": 1}):
        first = await ended(app, await app.enqueue("cancel_myself_and_return", {}))
        after = await ended(app, await app.enqueue("healthy", {}, timeout=10))
    assert first.result == "returned"
    assert (after.result, after.attempt) == ("well", 1)


async def test_a_payload_that_does_not_fit_the_handler_is_a_failure(app: App, conn: Connection) -> None:
    @app.task(retry=NEVER_AGAIN)
    async def exact(a: int) -> int:
        return a

    @app.task(name="exact_in_thread", retry=NEVER_AGAIN)
    def exact_in_thread(a: int) -> int:
        return a

    wrong = await enqueued(conn, "exact", payload='{"b": 1}')
    wrong_too = await enqueued(conn, "exact_in_thread", payload='{"a": 1, "b": 1}')
    run = await executed(app, wrong)
    assert (run.state, run.failures) == (RunState.FAILED, 1)
    assert (await ended(app, wrong_too)).state is RunState.FAILED


# Timeouts


@pytest.mark.parametrize("where", ["task", "run", "run over task"])
async def test_a_handler_over_its_timeout_fails_with_that_reason(app: App, where: str) -> None:
    cancelled = asyncio.Event()
    of_task = {"task": 0.05, "run": None, "run over task": 3_600}[where]
    of_run = {"task": None, "run": 0.05, "run over task": 0.05}[where]

    @app.task(timeout=of_task, retry=NEVER_AGAIN)
    async def dawdle() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    run = await executed(app, await app.enqueue("dawdle", {}, timeout=of_run))
    assert (run.state, reason(run), run.failures) == (RunState.FAILED, "timeout", 1)
    assert "0.05 s" in message(run)
    assert cancelled.is_set()


async def test_a_timeout_is_tried_again_like_any_failure(app: App) -> None:
    @app.task(timeout=0.05)
    async def dawdle(run: Run) -> str:
        if run.attempt == 1:
            await asyncio.Event().wait()
        return "quick"

    run = await executed(app, await app.enqueue("dawdle", {}, retry_delay=0))
    assert (run.state, run.result, run.failures) == (RunState.SUCCEEDED, "quick", 1)


@pytest.mark.parametrize("name", ["alone", "together"])
async def test_what_was_made_to_stop_is_with_the_finisher_before_anybody_looks(
    app: App, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    absorb, was_found = Executor._absorb, []

    async def absorb_and_look(self: Executor, slot: asyncio.Task[Any]) -> None:
        was_found.append(self.is_idle and not self._finisher.is_idle)
        await absorb(self, slot)

    @app.task(timeout=0.05)
    async def alone() -> None:
        await asyncio.Event().wait()

    @app.task(timeout=0.05, batch=10)
    async def together(runs: list[Run]) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(Executor, "_absorb", absorb_and_look)
    await executed(app, await app.enqueue(name, {}, retry_delay=3_600))
    assert was_found == [True]


async def test_a_sync_handler_over_its_timeout_fails_and_its_late_return_changes_nothing(app: App) -> None:
    release = threading.Event()
    returned = threading.Event()

    @app.task(timeout=0.05, retry=NEVER_AGAIN)
    def dawdle() -> str:
        release.wait(20)
        returned.set()
        return "too late"

    run_id = await app.enqueue("dawdle", {})
    async with working(app) as worker:
        run = await ended(app, run_id)
        release.set()
        await eventually(returned.is_set)
        await eventually(lambda: (worker.tally.failed, worker.tally.succeeded, worker.tally.lost) == (1, 0, 0))
    assert (run.state, reason(run)) == (RunState.FAILED, "timeout")


async def test_a_sync_handler_abandoned_by_its_timeout_does_not_stand_in_the_way_of_others(app: App) -> None:
    release = threading.Event()

    @app.task(timeout=0.05, retry=NEVER_AGAIN)
    def dawdle() -> None:
        release.wait(60)

    @app.task
    def healthy() -> str:
        return "well"

    async with working(app, {"default": 1}):
        try:
            run = await ended(app, await app.enqueue("dawdle", {}))
            assert reason(run) == "timeout"
            after = await ended(app, await app.enqueue("healthy", {}))
            assert after.result == "well"
        finally:
            release.set()


async def test_a_given_up_thread_is_reported_with_what_it_is_doing(app: App, caplog: pytest.LogCaptureFixture) -> None:
    release = threading.Event()

    @app.task(timeout=0.5, retry=NEVER_AGAIN)
    def dawdle_for_long() -> None:
        release.wait(60)

    async with working(app):
        try:
            run = await ended(app, await app.enqueue("dawdle_for_long", {}))
        finally:
            release.set()
    reports = [record.__dict__ for record in caplog.records if "was given up" in record.message]
    assert [(report["run_id"], report["task"], report["abandoned"]) for report in reports] == [
        (run.id, "dawdle_for_long", 1)
    ]
    assert "release.wait(60)" in reports[0]["stack"]


async def test_with_too_many_given_up_threads_sync_runs_wait_and_async_ones_do_not(
    app: App, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "MAX_ABANDONED", 2)
    release = threading.Event()
    begun: list[int] = []

    @app.task(timeout=0.05, retry=NEVER_AGAIN)
    def dawdle() -> None:
        begun.append(1)
        release.wait(60)

    @app.task
    def healthy() -> str:
        return "well"

    @app.task
    async def on_the_loop() -> str:
        return "well"

    def errors() -> list[str]:
        return [record.message for record in caplog.records if record.levelname == "ERROR"]

    caplog.set_level("INFO")
    async with working(app, {"default": 1}):
        try:
            dawdling = await app.enqueue_many("dawdle", [{}] * 2)
            assert [reason(await ended(app, run_id)) for run_id in dawdling] == ["timeout"] * 2
            assert len(errors()) == 1
            assert "too many threads" in errors()[0]
            waiting = await app.enqueue_many("healthy", [{}] * 3)
            others = [await ended(app, await app.enqueue("on_the_loop", {})) for _ in range(5)]
            assert {other.result for other in others} == {"well"}
            # They are not claimed at all.
            left = [run for run_id in waiting if (run := await app.get(run_id)) is not None]
            assert [(run.state, run.attempt) for run in left] == [(RunState.QUEUED, 0)] * 3
        finally:
            release.set()
        assert [(await ended(app, run_id)).result for run_id in waiting] == ["well"] * 3
    assert len(begun) == 2
    assert len(errors()) == 1
    assert any("begun again" in record.message for record in caplog.records)


async def test_a_sync_run_that_was_already_claimed_goes_back_with_no_failure(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "MAX_ABANDONED", 1)
    release = threading.Event()

    @app.task(timeout=0.05, retry=NEVER_AGAIN)
    def dawdle() -> None:
        release.wait(60)

    @app.task(retry=NEVER_AGAIN)
    def healthy() -> str:
        return "well"

    async with working(app, {"default": 1}) as worker:
        assert worker._parts is not None
        try:
            await ended(app, await app.enqueue("dawdle", {}))
            # As if it had been claimed just before.
            worker._parts._claimable[:] = sorted(app.tasks)
            run_id = await app.enqueue("healthy", {})
            await eventually(lambda: worker.tally.returned >= 1)
        finally:
            release.set()
        run = await ended(app, run_id)
    assert (run.result, run.failures, run.losses) == ("well", 0, 0)
    assert run.attempt >= 2


async def test_a_thread_that_had_just_ended_is_not_counted_as_given_up() -> None:
    class Late(threads.Threads):
        """Is cancelled in the very moment in which the answer is there."""

        def _done(self, *arguments: Any) -> None:
            super()._done(*arguments)
            running.cancel()

    given = Late()
    running = asyncio.create_task(given.run(a_run(), int))
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not given._abandoned
    given.close()


# What a handler can see of its own end


@pytest.mark.parametrize("why", ["cancelled", "over its time", "lost", "handed back"])
async def test_a_handler_in_a_thread_sees_that_it_should_stop(app: App, conn: Connection, why: str) -> None:
    seen: list[tuple[int, bool]] = []
    stopped = threading.Event()

    @app.task(timeout=1 if why == "over its time" else None, retry=NEVER_AGAIN)
    def poll(run: Run) -> None:
        if run.attempt == 1:
            seen.append((run.id, run.cancelled))
            while not run.cancelled and not stopped.wait(0.005):
                pass
            seen.append((run.id, run.cancelled))

    bystanders: list[bool] = []

    @app.task
    async def bystander(run: Run) -> None:
        bystanders.append(run.cancelled)

    run_id = await app.enqueue("poll", {})
    try:
        async with working(app) as worker:
            await eventually(lambda: seen)
            if why == "cancelled":
                await app.cancel(run_id)
            elif why == "lost":
                await conn.execute("delete from queue_service.leases")
            elif why == "handed back":
                worker.stop(now=True)
            await eventually(lambda: len(seen) == 2)
            if why != "handed back":
                await ended(app, await app.enqueue("bystander", {}))
                assert bystanders == [False]
    finally:
        stopped.set()
    assert seen == [(run_id, False), (run_id, True)]


async def test_an_async_handler_sees_why_it_is_cancelled_and_so_do_threads_it_started(app: App) -> None:
    seen: list[bool] = []
    release = threading.Event()

    def in_thread(run: Run) -> None:
        release.wait(20)
        seen.append(run.cancelled)

    @app.task(timeout=0.5, retry=NEVER_AGAIN)
    async def delegate(run: Run) -> None:
        try:
            await asyncio.to_thread(in_thread, run)
        except asyncio.CancelledError:
            seen.append(run.cancelled)
            raise

    async with working(app):
        run = await ended(app, await app.enqueue("delegate", {}))
        release.set()
        await eventually(lambda: len(seen) == 2)
    assert (reason(run), seen) == ("timeout", [True, True])


async def test_a_handler_that_goes_on_after_its_time_can_still_be_cancelled(app: App) -> None:
    late = asyncio.Event()

    @app.task(timeout=0.05, retry=NEVER_AGAIN)
    async def stubborn() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        late.set()
        await asyncio.Event().wait()

    async with working(app, {"default": 1}):
        run_id = await app.enqueue("stubborn", {})
        await asyncio.wait_for(late.wait(), 30)
        await app.cancel(run_id)
        assert (await ended(app, run_id)).state is RunState.CANCELLED


# Results that cannot be stored as they are


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        ("NUL \x00!", "NUL \ufffd!"),
        ("lone \ud800!", "lone \ufffd!"),
        ("lone " + chr(0xDFFF), "lone \ufffd"),
        (float("nan"), None),
        ([float("inf"), -float("inf"), 1.0], [None, None, 1.0]),
        ({"a\x00": ["\x00", {"b": "\ud900"}]}, {"a\ufffd": ["\ufffd", {"b": "\ufffd"}]}),
        (("a\x00", "b"), ["a\ufffd", "b"]),
        (Holder("NUL \x00"), {"text": "NUL \ufffd"}),
        ([Holder("lone \ud800")] * 3, [{"text": "lone \ufffd"}] * 3),
    ],
)
async def test_what_jsonb_refuses_is_replaced_in_results(app: App, value: Any, stored: Any) -> None:
    @app.task
    async def give() -> Any:
        return value

    run = await executed(app, await app.enqueue("give", {}))
    assert (run.state, run.result) == (RunState.SUCCEEDED, stored)


def deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        object(), lambda: 1, 1j, {1j: 1}, b"\xff" * 500_000, "x" * 300_000, deep(500), deep(100_000),
        msgspec.Raw(b"{this is no JSON"), msgspec.Raw(b'1},{"result":2'),
    ],
    ids=[
        "object", "function", "complex", "odd key", "long bytes", "long", "deep", "very deep",
        "raw text", "raw text that would shift the others",
    ],
)  # fmt: skip
async def test_a_result_that_cannot_be_stored_ends_its_run_once_and_loses_nothing(app: App, value: Any) -> None:
    calls: list[int] = []

    @app.task
    async def give() -> Any:
        calls.append(1)
        return value

    @app.task
    async def healthy(n: int) -> int:
        return n

    before = await app.enqueue_many("healthy", [{"n": n} for n in range(20)])
    run_id = await app.enqueue("give", {})
    behind = await app.enqueue_many("healthy", [{"n": n} for n in range(20)])
    tally = await Worker(app).run(once=True)
    run = await ended(app, run_id)
    assert (run.state, reason(run), run.failures, calls) == (RunState.FAILED, "result_refused", 1, [1])
    assert run.result is None
    assert [(await ended(app, each)).result for each in (*before, *behind)] == [*range(20), *range(20)]
    assert (tally.succeeded, tally.failed, tally.returned, tally.lost) == (40, 1, 0, 0)


async def test_the_limit_of_a_result_is_the_setting(database: str) -> None:
    settings = load({"QUEUE_SERVICE_PAYLOAD_LIMIT": "1000", "QUEUE_SERVICE_POLL_INTERVAL": "100ms"})
    async with App(database, settings=settings) as app:

        @app.task
        async def fill(size: int) -> str:
            return "x" * size

        fits = await app.enqueue("fill", {"size": 998})
        is_over = await app.enqueue("fill", {"size": 999})
        await Worker(app).run(once=True)
        assert (await ended(app, fits)).state is RunState.SUCCEEDED
        over = await ended(app, is_over)
    assert (over.state, reason(over)) == (RunState.FAILED, "result_refused")
    assert "1,000" in message(over)


# Runs that are not for us


async def test_a_run_of_an_unknown_task_is_left_alone(app: App) -> None:
    @app.task
    async def known() -> str:
        return "done"

    foreign = await app.enqueue("somewhere_else", {})
    run = await executed(app, await app.enqueue("known", {}))
    assert run.result == "done"
    left = await app.get(foreign)
    assert left is not None
    assert (left.state, left.attempt) == (RunState.QUEUED, 0)


async def test_a_run_that_expired_never_starts_and_ends_expired(app: App, conn: Connection) -> None:
    started: list[str] = []

    @app.task
    async def note(name: str) -> None:
        started.append(name)

    expired = await app.enqueue("note", {"name": "expired"}, expires_in=3_600)
    in_time = await app.enqueue("note", {"name": "in time"}, expires_in=3_600)
    await conn.execute(
        "update queue_service.runs set run_at = run_at - interval '2 h', expires_at = expires_at - interval '2 h' where id = %s",
        [expired],
    )
    async with working(app):
        run = await ended(app, expired)
        assert (await ended(app, in_time)).state is RunState.SUCCEEDED
    assert (run.state, reason(run), run.attempt) == (RunState.EXPIRED, "expired", 0)
    assert started == ["in time"]


# Cancelling


@pytest.fixture
def patient() -> dict[str, str]:
    """Clocks so slow that only notices can be quick."""
    return {f"QUEUE_SERVICE_{name}": "1h" for name in ("LEASE", "POLL_INTERVAL", "SWEEP_INTERVAL")}


async def cancelled(app: App, conn: Connection, cancel: Callable[[int], Awaitable[object]]) -> Run:
    """A run whose handler would wait for ever: what became of it once `cancel` had stopped that."""
    started, stopped = asyncio.Event(), asyncio.Event()

    @app.task
    async def wait_for_ever() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    async with working(app):
        await listening(conn)
        run_id = await app.enqueue("wait_for_ever", {})
        await asyncio.wait_for(started.wait(), 30)
        await cancel(run_id)
        await asyncio.wait_for(stopped.wait(), 30)
        return await ended(app, run_id)


@pytest.mark.direct("no notice comes through it")
async def test_cancelling_a_running_run_cancels_its_handler_at_once(
    database: str, conn: Connection, patient: dict[str, str]
) -> None:
    async with App(database, settings=load(patient)) as app:
        run = await cancelled(app, conn, app.cancel)
    assert (run.state, reason(run), run.failures) == (RunState.CANCELLED, "cancelled", 0)


@pytest.mark.direct("no notice comes through it")
@pytest.mark.parametrize("slow", ["LEASE", "POLL_INTERVAL"])
async def test_a_request_to_cancel_is_found_without_its_notice(database: str, conn: Connection, slow: str) -> None:
    ask = "update queue_service.runs set cancel_requested = true where id = %s"
    paces = {"QUEUE_SERVICE_LEASE": "3s", "QUEUE_SERVICE_POLL_INTERVAL": "100ms"}
    async with App(database, settings=load(paces | {f"QUEUE_SERVICE_{slow}": "1h"})) as app:
        run = await cancelled(app, conn, lambda run_id: conn.execute(ask, [run_id]))
    assert run.state is RunState.CANCELLED


async def test_a_cancelled_sync_handler_is_abandoned(app: App) -> None:
    started, release = threading.Event(), threading.Event()

    @app.task
    def wait_for_ever() -> None:
        started.set()
        release.wait(30)

    async with working(app):
        run_id = await app.enqueue("wait_for_ever", {})
        await eventually(started.is_set)
        assert await app.cancel(run_id)
        run = await ended(app, run_id)
        release.set()
    assert run.state is RunState.CANCELLED


async def test_a_slot_serves_on_after_its_run_was_cancelled(app: App) -> None:
    started = asyncio.Event()

    @app.task
    async def wait_for_ever() -> None:
        started.set()
        await asyncio.Event().wait()

    @app.task
    async def healthy() -> str:
        await asyncio.sleep(0)
        return "well"

    async with working(app, {"default": 1}):
        for _ in range(3):
            started.clear()
            run_id = await app.enqueue("wait_for_ever", {}, timeout=60)
            await asyncio.wait_for(started.wait(), 30)
            await app.cancel(run_id)
            assert (await ended(app, run_id)).state is RunState.CANCELLED
            after = await ended(app, await app.enqueue("healthy", {}, timeout=10))
            assert (after.result, after.failures) == ("well", 0)


async def test_a_handler_that_ends_well_in_spite_of_a_cancellation_keeps_its_result(app: App) -> None:
    started = asyncio.Event()

    @app.task
    async def stubborn() -> str:
        started.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return "came through"

    @app.task(retry=NEVER_AGAIN, timeout=0.05)
    async def dawdle() -> None:
        await asyncio.Event().wait()

    async with working(app, {"default": 1}):
        run_id = await app.enqueue("stubborn", {})
        await asyncio.wait_for(started.wait(), 30)
        await app.cancel(run_id)
        run = await ended(app, run_id)
        # Its cancellation is not left standing: it would break the next timeout in that slot.
        after = await ended(app, await app.enqueue("dawdle", {}))
    assert (run.state, run.result) == (RunState.SUCCEEDED, "came through")
    assert reason(after) == "timeout"


async def test_a_run_cancelled_while_it_waited_never_starts(app: App) -> None:
    started: list[int] = []

    @app.task
    async def note(n: int) -> None:
        started.append(n)

    run_id = await app.enqueue("note", {"n": 1})
    assert await app.cancel(run_id)
    run = await executed(app, run_id)
    assert (run.state, started) == (RunState.CANCELLED, [])


async def test_a_run_that_fails_after_it_was_asked_to_cancel_is_not_tried_again(app: App, conn: Connection) -> None:
    started, go_on = asyncio.Event(), asyncio.Event()

    @app.task
    async def stumble() -> None:
        started.set()
        await go_on.wait()
        raise ValueError("after all")

    async with working(app) as worker:
        run_id = await app.enqueue("stumble", {}, retry_delay=0)
        await asyncio.wait_for(started.wait(), 30)
        # In one go, so that the request can be seen by nobody before the failure is written.
        await conn.execute("update queue_service.runs set cancel_requested = true where id = %s", [run_id])
        go_on.set()
        run = await ended(app, run_id)
        assert worker.tally.succeeded == 0
    assert (run.state, run.attempt) == (RunState.CANCELLED, 1)


# Order


async def test_runs_start_by_priority_and_then_by_age(app: App) -> None:
    order: list[int] = []

    @app.task
    async def note(n: int) -> None:
        order.append(n)
        await asyncio.sleep(0)

    for n, priority in enumerate([0, 5, -3, 5, 32767, 0, -32768, 9]):
        await app.enqueue("note", {"n": n}, priority=priority)
    await Worker(app, {"default": 1}).run(once=True)
    assert order == [4, 7, 1, 3, 0, 5, 2, 6]


async def test_a_later_run_of_higher_priority_passes_a_backlog_of_slow_runs(app: App) -> None:
    order: list[str] = []

    @app.task
    async def slow(name: str) -> None:
        order.append(name)
        await asyncio.sleep(0.2)  # the work of a slow handler

    await app.enqueue_many("slow", [{"name": "low"}] * 100)
    overtaken: list[int] = []
    async with working(app, {"default": 2}) as worker:
        for n in range(4):
            # Others enqueue all the time, so that the worker has much to look at.
            while len(order) < 5 * (n + 1):
                await app.enqueue("slow", {"name": "low"})
            await app.enqueue("slow", {"name": f"high {n}"}, priority=1)
            before = len(order)
            await eventually(lambda: f"high {n}" in order)  # noqa: B023
            overtaken.append(order.index(f"high {n}") - before)
        worker.stop()
    # The two slots may be filled a moment before it comes, and one run may have been claimed ahead.
    assert max(overtaken) <= 3


async def test_a_backlog_of_short_runs_does_not_hide_a_higher_priority(app: App) -> None:
    order: list[int] = []

    @app.task
    async def short(n: int) -> None:
        order.append(n)
        if n == 100:
            await app.enqueue("short", {"n": -1}, priority=1)
        await asyncio.sleep(0.001)  # the work of a short handler

    await app.enqueue_many("short", [{"n": n} for n in range(1_000)])
    await Worker(app, {"default": 1}).run(once=True)
    assert len(order) == 1_001
    assert order.index(-1) < 500


async def test_counters_agree_with_the_rows(app: App, conn: Connection) -> None:
    @app.task(retry=NEVER_AGAIN)
    async def vary(n: int) -> Any:
        if n % 4 == 0:
            raise ValueError(str(n))
        return Cancel("no") if n % 4 == 1 else n

    await app.enqueue_many("vary", [{"n": n} for n in range(100)])
    tally = await Worker(app).run(once=True)
    counted = dict(await rows(conn, "select state, count(*) from queue_service.finished_runs group by state"))
    assert counted == {"failed": 25, "cancelled": 25, "succeeded": 50}
    assert (tally.failed, tally.cancelled, tally.succeeded) == (25, 25, 50)
