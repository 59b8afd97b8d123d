"""Lanes as workers work them off: whatever retries, crashes and waits, no two runs of a key at once, and none out of turn."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import pytest

from queue_service import App, Retry, Run, RunState, Snooze, Worker
from queue_service.db.execute import Connection, fetch
from queue_service.services import sweeper
from queue_service.settings import load
from queue_service.worker import pace
from tests.support import claim, eventually, listening, one, resting, working


class Witness:
    """Sees handlers begin and end, from outside of any worker."""

    def __init__(self) -> None:
        self.running: dict[str, int] = {}
        self.begun: dict[str, list[int]] = {}
        self.overlaps: list[str] = []

    def begin(self, run: Run) -> None:
        key = run.ordering_key or ""
        if key in self.running:
            self.overlaps.append(f"{key}: {run.id} while {self.running[key]}")
        self.running[key] = run.id
        self.begun.setdefault(key, []).append(run.id)

    def end(self, run: Run) -> None:
        del self.running[run.ordering_key or ""]


@pytest.mark.parametrize("seed", range(3))
async def test_four_workers_keep_every_lane_in_order(app: App, database: str, conn: Connection, seed: int) -> None:
    dice, witness = random.Random(seed), Witness()

    async def step(run: Run) -> Snooze | None:
        witness.begin(run)
        await asyncio.sleep(dice.choice([0, 0, 0.002]))  # the handler's work
        witness.end(run)
        chance = dice.random()
        if chance < 0.1:
            raise RuntimeError("again")
        return Snooze(0.01) if chance < 0.2 else None

    apps = [App(database, settings=app.settings) for _ in range(4)]
    for each in apps:
        each.task(name="step", retry=Retry(max_attempts=100))(step)
    for _ in range(400):
        await app.enqueue("step", {}, ordering_key=f"k{dice.randrange(20)}", retry_delay=0.01)
    async with AsyncExitStack() as stack:
        for each in apps:
            await stack.enter_async_context(each)
            await stack.enter_async_context(working(each, {"default": 10}))
        await eventually(lambda: nothing_is_left(conn), within=90)
    assert witness.overlaps == []
    for ids in witness.begun.values():
        assert ids == sorted(ids)
    assert await one(conn, "select count(*) from queue_service.finished_runs where state = 'succeeded'") == 400
    assert await one(conn, "select count(*) from queue_service.lanes") == 0


async def nothing_is_left(conn: Connection) -> bool:
    return bool(await one(conn, "select count(*) = 0 from queue_service.runs"))


@pytest.fixture
def only_the_first_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other look from the front for an hour; and no sweep that holds a lane just when a claim wants it, since it is such
    a look that would come back for it."""
    monkeypatch.setattr(pace, "SOON", 3_600.0)
    monkeypatch.setattr(sweeper, "LANE_LIMIT", 0)


@pytest.mark.usefixtures("only_the_first_scan")
async def test_a_lane_goes_on_at_once_when_its_head_ends(database: str) -> None:
    begun: list[int] = []
    async with App(database, settings=load({"QUEUE_SERVICE_POLL_INTERVAL": "1h"})) as app:

        @app.task
        async def note(n: int) -> None:
            begun.append(n)

        await app.enqueue_many("note", [{"n": n} for n in range(200)], ordering_key="k")
        async with working(app):
            await eventually(lambda: len(begun) == 200, within=60)
    assert begun == list(range(200))


@pytest.mark.direct("no notice comes through it")
@pytest.mark.usefixtures("only_the_first_scan")
async def test_a_notice_alone_leads_to_a_lane(app: App, database: str, conn: Connection) -> None:
    begun: list[int] = []
    async with App(database, settings=load({"QUEUE_SERVICE_POLL_INTERVAL": "1h"})) as patient:

        @patient.task
        async def note(n: int) -> None:
            begun.append(n)

        await patient.enqueue("note", {"n": 0}, ordering_key="k")
        async with working(patient):
            await listening(conn)
            await eventually(lambda: begun == [0])
            await eventually(lambda: nothing_is_held(patient))
            await app.enqueue("note", {"n": 1}, ordering_key="another")
            await eventually(lambda: begun == [0, 1])


