"""What a worker calls when it starts and when it stops."""

from __future__ import annotations

import asyncio

import pytest

from queue_service import App, Worker
from queue_service.errors import ConfigError
from queue_service.worker import hooks
from tests.support import eventually


async def test_hooks_are_called_around_the_handlers_and_the_last_to_start_stops_first(app: App) -> None:
    told: list[str] = []

    @app.task()
    async def t() -> None:
        told.append("handler")

    @app.on_start
    async def connect() -> None:
        assert app.is_open
        told.append("connect")

    @app.on_stop
    async def disconnect() -> None:
        await app.enqueue("t", {})
        told.append("disconnect")

    app.on_start(lambda: told.append("warm up"))
    app.on_stop(lambda: told.append("cool down"))
    await app.enqueue("t", {})
    await Worker(app, on_start=lambda: told.append("mine"), on_stop=lambda: told.append("mine too")).run(once=True)
    assert told == ["connect", "warm up", "mine", "handler", "mine too", "cool down", "disconnect"]


async def test_a_worker_whose_start_fails_begins_nothing_and_stops_what_was_begun(app: App) -> None:
    stopped: list[str] = []

    @app.task()
    async def t() -> None: ...

    @app.on_start
    def fail() -> None:
        raise LookupError("no such model")

    @app.on_stop
    def stop() -> None:
        stopped.append("stop")

    run_id = await app.enqueue("t", {})
    with pytest.raises(LookupError, match="no such model"):
        await Worker(app).run(once=True)
    run = await app.get(run_id)
    assert run is not None
    assert run.attempt == 0
    assert stopped == ["stop"]


async def test_a_hook_that_fails_or_takes_for_ever_keeps_no_other_from_stopping(
    app: App, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hooks, "STOP_SECONDS", 0.05)
    stopped = asyncio.Event()
    app.on_stop(stopped.set)

    @app.on_stop
    async def hang() -> None:
        await asyncio.Event().wait()

    @app.on_stop
    def fail() -> None:
        raise ValueError("and so on")

    await Worker(app).run(once=True)
    assert stopped.is_set()
    assert [record.message for record in caplog.records if "hook" in record.message] == [
        "a hook of stopping failed"
    ] * 2


async def test_hooks_run_when_a_worker_is_cancelled(app: App) -> None:
    begun, stopped = asyncio.Event(), asyncio.Event()
    app.on_start(begun.set)
    app.on_stop(stopped.set)
    working = asyncio.create_task(Worker(app).run())
    await eventually(begun.is_set)
    working.cancel()
    await asyncio.wait([working])
    assert stopped.is_set()


def test_a_hook_is_a_function() -> None:
    with pytest.raises(ConfigError, match="without brackets"):
        App("postgresql://nobody@localhost/nothing").on_start(None)  # type: ignore[type-var]
