from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from queue_service.errors import DatabaseUnavailable
from queue_service.services.combiner import LANES, MOST, Combiner


class Server:
    """Answers each number with its double, once it is let; refuses what is negative."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = asyncio.Event()
        self.is_gone = False
        self.combiner: Combiner[int, int] = Combiner(self.send, name="test")

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
    before = len(server.batches)
    assert before <= LANES
    server.gate.set()
    assert await asyncio.gather(*tasks, *later) == [2 * number for number in range(50)]
    assert len(server.batches) == before + 1
    assert sorted(number for batch in server.batches for number in batch) == list(range(50))


async def test_a_batch_is_bounded(server: Server) -> None:
    tasks = await server.call(3 * MOST)
    server.gate.set()
    assert await asyncio.gather(*tasks) == [2 * number for number in range(3 * MOST)]
    assert max(map(len, server.batches)) == MOST


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
    assert len(server.batches) == 1
    server.is_gone = False
    assert await server.combiner(1) == 2


async def test_a_caller_who_gives_up_takes_nothing_from_the_others(server: Server) -> None:
    tasks = await server.call(5)
    tasks[2].cancel()
    server.gate.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [each for each in answers if isinstance(each, int)] == [0, 2, 6, 8]
    assert isinstance(answers[2], asyncio.CancelledError)


async def test_nobody_waits_for_a_lane_that_was_cancelled(server: Server) -> None:
    tasks = await server.call(2)
    for lane in tuple(server.combiner._lanes):
        lane.cancel()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(each) for each in answers} == {DatabaseUnavailable}
    server.gate.set()
    assert await server.combiner(1) == 2