@pytest.mark.direct("that a worker rests is seen by its own sessions")
@pytest.mark.parametrize("limit", [None, 5])
async def test_a_lane_that_somebody_holds_when_it_is_looked_at_is_taken_soon_after(
    database: str, conn: Connection, session: Callable[[], Awaitable[Connection]], limit: int | None
) -> None:
    begun: list[int] = []
    async with App(database, settings=load({"QUEUE_SERVICE_POLL_INTERVAL": "1h"})) as app:
        await app.queues.limit("default", max_running=limit)

        @app.task
        async def note(n: int) -> None:
            begun.append(n)

        for n in range(2):
            await app.enqueue("note", {"n": n}, ordering_key=f"k{n}")
        holder = await session()
        async with AsyncExitStack() as stack:
            # As a sweep does, but until the worker has nothing to do any more.
            async with holder.transaction():
                await holder.execute("select from queue_service.lanes where ordering_key = 'k0' for update")
                await stack.enter_async_context(working(app))
                await eventually(lambda: begun == [1])
                await resting(conn)
            await eventually(lambda: begun == [1, 0], within=5)


async def nothing_is_held(app: App) -> bool:
    async with app.pool.connection() as conn:
        return await nothing_is_left(conn)


async def test_a_failed_head_lets_the_next_one_through(app: App) -> None:
    @app.task(retry=Retry(max_attempts=1))
    async def note(n: int) -> None:
        if n == 0:
            raise RuntimeError("no")

    ids = await app.enqueue_many("note", [{"n": n} for n in range(2)], ordering_key="k")
    async with asyncio.timeout(60):
        tally = await Worker(app, {"default": 5}).run(once=True)
    assert (tally.failed, tally.succeeded) == (1, 1)
    ended = [await app.get(run_id) for run_id in ids]
    assert [run.state for run in ended if run] == [RunState.FAILED, RunState.SUCCEEDED]


async def test_one_slow_lane_holds_up_no_other_and_no_run_without_a_lane(app: App) -> None:
    go = asyncio.Event()
    done: list[str] = []

    @app.task
    async def note(name: str) -> None:
        if name == "slow":
            await go.wait()
        done.append(name)

    async with working(app, {"default": 3}):
        await app.enqueue_many("note", [{"name": name} for name in ("slow", "behind", "behind")], ordering_key="slow")
        for n in range(20):
            await app.enqueue("note", {"name": "laned"}, ordering_key=f"k{n % 2}")
            await app.enqueue("note", {"name": "free"})
        await eventually(lambda: len(done) == 40)
        go.set()
        await eventually(lambda: len(done) == 43)
    assert done[40:] == ["slow", "behind", "behind"]


async def test_a_drained_worker_hands_its_lanes_to_another(app: App, database: str) -> None:
    held = asyncio.Event()

    @app.task
    async def wait(n: int) -> None:
        held.set()
        await asyncio.Event().wait()

    ids = await app.enqueue_many("wait", [{"n": n} for n in range(3)], ordering_key="k")
    async with working(app) as worker:
        await held.wait()
        worker.stop(now=True)
    begun: list[int] = []
    async with App(database, settings=app.settings) as other:

        @other.task(name="wait")
        async def note(run: Run, n: int) -> None:
            begun.append(run.id)

        async with asyncio.timeout(60):
            await Worker(other, {"default": 5}).run(once=True)
    assert begun == ids


async def test_an_enqueue_that_is_not_committed_holds_up_its_lane_and_loses_no_other_run(
    app: App, conn: Connection, session: Callable[[], Awaitable[Connection]]
) -> None:
    begun, go = asyncio.Event(), asyncio.Event()

    @app.task
    async def head() -> None:
        begun.set()
        await go.wait()

    @app.task
    async def other() -> None: ...

    run_id = await app.enqueue("head", {}, ordering_key="a")
    user = await session()
    async with working(app, {"default": 5}):
        await asyncio.wait_for(begun.wait(), 8)
        await user.execute("begin")
        await app.enqueue("head", {}, ordering_key="a", conn=user)
        go.set()
        # For longer than a lease.
        for _ in range(15):
            other_id = await app.enqueue("other", {})
            assert (await app.wait(other_id, timeout=5)).attempt == 1
            await asyncio.sleep(0.1)  # so that it takes that long
        assert await one(conn, "select state from queue_service.runs where id = %s", run_id) == "running"
        await user.execute("commit")
        done = await app.wait(run_id, timeout=8)
    assert (done.state, done.losses) == (RunState.SUCCEEDED, 0)


