from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Sequence

import pytest

from queue_service.errors import DatabaseUnavailable
from queue_service.services import combiner
from queue_service.services.combiner import BUSY, CARRIERS, MAX_BYTES, MAX_ITEMS, Busy, Combiner


class Server:
    """Answers each number with its double, once it is let; refuses what is negative. Of `busy`, it says so as often."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = asyncio.Event()
        self.is_gone = False
        self.busy: dict[int, int] = {}
        self.combiner: Combiner[int, int] = Combiner(self.send, name="test", weigh=lambda number: number)

    async def send(self, numbers: Sequence[int]) -> list[int | Busy]:
        self.batches.append(list(numbers))
        await self.gate.wait()
        if self.is_gone:
            raise DatabaseUnavailable("gone")
        if min(numbers) < 0:
            raise ValueError(min(numbers))
        return [self._answer(number) for number in numbers]

    def _answer(self, number: int) -> int | Busy:
        if not self.busy.get(number):
            return 2 * number
        self.busy[number] -= 1
        return BUSY

    async def call(self, *numbers: int) -> list[asyncio.Task[int]]:
        """Calls made at the same moment, after which a moment has passed."""
        tasks = [asyncio.create_task(self.combiner(number)) for number in numbers]
        for _ in range(5):
            await asyncio.sleep(0)
        return tasks

    async def occupied(self) -> list[asyncio.Task[int]]:
        """Calls that are under way, one after the other, on every carrier."""
        tasks = []
        for number in range(CARRIERS):
            tasks += await self.call(number)
        assert self.batches == [[number] for number in range(CARRIERS)]
        return tasks


@pytest.fixture
async def server() -> Server:
    return Server()


async def test_a_lone_call_goes_at_once(server: Server) -> None:
    server.gate.set()
    assert await server.combiner(4) == 8
    assert server.batches == [[4]]


async def test_those_that_come_at_the_same_moment_go_together(server: Server) -> None:
    tasks = await server.call(*range(10))
    assert server.batches == [list(range(10))]
    server.gate.set()
    assert await asyncio.gather(*tasks) == [2 * number for number in range(10)]


async def test_those_that_come_meanwhile_go_together_and_each_gets_its_own_answer(server: Server) -> None:
    tasks = await server.occupied()
    for number in range(CARRIERS, 50):
        tasks += await server.call(number)
    server.gate.set()
    assert await asyncio.gather(*tasks) == [2 * number for number in range(50)]
    assert server.batches[CARRIERS:] == [list(range(CARRIERS, 50))]


async def test_callers_that_go_together_stay_together(server: Server) -> None:
    server.gate.set()

    async def caller(first: int) -> None:
        for number in range(20):
            await server.combiner(first + number)

    await asyncio.gather(*map(caller, range(16)))
    assert [len(batch) for batch in server.batches] == 20 * [16]


async def test_a_batch_is_bounded(server: Server) -> None:
    tasks = await server.call(*range(3 * MAX_ITEMS))
    server.gate.set()
    assert await asyncio.gather(*tasks) == [2 * number for number in range(3 * MAX_ITEMS)]
    assert max(map(len, server.batches)) == MAX_ITEMS


async def test_a_batch_is_bounded_by_what_it_carries_but_for_one_item(server: Server) -> None:
    tasks = await server.occupied()
    sizes = [MAX_BYTES // 2, MAX_BYTES // 2, 1, 3 * MAX_BYTES, 2]
    tasks += await server.call(*sizes)
    server.gate.set()
    await asyncio.gather(*tasks)
    assert server.batches[CARRIERS:] == [sizes[:2], sizes[2:3], sizes[3:4], sizes[4:]]


async def test_a_call_that_is_refused_fails_alone(server: Server) -> None:
    server.gate.set()
    numbers = [1, 2, -3, 4, -5]
    answers = await asyncio.gather(*map(server.combiner, numbers), return_exceptions=True)
    assert [each if isinstance(each, int) else str(each) for each in answers] == [2, 4, "-3", 8, "-5"]


async def test_where_the_database_is_gone_nobody_tries_one_by_one(server: Server) -> None:
    server.is_gone = True
    server.gate.set()
    answers = await asyncio.gather(*map(server.combiner, range(20)), return_exceptions=True)
    assert {type(each) for each in answers} == {DatabaseUnavailable}
    assert sum(len(batch) for batch in server.batches) == 20
    server.is_gone = False
    assert await server.combiner(1) == 2


async def test_what_is_busy_goes_again_until_it_is_done(server: Server) -> None:
    server.gate.set()
    server.busy = {3: 4}
    assert await asyncio.gather(*map(server.combiner, range(6))) == [2 * number for number in range(6)]
    assert server.batches == [list(range(6)), [3], [3], [3], [3]]


async def test_what_stays_busy_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(combiner, "LOCK_SECONDS", 0.05)
    server.gate.set()
    server.busy = {3: 1_000_000}
    async with asyncio.timeout(30):
        with pytest.raises(DatabaseUnavailable, match="Another transaction has held"):
            await server.combiner(3)
    assert await server.combiner(4) == 8


async def test_a_caller_who_gives_up_takes_nothing_from_the_others_and_is_not_sent(server: Server) -> None:
    tasks = await server.occupied()
    tasks += await server.call(*range(CARRIERS, 6))
    for number in (0, 4):
        tasks[number].cancel()
    await asyncio.sleep(0)
    server.gate.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [each for each in answers if isinstance(each, int)] == [2, 4, 6, 10]
    assert sorted(number for batch in server.batches for number in batch) == [0, 1, 2, 3, 5]


async def test_nobody_waits_for_a_carrier_that_was_cancelled(server: Server) -> None:
    tasks = await server.call(1, 2, 3)
    for carrier in tuple(server.combiner._carriers):
        carrier.cancel()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(each) for each in answers} == {DatabaseUnavailable}
    server.gate.set()
    assert await server.combiner(1) == 2


async def test_nobody_waits_for_a_carrier_that_was_cancelled_before_it_began(server: Server) -> None:
    tasks = [asyncio.create_task(server.combiner(number)) for number in range(3)]
    while not server.combiner._carriers:  # noqa: ASYNC110 - it is not to go on a step too late
        await asyncio.sleep(0)
    assert server.batches == []
    for carrier in tuple(server.combiner._carriers):
        carrier.cancel()
    server.gate.set()
    assert await asyncio.gather(*tasks) == [0, 2, 4]


async def test_whatever_comes_and_goes_nobody_is_left_waiting(server: Server) -> None:
    server.gate.set()
    chance = random.Random(1)

    async def caller() -> None:
        for number in range(20):
            for _ in range(chance.randrange(5)):
                await asyncio.sleep(0)
            call = asyncio.create_task(server.combiner(number))
            if chance.random() < 0.2:
                await asyncio.sleep(0)
                call.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                assert await call == 2 * number

    async with asyncio.timeout(30):
        await asyncio.gather(*(caller() for _ in range(50)))
    assert server.combiner._under_way == 0
