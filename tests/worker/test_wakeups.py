"""Who looks when a notice comes. Polls are an hour apart here: what is begun was looked for because somebody heard of it."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from queue_service import App, Worker
from queue_service.db.execute import Connection
from queue_service.db.query import Query, scalar
from queue_service.roster.queries import Fleet
from queue_service.settings import load
from queue_service.worker.claims import Claims
from queue_service.worker.looks import CALL_PAUSE, Looks
from queue_service.worker.pace import Alarm
from queue_service.worker.queue_state import QueueState
from tests.support import eventually, listening, one, working

SETTINGS = {"POLL_INTERVAL": "1h", "SWEEP_INTERVAL": "1h", "LEASE": "3s"}


@pytest.fixture
async def patient(database: str) -> AsyncIterator[App]:
    settings = load({f"QUEUE_SERVICE_{name}": value for name, value in SETTINGS.items()})
    async with App(database, settings=settings) as opened:

        @opened.task
        async def noop() -> None: ...

        yield opened


@asynccontextmanager
async def fleet(app: App, number: int, *, concurrency: int = 10) -> AsyncIterator[list[Worker]]:
    """So many idle workers that know of each other."""
    async with AsyncExitStack() as stack:
        workers = [await stack.enter_async_context(working(app, {"default": concurrency})) for _ in range(number)]
        await eventually(lambda: all(size(each) == number for each in workers))
        yield workers


def size(worker: Worker) -> int:
    """How many it knows of."""
    assert worker._parts is not None
    return worker._parts.claimer._looks.precedence._size


def tallies(workers: list[Worker]) -> list[int]:
    return [each.tally.succeeded for each in workers]


@pytest.fixture
def claims(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When a claim was asked for, one after the other, by all workers here."""
    asked: list[float] = []
    claim = Claims.claim

    async def noted(self: Claims, *arguments: object, **options: object) -> None:
        asked.append(time.monotonic())
        await claim(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Claims, "claim", noted)
    return asked


async def test_of_many_idle_workers_few_look_for_a_run_and_all_have_their_turn(
    patient: App, conn: Connection, claims: list[float]
) -> None:
    async with fleet(patient, 8) as workers:
        await listening(conn)
        for _ in range(200):
            await patient.wait(await patient.enqueue("noop", {}), timeout=20)
        assert sum(tallies(workers)) == 200
        assert all(tallies(workers))
    # A look each would be 1,600. The first and the second make 400, and the others learn that they are not needed.
    assert len(claims) < 800


async def test_a_run_does_not_wait_for_workers_that_are_dead(patient: App, conn: Connection) -> None:
    """Most of those in the roster, for as long as they are taken for living."""
    async with fleet(patient, 4) as workers:
        # Meanwhile those behind the second have learned that they are not needed.
        for _ in range(100):
            await patient.wait(await patient.enqueue("noop", {}), timeout=20)
        await conn.execute(
            "insert into queue_service.workers (name, version, revision, queues, fleet, seen_at) "
            "select 'dead', '1', revision, '{}', fleet, now() + interval '1 day' from queue_service.workers, generate_series(1, 9)"
        )
        await eventually(lambda: all(size(each) == 40 for each in workers))
        begun = time.monotonic()
        for _ in range(20):
            await patient.wait(await patient.enqueue("noop", {}), timeout=20)
        # The first one alive among ten looks after 3 s at the latest, and much sooner once it knows that it is needed.
        assert time.monotonic() - begun < 20 * 1.0


async def test_a_run_does_not_wait_for_workers_that_are_full(patient: App) -> None:
    release = asyncio.Event()

    @patient.task
    async def hold() -> None:
        await release.wait()

    async with fleet(patient, 6, concurrency=1) as workers:
        held = [await patient.enqueue("hold", {}) for _ in range(5)]
        await eventually(lambda: running(patient, 5))
        for _ in range(20):
            await patient.wait(await patient.enqueue("noop", {}), timeout=20)
        assert sorted(tallies(workers)) == [0, 0, 0, 0, 0, 20]
        release.set()
        for run_id in held:
            await patient.wait(run_id, timeout=20)


@pytest.mark.parametrize("enqueue_all", ["at once", "one by one"])
async def test_runs_for_all_begin_in_all_workers_at_once(patient: App, enqueue_all: str) -> None:
    """Each has a slot, and no run ends before all have begun."""
    begun: list[float] = []
    all_begun = asyncio.Event()

    @patient.task
    async def meet() -> None:
        begun.append(time.monotonic())
        if len(begun) == 8:
            all_begun.set()
        await all_begun.wait()

    async with fleet(patient, 8, concurrency=1) as workers:
        if enqueue_all == "at once":
            await patient.enqueue_many("meet", [{}] * 8)
        else:
            await asyncio.gather(*(patient.enqueue("meet", {}) for _ in range(8)))
        async with asyncio.timeout(20):
            await all_begun.wait()
        await eventually(lambda: tallies(workers) == [1] * 8)