async def test_lanes_that_nobody_here_can_go_on_with_cost_the_others_nothing(app: App, conn: Connection) -> None:
    begun: list[str] = []

    @app.task
    async def note(key: str) -> None:
        begun.append(key)

    async with working(app, {"default": 5}):
        await conn.execute(
            "insert into queue_service.runs (queue, task, payload, ordering_key, run_at) "
            "select 'default', 'unknown', '{}', n::text, now() - interval '1 hour' from generate_series(1, 3000) as n"
        )
        # Within one look of the claimer, and not after those that come before it.
        for n in range(10):
            await app.enqueue("note", {"key": f"fresh {n}"}, ordering_key=f"fresh {n}")
            await eventually(lambda: f"fresh {n}" in begun, within=2)  # noqa: B023 - awaited here
        # Nor if their rows do not say so.
        await conn.execute("update queue_service.lanes set task = ''")
        await app.enqueue("note", {"key": "last"}, ordering_key="last")
        await eventually(lambda: "last" in begun, within=5)
        marked = "select count(*) = 3000 from queue_service.lanes where task = 'unknown'"
        await eventually(lambda: one(conn, marked))


@pytest.mark.parametrize("width", [4, 10])
async def test_a_wide_lane_has_as_many_going_on_as_it_may_while_there_is_work(app: App, width: int) -> None:
    running, most, go = 0, 0, asyncio.Event()

    @app.task
    async def hold(n: int) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await go.wait()
        running -= 1

    await app.queues.limit("default", max_running_per_key=width)
    await app.enqueue_many("hold", [{"n": n} for n in range(3 * width)], ordering_key="k")
    async with working(app, {"default": 50}):
        await eventually(lambda: running == width)
        go.set()
        await eventually(lambda: nothing_is_held(app))
    assert most == width


async def test_a_run_that_was_stored_while_triggers_did_not_fire_is_found(app: App, conn: Connection) -> None:
    begun: list[int] = []

    @app.task
    async def note(n: int) -> None:
        begun.append(n)

    await conn.execute("set session_replication_role = replica")
    for n in range(3):
        await app.enqueue("note", {"n": n}, ordering_key="k", conn=conn)
    await conn.execute("set session_replication_role = origin")
    assert await one(conn, "select count(*) from queue_service.lanes") == 0
    async with working(app):
        await eventually(lambda: begun == [0, 1, 2], within=30)


async def test_a_lane_goes_on_after_its_running_run_was_deleted_by_hand(app: App, conn: Connection) -> None:
    begun: list[int] = []

    @app.task
    async def note(n: int) -> None:
        begun.append(n)

    ids = await app.enqueue_many("note", [{"n": n} for n in range(2)], ordering_key="k")
    assert [run.id for run, _ in await fetch(conn, claim(tasks=("note",), laned=True))] == ids[:1]
    await conn.execute("delete from queue_service.runs where id = %s", [ids[0]])
    assert await one(conn, "select running from queue_service.lanes") == 1
    async with working(app):
        await eventually(lambda: begun == [1], within=30)


async def test_lanes_that_gave_nothing_are_tended_by_who_asked(database: str, conn: Connection) -> None:
    async with App(database, settings=load({"QUEUE_SERVICE_SWEEP_INTERVAL": "1h"})) as app:

        @app.task
        async def note() -> None: ...

        async with working(app):
            await app.wait(await app.enqueue("note", {}), timeout=10)
            await app.enqueue_many("note", [{}] * 3, ordering_key="k")
            await eventually(lambda: nothing_is_left(conn))
            await conn.execute(
                "insert into queue_service.runs (queue, task, payload, ordering_key) "
                "select 'default', 'unknown', '{}', n::text from generate_series(1, 3) as n"
            )
            await conn.execute("update queue_service.lanes set task = ''")
            marked = "select count(*) = 3 from queue_service.lanes where task = 'unknown'"
            await eventually(lambda: one(conn, marked))
