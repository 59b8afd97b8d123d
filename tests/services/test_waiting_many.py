"""Waiting for many runs at once."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

import pytest

from queue_service import App, Run, RunState
from queue_service.db.execute import Connection
from queue_service.db.query import Query
from queue_service.errors import DatabaseUnavailable, RunUnknown
from queue_service.runs import queries
from queue_service.services.endings import Endings
from tests.support import eventually, one, working


async def test_they_come_in_the_order_asked_for_when_the_last_has_ended(app: App) -> None:
    @app.task
    async def echo(n: int) -> int:
        return n

    ids = await app.enqueue_many("echo", [{"n": n} for n in range(500)])
    asked = [*reversed(ids), ids[0], ids[0]]
    async with working(app):
        runs = await app.wait_many(asked, timeout=20)
    assert [run.id for run in runs] == asked
    assert [run.result for run in runs] == [*reversed(range(500)), 0, 0]


async def test_none_of_them_is_nothing_to_wait_for(app: App) -> None:
    assert await app.wait_many([], timeout=1) == []


async def test_what_ended_before_and_what_ends_later_are_waited_for_together(app: App) -> None:
    ids = [await app.enqueue("noop", {}) for _ in range(3)]
    await app.cancel(ids[0])
    waiting = asyncio.create_task(app.wait_many(ids, timeout=10))
    await asyncio.sleep(0)
    for run_id in ids[1:]:
        assert not waiting.done()
        await app.cancel(run_id)
    assert [run.state for run in await waiting] == 3 * [RunState.CANCELLED]


async def test_one_that_nobody_knows_is_said(app: App) -> None:
    run_id = await app.enqueue("noop", {})
    await app.cancel(run_id)
    with pytest.raises(RunUnknown, match="no run 999"):
        await app.wait_many([run_id, 999], timeout=10)


async def test_the_wait_ends_when_its_time_is_over_and_leaves_nothing_behind(app: App) -> None:
    ids = [await app.enqueue("noop", {}) for _ in range(3)]
    await app.cancel(ids[0])
    with pytest.raises(TimeoutError, match=r"One of 3 runs did not end within 0\.05 s"):
        await app.wait_many(ids, timeout=0.05)
    assert app.opened.endings._waiting == {}


async def test_one_look_serves_them_all(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = await app.enqueue_many("noop", [{}] * 50)
    for run_id in ids:
        await app.cancel(run_id)
    asked: list[int] = []
    many = queries.get_many

    def counted(run_ids: Collection[int]) -> Query[list[Run]]:
        asked.append(len(run_ids))
        return many(run_ids)

    monkeypatch.setattr(queries, "get_many", counted)
    await app.wait_many(ids, timeout=10)
    assert asked == [50]


async def test_one_that_goes_back_from_history_meanwhile_is_waited_for_again(app: App, conn: Connection) -> None:
    first, second = await app.enqueue("noop", {}), await app.enqueue("noop", {})
    await app.cancel(first)
    waiting = asyncio.create_task(app.wait_many([first, second], timeout=10))
    await eventually(lambda: len(app.opened.endings._waiting) == 2)
    await app.retry(first)
    await app.cancel(second)
    await eventually(lambda: one(conn, "select count(*) = 1 from queue_service.runs"))
    assert not waiting.done()
    await app.cancel(first)
    assert [run.id for run in await waiting] == [first, second]


async def test_all_hear_of_it_when_the_watch_has_ended(app: App) -> None:
    ids = [await app.enqueue("noop", {}) for _ in range(3)]
    waiting = asyncio.create_task(app.wait_many(ids, timeout=10))
    await eventually(lambda: len(app.opened.endings._waiting) == 3)
    endings: Endings = app.opened.endings
    for answers in endings._waiting.values():
        for answer in answers:
            answer.set_exception(DatabaseUnavailable("gone"))
    with pytest.raises(DatabaseUnavailable, match="gone"):
        await waiting
