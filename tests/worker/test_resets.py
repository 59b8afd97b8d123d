"""Attempts seen from outside: an event says of which attempt it is, and a new one begins with a reset."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from queue_service import App, Retry, Run, Snooze, Turn, Worker
from queue_service.db.execute import Connection
from queue_service.db.query import Query
from queue_service.worker.resets import after_reset
from tests.support import eventually, one, working

AGAIN = Retry(max_attempts=3, backoff="fixed", base=0, jitter=False)
TURN = Turn(deployment="dep-1", message_id="m1", stream="conv-1")


async def told(app: App) -> list[tuple[str, Any, int | None]]:
    return [(each.kind, each.body.get("text"), each.attempt) for each in await app.events.read("conv-1")]


async def work(app: App, run_id: int) -> None:
    async with working(app):
        await app.wait(run_id, timeout=10)


async def test_a_new_attempt_resets_the_half_answer_of_the_one_before(app: App) -> None:
    @app.task(retry=AGAIN)
    async def t(run: Run) -> None:
        await app.events.append("conv-1", "delta", {"text": f"Hel{run.attempt}"})
        await app.events.append("other", "delta", {"text": "not of the turn's stream"})
        if run.attempt < 3:
            raise ValueError
        await app.turns.commit_reply("dep-1", ["m1"], {"text": "Hello"})

    await work(app, await app.turns.dispatch(TURN, "t", {}))
    assert await told(app) == [
        ("delta", "Hel1", 1), ("reset", None, 2), ("delta", "Hel2", 2), ("reset", None, 3), ("delta", "Hel3", 3),
        ("reply", "Hello", None),
    ]  # fmt: skip
    (reset, _) = [each for each in await app.events.read("conv-1") if each.kind == "reset"]
    assert reset.body == {"message_id": "m1"}
    assert [each.attempt for each in await app.events.read("other")] == [None, None, None]


async def test_there_is_no_reset_where_there_is_nothing_to_forget(app: App) -> None:
    @app.task(retry=AGAIN)
    async def t(run: Run) -> Any:
        if run.attempt in {2, 4}:
            await app.events.append("conv-1", "delta", {"text": f"of {run.attempt}"})
        if run.attempt < 5:
            return Snooze(0)
        await app.turns.commit_reply("dep-1", ["m1"], {"text": "Hello"})
        return None

    await work(app, await app.turns.dispatch(TURN, "t", {}))
    assert [kind for kind, *_ in await told(app)] == ["delta", "reset", "delta", "reset", "reply"]


async def test_a_turn_that_has_ended_is_not_reset(app: App) -> None:
    @app.task(retry=AGAIN)
    async def t(run: Run) -> None:
        if run.attempt == 1:
            await app.events.append("conv-1", "delta", {"text": "Hel"})
            await app.turns.commit_reply("dep-1", ["m1"], {"text": "Hello"})
            raise ValueError("after the answer")

    await work(app, await app.turns.dispatch(TURN, "t", {}))
    assert [kind for kind, *_ in await told(app)] == ["delta", "reply"]


async def test_the_deltas_of_another_turn_of_the_stream_are_left_alone(app: App) -> None:
    @app.task(retry=AGAIN)
    async def t(run: Run) -> None:
        assert run.turn is not None
        if run.turn.message_id == "m2":
            await app.events.append("conv-1", "delta", {"text": "second"})
        elif run.attempt == 1:
            raise ValueError
        await app.turns.commit_reply("dep-1", [run.turn.message_id], {"text": "done"})

    await app.turns.dispatch(Turn(deployment="dep-1", message_id="m2", stream="conv-1"), "t", {})
    await work(app, await app.turns.dispatch(TURN, "t", {}))
    assert "reset" not in [kind for kind, *_ in await told(app)]


async def test_a_reset_that_cannot_be_stored_puts_the_attempt_off(app: App, conn: Connection) -> None:
    """The stream is held by somebody's transaction for longer than a lock is waited for."""
    begun: list[int] = []

    @app.task(retry=AGAIN)
    async def t(run: Run) -> None:
        begun.append(run.attempt)
        if run.attempt == 1:
            await app.events.append("conv-1", "delta", {"text": "Hel"})
            raise ValueError
        await app.turns.commit_reply("dep-1", ["m1"], {"text": "Hello"})

    run_id = await app.turns.dispatch(TURN, "t", {})
    await conn.execute(
        "create function refuse_reset() returns trigger language plpgsql as "
        "$$ begin if new.kind = 'reset' then raise lock_not_available; end if; return new; end $$; "
        "create trigger refused before insert on queue_service.events for each row execute function refuse_reset()"
    )
    async with working(app):
        await eventually(lambda: one(conn, "select attempt > 1 and state = 'queued' from queue_service.runs"))
        assert begun == [1]
        await conn.execute("drop trigger refused on queue_service.events")
        await app.wait(run_id, timeout=10)
    run = await app.get(run_id)
    assert run is not None
    assert run.failures == 1
    assert [kind for kind, *_ in await told(app)] == ["delta", "reset", "reply"]


async def test_handlers_in_threads_say_their_attempt_too(app: App, database: str) -> None:
    @app.task(retry=AGAIN)
    def t(run: Run) -> None:
        with App(database).sync as q:
            q.events.append("conv-1", "delta", {"text": "Hel"})
            if run.attempt == 1:
                raise ValueError
            q.turns.commit_reply("dep-1", ["m1"], {"text": "Hello"})

    await work(app, await app.turns.dispatch(TURN, "t", {}))
    assert await told(app) == [
        ("delta", "Hel", 1), ("reset", None, 2), ("delta", "Hel", 2), ("reply", "Hello", None)
    ]  # fmt: skip


async def test_a_worker_that_was_killed_is_followed_by_a_reset(app: App, conn: Connection) -> None:
    @app.task()
    async def t(run: Run) -> None:
        await app.events.append("conv-1", "delta", {"text": "Hel"})
        if run.attempt == 1:
            await asyncio.Event().wait()
        await app.turns.commit_reply("dep-1", ["m1"], {"text": "Hello"})

    run_id = await app.turns.dispatch(TURN, "t", {})
    dying = asyncio.create_task(Worker(app, {"default": 1}).run())
    await eventually(lambda: one(conn, "select count(*) = 1 from queue_service.events"))
    await conn.execute("update queue_service.leases set expires_at = clock_timestamp() - interval '1 s'")
    await eventually(lambda: one(conn, "select losses = 1 from queue_service.runs"))
    await app.wait(run_id, timeout=20)
    dying.cancel()
    await asyncio.wait([dying])
    assert [kind for kind, *_ in await told(app)] == ["delta", "reset", "delta", "reply"]


async def test_a_handler_that_is_cancelled_at_its_reset_is_cancelled(app: App) -> None:
    async def cancelled(_: Query[Any]) -> Any:
        raise asyncio.CancelledError

    async def handler() -> None: ...

    run = await app.get(await app.turns.dispatch(TURN, "t", {}))
    assert run is not None
    with pytest.raises(asyncio.CancelledError):
        await after_reset(cancelled, run, handler())
