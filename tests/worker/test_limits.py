"""Limits as workers keep them: counted from outside of them, whatever crashes, and made full use of."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Collection
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from queue_service import App, Run, Worker
from queue_service.db.execute import Connection
from queue_service.settings import load
from queue_service.worker import pace, queue_state
from tests.support import eventually, one, rows, working
from tests.worker.conftest import Start

RUNS = 120


def running(lines: list[str]) -> list[int]:
    """How many handlers were at work after each line. Those of a process end with it, too."""
    at_work: dict[str, str] = {}
    counts = []
    for line in lines:
        match line.split():
            case ["begun", run, _, process]:
                at_work[run] = process
            case ["ended", run, _, process] if at_work.get(run) == process:
                del at_work[run]
            case ["killed", process]:
                at_work = {run: each for run, each in at_work.items() if each != process}
        counts.append(len(at_work))
    return counts


async def all_ended(conn: Connection) -> bool:
    return bool(await one(conn, "select count(*) = 0 from queue_service.runs"))


async def started(conn: Connection, processes: Collection[object]) -> None:
    """So many workers are there: none of them comes only when the others have done it all."""
    await eventually(lambda: one(conn, "select count(*) = %s from queue_service.workers", len(processes)), within=60)


async def lines_in(path: Path, count: int) -> None:
    await eventually(lambda: path.exists() and len(path.read_text().splitlines()) >= count, within=30)


async def test_four_processes_keep_to_a_limit_and_reach_it(
    app: App, conn: Connection, start: Start, tmp_path: Path
) -> None:
    seen = tmp_path / "seen"
    await app.queues.limit("default", max_running=5)
    await started(conn, [start("-q", "default:4") for _ in range(4)])
    await app.queues.pause("default")
    # A third of them stand in lanes, which count in the same limit.
    for number in range(RUNS):
        key = f"k{number % 10}" if number % 3 == 0 else None
        await app.enqueue("witness", {"path": str(seen), "seconds": 0.05}, ordering_key=key)
    await app.queues.resume("default")
    await eventually(lambda: all_ended(conn), within=60)
    counts = running(seen.read_text().splitlines())
    assert max(counts) == 5
    assert len(counts) == 2 * RUNS


async def test_a_limit_holds_while_processes_are_killed(
    app: App, conn: Connection, start: Start, tmp_path: Path
) -> None:
    seen = tmp_path / "seen"
    await app.queues.limit("default", max_running=4)
    for _ in range(RUNS):
        await app.enqueue("witness", {"path": str(seen), "seconds": 0.02})
    processes = [start("-q", "default:4") for _ in range(4)]
    for process, share in zip(processes[:2], (20, 60), strict=True):
        await lines_in(seen, share)
        process.kill()
        process.wait()
        with seen.open("a") as witness:
            witness.write(f"killed {process.pid}\n")
    await eventually(lambda: all_ended(conn), within=60)
    assert max(running(seen.read_text().splitlines())) <= 4
    assert await one(conn, "select count(*) from queue_service.finished_runs where state = 'succeeded'") == RUNS


async def test_four_processes_keep_to_a_rate_and_make_use_of_it(app: App, conn: Connection, start: Start) -> None:
    rate, burst, count = 50, 10, 110
    await app.queues.limit("default", rate=rate, burst=burst)
    await app.enqueue_many("double", [{"n": n} for n in range(count)])
    for _ in range(4):
        start("-q", "default:10")
    await eventually(lambda: all_ended(conn), within=60)
    claimed = [row[0] for row in await rows(conn, "select claimed_at from queue_service.finished_runs order by 1")]
    for first, last in itertools.combinations(range(count), 2):
        # One more: runs that one statement claims are marked one after the other.
        assert last - first <= burst + rate * (claimed[last] - claimed[first]).total_seconds() + 1
    # What is not made use of in time is lost, and a machine that is busy loses some of it.
    assert claimed[-1] - claimed[0] < timedelta(seconds=3 * (count - burst) / rate)


@pytest.mark.direct("no notice comes through it")
async def test_what_ends_makes_room_at_once(app: App, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    release = asyncio.Event()
    begun: list[int] = []
    # Found by polling, or asked for again some time later, they would take an hour each.
    monkeypatch.setattr(queue_state, "AT_LIMIT", 3_600.0)
    async with App(database, settings=load({"QUEUE_SERVICE_POLL_INTERVAL": "1h"})) as patient:

        @patient.task
        async def note(n: int) -> None:
            begun.append(n)
            await release.wait()

        await app.queues.limit("default", max_running=1)
        async with working(patient) as worker, asyncio.timeout(60):
            await patient.enqueue("note", {"n": 0})
            await eventually(lambda: begun == [0])
            # In vain, since the first one runs.
            await patient.enqueue("note", {"n": 1})
            parts = worker._parts
            assert parts is not None
            await eventually(lambda: parts.claimer.states["default"].not_before > 0)
            await patient.enqueue_many("note", [{"n": n} for n in range(2, 100)])
            release.set()
            await eventually(lambda: len(begun) == 100, within=60)
    assert begun == list(range(100))


async def test_room_that_is_made_while_a_claim_is_under_way_is_made_use_of(
    app: App, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_state, "AT_LIMIT", 3_600.0)
    done: list[int] = []
    async with App(database, settings=load({"QUEUE_SERVICE_POLL_INTERVAL": "1h"})) as patient:

        @patient.task
        async def note(n: int) -> None:
            done.append(n)

        await app.queues.limit("default", max_running=20)
        await patient.enqueue_many("note", [{"n": n} for n in range(3_000)])
        async with working(patient, {"default": 20}):
            await eventually(lambda: len(done) == 3_000, within=90)


async def test_a_rate_lets_the_next_one_begin_when_it_may(app: App, database: str) -> None:
    begun: list[int] = []
    async with App(database, settings=load({"QUEUE_SERVICE_POLL_INTERVAL": "1h"})) as patient:

        @patient.task
        async def note(n: int) -> None:
            begun.append(n)

        await app.queues.limit("default", rate=50, burst=1)
        await patient.enqueue_many("note", [{"n": n} for n in range(20)])
        async with working(patient):
            await eventually(lambda: len(begun) == 20, within=30)
    assert begun == list(range(20))


async def test_a_worker_whose_slots_are_taken_waits_and_does_not_spin(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = asyncio.Event()
    at_work: list[int] = []
    waits: list[float] = []
    sleep = pace.Alarm.sleep

    async def noted(self: pace.Alarm, seconds: float) -> None:
        if len(at_work) == 2:
            waits.append(seconds)
        await sleep(self, seconds)

    monkeypatch.setattr(pace.Alarm, "sleep", noted)

    @app.task
    async def hold(run: Run) -> None:
        at_work.append(run.id)
        await release.wait()

    # The second one is waited for, and then there is no slot for the third, which the rate lets begin soon.
    await app.queues.limit("default", rate=20, burst=1)
    await app.enqueue_many("hold", [{}] * 5)
    async with working(app, {"default": 2}):
        await eventually(lambda: len(waits) >= 3, within=20)
        release.set()
    assert min(waits) > 0


async def test_nothing_is_claimed_ahead_from_a_limited_queue(app: App, conn: Connection) -> None:
    release = asyncio.Event()
    begun: list[bool] = []
    done: list[bool] = []

    @app.task
    async def note(slow: bool) -> None:
        if slow:
            begun.append(slow)
            await release.wait()
        done.append(slow)

    await app.queues.limit("default", max_running=1_000)
    # Worked off at a speed at which much would be claimed ahead.
    await app.enqueue_many("note", [{"slow": False}] * 2_000)
    async with working(app, {"default": 5}):
        await eventually(lambda: len(done) == 2_000, within=60)
        await app.enqueue_many("note", [{"slow": True}] * 20)
        await eventually(lambda: len(begun) == 5)
        # Of those that have ended, some may count as running until that is written.
        slow = "select count(*) from queue_service.runs where state = 'running' and (payload ->> 'slow')::boolean"
        assert await one(conn, slow) == 5
        release.set()
        await eventually(lambda: len(done) == 2_020, within=60)


async def test_a_limit_that_is_raised_or_taken_away_lets_more_begin_within_a_second(app: App) -> None:
    release = asyncio.Event()
    at_work: list[int] = []

    @app.task
    async def hold(run: Run) -> None:
        at_work.append(run.id)
        await release.wait()

    await app.queues.limit("default", max_running=1)
    for _ in range(10):
        await app.enqueue("hold", {})
    async with working(app, {"default": 10}):
        await eventually(lambda: len(at_work) == 1)
        await app.queues.limit("default", max_running=3)
        await eventually(lambda: len(at_work) == 3, within=5)
        await app.queues.limit("default")
        await eventually(lambda: len(at_work) == 10, within=5)
        release.set()


@pytest.mark.parametrize("change", [{"rate": 100, "period": 1.0}, {}], ids=["raised", "taken away"])
async def test_a_rate_that_is_changed_is_not_waited_for_as_it_was(app: App, change: dict[str, Any]) -> None:
    done: list[int] = []

    @app.task
    async def note(n: int) -> None:
        done.append(n)

    await app.queues.limit("default", rate=1, period=3_600)
    async with working(app) as worker:
        # Its end lets the worker ask once more.
        await app.wait(await app.enqueue("note", {"n": 0}), timeout=60)
        await app.enqueue("note", {"n": 1})
        parts = worker._parts
        assert parts is not None
        await eventually(lambda: parts.claimer.states["default"].not_before > 0)
        await app.queues.limit("default", **change)
        await eventually(lambda: done == [0, 1], within=60)


async def test_once_waits_for_the_rate(app: App) -> None:
    @app.task
    async def note() -> None: ...

    await app.queues.limit("default", rate=5, period=0.1)
    await app.enqueue_many("note", [{}] * 15)
    await app.enqueue("note", {}, ordering_key="k")
    async with asyncio.timeout(60):
        tally = await Worker(app, {"default": 10}).run(once=True)
    assert tally.succeeded == 16


async def test_lanes_and_other_runs_take_turns_at_a_limit(app: App) -> None:
    begun: list[bool] = []

    @app.task
    async def note(run: Run) -> None:
        begun.append(run.ordering_key is None)

    await app.queues.limit("default", max_running=1)
    for number in range(20):
        await app.enqueue("note", {}, ordering_key=f"k{number}")
        await app.enqueue("note", {})
    async with working(app, {"default": 5}):
        await eventually(lambda: len(begun) == 40, within=60)
    assert 8 <= sum(begun[:20]) <= 12


async def test_a_full_queue_holds_up_no_other(app: App) -> None:
    release = asyncio.Event()
    done: list[str] = []

    @app.task
    async def note(run: Run) -> None:
        if run.queue == "full":
            await release.wait()
        done.append(run.queue)

    await app.queues.limit("full", max_running=1)
    for queue in ("full", "default"):
        await app.enqueue_many("note", [{}] * 50, queue=queue)
    async with working(app, {"full": 5, "default": 5}):
        await eventually(lambda: done.count("default") == 50, within=30)
        assert "full" not in done
        release.set()
        await eventually(lambda: len(done) == 100, within=60)
