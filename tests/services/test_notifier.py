from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace

import pytest

from queue_service import App
from queue_service.db import channels
from queue_service.db.channels import Notice
from queue_service.db.execute import Connection, fetch
from queue_service.db.query import Query
from queue_service.errors import DatabaseUnavailable, ValueRefused
from queue_service.services import notifier
from queue_service.services.notifier import Notifier
from tests.support import eventually


class Post:
    """A notifier whose letters are kept, or sent by a connection."""

    def __init__(self, conn: Connection | None = None) -> None:
        self.letters: list[list[Notice]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.failure: Exception | None = None
        self._conn = conn
        self.notifier = Notifier(self.fetch)

    async def fetch(self, query: Query[None]) -> None:
        pairs = zip(query.params["channels"], query.params["payloads"], strict=True)
        self.letters.append([Notice(channel, payload) for channel, payload in pairs])
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        if self._conn is not None:
            await fetch(self._conn, query)


def about(number: int) -> Notice:
    return Notice("runs", str(number))


@pytest.fixture
async def post() -> AsyncIterator[Post]:
    made = Post()
    yield made
    made.failure = None
    await made.notifier.close()


async def test_a_lone_notice_is_sent_at_once(post: Post) -> None:
    post.notifier.send([about(1)])
    await asyncio.sleep(0)
    assert post.letters == [[about(1)]]


async def test_what_comes_while_one_is_on_its_way_is_gathered_into_one_letter_in_order(post: Post) -> None:
    post.gate.clear()
    post.notifier.send([about(0)])
    await asyncio.sleep(0)
    for number in range(1, 50):
        post.notifier.send([about(number)])
    post.gate.set()
    await eventually(lambda: len(post.letters) == 2)
    assert post.letters == [[about(0)], [about(number) for number in range(1, 50)]]


async def test_the_same_notice_is_sent_once_in_a_letter(post: Post) -> None:
    post.gate.clear()
    post.notifier.send([about(0)])
    await asyncio.sleep(0)
    post.notifier.send(10 * [about(1)])
    post.notifier.send([about(2), about(1)])
    post.gate.set()
    await eventually(lambda: len(post.letters) == 2)
    assert post.letters[1] == [about(1), about(2)]


async def test_what_is_said_again_later_is_sent_again(post: Post) -> None:
    post.notifier.send([about(1)])
    await eventually(lambda: post.letters)
    post.notifier.send([about(1)])
    await eventually(lambda: len(post.letters) == 2)
    assert post.letters == [[about(1)], [about(1)]]


async def test_one_channel_does_not_wait_for_another(post: Post) -> None:
    post.gate.clear()
    post.notifier.send([about(1)])
    await asyncio.sleep(0)
    post.notifier.send([Notice("finished", "1")])
    await asyncio.sleep(0)
    assert post.letters == [[about(1)], [Notice("finished", "1")]]
    post.gate.set()


async def test_one_notice_rides_and_the_next_does_not_until_the_moment_is_over(post: Post) -> None:
    assert post.notifier.try_reserve("runs")
    assert not post.notifier.try_reserve("runs")
    assert post.notifier.try_reserve("finished")
    await eventually(lambda: post.notifier.try_reserve("runs"))
    assert post.letters == []


async def test_what_may_not_ride_is_sent_when_the_moment_is_over(post: Post) -> None:
    assert post.notifier.try_reserve("runs")
    post.notifier.send([about(1)])
    assert post.letters == []
    await eventually(lambda: post.letters == [[about(1)]])


@pytest.mark.parametrize(
    "failure", [DatabaseUnavailable("gone"), ValueRefused("too many notices in the queue"), RuntimeError("whatever")]
)
async def test_an_error_costs_the_notices_of_its_time_and_no_more(post: Post, failure: Exception) -> None:
    post.failure = failure
    post.notifier.send([about(1)])
    await eventually(lambda: len(post.letters) == 1)
    post.failure = None
    post.notifier.send([about(2)])
    await eventually(lambda: len(post.letters) == 2)
    assert post.letters[1] == [about(2)]


async def test_closing_sends_what_is_pending(post: Post) -> None:
    assert post.notifier.try_reserve("runs")
    post.notifier.send([about(1), about(2)])
    await post.notifier.close()
    assert post.letters == [[about(1), about(2)]]


async def test_a_flood_is_announced_by_a_listener_without_a_loss(
    session: Callable[[], Awaitable[Connection]], conn: Connection
) -> None:
    await conn.execute("listen runs")
    post = Post(await session())
    for number in range(1_000):
        post.notifier.send([about(number)])
        if number % 50 == 0:
            await asyncio.sleep(0)
    heard = {int(notice.payload) async for notice in conn.notifies(timeout=30, stop_after=1_000)}
    await post.notifier.close()
    assert heard == set(range(1_000))
    assert len(post.letters) < 200


async def test_the_moment_grows_in_a_flood_and_shrinks_at_a_thousand_a_second(
    post: Post, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, sent, rate = 0.0, 0, 0.0
    sleep = asyncio.sleep

    async def moment(seconds: float) -> None:
        """As long as it is said to be, on whatever machine: what comes in it has come."""
        nonlocal now, sent
        now += seconds
        while rate and sent < now * rate + 1:
            post.notifier.send([about(sent)])
            sent += 1
        await sleep(0)

    async def letters_at(wanted: float, seconds: float) -> float:
        """How many letters a second go out."""
        nonlocal now, sent, rate
        now, sent, rate, before = 0.0, 1, wanted, len(post.letters)
        post.notifier.send([about(0)])
        await eventually(lambda: now >= seconds)
        rate = 0.0
        await post.notifier.close()
        return (len(post.letters) - before) / now

    monkeypatch.setattr(notifier, "asyncio", SimpleNamespace(sleep=moment, create_task=asyncio.create_task))
    # But not beyond its bound of 10 ms.
    assert 80 < await letters_at(50_000, 0.3) < 200
    assert await letters_at(1_000, 0.5) > 300


async def test_an_app_that_closes_has_announced_all_it_did(database: str, conn: Connection) -> None:
    await conn.execute(f"listen {channels.RUNS}")
    async with App(database) as app:
        for priority in range(10):
            await app.enqueue("noop", {}, priority=priority)
    heard = {notice.payload async for notice in conn.notifies(timeout=10, stop_after=10)}
    assert heard == {f"{priority} default" for priority in range(10)}
