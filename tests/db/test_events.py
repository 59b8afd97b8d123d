"""Streams on a real database: the order of seq is the order of commits, without gaps, and readers hear what they miss."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing
from typing import Any

import msgspec
import psycopg
import pytest
from psycopg import errors as pg

from queue_service import App, Event, StreamState, Turn, TurnFailure
from queue_service.app.sync import SyncApp
from queue_service.db.execute import Connection
from queue_service.errors import ConfigError, DatabaseUnavailable, PayloadRefused, StreamEnded, ValueRefused
from queue_service.services import fanout
from queue_service.settings import load
from tests.support import blocked, eventually, one, rows

Session = Callable[[], Awaitable[Connection]]

# Who listens for events, as the server sees them.
LISTENERS = "from pg_stat_activity where datname = current_database() and query like 'listen%%events%%'"


@pytest.fixture
def q(app: App) -> Iterator[SyncApp]:
    with app.sync as opened:
        yield opened


async def following(events: AsyncGenerator[Event, None]) -> Event:
    async with asyncio.timeout(10):
        return await anext(events)


async def taken(events: AsyncGenerator[Event, None], count: int) -> list[int]:
    return [(await following(events)).seq for _ in range(count)]


async def to_the_end(events: AsyncGenerator[Event, None]) -> list[tuple[int, str]]:
    async with asyncio.timeout(10):
        return [(event.seq, event.kind) async for event in events]


async def waiting_follower(app: App, stream: str = "s") -> None:
    """Until somebody follows the stream here and has seen all there is."""
    await eventually(lambda: (tail := app.opened.fanout._tails.get(stream)) and tail.head is not None)


class TestAppending:
    async def test_numbers_the_events_of_each_stream_from_one(self, app: App) -> None:
        assert [await app.events.append("s", "delta", {"n": n}) for n in range(3)] == [1, 2, 3]
        assert await app.events.append("other", "status", "a text") == 1
        assert [(event.seq, event.kind, event.body) for event in await app.events.read("s")] == [
            (n + 1, "delta", {"n": n}) for n in range(3)
        ]
        (event,) = await app.events.read("other")
        assert (event.stream, event.body, event.terminal) == ("other", "a text", False)
        assert event.created_at is not None

    async def test_needs_no_body(self, app: App) -> None:
        assert await app.events.append("s", "status") == 1
        assert await app.events.append_many("s", [("status", None), ("status", [None])]) == [2, 3]
        assert [event.body for event in await app.events.read("s")] == [None, None, [None]]

    async def test_many_puts_nothing_between_them(self, app: App) -> None:
        calls = [app.events.append_many("s", [("delta", [n, k]) for k in range(5)]) for n in range(20)]
        answers = await asyncio.gather(*calls)
        assert all(seqs == list(range(seqs[0], seqs[0] + 5)) for seqs in answers)
        stored = {event.seq: event.body for event in await app.events.read("s")}
        assert len(stored) == 100
        assert all([stored[seq] for seq in seqs] == [[n, k] for k in range(5)] for n, seqs in enumerate(answers))

    async def test_nothing_stores_nothing(self, app: App) -> None:
        assert await app.events.append_many("s", []) == []
        assert await app.events.stream("s") is None

    async def test_from_many_connections_leaves_no_gap_and_no_double(self, app: App, session: Session) -> None:
        sessions = [await session() for _ in range(4)]

        async def write(mine: Connection) -> list[int]:
            return [await app.events.append("s", "delta", {}, conn=mine) for _ in range(25)]

        seqs = await asyncio.gather(
            *map(write, sessions), *(app.events.append_many("s", [("x", 1)]) for _ in range(25))
        )
        assert sorted(seq for each in seqs for seq in each) == list(range(1, 126))
        assert [event.seq for event in await app.events.read("s")] == list(range(1, 126))
        assert all(each == sorted(each) for each in seqs)

    async def test_a_second_writer_waits_for_the_first_to_commit(
        self, app: App, database: str, session: Session, conn: Connection
    ) -> None:
        other = await session()
        async with await psycopg.AsyncConnection.connect(database) as mine:
            assert await app.events.append("s", "delta", "first", conn=mine) == 1
            second = asyncio.ensure_future(app.events.append("s", "delta", "second", conn=other))
            await eventually(lambda: blocked(conn, other))
            assert await app.events.read("s") == []
            await mine.commit()
        assert await second == 2

    async def test_a_seq_that_was_rolled_back_is_given_again(self, app: App, database: str) -> None:
        async with await psycopg.AsyncConnection.connect(database) as mine:
            assert await app.events.append("s", "delta", "never", conn=mine) == 1
            await mine.rollback()
        assert await app.events.append("s", "delta", "first") == 1
        assert [event.body for event in await app.events.read("s")] == ["first"]

    @pytest.mark.parametrize("kind", ["reply", "error", "gap", "", "x" * 65, "a\nb", 7, None])
    async def test_of_a_kind_that_is_no_word_or_is_reserved_is_refused(self, app: App, kind: Any) -> None:
        with pytest.raises(ConfigError, match=r"[Kk]ind"):
            await app.events.append("s", kind, {})
        assert await app.events.stream("s") is None

    @pytest.mark.parametrize("kind", ["reply", "error"])
    async def test_no_ending_can_be_stored_as_anything_else(self, conn: Connection, kind: str) -> None:
        with pytest.raises(pg.CheckViolation):
            await conn.execute(
                "insert into queue_service.events (stream, seq, kind, body) values ('s', 1, %s, '{}')", [kind]
            )

    @pytest.mark.parametrize("body", [{"a": "\x00"}, "\ud800", math.nan, "x" * 300_000, object()])
    async def test_a_body_that_cannot_be_stored_is_refused(self, app: App, body: Any) -> None:
        with pytest.raises(PayloadRefused, match="body"):
            await app.events.append("s", "delta", body)

    async def test_a_call_that_the_database_refuses_fails_alone(self, app: App) -> None:
        bodies: list[Any] = list(range(10))
        bodies[4] = msgspec.Raw(b"1e-20000")
        answers = await asyncio.gather(*(app.events.append("s", "x", body) for body in bodies), return_exceptions=True)
        assert [type(each) for each in answers if not isinstance(each, int)] == [ValueRefused]
        assert sorted(event.body for event in await app.events.read("s")) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
        assert await app.events.head("s") == 9

    async def test_many_calls_at_once_share_statements(self, app: App) -> None:
        asked: list[str] = []
        fetch = app.opened.pool.fetch

        async def counted(query: Any) -> Any:
            asked.append(query.text)
            return await fetch(query)

        app.opened.pool.fetch = counted  # type: ignore[method-assign, assignment]
        seqs = await asyncio.gather(*(app.events.append(f"s{n % 3}", "delta", n) for n in range(90)))
        assert sum("insert into queue_service.events" in text for text in asked) <= 3
        for n, seq in enumerate(seqs):
            (event,) = await app.events.read(f"s{n % 3}", after=seq - 1, limit=1)
            assert event.body == n

    async def test_to_an_ended_stream_is_refused_and_to_others_in_the_same_batch_is_not(self, app: App) -> None:
        await app.events.set_state("over", "ended")
        streams = ["s", "over", "s"]
        answers = await asyncio.gather(*(app.events.append(s, "delta", {}) for s in streams), return_exceptions=True)
        assert isinstance(answers[1], StreamEnded)
        assert [answers[0], answers[2]] == [1, 2]
        assert await app.events.set_state("over", "active") == 0
        assert await app.events.append("over", "delta", {}) == 1


class TestReading:
    async def test_goes_on_after_a_cursor_a_page_at_a_time(self, app: App) -> None:
        await app.events.append_many("s", [("delta", n) for n in range(10)])
        assert [event.seq for event in await app.events.read("s", after=3, limit=4)] == [4, 5, 6, 7]
        assert await app.events.read("s", after=10) == []
        assert await app.events.read("s", after=99) == []
        assert await app.events.head("s") == 10

    async def test_a_stream_that_does_not_exist_finds_nothing_and_a_head_of_zero(self, app: App) -> None:
        assert await app.events.read("nowhere") == []
        assert await app.events.head("nowhere") == 0
        assert await app.events.stream("nowhere") is None
        assert await app.events.trim("nowhere", upto=9) == 0

    async def test_knows_a_stream_from_the_arming_of_its_first_turn_on(self, app: App) -> None:
        await app.turns.arm(Turn(deployment="d", message_id="m", stream="s"))
        found = await app.events.stream("s")
        assert found is not None
        assert (found.head, found.state) == (0, StreamState.CREATED)

    @pytest.mark.parametrize("bad", [{"after": -1}, {"after": True}, {"after": "1"}, {"limit": 0}, {"limit": 1_001}])
    async def test_takes_a_cursor_and_a_limit_that_make_sense(self, app: App, bad: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=next(iter(bad))):
            await app.events.read("s", **bad)

    async def test_of_a_state_that_does_not_exist_is_refused(self, app: App) -> None:
        with pytest.raises(ConfigError, match="created, starting, active"):
            await app.events.set_state("s", "finished")


class TestTrimming:
    async def test_deletes_up_to_a_seq_and_keeps_endings(self, app: App) -> None:
        await app.events.append_many("s", [("delta", n) for n in range(3)])
        await app.turns.arm(Turn(deployment="d", message_id="m", stream="s"))
        await app.turns.fail("d", "m", TurnFailure("cancelled"))
        await app.events.append_many("s", [("delta", n) for n in range(3)])
        assert await app.events.trim("s", upto=6) == 5
        assert [event.seq for event in await app.events.read("s")] == [4, 7]
        assert await app.events.trim("s", upto=6) == 0
        assert await app.events.head("s") == 7
        assert await app.events.append("s", "delta", {}) == 8
        outcome = await app.turns.outcome("d", "m")
        assert outcome is not None
        assert outcome.body is not None


class TestFollowing:
    async def test_gives_what_is_stored_and_then_what_comes_from_another_replica(self, app: App, database: str) -> None:
        await app.events.append_many("s", [("delta", n) for n in range(3)])
        async with App(database) as other, aclosing(app.events.follow("s", after=1)) as events:
            assert await taken(events, 2) == [2, 3]
            for seq in range(4, 24):
                assert await other.events.append("s", "delta", {"seq": seq}) == seq
                event = await following(events)
                assert (event.seq, event.body) == (seq, {"seq": seq})

    async def test_misses_nothing_while_others_write(self, app: App, database: str) -> None:
        async with App(database) as other, aclosing(app.events.follow("s")) as events:
            writing = [asyncio.ensure_future(other.events.append("s", "delta", n)) for n in range(300)]
            assert await taken(events, 150) == list(range(1, 151))
            writing += [asyncio.ensure_future(app.events.append("s", "delta", n)) for n in range(300)]
            assert await taken(events, 450) == list(range(151, 601))
            await asyncio.gather(*writing)

    async def test_a_stream_that_does_not_exist_yet_waits_for_it(self, app: App) -> None:
        async with aclosing(app.events.follow("s")) as events:
            first = asyncio.ensure_future(following(events))
            await waiting_follower(app)
            await app.events.append("s", "delta", {})
            assert (await first).seq == 1

    async def test_hears_how_turns_end(self, app: App) -> None:
        await app.turns.arm(Turn(deployment="d", message_id="m", stream="s"))
        async with aclosing(app.events.follow("s")) as events:
            first = asyncio.ensure_future(following(events))
            await waiting_follower(app)
            await app.turns.commit_reply("d", ["m"], {"text": "hi"})
            event = await first
        assert (event.kind, event.terminal, event.body["message_ids"]) == ("reply", True, ["m"])

    async def test_hears_what_was_trimmed_before_it_came(self, app: App) -> None:
        await app.events.append_many("s", [("delta", n) for n in range(5)])
        await app.events.trim("s", upto=3)
        async with aclosing(app.events.follow("s", after=1)) as events:
            gap = await following(events)
            assert (gap.kind, gap.seq, gap.body["from"], gap.body["to"]) == ("gap", 3, 2, 3)
            assert gap.body["head"] >= 4
            assert await taken(events, 2) == [4, 5]

    async def test_hears_of_a_gap_on_either_side_of_an_ending(self, app: App) -> None:
        await app.events.append("s", "delta", {})
        await app.turns.arm(Turn(deployment="d", message_id="m", stream="s"))
        await app.turns.fail("d", "m", TurnFailure("cancelled"))
        await app.events.append("s", "delta", {})
        await app.events.trim("s", upto=3)
        await app.events.set_state("s", "ended")
        assert await to_the_end(app.events.follow("s")) == [(1, "gap"), (2, "error"), (3, "gap")]

    async def test_hears_of_a_cursor_that_this_database_never_had(self, app: App) -> None:
        await app.events.append_many("s", [("delta", 1), ("delta", 2)])
        async with aclosing(app.events.follow("s", after=7)) as events:
            gap = await following(events)
            assert (gap.kind, gap.body) == ("gap", {"stream": "s", "from": 3, "to": 7, "head": 2})
            await app.events.append("s", "delta", 3)
            assert (await following(events)).seq == 3

    async def test_ends_with_the_stream_once_everything_was_given(self, app: App, database: str) -> None:
        await app.events.append_many("s", [("delta", n) for n in range(3)])
        async with App(database) as other:
            first = asyncio.ensure_future(to_the_end(app.events.follow("s")))
            second = asyncio.ensure_future(to_the_end(app.events.follow("s", after=3)))
            await waiting_follower(app)
            await other.events.append_many("s", [("delta", n) for n in range(700)])
            await other.events.set_state("s", "ended")
            assert [seq for seq, _ in await first] == list(range(1, 704))
            assert [seq for seq, _ in await second] == list(range(4, 704))
        assert await to_the_end(app.events.follow("s", after=700)) == [(n, "delta") for n in (701, 702, 703)]
        assert app.opened.fanout._tails == {}

    @pytest.mark.direct("there is no listener to lose")
    async def test_loses_nothing_where_its_listener_is_lost(self, database: str, conn: Connection) -> None:
        # Polling would hide what listening misses.
        settings = load({"QUEUE_SERVICE_POLL_INTERVAL": "1h"})
        async with App(database, settings=settings) as app, aclosing(app.events.follow("s")) as events:
            for turn in range(3):
                await app.events.append("s", "delta", turn)
                assert (await following(events)).body == turn
                assert await eventually(lambda: one(conn, f"select pg_terminate_backend(pid) {LISTENERS}"))
                await conn.execute(
                    "with head as (update queue_service.streams set head = head + 1 returning head) "
                    "insert into queue_service.events (stream, seq, kind, body) select 's', head, 'x', '0' from head"
                )
                assert (await following(events)).kind == "x"

    async def test_finds_what_nobody_announced(self, app: App, conn: Connection) -> None:
        async with aclosing(app.events.follow("s")) as events:
            first = asyncio.ensure_future(following(events))
            await waiting_follower(app)
            await conn.execute(
                "with head as (insert into queue_service.streams (stream, head) values ('s', 1)) "
                "insert into queue_service.events (stream, seq, kind, body) values ('s', 1, 'x', '0')"
            )
            assert (await first).kind == "x"

    async def test_slowly_costs_the_others_nothing_and_misses_nothing(
        self, app: App, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(fanout, "TAIL_LENGTH", 20)
        async with aclosing(app.events.follow("s")) as slow, aclosing(app.events.follow("s")) as quick:
            await app.events.append("s", "delta", {})
            assert [await taken(slow, 1), await taken(quick, 1)] == [[1], [1]]
            for _ in range(10):
                await app.events.append_many("s", [("delta", {})] * 30)
            assert await taken(quick, 300) == list(range(2, 302))
            assert len(app.opened.fanout._tails["s"].events) <= 20
            assert await taken(slow, 300) == list(range(2, 302))

    async def test_by_many_reads_each_event_once(self, app: App, database: str) -> None:
        async with App(database) as other:
            asked: list[str] = []
            fetch = app.opened.fanout._fetch

            async def counted(query: Any) -> Any:
                asked.append(query.text)
                return await fetch(query)

            app.opened.fanout._fetch = counted
            followers = [asyncio.ensure_future(to_the_end(app.events.follow("s"))) for _ in range(50)]
            await eventually(lambda: (tail := app.opened.fanout._tails.get("s")) and tail.watchers == 50)
            await waiting_follower(app)
            first_reads = sum("unnest" in text for text in asked)
            for _ in range(5):
                await other.events.append("s", "delta", {})
            await other.events.set_state("s", "ended")
            assert {len(each) for each in await asyncio.gather(*followers)} == {5}
            assert sum("unnest" in text for text in asked) - first_reads <= 10

    async def test_ends_with_an_error_when_its_app_is_closed(self, database: str) -> None:
        async with App(database) as app:
            waiting = asyncio.ensure_future(to_the_end(app.events.follow("s")))
            await waiting_follower(app)
        with pytest.raises(DatabaseUnavailable, match="closed"):
            await waiting

    async def test_leaves_nothing_behind(self, app: App) -> None:
        await app.events.append("s", "delta", {})
        async with aclosing(app.events.follow("s")) as events:
            await following(events)
            assert set(app.opened.fanout._tails) == {"s"}
        await eventually(lambda: not app.opened.fanout._tails)


class TestBlockingCode:
    async def test_has_the_same_methods(self, q: SyncApp) -> None:
        assert q.events.append("s", "delta", {"n": 1}) == 1
        assert q.events.append_many("s", [("delta", {"n": 2}), ("card", {})]) == [2, 3]
        assert [event.seq for event in q.events.read("s", after=1)] == [2, 3]
        assert (q.events.head("s"), q.events.trim("s", upto=1)) == (3, 1)
        assert q.events.set_state("s", "ended") == 3
        assert [(event.seq, event.kind) for event in q.events.follow("s")] == [(1, "gap"), (2, "delta"), (3, "card")]
        with pytest.raises(StreamEnded):
            q.events.append("s", "delta", {})

    async def test_follows_until_it_has_had_enough(self, q: SyncApp) -> None:
        q.events.append_many("s", [("delta", 1), ("delta", 2)])
        for event in q.events.follow("s"):
            if event.seq == 2:
                break
        assert q.events.append("s", "delta", {}) == 3

    async def test_appends_in_the_callers_transaction(self, q: SyncApp, database: str, conn: Connection) -> None:
        with psycopg.connect(database) as mine:
            assert q.events.append("s", "delta", 1, conn=mine) == 1
            mine.rollback()
            assert q.events.append_many("s", [("delta", 2), ("delta", 3)], conn=mine) == [1, 2]
            assert q.events.head("s") == 0
            mine.commit()
        assert await rows(conn, "select seq, body from queue_service.events order by seq") == [(1, 2), (2, 3)]
