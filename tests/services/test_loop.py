"""Long-lived tasks: whatever goes wrong in one, it goes on, and whoever asks sees it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import timedelta

import pytest
import uvloop

from queue_service.errors import DatabaseUnavailable
from queue_service.services import loop
from queue_service.services.loop import Service, Services, every
from tests.hostile import MISDEEDS, hostile
from tests.support import eventually


@pytest.fixture
async def services(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Services]:
    monkeypatch.setattr(loop, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(loop, "MAX_PAUSE", 0.002)
    made = Services()
    yield made
    await made.close()


async def test_work_that_raises_is_begun_again_and_shows_that_it_fails_until_it_is_well(services: Services) -> None:
    begun, may_work = 0, asyncio.Event()

    async def work(service: Service) -> None:
        nonlocal begun
        begun += 1
        if not may_work.is_set():
            raise RuntimeError("not yet")
        service.well()
        await asyncio.Event().wait()

    service = services.ensure("work", work)
    await eventually(lambda: begun >= 3)
    assert not service.condition.is_well
    assert service.condition.failing is not None
    assert "not yet" in (service.why or "")
    may_work.set()
    await eventually(lambda: service.condition.is_well)


@pytest.mark.parametrize("method", ["__str__", "__class__", "__cause__", "__notes__", "__getattribute__"])
@pytest.mark.parametrize("misdeed", MISDEEDS)
async def test_no_exception_whatever_it_does_when_it_is_asked_ends_it(
    services: Services, method: str, misdeed: str
) -> None:
    begun, error = 0, hostile({method: misdeed})

    async def work(service: Service) -> None:
        nonlocal begun
        begun += 1
        raise error

    services.ensure("work", work)
    await eventually(lambda: begun >= 3)


async def test_one_that_fails_leaves_the_others_alone(services: Services) -> None:
    turns = 0

    async def broken(_: Service) -> None:
        raise RuntimeError("again and again")

    async def turn() -> None:
        nonlocal turns
        turns += 1

    services.ensure("broken", broken)
    whole = services.ensure("whole", every(timedelta(milliseconds=1), turn))
    await eventually(lambda: turns >= 5)
    assert whole.condition.is_well
    assert {service.name for service in services if not service.condition.is_well} == {"broken"}


async def test_each_reason_is_logged_once(services: Services, caplog: pytest.LogCaptureFixture) -> None:
    errors: Sequence[Exception] = (
        [RuntimeError("one")] * 3 + [DatabaseUnavailable("away")] * 3 + [RuntimeError("two")] * 3
    )
    seen = iter(errors)

    async def once() -> None:
        if (error := next(seen, None)) is not None:
            raise error

    with caplog.at_level(logging.INFO):
        service = services.ensure("work", every(timedelta(milliseconds=1), once))
        await eventually(lambda: next(seen, None) is None and service.condition.is_well)
    said = [record.levelname for record in caplog.records if record.name.endswith("loop")]
    assert said == ["ERROR", "WARNING", "ERROR", "INFO"]


async def test_it_runs_once_however_often_it_is_asked_for_and_ends_when_it_is_stopped(services: Services) -> None:
    running = 0

    async def work(_: Service) -> None:
        nonlocal running
        running += 1
        try:
            await asyncio.Event().wait()
        finally:
            running -= 1

    assert services.ensure("work", work) is services.ensure("work", work)
    await eventually(lambda: running == 1)
    services.stop("work")
    services.ensure("work", work)
    await eventually(lambda: running == 1)
    await services.close()
    assert running == 0
    assert list(services) == []


async def test_one_that_was_stopped_is_not_cancelled_again_when_all_are_closed(services: Services) -> None:
    """psycopg, when it is cancelled, has the statement cancelled on the server; a second time leaves that undone, and says so on
    standard error."""
    begun, cancels = asyncio.Event(), 0

    async def work(_: Service) -> None:
        nonlocal cancels
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancels += 1
            try:
                for _turn in range(10):
                    await asyncio.sleep(0)  # steps of the loop
            except asyncio.CancelledError:
                cancels += 1

    services.ensure("work", work)
    await begun.wait()
    services.stop("work")
    await asyncio.sleep(0)  # a step of the loop
    await services.close()
    assert cancels == 1


async def test_one_that_somebody_else_cancels_is_begun_anew(services: Services) -> None:
    begun = 0

    async def work(_: Service) -> None:
        nonlocal begun
        begun += 1
        await asyncio.Event().wait()

    service = services.ensure("work", work)
    await eventually(lambda: begun == 1)
    assert service.task is not None
    service.task.cancel()
    await eventually(lambda: begun == 2)


async def test_one_whose_work_is_done_is_not_begun_again(services: Services) -> None:
    begun = 0

    async def work(_: Service) -> None:
        nonlocal begun
        begun += 1

    service = services.ensure("work", work)
    await asyncio.wait_for(service.has_returned.wait(), 5)
    await eventually(lambda: list(services) == [])
    assert begun == 1


@pytest.mark.parametrize("on_loop", [asyncio.run, uvloop.run])
def test_closing_ends_work_of_which_a_timeout_passes_at_that_moment(on_loop: Callable[..., None]) -> None:
    async def patient(_: Service) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.01):
                    await asyncio.Event().wait()

    async def closed() -> None:
        services = Services()
        services.ensure("patient", patient)
        await asyncio.sleep(0)
        closing = asyncio.create_task(services.close())
        # The loop comes back when both are due.
        time.sleep(0.02)  # noqa: ASYNC251
        async with asyncio.timeout(10):
            await closing

    on_loop(closed())
