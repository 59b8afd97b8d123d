"""When a failed run is tried again: what the task's policy, the run and the handler have to say in it."""

from __future__ import annotations

import asyncio
import math
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from queue_service import App, Retry, RetryLater, Run, RunState, Worker
from queue_service.db.execute import Connection


async def failed_once(app: App, retry: Retry, error: BaseException, **options: Any) -> tuple[Run, float]:
    """The run after one attempt, and the seconds until the next."""

    @app.task(retry=retry)
    async def fail() -> None:
        raise error

    before = datetime.now(UTC)
    run_id = await app.enqueue("fail", {}, **options)
    await Worker(app).run(once=True)
    run = await app.get(run_id)
    assert run is not None
    assert run.failures == 1
    return run, (run.run_at - before).total_seconds()


def close_to(wait: float, seconds: float) -> bool:
    return seconds - 1 < wait < seconds + 30


@pytest.mark.parametrize(
    ("retry", "seconds"),
    [
        (Retry(base=600, cap=10_000, jitter=False), 600),
        (Retry(base=timedelta(minutes=10), cap=timedelta(minutes=5), jitter=False), 300),
        (Retry(backoff="linear", base=200, jitter=False), 200),
        (Retry(backoff="fixed", base=250, jitter=False), 250),
        (Retry(backoff=lambda failures, error: 4_000 * failures + len(str(error))), 4_003),
        (Retry(backoff=lambda *_: timedelta(hours=2)), 7_200),
    ],
)
async def test_the_wait_is_what_the_policy_says(app: App, retry: Retry, seconds: float) -> None:
    run, wait = await failed_once(app, retry, ValueError("abc"))
    assert run.state is RunState.QUEUED
    assert close_to(wait, seconds)


async def test_the_wait_grows_with_the_failures(app: App, conn: Connection) -> None:
    @app.task(retry=Retry(max_attempts=10, backoff="linear", base=1_000, cap=100_000, jitter=False))
    async def fail() -> None:
        raise ValueError

    run_id = await app.enqueue("fail", {})
    await conn.execute("update queue_service.runs set failures = 4, attempt = 4 where id = %s", [run_id])
    before = datetime.now(UTC)
    await Worker(app).run(once=True)
    run = await app.get(run_id)
    assert run is not None
    assert close_to((run.run_at - before).total_seconds(), 5_000)


async def test_a_runs_own_delay_comes_before_the_policy(app: App) -> None:
    def never_asked(failures: int, error: BaseException) -> float:
        raise AssertionError

    _, wait = await failed_once(app, Retry(backoff=never_asked), ValueError(), retry_delay=3_600)
    assert close_to(wait, 3_600)


async def test_a_handler_that_asks_for_a_delay_comes_before_both_and_counts_as_failed(app: App) -> None:
    policy = Retry(backoff="fixed", base=100, never=(RetryLater,))
    run, wait = await failed_once(app, policy, RetryLater(timedelta(hours=2)), retry_delay=50)
    assert run.state is RunState.QUEUED
    assert close_to(wait, 7_200)
    assert run.error is not None
    assert (run.error["reason"], run.error["type"]) == ("raised", "RetryLater")


async def test_a_delay_asked_for_on_the_last_attempt_ends_the_run(app: App) -> None:
    run, _ = await failed_once(app, Retry(max_attempts=1), RetryLater(60))
    assert run.state is RunState.FAILED


@pytest.mark.parametrize(
    ("retry", "error", "state"),
    [
        (Retry(on=(ConnectionError, TimeoutError)), ConnectionResetError(), RunState.QUEUED),
        (Retry(on=(ConnectionError, TimeoutError)), ValueError(), RunState.FAILED),
        (Retry(on=OSError, never=FileNotFoundError), FileNotFoundError(), RunState.FAILED),
        (Retry(on=OSError, never=FileNotFoundError), PermissionError(), RunState.QUEUED),
        (Retry(never=(ValueError,)), ValueError(), RunState.FAILED),
        (Retry(never=(ValueError,)), SystemExit(), RunState.QUEUED),
        (Retry(backoff=lambda *_: None), ValueError(), RunState.FAILED),
    ],
)
async def test_only_errors_that_are_named_are_tried_again(
    app: App, retry: Retry, error: BaseException, state: RunState
) -> None:
    run, _ = await failed_once(app, retry, error)
    assert run.state is state
    assert run.error is not None
    assert run.error["type"] == type(error).__name__


async def test_an_error_that_is_not_tried_again_ends_the_run_in_spite_of_its_own_delay(app: App) -> None:
    run, _ = await failed_once(app, Retry(never=ValueError), ValueError(), retry_delay=10)
    assert run.state is RunState.FAILED


@pytest.mark.parametrize(("on", "state"), [(TimeoutError, RunState.QUEUED), (ValueError, RunState.FAILED)])
async def test_a_timeout_is_a_timeout_error_to_the_policy(app: App, on: type[Exception], state: RunState) -> None:
    @app.task(timeout=0.05, retry=Retry(on=on))
    async def dawdle() -> None:
        await asyncio.Event().wait()

    run_id = await app.enqueue("dawdle", {}, retry_delay=3_600)
    await Worker(app).run(once=True)
    run = await app.get(run_id)
    assert run is not None
    assert (run.state, run.failures) == (state, 1)


class Strange(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even this works")


def broken(answer: Any) -> Any:
    """A policy that answers so, or raises it."""

    def policy(failures: int, error: BaseException) -> Any:
        if isinstance(answer, BaseException):
            raise answer
        return answer

    return policy


@pytest.mark.parametrize(
    "answer",
    [
        RuntimeError("a bug"), SystemExit(1), KeyboardInterrupt(), asyncio.CancelledError(), Strange(), RecursionError(),
        -1, -0.001, math.nan, math.inf, -math.inf, 1e300, 10**400, "soon", True, pytest.param(object(), id="object()"), timedelta(seconds=-1),
        timedelta.max,
    ],
    ids=lambda value: repr(value)[:24],
)  # fmt: skip
async def test_a_policy_that_is_broken_loses_no_run(app: App, answer: Any, caplog: pytest.LogCaptureFixture) -> None:
    run, wait = await failed_once(app, Retry(backoff=broken(answer)), ValueError("the handler's"))
    assert (run.state, run.attempt) == (RunState.QUEUED, 1)
    assert 1.5 < wait < 30
    assert run.error is not None
    assert run.error["message"] == "the handler's"
    (said,) = [record.__dict__ for record in caplog.records if record.levelname == "ERROR"]
    assert (said["run_id"], said["task"]) == (run.id, "fail")
