"""Worker processes are killed under load, again and again: no run is lost, and none is finished twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from queue_service.db.execute import Connection
from tests.support import eventually, one, rows

RUNS = 4_000
KILLS = 5
WORKERS = 3
SECONDS = 0.02

pytestmark = pytest.mark.chaos

HELD = (
    "select count(*) from queue_service.runs where lease_id in (select leases.id from queue_service.leases "
    "join queue_service.workers on workers.id = worker_id where name = %s)"
)
QUIET = (
    "select count(*) = 0 from pg_stat_activity where datname = current_database() and state = 'active' "
    "and application_name = 'queue_service' and pid <> pg_backend_pid()"
)


class Process:
    """A worker process, known in the roster by its name."""

    def __init__(self, database: str, number: int) -> None:
        self.name = f"worker {number}"
        paces = ["--lease", "2s", "--poll-interval", "100ms", "--sweep-interval", "200ms", "--max-losses", "100"]
        command = [sys.executable, "-m", "queue_service", "worker", "-a", "tests.worker.tasks_for_tests:app"]
        more = ["-q", "default:8", "--name", self.name, "--database-url", database, "--log-level", "error"]
        self._process = subprocess.Popen([*command, *paces, *more], stderr=subprocess.DEVNULL, env={**os.environ})

    async def started(self, conn: Connection) -> None:
        """It is at work: before, a signal would end it as it ends any program."""
        joined = "select count(*) from queue_service.workers where name = %s"
        await eventually(lambda: one(conn, joined, self.name), within=60)

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def freeze(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def terminate(self) -> int:
        self._process.terminate()
        return self._process.wait(30)


async def test_killed_workers_lose_nothing_and_finish_nothing_twice(
    database: str, conn: Connection, tmp_path: Path
) -> None:
    seed = random.SystemRandom().randrange(10**6)
    dice = random.Random(seed)
    witness = tmp_path / "witness"
    workers = [Process(database, number) for number in range(WORKERS)]
    load, harvest = Load(conn, witness), []
    try:
        await load.enqueue(RUNS // 2)
        for number in range(KILLS):
            victim = workers.pop(dice.randrange(WORKERS))
            harvest.append(await _kill_while_it_holds_claims(load, victim))
            workers.append(Process(database, WORKERS + number))
            await load.enqueue(RUNS // 2 // KILLS)
        await eventually(lambda: one(conn, "select count(*) = 0 from queue_service.runs"), within=60)
        for worker in workers:
            await worker.started(conn)
        assert all(worker.is_alive for worker in workers)
        assert [worker.terminate() for worker in workers] == [0] * WORKERS
    finally:
        for worker in workers:
            worker.kill()

    finished = await rows(conn, "select id, attempt, losses, state, result from queue_service.finished_runs")
    lines = [line.split() for line in witness.read_text().splitlines()]
    begun = Counter((int(run_id), int(attempt)) for verb, run_id, attempt, _ in lines if verb == "begun")
    ended = Counter((int(run_id), int(attempt)) for verb, run_id, attempt, _ in lines if verb == "ended")
    rescued = sum(losses > 0 for _, _, losses, _, _ in finished)
    lost = load.enqueued - len({run_id for run_id, *_ in finished})
    twice = len(finished) - len({run_id for run_id, *_ in finished})
    print(  # noqa: T201 - the counts are what this is about
        f"\nseed {seed} | runs {load.enqueued} | kills {KILLS}, holding {harvest} | rescued {rescued} | "
        f"begun {begun.total()} | ended {ended.total()} | lost {lost} | finished twice {twice}"
    )
    assert (lost, twice) == (0, 0)
    assert await one(conn, "select count(*) from queue_service.leases") == 0
    assert {state for _, _, _, state, _ in finished} == {"succeeded"}
    assert all(result == run_id for run_id, _, _, _, result in finished)
    # No claim was ever given to two: each attempt began at most once, and the one that counted had come to its end.
    assert max(begun.values()) == 1
    assert all((run_id, attempt) in ended for run_id, attempt, *_ in finished)
    # Every attempt but the last ended with its worker, and each loss was charged; but what runs in a process of its own, since
    # it lost its worker before, is handed back by that when its worker is killed.
    back = [attempt - losses - 1 for _, attempt, losses, _, _ in finished]
    assert min(back) == 0
    assert sum(back) <= 8 * KILLS
    assert all(count > 0 for count in harvest)
    assert 0 < rescued < RUNS // 2


class Load:
    def __init__(self, conn: Connection, witness: Path) -> None:
        self.conn = conn
        self.enqueued = 0
        self._witness = witness

    async def enqueue(self, count: int) -> None:
        await self.conn.execute(
            "insert into queue_service.runs (queue, task, payload) "
            "select 'default', 'witness', jsonb_build_object('path', %s::text, 'seconds', %s::float8) "
            "from generate_series(1, %s)",
            [str(self._witness), SECONDS, count],
        )
        self.enqueued += count

    async def replenish(self) -> None:
        """There is something to claim, also for a worker that took long to start."""
        if not await one(self.conn, "select count(*) from queue_service.runs where state = 'queued'"):
            await self.enqueue(RUNS // 10)


async def _freeze_with_claims(load: Load, victim: Process, *, is_alone: bool = False) -> int:
    """Stop the worker, and return how many runs it holds; one that holds none goes on, and this returns 0. Where the worker
    `is_alone`, what it had sent before is carried out first."""
    assert victim.is_alive
    await load.replenish()
    if not await one(load.conn, HELD, victim.name):
        return 0
    victim.freeze()
    if is_alone:
        await eventually(lambda: one(load.conn, QUIET))
    held: int = await one(load.conn, HELD, victim.name)
    if not held:
        victim.thaw()
    return held


async def _kill_while_it_holds_claims(load: Load, victim: Process) -> int:
    """How many runs it held. It is stopped first, so that what it holds stays the same between the look and the kill."""
    held: int = await eventually(lambda: _freeze_with_claims(load, victim), within=60)
    victim.kill()
    return held


async def test_a_worker_that_slept_past_its_leases_changes_nothing_when_it_wakes(
    database: str, conn: Connection, tmp_path: Path
) -> None:
    witness = tmp_path / "witness"
    load, sleeper = Load(conn, witness), Process(database, 1)
    other = None
    try:
        await load.enqueue(400)
        held = await eventually(lambda: _freeze_with_claims(load, sleeper, is_alone=True), within=60)
        other = Process(database, 2)
        # While it sleeps, what it held is taken from it and finished by the other.
        await eventually(lambda: one(conn, "select count(*) = 0 from queue_service.runs"), within=60)
        sleeper.thaw()
        await load.enqueue(400)
        await eventually(lambda: one(conn, "select count(*) = 0 from queue_service.runs"), within=60)
        assert (sleeper.terminate(), other.terminate()) == (0, 0)
    finally:
        sleeper.kill()
        if other is not None:
            other.kill()
    finished = await rows(conn, "select id, attempt, losses, state, result from queue_service.finished_runs")
    rescued = sum(losses > 0 for _, _, losses, _, _ in finished)
    print(f"\nheld {held} when it fell asleep | rescued {rescued} | finished {len(finished)}")  # noqa: T201
    assert len(finished) == len({run_id for run_id, *_ in finished}) == 800
    assert 0 < rescued <= held
    assert all((state, result) == ("succeeded", run_id) for run_id, _, _, state, result in finished)
    assert all(attempt == losses + 1 for _, attempt, losses, _, _ in finished)
