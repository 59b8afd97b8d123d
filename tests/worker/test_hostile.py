"""A handler, its exception or its answer that misbehaves ends its own run, and no other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from queue_service import App, Cancel, Retry, Run, RunState, Snooze, Worker
from queue_service.errors import ClaimLost
from queue_service.tasks import Defer, RetryLater
from tests.hostile import METHODS, MISDEEDS, PROPERTIES, hostile
from tests.support import eventually, working

NEVER_AGAIN = Retry(max_attempts=1)
ACTS = [{name: misdeed} for name in (*METHODS, *PROPERTIES) for misdeed in MISDEEDS]


def misbehaving(number: int, how: str) -> BaseException:
    bad = hostile(ACTS[number], (Exception, BaseException, TimeoutError)[number % 3])
    if how == "raised":
        return bad
    outer = ValueError("outer")
    if how == "cause":
        outer.__cause__ = bad
    else:
        outer.__context__ = bad
    return outer


@pytest.mark.parametrize("how", ["raised", "cause", "context"])
@pytest.mark.parametrize("kind", ["coroutine", "thread", "batch"])
async def test_every_exception_is_its_runs_failure(app: App, kind: str, how: str) -> None:
    if kind == "coroutine":

        @app.task(name="explode", retry=NEVER_AGAIN)
        async def in_a_coroutine(n: int) -> None:
            raise misbehaving(n, how)

    elif kind == "thread":

        @app.task(name="explode", retry=NEVER_AGAIN)
        def in_a_thread(n: int) -> None:
            raise misbehaving(n, how)

    else:

        @app.task(name="explode", batch=10)
        async def in_a_batch(runs: list[Run]) -> list[Any]:
            return [misbehaving(run.payload["n"], how) for run in runs]

    @app.task
    async def healthy() -> str:
        return "well"

    bad = await app.enqueue_many("explode", [{"n": n} for n in range(len(ACTS))], max_attempts=1)
    good = await app.enqueue_many("healthy", [{}] * 3)
    tally = await Worker(app).run(once=True)
    assert (tally.succeeded, tally.failed, tally.lost) == (3, len(ACTS), 0)
    for run in await app.wait_many(bad, timeout=10):
        assert run.error is not None
        assert run.error["reason"] == "raised"
        assert run.error["type"] in {"Hostile", "ValueError"}
    assert {run.result for run in await app.wait_many(good, timeout=10)} == {"well"}


@pytest.mark.parametrize("kind", ["coroutine", "thread"])
@pytest.mark.parametrize("what", ["lost", "later"])
async def test_an_error_of_ours_that_was_made_into_something_else_is_a_failure(app: App, kind: str, what: str) -> None:
    class Lost(ClaimLost):
        def __init__(self) -> None:
            pass

        def __getattribute__(self, name: str) -> Any:
            raise SystemExit(name)

    class Later(RetryLater):
        def __init__(self) -> None:
            pass

    error = Lost if what == "lost" else Later

    if kind == "coroutine":

        @app.task(name="explode", retry=NEVER_AGAIN)
        async def in_a_coroutine() -> None:
            raise error

    else:

        @app.task(name="explode", retry=NEVER_AGAIN)
        def in_a_thread() -> None:
            raise error

    run_id = await app.enqueue("explode", {})
    await Worker(app).run(once=True)
    run = await app.wait(run_id, timeout=10)
    assert (run.state, run.failures) == (RunState.FAILED, 1)


class Liar:
    """Says that it is a Snooze, and raises whenever it is looked at."""

    def __getattribute__(self, name: str) -> Any:
        raise SystemExit(name)


class Bare(Snooze):
    def __init__(self) -> None:
        pass


class Endless(Snooze):
    def __init__(self) -> None:
        self.delay = float("nan")  # type: ignore[assignment]


class Wordless(Cancel):
    def __init__(self) -> None:
        self.reason = object()  # type: ignore[assignment]

    def __str__(self) -> str:
        raise SystemExit


def owned(owner: Any) -> Callable[[], Defer]:
    def make() -> Defer:
        deferred = Defer(0)
        deferred.owner = owner
        return deferred

    return make


ANSWERS: list[tuple[str, Callable[[], Any], RunState]] = [
    ("liar", Liar, RunState.FAILED),
    ("bare", Bare, RunState.FAILED),
    ("endless", Endless, RunState.FAILED),
    ("wordless", Wordless, RunState.CANCELLED),
    ("odd owner", owned("\x00"), RunState.FAILED),
    ("no owner", owned("\ud800"), RunState.FAILED),
    ("class", lambda: Snooze, RunState.FAILED),
    ("raw", lambda: {"n": msgspec.Raw(b"1e5000")}, RunState.FAILED),
]


@pytest.mark.parametrize("kind", ["coroutine", "thread", "batch"])
async def test_every_answer_is_its_runs_ending(app: App, kind: str) -> None:
    if kind == "coroutine":

        @app.task(name="answer", retry=NEVER_AGAIN)
        async def in_a_coroutine(n: int) -> Any:
            return ANSWERS[n][1]() if n >= 0 else "well"

    elif kind == "thread":

        @app.task(name="answer", retry=NEVER_AGAIN)
        def in_a_thread(n: int) -> Any:
            return ANSWERS[n][1]() if n >= 0 else "well"

    else:

        @app.task(name="answer", batch=100)
        async def in_a_batch(runs: list[Run]) -> list[Any]:
            return [ANSWERS[n][1]() if (n := run.payload["n"]) >= 0 else "well" for run in runs]

    bad = await app.enqueue_many("answer", [{"n": n} for n in range(len(ANSWERS))])
    good = await app.enqueue_many("answer", [{"n": -1}] * 3)
    await Worker(app).run(once=True)
    ended = await app.wait_many(bad, timeout=10)
    assert {ANSWERS[n][0]: run.state for n, run in enumerate(ended)} == {name: state for name, _, state in ANSWERS}
    assert {run.result for run in await app.wait_many(good, timeout=10)} == {"well"}


@pytest.mark.parametrize("owner", ["", "\x00", "\ud800", 7])
def test_a_run_can_only_be_left_to_somebody_who_has_a_name(owner: Any) -> None:
    with pytest.raises(ValueError, match="owner of a Defer"):
        Defer(0, owner)


async def test_a_slot_that_was_cancelled_by_somebody_else_is_replaced(app: App) -> None:
    slots: set[asyncio.Task[Any]] = set()

    @app.task
    async def note() -> None:
        task = asyncio.current_task()
        assert task is not None
        slots.add(task)

    async with working(app, {"default": 1}):
        for number in range(1, 4):
            await app.wait(await app.enqueue("note", {}), timeout=10)
            assert len(slots) == number
            (newest,) = [slot for slot in slots if not slot.done()]
            newest.cancel()
            await eventually(newest.done)
