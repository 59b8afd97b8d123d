"""Workers are killed while their handlers write in transactions that end their runs: each effect is there once."""

from __future__ import annotations

import asyncio
import functools
import random

import pytest

from queue_service.db.execute import Connection
from tests.chaos.test_kill import Process
from tests.support import eventually, one, rows

RUNS = 200
KILLS = 6
WORKERS = 2

pytestmark = pytest.mark.chaos

NOTHING_LEFT = "select not exists (select from queue_service.runs) and not exists (select from queue_service.leases)"


NOBODY = "nobody, for all is done"
HOLDER = (
    "select workers.name from queue_service.workers join queue_service.leases on leases.worker_id = workers.id "
    "where workers.name = any(%s) order by random() limit 1"
)


async def _holder(conn: Connection, workers: list[Process]) -> str | None:
    """One of these workers that holds claims at this moment."""
    found: str | None = await one(conn, HOLDER, [worker.name for worker in workers])
    if found is None and await one(conn, NOTHING_LEFT):
        return NOBODY
    return found


@pytest.mark.parametrize("dies", ["before", "after"])
async def test_a_worker_that_dies_around_its_commit(database: str, conn: Connection, dies: str) -> None:
    await conn.execute("create table effects (run_id bigint not null, attempt integer not null)")
    run_id = await one(
        conn,
        "insert into queue_service.runs (queue, task, payload) "
        "values ('default', 'spend', jsonb_build_object('dies', %s::text)) returning id",
        dies,
    )
    victim = Process(database, 1)
    heir = None
    try:
        await eventually(lambda: not victim.is_alive, within=30)
        attempts = 2 if dies == "before" else 1
        assert await one(conn, "select count(*) from effects") == attempts % 2
        heir = Process(database, 2)
        await eventually(lambda: one(conn, NOTHING_LEFT), within=30)
        assert heir.terminate() == 0
    finally:
        victim.kill()
        if heir is not None:
            heir.kill()
    finished = await rows(conn, "select id, state, attempt, losses from queue_service.finished_runs")
    assert finished == [(run_id, "succeeded", attempts, attempts - 1)]
    assert await rows(conn, "select run_id, attempt from effects") == [(run_id, attempts)]


async def test_two_hundred_runs_count_to_two_hundred(database: str, conn: Connection) -> None:
    seed = random.SystemRandom().randrange(10**6)
    dice = random.Random(seed)
    await conn.execute("create table counter (n bigint not null)")
    await conn.execute("insert into counter values (0)")
    await conn.execute(
        "insert into queue_service.runs (queue, task, payload) "
        "select 'default', 'add_one', '{\"seconds\": 0.02}' from generate_series(1, %s)",
        [RUNS],
    )
    workers = [Process(database, number) for number in range(WORKERS)]
    kills = 0
    try:
        while kills < KILLS:
            holder = await eventually(functools.partial(_holder, conn, workers), within=60)
            if holder == NOBODY:
                break
            victim = next(worker for worker in workers if worker.name == holder)
            await asyncio.sleep(dice.random() * 0.05)  # so that it dies at any moment of a transaction
            victim.kill()
            workers.remove(victim)
            kills += 1
            workers.append(Process(database, WORKERS + kills))
        await eventually(lambda: one(conn, NOTHING_LEFT), within=60)
        for worker in workers:
            await worker.started(conn)
        assert [worker.terminate() for worker in workers] == [0] * WORKERS
    finally:
        for worker in workers:
            worker.kill()
    states = await rows(conn, "select state, count(*), max(attempt) from queue_service.finished_runs group by state")
    counted = await one(conn, "select n from counter")
    print(f"\nseed {seed} | runs {RUNS} | kills {kills} | counted {counted} | {states}")  # noqa: T201
    assert [(state, count) for state, count, _ in states] == [("succeeded", RUNS)]
    assert counted == RUNS
    assert states[0][2] > 1