@pytest.mark.parametrize("is_full_before", [False, True], ids=["filled by this claim", "full before"])
async def test_one_that_has_no_room_for_what_is_left_calls_the_others(
    patient: App, monkeypatch: pytest.MonkeyPatch, *, is_full_before: bool
) -> None:
    """Where only the first and the second look, and the others would come in an hour."""
    release = asyncio.Event()

    @patient.task
    async def hold() -> None:
        await release.wait()

    # In an order that stays: on a machine that is slow, one whose turn is over and one whose turn is yet to come may hear of
    # the same run.
    monkeypatch.setattr("queue_service.worker.precedence.SLICE", math.inf)
    async with fleet(patient, 6, concurrency=2) as workers:
        monkeypatch.setattr("queue_service.worker.precedence.STEP", 3600.0)
        for number in range(5 if is_full_before else 0):
            # Whoever it is, it is full then.
            await patient.enqueue_many("hold", [{}] * 2)
            await eventually(lambda: running(patient, 2 * number + 2))  # noqa: B023
        left = 12 - 10 * is_full_before
        for _ in range(left if is_full_before else 0):
            await patient.enqueue("hold", {})
        if not is_full_before:
            await patient.enqueue_many("hold", [{}] * left)
        try:
            await eventually(lambda: running(patient, 12))
        finally:
            release.set()
        await eventually(lambda: tallies(workers) == [2] * 6)


async def test_a_backlog_is_worked_off_by_all(patient: App) -> None:
    release = asyncio.Event()

    @patient.task
    async def hold() -> None:
        await release.wait()

    async with fleet(patient, 5, concurrency=4) as workers:
        await patient.enqueue_many("hold", [{}] * 100)
        await eventually(lambda: running(patient, 20))
        release.set()
        await eventually(lambda: sum(tallies(workers)) == 100)


async def test_a_run_that_only_one_of_the_workers_of_a_queue_knows_is_begun_there(
    database: str, patient: App, conn: Connection
) -> None:
    other = App(database, settings=patient.settings)

    @other.task
    async def rare() -> str:
        return "done"

    async with other, fleet(patient, 4):
        async with working(other):
            await eventually(lambda: one(conn, "select count(distinct fleet) = 2 from queue_service.workers"))
            for _ in range(20):
                run = await patient.wait(await patient.enqueue("rare", {}), timeout=20)
                assert run.result == "done"


async def test_what_a_worker_hands_back_when_it_stops_is_begun_by_another_at_once(patient: App) -> None:
    begun = asyncio.Event()

    @patient.task
    async def hold_once() -> None:
        if not begun.is_set():
            begun.set()
            await asyncio.Event().wait()

    async with fleet(patient, 1) as (first,):
        run_id = await patient.enqueue("hold_once", {})
        await begun.wait()
        async with working(patient) as second:
            await eventually(lambda: size(first) == size(second) == 2)
            first.stop(now=True)
            await patient.wait(run_id, timeout=20)
            assert second.tally.succeeded == 1


async def test_workers_that_come_and_go_leave_no_run_behind(patient: App) -> None:
    async with fleet(patient, 2):

        async def come_and_go() -> None:
            for _ in range(6):
                async with working(patient):
                    await asyncio.sleep(0.1)  # each lives so long

        coming = [asyncio.create_task(come_and_go()) for _ in range(2)]
        while not all(each.done() for each in coming):
            await patient.wait(await patient.enqueue("noop", {}), timeout=20)
        await asyncio.gather(*coming)


async def running(app: App, number: int) -> bool:
    count: Query[int] = Query("select count(*) from queue_service.runs where state = 'running'", scalar)
    return await app.fetch(count) == number


async def test_one_that_is_full_and_may_not_call_yet_looks_again_when_it_may() -> None:
    called: list[str] = []
    looks = Looks(1, Alarm(), poll=3600.0, call_others=lambda queue, _: called.append(queue))
    looks.learn(Fleet([1, 2], 0.0), 0.0, 0.0)
    state = QueueState(Full())  # type: ignore[arg-type]
    for number in (1, 2):
        looks._begin(state, 1)
        now = time.monotonic()
        if looks.note_what_came(now):
            looks.call_others(now)
        # Just after a call the second one has to wait.
        assert called == ["default"]
        assert (state.look is not None) is (number == 2)
    assert state.look is not None
    assert state.look.when() - asyncio.get_running_loop().time() <= CALL_PAUSE
    await eventually(lambda: state.look is None)
    now = time.monotonic()
    assert looks.note_what_came(now)
    looks.call_others(now)
    assert called == ["default"] * 2


class Full:
    """An executor without room."""

    queue = "default"
    is_idle = False

    def wants(self, *, ahead: bool = True) -> int:
        del ahead
        return 0
