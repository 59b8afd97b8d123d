"""The primary dies under load and its synchronous standby is promoted: nothing acknowledged is lost, each turn ends once, and
service is back as soon as the new primary takes writes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

import psycopg
import pytest

from queue_service import App, Turn
from queue_service.db import embedded
from queue_service.db.execute import Connection
from queue_service.db.session import connect
from queue_service.errors import DatabaseUnavailable
from tests.servers.pair import DATABASE, Pair, made_pair, running_pair
from tests.support import eventually, one, quick_app, rows
from tests.worker.worker_process import WorkerProcess

CALLERS = 8
# So much is acknowledged before the primary dies, and so much after.
ENOUGH = 150
SOON = 1.5

pytestmark = pytest.mark.chaos


@pytest.fixture
def pair() -> Iterator[Pair]:
    with made_pair(embedded.programs()) as made, running_pair(made, embedded.programs()) as running:
        yield running


@dataclass
class Load:
    """What callers have had acknowledged, each of whom insists on what it was not answered."""

    app: App
    runs: dict[str, int] = field(default_factory=dict)
    turns: dict[str, int] = field(default_factory=dict)
    events: list[int] = field(default_factory=list)
    refused: int = 0
    last: float = 0.0
    is_over: bool = False

    @property
    def count(self) -> int:
        return len(self.runs) + len(self.turns) + len(self.events)

    async def call(self, caller: int) -> None:
        number = 0
        while not self.is_over:
            number += 1
            key = f"{caller}-{number}"
            turn = Turn(deployment=f"d{caller}", message_id=key, stream=f"s{key}")
            self.runs[key] = await self._insist(lambda: self.app.enqueue("double", {"n": 1}, singleton_key=key))  # noqa: B023
            self.turns[key] = await self._insist(lambda: self.app.turns.dispatch(turn, "double", {"n": 2}))  # noqa: B023
            self.events.append(await self._insist(lambda: self.app.events.append(f"log {caller}", "delta", key)))  # noqa: B023

    async def _insist(self, call: Callable[[], Awaitable[int]]) -> int:
        while True:
            try:
                answer = await call()
            except DatabaseUnavailable:
                self.refused += 1
                await asyncio.sleep(0.01)
            else:
                self.last = time.monotonic()
                return answer


async def test_a_primary_that_dies_under_load_takes_nothing_acknowledged_with_it(pair: Pair) -> None:
    before, after = (str(node.port) for node in (pair.primary, pair.standby))
    url = f"postgresql://postgres@127.0.0.1:{before},127.0.0.1:{after}/{DATABASE}"
    workers = [WorkerProcess(url, "-q", "default:10") for _ in range(2)]
    try:
        for worker in workers:
            await worker.started()
        async with quick_app(pair.conninfo) as app:
            load = Load(app)
            callers = [asyncio.create_task(load.call(n)) for n in range(CALLERS)]
            await eventually(lambda: load.count > ENOUGH, within=60)
            acknowledged = load.count
            await asyncio.to_thread(pair.fail_over)
            back = await writable(pair)
            await eventually(lambda: load.last > back, within=40)
            late = load.last - back
            await eventually(lambda: load.count > acknowledged + ENOUGH, within=60)
            load.is_over = True
            await asyncio.gather(*callers)
            assert late < SOON
            conn = await connect(pair.primary.conninfo)
            await check(load, conn)
            await conn.close()
        assert all(worker.process.poll() is None for worker in workers)
    finally:
        for worker in workers:
            worker.end()
    print(f"\nacknowledged {load.count}, refused {load.refused}, back after {late:.2f} s")  # noqa: T201


async def writable(pair: Pair) -> float:
    """When a fresh connection could write (monotonic)."""
    async with await psycopg.AsyncConnection.connect(pair.primary.conninfo, autocommit=True) as conn:
        await conn.execute("create temporary table written ()")
    return time.monotonic()


async def check(load: Load, conn: Connection) -> None:
    await eventually(lambda: one(conn, "select count(*) = 0 from queue_service.runs"), within=60)
    await eventually(lambda: one(conn, "select count(*) = 0 from queue_service.turn_markers"), within=60)
    finished = await rows(conn, "select id, state from queue_service.finished_runs")
    states = dict(finished)
    assert len(states) == len(finished)
    lost = {run_id for run_id in (*load.runs.values(), *load.turns.values()) if run_id not in states}
    assert lost == set()
    assert {states[run_id] for run_id in load.runs.values()} == {"succeeded"}
    endings = await rows(conn, "select stream, count(*) from queue_service.events where terminal group by stream")
    assert {count for _, count in endings} == {1}
    assert {f"s{key}" for key in load.turns} <= {stream for stream, _ in endings}
    # The numbers of a stream's events are acknowledged too, and have no gap.
    appended = await rows(conn, "select seq from queue_service.events where stream like 'log %%'")
    assert not set(load.events) - {seq for (seq,) in appended}
