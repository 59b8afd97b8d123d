"""A worker, a handler's transaction and a browser give up what waits for the synchronous standby, and nothing is acknowledged
before the standby has it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from queue_service import App, Run, Worker
from queue_service.db.execute import Connection
from queue_service.db.session import connect
from tests.gateway.served import serving
from tests.servers.pair import GAVE_UP, Pair
from tests.servers.test_giving_up import WAITING
from tests.support import eventually, one, quick_app
from tests.worker.worker_process import WorkerProcess

LIVE = "select count(*) from queue_service.runs"
ENDED = "select count(*) from queue_service.finished_runs where state = 'succeeded'"


@pytest.fixture
async def watching(own_database: str) -> AsyncIterator[Connection]:
    conn = await connect(own_database)
    yield conn
    await conn.close()


@pytest.fixture
async def replicated(own_database: str) -> AsyncIterator[App]:
    async with quick_app(own_database) as app:
        yield app


class Stalled:
    """From when the standby was stalled, what the primary has logged."""

    def __init__(self, pair: Pair) -> None:
        self._pair = pair
        self._told = len(pair.primary.log)
        pair.stall()

    def assert_nothing_was_cut_short(self) -> None:
        assert GAVE_UP not in self._pair.primary.log[self._told :]


async def is_waiting(conn: Connection) -> None:
    await eventually(lambda: one(conn, WAITING))


@pytest.mark.parametrize("how", ["stopped", "stopped at once", "cancelled"])
async def test_a_worker_that_ends_while_an_ending_waits_leaves_it_to_the_server(
    how: str, shared_pair: Pair, replicated: App, watching: Connection
) -> None:
    release = asyncio.Event()

    @replicated.task
    async def hold() -> None:
        await release.wait()

    run_id = await replicated.enqueue("hold", {})
    worker = Worker(replicated)
    running = asyncio.create_task(worker.run())
    await eventually(lambda: one(watching, "select count(*) from queue_service.runs where state = 'running'"))
    stalled = Stalled(shared_pair)
    release.set()
    await is_waiting(watching)
    if how == "cancelled":
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    else:
        worker.stop(now=how == "stopped at once")
        # It waits for its endings to be written.
        await asyncio.wait([running], timeout=0.5)
    assert await one(watching, ENDED) == 0
    stalled.assert_nothing_was_cut_short()
    shared_pair.resume()
    run = await replicated.wait(run_id, timeout=20)
    assert (run.state, run.attempt) == ("succeeded", 1)
    if how != "cancelled":
        await running
    stalled.assert_nothing_was_cut_short()


async def test_a_worker_process_that_is_told_twice_to_end_leaves_it_to_the_server(
    shared_pair: Pair, replicated: App, watching: Connection, tmp_path: Path
) -> None:
    worker = WorkerProcess(watching_url(watching))
    try:
        await worker.started()
        run_id = await replicated.enqueue("hold", {"directory": str(tmp_path)})
        await eventually((tmp_path / "started").exists, within=30)
        stalled = Stalled(shared_pair)
        (tmp_path / "release").touch()
        await is_waiting(watching)
        worker.signal(signal.SIGTERM)
        worker.signal(signal.SIGTERM)
        await worker.says("/readyz", 503)
        assert await one(watching, ENDED) == 0
        stalled.assert_nothing_was_cut_short()
        shared_pair.resume()
        assert (await replicated.wait(run_id, timeout=20)).state == "succeeded"
        stalled.assert_nothing_was_cut_short()
    finally:
        worker.end()


def watching_url(conn: Connection) -> str:
    info = conn.info
    return f"postgresql://{info.user}@{info.host}:{info.port}/{info.dbname}"


@pytest.mark.parametrize("timeout", [None, 1.0], ids=["stopped", "out of time"])
@pytest.mark.parametrize("blocking", [False, True], ids=["coroutine", "thread"])
async def test_a_transaction_of_a_handler_that_is_cancelled_while_it_commits_is_left_to_the_server(
    blocking: bool, timeout: float | None, shared_pair: Pair, replicated: App, watching: Connection
) -> None:
    await watching.execute("create table public.effects (n integer)")

    @replicated.task(timeout=timeout)
    async def spend(run: Run) -> None:
        async with run.transaction() as mine:
            await mine.execute("insert into public.effects values (1)")
            await held()

    @replicated.task(timeout=timeout)
    def spend_blocking(run: Run) -> None:
        with run.transaction() as mine:
            mine.execute("insert into public.effects values (1)")
            asyncio.run_coroutine_threadsafe(held(), loop).result()

    loop, begun, release = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()

    async def held() -> None:
        begun.set()
        await release.wait()

    run_id = await replicated.enqueue("spend_blocking" if blocking else "spend", {})
    worker = Worker(replicated)
    running = asyncio.create_task(worker.run())
    await asyncio.wait_for(begun.wait(), 20)
    stalled = Stalled(shared_pair)
    release.set()
    await is_waiting(watching)
    if timeout is None:
        worker.stop(now=True)
    # In which the handler is cancelled.
    await asyncio.wait([running], timeout=1.5)
    assert await one(watching, "select count(*) from public.effects") == 0
    stalled.assert_nothing_was_cut_short()
    shared_pair.resume()
    worker.stop()
    await running
    stalled.assert_nothing_was_cut_short()
    await eventually(lambda: one(watching, "select count(*) = 1 from public.effects"))
    assert (await replicated.wait(run_id, timeout=20)).state == "succeeded"


async def test_a_browser_that_hangs_up_and_sends_again_is_told_nothing_that_the_standby_does_not_have(
    shared_pair: Pair, replicated: App, watching: Connection
) -> None:
    body: dict[str, Any] = {"stream": "ann/a", "client_message_id": "m1", "body": {"text": "hi"}}
    async with serving(replicated) as served, served.client("ann") as ann, ann.connected() as (_, connection_id):
        stalled = Stalled(shared_pair)
        for _ in range(2):
            with pytest.raises(httpx2.ReadTimeout):
                async with asyncio.timeout(20):
                    await ann.http.post(
                        "/api/chat/send",
                        json=body,
                        headers={**ann.headers, "x-connection-id": connection_id},
                        timeout=0.5,
                    )
            await is_waiting(watching)
        assert await one(watching, "select count(*) from queue_service.events") == 0
        stalled.assert_nothing_was_cut_short()
        shared_pair.resume()
        answer = await ann.post("send", connection_id, body)
        assert answer.status_code in {200, 202}
        stored = "select count(*) from queue_service.events where kind = 'message'"
        assert await one(watching, stored) == 1
        assert await one(watching, LIVE) == 1
