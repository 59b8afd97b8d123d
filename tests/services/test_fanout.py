"""The tail of a stream, and the fanout between a database and followers that are slow, late, or lied to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import psycopg
import pytest

from queue_service import App, Event, StreamState, Turn
from queue_service.db import channels
from queue_service.db.execute import Connection
from queue_service.errors import DatabaseUnavailable, SchemaMismatch
from queue_service.services import fanout
from queue_service.services.fanout import READ_PAGE, TAIL_LENGTH, Tail, Wakeup
from tests.support import eventually, service


def events(first: int, last: int, kind: str = "delta") -> list[Event]:
    return [
        Event(stream="s", seq=seq, kind=kind, body={}, terminal=kind in {"reply", "error"})
        for seq in range(first, last + 1)
    ]


def placed(head: int = 0) -> Tail:
    tail = Tail("s")
    tail.place(head)
    return tail


async def tail_of(app: App) -> Tail:
    """The tail of stream `s`, once it was looked at first."""

    def found() -> Tail | None:
        tail = app.opened.fanout._tails.get("s")
        return tail if tail is not None and tail.head is not None else None

    tail = await eventually(found)
    assert isinstance(tail, Tail)
    return tail


async def follow_at_rest(app: App, follower: AsyncGenerator[Event, None]) -> asyncio.Future[Event]:
    """Store the first event of stream `s`, and return the second as it is to come: the follower has had the first, and no look
    at the stream is under way."""
    await app.events.append("s", "delta", {})
    assert (await next_of(follower)).seq == 1
    await eventually(lambda: (tail := app.opened.fanout._tails.get("s")) is not None and tail.head == 1)
    return asyncio.ensure_future(next_of(follower))


async def next_of(follower: AsyncGenerator[Event, None]) -> Event:
    async with asyncio.timeout(10):
        return await anext(follower)


class TestATail:
    async def test_before_the_first_look_has_nothing_to_say(self) -> None:
        assert Tail("s").since(0) is None

    async def test_holds_what_came_after_it_was_placed_and_nothing_before(self) -> None:
        tail = placed(10)
        tail.extend(events(11, 13))
        assert [event.seq for event in tail.since(10) or []] == [11, 12, 13]
        assert [event.seq for event in tail.since(12) or []] == [13]
        assert tail.since(13) == []
        assert tail.since(9) is None

    async def test_takes_events_that_were_read_twice_once(self) -> None:
        tail = placed()
        tail.extend(events(1, 5))
        tail.extend(events(3, 7))
        assert [event.seq for event in tail.since(0) or []] == list(range(1, 8))

    async def test_is_bounded_and_knows_what_it_no_longer_holds(self) -> None:
        tail = placed()
        tail.extend(events(1, TAIL_LENGTH + 10))
        assert len(tail.events) == TAIL_LENGTH
        assert tail.since(9) is None
        assert len(tail.since(10) or []) == TAIL_LENGTH

    async def test_rings_for_endings_only_where_there_is_one(self) -> None:
        tail = placed()
        moved, ended = tail.moved.next(), tail.ended_turns.next()
        tail.extend(events(1, 2))
        assert (moved.is_set(), ended.is_set()) == (True, False)
        tail.extend(events(3, 3, "reply"))
        assert ended.is_set()

    async def test_rings_for_endings_when_it_is_placed(self) -> None:
        tail = Tail("s")
        ended = tail.ended_turns.next()
        tail.place(1)
        assert ended.is_set()

    async def test_is_over_once_an_ended_stream_was_given_up_to_its_top(self) -> None:
        tail = placed(3)
        tail.top, tail.state = 5, StreamState.ENDED
        assert (tail.is_over(4), tail.is_over(5)) == (False, True)
        tail.state = StreamState.CLOSING
        assert not tail.is_over(5)


class TestABell:
    async def test_wakes_those_who_took_it_before_and_not_those_after(self) -> None:
        wakeup = Wakeup()
        before, same = wakeup.next(), wakeup.next()
        wakeup.wake()
        assert before.is_set()
        assert same.is_set()
        assert not wakeup.next().is_set()


class TestTheFanout:
    async def test_reads_a_long_backlog_a_page_at_a_time(self, app: App) -> None:
        async with aclosing(app.events.follow("s")) as follower:
            first = asyncio.ensure_future(next_of(follower))
            await tail_of(app)
            many = 2 * READ_PAGE + 50
            await app.events.append_many("s", [("delta", n) for n in range(many)])
            assert (await first).seq == 1
            assert [(await next_of(follower)).seq for _ in range(many - 1)] == list(range(2, many + 1))

    async def test_follows_many_streams_at_once(self, app: App, database: str) -> None:
        async def collect(stream: str) -> list[int]:
            async with asyncio.timeout(60):
                return [event.seq async for event in app.events.follow(stream)]

        names = [f"s{n}" for n in range(80)]
        followers = [asyncio.ensure_future(collect(name)) for name in names]
        async with App(database) as other:
            for _ in range(3):
                await asyncio.gather(*(other.events.append(name, "delta", {}) for name in names))
            await asyncio.gather(*(other.events.set_state(name, "ended") for name in names))
        assert await asyncio.gather(*followers) == [[1, 2, 3]] * 80

    async def test_survives_notices_that_are_nonsense(self, app: App, conn: Connection) -> None:
        async with aclosing(app.events.follow("s")) as follower:
            first = asyncio.ensure_future(next_of(follower))
            await tail_of(app)
            numbers = ["-1 s", "1", "7 ", "99 s", "9" * 19 + " s", "9" * 5_000 + " s", "\u00b2 s", "1 unknown"]
            for payload in ["", "*", "x", "x s", *numbers]:
                await conn.execute("select pg_notify(%s, %s)", [channels.EVENTS, payload])
            await app.events.append("s", "delta", {})
            assert (await first).seq == 1

    async def test_survives_a_database_that_is_gone_for_a_while(self, app: App) -> None:
        fanout_ = app.opened.fanout
        fetch = fanout_._fetch
        async with aclosing(app.events.follow("s")) as follower:
            following = await follow_at_rest(app, follower)
            lost: list[Any] = []

            async def gone(query: Any) -> Any:
                lost.append(query)
                raise DatabaseUnavailable("gone")

            fanout_._fetch = gone
            await app.events.append("s", "delta", {})
            await eventually(lambda: len(lost) > 1)
            assert not following.done()
            fanout_._fetch = fetch
            assert (await following).seq == 2

    @pytest.mark.parametrize("error", [psycopg.ProgrammingError, RuntimeError, DatabaseUnavailable])
    async def test_goes_on_after_whatever_error_and_says_so(self, app: App, error: type[Exception]) -> None:
        fanout_ = app.opened.fanout
        fetch = fanout_._fetch
        async with aclosing(app.events.follow("s")) as follower:
            following = await follow_at_rest(app, follower)
            reading = service(app.opened.services, "reading of streams")

            async def broken(_query: Any) -> Any:
                raise error("on purpose")

            fanout_._fetch = broken
            await app.events.append("s", "delta", {})
            await eventually(lambda: reading.why is not None)
            assert not reading.condition.is_well
            fanout_._fetch = fetch
            assert (await following).seq == 2
            await eventually(lambda: reading.condition.is_well)

    async def test_lives_through_a_table_that_is_missing_for_a_while(self, app: App, conn: Connection) -> None:
        async with asyncio.timeout(20), aclosing(app.events.follow("s")) as follower:
            await app.events.append("s", "delta", {})
            assert (await anext(follower)).seq == 1
            await conn.execute("alter table queue_service.events rename to elsewhere")
            waiting = asyncio.ensure_future(anext(follower))
            with pytest.raises(SchemaMismatch):
                await app.events.append("s", "delta", {})
            await conn.execute("alter table queue_service.elsewhere rename to events")
            await app.events.append("s", "delta", {})
            assert (await waiting).seq == 2

    async def test_looks_at_quiet_streams_less_often(self, app: App, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fanout, "QUIET_POLLS", 10**9)
        await app.events.set_state("quiet", "suspended")
        asked: list[list[str]] = []
        fanout_ = app.opened.fanout
        fetch = fanout_._fetch

        async def noted(query: Any) -> Any:
            asked.append(query.params.get("streams", []))
            return await fetch(query)

        with fanout_.watch("quiet") as quiet, fanout_.watch("s"):
            await eventually(lambda: quiet.head is not None)
            await tail_of(app)
            fanout_._fetch = noted
            await eventually(lambda: len(asked) > 3 and asked[-2:] == [["s"], ["s"]])

    async def test_hears_of_a_turn_that_ended_between_two_polls(self, app: App, database: str) -> None:
        await app.turns.arm(Turn(deployment="d", message_id="m", stream="s"))
        with app.opened.fanout.watch("s") as tail:
            await tail_of(app)
            ended = tail.ended_turns.next()
            async with App(database) as other:
                await other.turns.commit_reply("d", ["m"], {})
            await asyncio.wait_for(ended.wait(), 10)

    async def test_tells_of_events_that_went_before_they_were_read(self, app: App, database: str) -> None:
        async with aclosing(app.events.follow("s")) as follower:
            first = asyncio.ensure_future(anext(follower))
            await tail_of(app)
            async with await psycopg.AsyncConnection.connect(database) as mine:
                await app.events.append_many("s", [("delta", 1), ("delta", 2)], conn=mine)
                await mine.execute("delete from queue_service.events")
            await app.events.set_state("s", "ended")
            done, _ = await asyncio.wait([first], timeout=10)
            first.cancel()
            assert done
            gap = first.result()
            assert (gap.kind, gap.body["from"], gap.body["to"]) == ("gap", 1, 2)

    async def test_goes_back_with_the_database(self, app: App, conn: Connection) -> None:
        await app.events.append_many("s", [("delta", n) for n in range(1, 6)])
        async with aclosing(app.events.follow("s")) as follower:
            assert [(await next_of(follower)).seq for _ in range(5)] == [1, 2, 3, 4, 5]
            await conn.execute("delete from queue_service.events where seq > 2")
            await conn.execute("update queue_service.streams set head = 2")
            gap = await next_of(follower)
            assert (gap.kind, gap.body) == ("gap", {"stream": "s", "from": 3, "to": 5, "head": 2})
            await app.events.append("s", "delta", "another")
            assert await next_of(follower) == (await app.events.read("s", after=2))[0]
