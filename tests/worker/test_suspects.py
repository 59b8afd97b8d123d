"""Runs that lost a worker: executed alone, so that one that kills its worker takes nobody with it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from queue_service import App, Run, RunState, Worker
from queue_service.db.execute import Connection
from queue_service.settings import load
from queue_service.worker import suspects as suspects_module
from queue_service.worker.pace import Alarm
from queue_service.worker.suspects import Suspects
from tests.support import enqueued, eventually, one, rows, working
from tests.worker.conftest import Observe


async def suspects(conn: Connection, task: str, count: int, **fields: Any) -> list[int]:
    """Runs that lost a worker before."""
    ids = [await enqueued(conn, task, **fields) for _ in range(count)]
    await conn.execute("update queue_service.runs set losses = 1 where id = any(%s)", [ids])
    return ids


async def test_a_suspect_runs_alone(app: App, conn: Connection) -> None:
    running: set[str] = set()
    company: list[set[str]] = []

    @app.task
    async def ordinary(n: int) -> None:
        running.add(f"ordinary {n}")
        await asyncio.sleep(0.005)  # the handler's work
        running.discard(f"ordinary {n}")

    @app.task
    async def suspect() -> None:
        assert "suspect" not in running
        running.add("suspect")
        for _ in range(20):
            company.append(running - {"suspect"})
            await asyncio.sleep(0.001)  # the handler's work
        running.discard("suspect")

    await app.enqueue_many("ordinary", [{"n": n} for n in range(1_000)])
    ids = await suspects(conn, "suspect", 5)
    async with working(app, {"default": 5}):
        runs = [await app.wait(run_id, timeout=30) for run_id in ids]
        await eventually(lambda: one(conn, "select count(*) = 1005 from queue_service.finished_runs"), within=30)
    assert [(run.state, run.losses) for run in runs] == [(RunState.SUCCEEDED, 1)] * 5
    assert len(company) == 100
    assert [each for each in company if each] == []


async def test_a_suspect_is_not_claimed_together_with_others(app: App, conn: Connection) -> None:
    held: list[int] = []

    @app.task
    async def suspect() -> None:
        held.append(await one(conn, "select max(cardinality(run_ids)) from queue_service.leases"))

    await suspects(conn, "suspect", 10)
    await Worker(app).run(once=True)
    assert held == [1] * 10


async def test_a_slow_suspect_does_not_hold_up_the_others_for_long(app: App, conn: Connection) -> None:
    release, started = asyncio.Event(), asyncio.Event()

    @app.task
    async def suspect() -> None:
        started.set()
        await release.wait()

    @app.task
    async def ordinary() -> None: ...

    (run_id,) = await suspects(conn, "suspect", 1)
    async with working(app):
        await asyncio.wait_for(started.wait(), 10)
        await app.wait(await app.enqueue("ordinary", {}), timeout=15)
        release.set()
        assert (await app.wait(run_id, timeout=15)).state is RunState.SUCCEEDED


async def test_a_slow_ordinary_run_does_not_hold_up_a_suspect_for_ever(app: App, conn: Connection) -> None:
    release, started = asyncio.Event(), asyncio.Event()

    @app.task
    async def ordinary() -> None:
        started.set()
        await release.wait()

    @app.task
    async def suspect() -> None: ...

    slow = await app.enqueue("ordinary", {})
    async with working(app):
        await asyncio.wait_for(started.wait(), 10)
        (run_id,) = await suspects(conn, "suspect", 1)
        assert (await app.wait(run_id, timeout=15)).state is RunState.SUCCEEDED
        release.set()
        await app.wait(slow, timeout=15)


async def test_many_suspects_do_not_starve_ordinary_runs(app: App, conn: Connection) -> None:
    order: list[str] = []

    @app.task
    async def suspect() -> None:
        order.append("suspect")
        await asyncio.sleep(0.01)  # the handler's work

    @app.task
    async def ordinary() -> None:
        order.append("ordinary")
        await asyncio.sleep(0.01)  # the handler's work

    await suspects(conn, "suspect", 40)
    await app.enqueue_many("ordinary", [{}] * 10)
    async with working(app, {"default": 2}):
        await eventually(lambda: len(order) == 50, within=40)
    last = max(index for index, name in enumerate(order) if name == "ordinary")
    assert order[:last].count("suspect") <= 20


async def test_once_works_off_suspects_too(app: App, conn: Connection) -> None:
    @app.task
    async def suspect() -> None: ...

    await suspects(conn, "suspect", 30)
    tally = await Worker(app).run(once=True)
    assert tally.succeeded == 30


async def test_a_suspect_that_is_claimed_while_its_worker_stops_is_handed_back(
    app: App, conn: Connection, session: Callable[[], Awaitable[Connection]]
) -> None:
    begun: list[int] = []

    @app.task
    async def suspect(run: Run) -> None:
        begun.append(run.attempt)
        await asyncio.Event().wait()

    (run_id,) = await suspects(conn, "suspect", 1)
    other = await session()
    waits = (
        "select count(*) > 0 from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock' "
        "and application_name = 'queue_service'"
    )
    # Whoever claims waits here, with the run in hand.
    await other.execute("begin")
    await other.execute("lock table queue_service.leases in share mode")
    async with working(app) as worker:
        await eventually(lambda: one(conn, waits))
        worker.stop()
        assert worker._parts is not None
        await eventually(lambda: worker._parts is not None and worker._parts.claimer.is_stopping)
        await other.execute("commit")
    run = await app.get(run_id)
    assert run is not None
    assert (run.state, run.losses, begun) == (RunState.QUEUED, 1, [])


async def test_suspects_of_a_paused_queue_and_of_unknown_tasks_are_left_alone(app: App, conn: Connection) -> None:
    @app.task
    async def suspect() -> None: ...

    await suspects(conn, "suspect", 2)
    await suspects(conn, "somewhere_else", 2)
    await app.queues.pause("default")
    assert (await Worker(app).run(once=True)).succeeded == 0
    await app.queues.resume("default")
    assert (await Worker(app).run(once=True)).succeeded == 2


async def test_a_run_that_kills_its_worker_ends_failed_and_takes_nobody_with_it(
    database: str, conn: Connection, tmp_path: Path
) -> None:
    """The worker dies of it once, and then two processes of their own, of the worker after it."""
    path = tmp_path / "witness"
    poison = await enqueued(conn, "poison", payload=f'{{"path": "{path}"}}')
    for _ in range(60):
        await enqueued(conn, "witness", payload=f'{{"path": "{path}", "seconds": 0.05}}')
    deaths = 0
    process = _start(database)
    try:

        async def over() -> bool:
            nonlocal process, deaths
            if process.poll() is not None:
                assert process.returncode == 9
                deaths += 1
                process = _start(database)
            return bool(await one(conn, "select count(*) = 61 from queue_service.finished_runs"))

        await eventually(over, within=60)
    finally:
        process.kill()
        process.wait()
    assert deaths == 1
    ((state, error, losses, failures),) = await rows(
        conn, "select state, error, losses, failures from queue_service.finished_runs where id = %s", poison
    )
    assert (state, error["reason"], losses, failures) == ("failed", "worker_lost", 3, 0)
    innocents = await rows(
        conn, "select distinct state, losses, failures from queue_service.finished_runs where id <> %s", poison
    )
    assert set(innocents) <= {("succeeded", 0, 0), ("succeeded", 1, 0)}
    lines = [line.split() for line in path.read_text().splitlines()]
    unfinished = _unfinished_at_deaths(lines)
    assert len(unfinished) == 3
    # Nothing but the poison was running where it struck for the second and the third time.
    assert unfinished[1:] == [0, 0]


def _unfinished_at_deaths(lines: list[list[str]]) -> list[int]:
    """For each process that died of the poison: how many runs it had begun and not ended."""
    counts = []
    for pid in [line[3] for line in lines if line[0] == "poison"]:
        of_process = [line for line in lines if line[3] == pid]
        begun = {line[1] for line in of_process if line[0] == "begun"}
        counts.append(len(begun - {line[1] for line in of_process if line[0] == "ended"}))
    return counts


def _start(database: str) -> subprocess.Popen[bytes]:
    paces = ["--lease", "2s", "--poll-interval", "50ms", "--sweep-interval", "50ms", "--log-level", "error"]
    command = [
        sys.executable,
        "-m",
        "queue_service",
        "worker",
        "-a",
        "tests.worker.tasks_for_tests:app",
        "-q",
        "default:4",
    ]
    return subprocess.Popen(
        [*command, *paces, "--database-url", database], env={**os.environ}, stderr=subprocess.DEVNULL
    )


async def test_a_suspect_that_waits_for_a_slot_of_its_queue_holds_up_no_other_queue(
    app: App, conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suspects_module, "UNTIL_IDLE", 60.0)
    release, started, done = asyncio.Event(), asyncio.Event(), 0

    @app.task
    async def ordinary() -> None:
        started.set()
        await release.wait()

    @app.task(queue="other")
    async def other() -> None:
        nonlocal done
        done += 1
        await asyncio.sleep(0.01)  # the handler's work

    await app.enqueue("ordinary", {})
    async with working(app, {"default": 1, "other": 1}):
        await asyncio.wait_for(started.wait(), 10)
        (run_id,) = await suspects(conn, "ordinary", 1)
        await app.enqueue_many("other", [{}] * 1_000)
        await eventually(lambda: done >= 300, within=30)
        # It comes before those that wait for the slot with it.
        later = await app.enqueue("ordinary", {})
        release.set()
        run, behind = await app.wait_many([run_id, later], timeout=15)
    assert run.claimed_at is not None
    assert behind.claimed_at is not None
    assert run.claimed_at < behind.claimed_at


BESIDE = "runs that lost their worker run in a process of their own"


class TestOfTheCommandLine:
    async def test_suspects_run_in_a_process_of_their_own_and_hold_up_nobody(
        self, app: App, database: str, conn: Connection, tmp_path: Path, observe: Observe
    ) -> None:
        ids = await suspects(conn, "hold", 6, payload=f'{{"directory": "{tmp_path}"}}')
        process = await observe(database, "-q", "default:10", "-q", "other:1")
        began = tmp_path / "started"
        await eventually(began.exists, within=30)
        for n in range(20):
            run_id = await app.enqueue("double", {"n": n}, queue="other")
            # In far less than the 1.5 s that each of them has for itself.
            assert (await app.wait(run_id, timeout=1)).result == 2 * n
        names = [name for (name,) in await rows(conn, "select name from queue_service.workers")]
        assert len([name for name in names if ":suspects:" in name]) == 1
        await eventually(lambda: len(began.read_text().splitlines()) >= 2)
        (tmp_path / "release").touch()
        runs = await app.wait_many(ids, timeout=30)
        assert {(run.state, run.losses) for run in runs} == {(RunState.SUCCEEDED, 1)}
        # It ends when there are no more.
        (beside,) = process.events(BESIDE)
        await eventually(lambda: not Path(f"/proc/{beside['pid']}").exists())

    @pytest.mark.parametrize(("number", "drain"), [(signal.SIGTERM, "200ms"), (signal.SIGKILL, "1h")])
    async def test_their_process_ends_with_the_worker_and_hands_them_back(
        self,
        app: App,
        database: str,
        conn: Connection,
        tmp_path: Path,
        observe: Observe,
        number: signal.Signals,
        drain: str,
    ) -> None:
        (run_id,) = await suspects(conn, "hold", 1, payload=f'{{"directory": "{tmp_path}"}}')
        process = await observe(database, "--drain-timeout", drain, "--lease", "1h")
        await eventually((tmp_path / "started").exists, within=30)
        (beside,) = process.events(BESIDE)
        process.signal(number)
        await eventually(lambda: not Path(f"/proc/{beside['pid']}").exists())
        run = await app.get(run_id)
        assert run is not None
        assert (run.state, run.losses) == (RunState.QUEUED, 1)

    async def test_a_process_of_theirs_that_does_not_start_shows_in_the_roster_and_holds_up_nobody(
        self, app: App, conn: Connection
    ) -> None:
        @app.task
        async def ordinary() -> None: ...

        await suspects(conn, "ordinary", 1)
        quick = load({"QUEUE_SERVICE_LEASE": "1s"})
        async with working(app, settings=quick, suspect_command=[sys.executable, "-c", "raise SystemExit(7)"]):
            await eventually(lambda: one(conn, "select failing = array['suspects'] from queue_service.workers"))
            await app.wait(await app.enqueue("ordinary", {}), timeout=5)


async def test_in_a_program_they_get_a_tenth_of_its_time_and_never_many_in_a_row(app: App, conn: Connection) -> None:
    order: list[str] = []
    delays: list[float] = []

    @app.task
    async def suspect() -> None:
        order.append("suspect")
        await asyncio.Event().wait()

    @app.task
    async def short() -> None:
        order.append("suspect")

    @app.task(queue="other")
    async def ping() -> None:
        order.append("ping")

    await suspects(conn, "suspect", 30)
    await suspects(conn, "short", 20)
    async with working(app, {"default": 10, "other": 1}) as worker:
        while "suspect" not in order or len(delays) < 30:
            began = time.monotonic()
            await app.wait(await app.enqueue("ping", {}), timeout=10)
            delays.append(time.monotonic() - began)
        worker.stop(now=True)
    assert max(delays) <= 2.5
    assert max(len(together) for together in "".join(each[0] for each in order).split("p")) <= suspects_module.IN_A_ROW


async def test_a_turn_of_theirs_is_followed_by_nine_times_as_long_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_000.0

    class Claims:
        async def suspect_is_due(self, _queues: object) -> bool:
            return True

        async def claim_suspect(self, _queues: object) -> bool:
            nonlocal now
            now += 0.2
            return True

    monkeypatch.setattr(suspects_module, "time", SimpleNamespace(monotonic=lambda: now))
    claims: Any = Claims()
    turns = Suspects({}, claims, Alarm(), passed=lambda: None, poll_interval=0.1)
    await turns.run_due()
    # Two of 0.2 s: after the second the quarter of a second is over.
    assert now == pytest.approx(1_000.4)
    assert not turns.are_to_be_looked_for(now + 3.5)
    assert turns.are_to_be_looked_for(now + 3.7)
