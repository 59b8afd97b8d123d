"""When runs are claimed, how many, and by whom."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from queue_service import App, RunState, Worker
from queue_service.db.execute import Connection
from queue_service.settings import load
from tests.support import enqueued, eventually, listening, one, rows, working
from tests.worker.conftest import short_then_slow

RUNNING = "select count(*) from queue_service.runs where state = 'running'"


@pytest.fixture
async def patient(database: str) -> AsyncIterator[App]:
    """An App that would look for runs once in an hour, and is quicker only where it hears of them."""
    slow = {f"QUEUE_SERVICE_{name}": "1h" for name in ("POLL_INTERVAL", "SWEEP_INTERVAL", "LEASE")}
    async with App(database, settings=load(slow)) as opened:
        yield opened


# How many


@pytest.mark.parametrize("busy", [False, True], ids=["quiet", "while others enqueue"])
async def test_slow_handlers_hold_no_more_runs_than_they_have_slots(app: App, conn: Connection, busy: bool) -> None:
    begun: list[int] = []

    @app.task
    async def slow(n: int) -> None:
        begun.append(n)
        await asyncio.sleep(0.2)  # the handler's work

    await app.enqueue_many("slow", [{"n": n} for n in range(500)])
    most = Counter[int]()
    async with working(app, {"default": 2}) as first, working(app, {"default": 2}) as second:
        while len(begun) < 40:
            if busy:
                await app.enqueue("slow", {"n": -1})
            for worker_id, held in await rows(
                conn,
                "select worker_id, count(*) from queue_service.leases join queue_service.runs on lease_id = leases.id "
                "where state = 'running' group by worker_id",
            ):
                most[worker_id] = max(most[worker_id], held)
        first.stop()
        second.stop()
    assert len(most) == 2
    # Two in its slots, and what the pace of this test, some milliseconds a run, lets it begin within 50 ms.
    assert max(most.values()) <= 12


async def test_two_workers_share_a_backlog_of_slow_runs(app: App, conn: Connection) -> None:
    release = asyncio.Event()
    begun: list[int] = []

    @app.task
    async def slow(n: int) -> None:
        begun.append(n)
        await release.wait()

    await app.enqueue_many("slow", [{"n": n} for n in range(20)])
    async with working(app, {"default": 3}) as first, working(app, {"default": 3}) as second:
        await eventually(lambda: len(begun) == 6)
        held = await rows(
            conn,
            "select worker_id, count(*) from queue_service.leases join queue_service.runs on lease_id = leases.id "
            "group by worker_id",
        )
        assert dict(held) == {first.id: 3, second.id: 3}
        release.set()
        await eventually(lambda: one(conn, "select count(*) = 20 from queue_service.finished_runs"))
        await eventually(lambda: first.tally.succeeded + second.tally.succeeded == 20)


async def test_what_was_claimed_ahead_of_handlers_that_stalled_is_handed_back(app: App, conn: Connection) -> None:
    runs = await short_then_slow(app)
    async with working(app, {"default": 2}) as worker:
        await eventually(lambda: len(runs.blocked) == 2)
        assert await one(conn, RUNNING) > 2
        await eventually(lambda: one(conn, f"select ({RUNNING}) = 2"))
        assert await one(conn, "select max(failures + losses) from queue_service.runs") == 0
        async with working(app, {"default": 2}):
            await eventually(lambda: len(runs.blocked) == 4)
        runs.release.set()
        await eventually(lambda: one(conn, "select count(*) = 4000 from queue_service.finished_runs"), within=30)
        assert worker.tally.lost == 0


async def test_runs_in_the_slots_are_never_above_the_concurrency(app: App) -> None:
    running = most = 0

    @app.task
    async def note() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(3):
            await asyncio.sleep(0)
        running -= 1

    await app.enqueue_many("note", [{}] * 500)
    await Worker(app, {"default": 7}).run(once=True)
    assert most == 7


async def test_each_queue_has_its_own_concurrency(app: App) -> None:
    release = asyncio.Event()
    running: Counter[str] = Counter()

    @app.task
    async def wait(queue: str) -> None:
        running[queue] += 1
        await release.wait()

    for queue in ("narrow", "wide", "unwanted"):
        await app.enqueue_many("wait", [{"queue": queue}] * 12, queue=queue)
    async with working(app, {"narrow": 1, "wide": 5}):
        await eventually(lambda: sum(running.values()) == 6)
        assert running == {"narrow": 1, "wide": 5}
        release.set()
        await eventually(lambda: sum(running.values()) == 24)
    assert running == {"narrow": 12, "wide": 12}


async def test_a_full_queue_does_not_hold_up_another(app: App) -> None:
    release = asyncio.Event()
    started = asyncio.Event()

    @app.task(queue="stuck")
    async def stick() -> None:
        started.set()
        await release.wait()

    @app.task(queue="free")
    async def quick(n: int) -> int:
        return n

    await app.enqueue_many("stick", [{}] * 10)
    async with working(app, {"stuck": 1, "free": 1}):
        await asyncio.wait_for(started.wait(), 10)
        for n in range(5):
            assert (await app.wait(await app.enqueue("quick", {"n": n}), timeout=10)).result == n
        release.set()


# How soon


@pytest.mark.direct("no notice comes through it")
async def test_a_notice_wakes_an_idle_worker_long_before_it_would_poll(patient: App, conn: Connection) -> None:
    begun: list[int] = []

    @patient.task
    async def note(n: int) -> None:
        begun.append(n)

    async with working(patient):
        await listening(conn)
        for n in range(5):
            await patient.enqueue("note", {"n": n}, priority=n)
            await eventually(lambda: len(begun) == n + 1)  # noqa: B023
        await patient.enqueue_many("note", [{"n": n} for n in range(5, 105)])
        await eventually(lambda: len(begun) == 105)


async def test_a_freed_slot_takes_the_next_run_without_a_poll(patient: App) -> None:
    begun: list[int] = []

    @patient.task
    async def note(n: int) -> None:
        begun.append(n)
        await asyncio.sleep(0.001)  # the handler's work

    await patient.enqueue_many("note", [{"n": n} for n in range(200)])
    async with working(patient, {"default": 1}):
        await eventually(lambda: len(begun) == 200, within=60)
    assert begun == list(range(200))


async def test_many_queues_are_claimed_from_together(app: App, conn: Connection) -> None:
    leases = set()

    @app.task
    async def note(n: int) -> None:
        leases.update(await rows(conn, "select lease_id from queue_service.runs where lease_id is not null"))

    names = [f"q{n}" for n in range(100)]
    for name in names:
        await app.enqueue_many("note", [{"n": n} for n in range(3)], queue=name)
    async with asyncio.timeout(60):
        tally = await Worker(app, dict.fromkeys(names, 5)).run(once=True)
    assert tally.succeeded == 300
    assert 0 < len(leases) < 30


async def test_runs_without_any_notice_are_found_by_polling(app: App, conn: Connection) -> None:
    begun: list[int] = []

    @app.task
    async def note(n: int) -> None:
        begun.append(n)

    async with working(app):
        await listening(conn)
        for n in range(3):
            await enqueued(conn, "note", payload=f'{{"n": {n}}}')
            await eventually(lambda: begun[-1:] == [n])  # noqa: B023


# More than are let go in the time that a scan may take to come on a machine with much to do.
BACKLOG = 3_000


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "with a backlog"])
async def test_a_run_that_commits_behind_the_floor_is_found(app: App, conn: Connection, busy: bool) -> None:
    turn = asyncio.Semaphore(0)
    begun: list[str] = []

    @app.task
    async def note(name: str) -> None:
        begun.append(name)
        if name == "slow":
            await turn.acquire()

    async with working(app, {"default": 2}):
        await app.enqueue_many("note", [{"name": "quick"}] * 50)
        await eventually(lambda: len(begun) == 50)
        if busy:
            await app.enqueue_many("note", [{"name": "slow"}] * BACKLOG)
            await eventually(lambda: begun.count("slow") == 2)
        await conn.execute(
            "insert into queue_service.runs (queue, task, payload, run_at) "
            """values ('default', 'note', '{"name": "behind"}', clock_timestamp() - interval '1 day')"""
        )

        async def found() -> bool:
            turn.release()
            return "behind" in begun

        await eventually(found)
        assert begun.count("slow") < BACKLOG
        for _ in range(BACKLOG):
            turn.release()


async def test_a_transaction_that_commits_late_is_found_without_a_notice(
    app: App, conn: Connection, database: str
) -> None:
    begun: list[str] = []

    @app.task
    async def note(name: str) -> None:
        begun.append(name)

    async with working(app):
        async with conn.transaction():
            await enqueued(conn, "note", payload='{"name": "late"}')
            for n in range(30):
                await app.enqueue("note", {"name": str(n)})
            await eventually(lambda: len(begun) == 30)
        await eventually(lambda: "late" in begun)


@pytest.mark.direct("no notice comes through it")
async def test_after_its_listener_was_lost_a_worker_looks_everywhere(patient: App, conn: Connection) -> None:
    begun: list[int] = []

    @patient.task
    async def note(n: int) -> None:
        begun.append(n)

    async with working(patient):
        await listening(conn)
        await patient.enqueue("note", {"n": 0})
        await eventually(lambda: begun == [0])
        async with conn.transaction():
            await conn.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity "
                "where datname = current_database() and application_name = 'queue_service listener'"
            )
            await enqueued(conn, "note", payload='{"n": 1}')
        await eventually(lambda: begun == [0, 1], within=30)
        await listening(conn)
        await patient.enqueue("note", {"n": 2})
        await eventually(lambda: begun == [0, 1, 2])


@pytest.mark.direct("no notice comes through it")
async def test_notices_that_make_no_sense_are_ignored(app: App, conn: Connection) -> None:
    @app.task
    async def healthy() -> str:
        return "well"

    async with working(app):
        await listening(conn)
        for channel in ("queue_service_runs", "queue_service_cancel", "queue_service_finished"):
            for payload in (
                "",
                "x",
                "1",
                "99999999999999999999 default",
                "-1 nowhere",
                "1,,2",
                "99999999999999999999999",
            ):
                await conn.execute("select pg_notify(%s, %s)", [channel, payload])
        run = await app.wait(await app.enqueue("healthy", {}), timeout=10)
    assert run.result == "well"


# Paused queues


@pytest.mark.direct("no notice comes through it")
async def test_a_paused_queue_is_not_worked_and_resuming_wakes_it(patient: App, conn: Connection) -> None:
    begun: list[str] = []

    @patient.task
    async def note(name: str) -> None:
        begun.append(name)

    await patient.queues.pause("default")
    async with working(patient, {"default": 5, "other": 5}):
        await listening(conn)
        paused = await patient.enqueue("note", {"name": "paused"})
        for n in range(5):
            await patient.enqueue("note", {"name": str(n)}, queue="other")
            await eventually(lambda: begun[-1:] == [str(n)])  # noqa: B023
        run = await patient.get(paused)
        assert run is not None
        assert (run.state, run.attempt) == (RunState.QUEUED, 0)
        assert await patient.queues.resume("default")
        await eventually(lambda: begun[-1:] == ["paused"])


async def test_pausing_lets_what_is_running_end_and_once_does_not_wait_for_the_rest(app: App) -> None:
    started, release = asyncio.Event(), asyncio.Event()

    @app.task
    async def wait(n: int) -> int:
        started.set()
        await release.wait()
        return n

    ids = await app.enqueue_many("wait", [{"n": n} for n in range(3)])
    running = asyncio.create_task(Worker(app, {"default": 1}).run(once=True))
    await asyncio.wait_for(started.wait(), 10)
    await app.queues.pause("default")
    release.set()
    await asyncio.wait_for(running, 20)
    states = [run.state for run in [await app.get(run_id) for run_id in ids] if run is not None]
    assert states == [RunState.SUCCEEDED, RunState.QUEUED, RunState.QUEUED]
