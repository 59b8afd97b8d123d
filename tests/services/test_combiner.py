from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Sequence

import pytest

from queue_service.errors import DatabaseUnavailable
from queue_service.services.combiner import LANES, MOST, MOST_BYTES, Combiner
from tests.support import eventually


class Server:
    """Answers each number with its double, once it is let; refuses what is negative."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = asyncio.Event()
        self.is_gone = False
        self.combiner: Combiner[int, int] = Combiner(self.send, name="test", weigh=lambda number: number)

    async def send(self, numbers: Sequence[int]) -> list[int]:
        self.batches.append(list(numbers))
        await self.gate.wait()
        if self.is_gone:
            raise DatabaseUnavailable("gone")
        if min(numbers) < 0:
            raise ValueError(min(numbers))
        return [2 * number for number in numbers]

    async def call(self, count: int) -> list[asyncio.Task[int]]:
        tasks = [asyncio.create_task(self.combiner(number)) for number in range(count)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return tasks


@pytest.fixture
async def server() -> Server:
    return Server()


async def test_a_lone_call_goes_at_once(server: Server) -> None:
    server.gate.set()
    assert await server.combiner(4) == 8
    assert server.batches == [[4]]


async def test_those_that_come_meanwhile_go_together_and_each_gets_its_own_answer(server: Server) -> None:
    tasks = await server.call(10)
    later = [asyncio.create_task(server.combiner(number)) for number in range(10, 50)]
    await asyncio.sleep(0)
    assert server.batches == [[number] for number in range(LANES)]
    server.gate.set()
    assert await asyncio.gather(*tasks, *later) == [2 * number for number in range(50)]
    assert server.batches[LANES:] == [list(range(LANES, 50))]


async def test_a_batch_is_bounded(server: Server) -> None:
    tasks = await server.call(3 * MOST)
    server.gate.set()
    assert await asyncio.gather(*tasks) == [2 * number for number in range(3 * MOST)]
    assert max(map(len, server.batches)) == MOST


async def test_a_batch_is_bounded_by_what_it_carries_but_for_one_item(server: Server) -> None:
    tasks = await server.call(LANES)
    sizes = [MOST_BYTES // 2, MOST_BYTES // 2, 1, 3 * MOST_BYTES, 2]
    tasks += [asyncio.create_task(server.combiner(size)) for size in sizes]
    await asyncio.sleep(0)
    server.gate.set()
    await asyncio.gather(*tasks)
    assert server.batches[LANES:] == [sizes[:2], sizes[2:3], sizes[3:4], sizes[4:]]


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


async def test_a_caller_who_gives_up_takes_nothing_from_the_others_and_is_not_sent(server: Server) -> None:
    tasks = await server.call(6)
    for number in (0, 4):
        tasks[number].cancel()
    await asyncio.sleep(0)
    server.gate.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [each for each in answers if isinstance(each, int)] == [2, 4, 6, 10]
    assert sorted(number for batch in server.batches for number in batch) == [0, 1, 2, 3, 5]


async def test_nobody_waits_for_a_lane_that_was_cancelled(server: Server) -> None:
    tasks = await server.call(LANES + 3)
    server.gate.set()
    server.gate.clear()
    await eventually(lambda: server.combiner._lanes)
    for lane in tuple(server.combiner._lanes):
        lane.cancel()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert DatabaseUnavailable in {type(each) for each in answers}
    server.gate.set()
    assert await server.combiner(1) == 2


async def test_whatever_comes_and_goes_nobody_is_left_waiting(server: Server) -> None:
    server.gate.set()
    chance = random.Random(1)  # noqa: S311 - the same every time

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
