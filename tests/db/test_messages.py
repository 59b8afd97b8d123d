"""Messages on a real database: each is taken in once, with its event, its turn and its run, or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import msgspec
import pytest

from queue_service import App, Run, StreamState, Turn
from queue_service.db.execute import Connection, fetch
from queue_service.db.query import Query
from queue_service.errors import ConfigError, MessageConflict, PayloadRefused, StreamEnded
from queue_service.runs.model import NewRun
from queue_service.turns import queries
from queue_service.turns.queries import Owed, Sent
from tests.support import blocked, eventually, one, refusing, rows, working

Session = Callable[[], Awaitable[Connection]]
OVER = (StreamState.CLOSING, StreamState.ENDED)
TABLES = ("turn_outcomes", "turn_markers", "receipts", "runs", "events")


def turn(message_id: str = "m1", **fields: Any) -> Turn:
    return Turn(**{"deployment": "dep-1", "message_id": message_id, "stream": "conv-1", "user_id": "u"} | fields)


def statement(message_id: str = "m1", digest: str = "d", stream: str = "conv-1") -> Query[Sent | None]:
    owed = Owed(turn(message_id, stream=stream).fields(1_000), timedelta(minutes=5), timedelta(minutes=1))
    new = NewRun(task="noop", queue="default", payload="{}")
    run = {name: getattr(new, name) for name in NewRun.__slots__ if name != "singleton_key"}
    return queries.send(owed, run, "{}", digest, None, notify=True)


async def counts(conn: Connection) -> dict[str, int]:
    return {table: await one(conn, f"select count(*) from queue_service.{table}") for table in TABLES}


class TestSending:
    async def test_stores_the_message_its_turn_and_its_run(self, app: App, conn: Connection) -> None:
        receipt = await app.turns.send(turn(), "agent_turn", {"text": "hi"}, queue="agents", metadata={"k": 1})
        assert msgspec.to_builtins(receipt) == {
            "deployment": "dep-1", "message_id": "m1", "stream": "conv-1", "seq": 1, "new": True,
        }  # fmt: skip
        (event,) = await app.events.read("conv-1")
        assert (event.kind, event.terminal) == ("message", False)
        assert event.body == {"message_id": "m1", "user_id": "u", "body": {"text": "hi"}}
        (marker,) = await app.turns.list()
        run = await app.get(marker.run_id or 0)
        assert run is not None
        assert (run.task, run.queue, run.payload) == ("agent_turn", "agents", {"text": "hi"})
        assert run.metadata is not None
        assert run.metadata["k"] == 1
        assert Turn(**run.metadata["turn"]) == turn()
        assert await counts(conn) == dict.fromkeys(TABLES, 1)

    async def test_again_returns_the_receipt_and_stores_nothing(self, app: App, conn: Connection) -> None:
        first = await app.turns.send(turn(), "agent_turn", {"text": "hi"})
        for _ in range(3):
            again = await app.turns.send(turn(), "agent_turn", {"text": "hi"})
            assert again == msgspec.structs.replace(first, new=False)
        assert await counts(conn) == dict.fromkeys(TABLES, 1)

    async def test_again_after_the_ending_returns_the_receipt(self, app: App) -> None:
        first = await app.turns.send(turn(), "agent_turn", {})
        await app.turns.commit_reply("dep-1", ["m1"], {"text": "done"})
        assert await app.turns.send(turn(), "agent_turn", {}) == msgspec.structs.replace(first, new=False)

    async def test_of_something_else_under_the_id_is_refused(self, app: App, conn: Connection) -> None:
        await app.turns.send(turn(), "agent_turn", {"text": "hi"})
        for other, task, payload in (
            (turn(), "agent_turn", {"text": "ho"}),
            (turn(), "another", {"text": "hi"}),
            (turn(stream="conv-2"), "agent_turn", {"text": "hi"}),
        ):
            with pytest.raises(MessageConflict, match="m1"):
                await app.turns.send(other, task, payload)
        assert await counts(conn) == dict.fromkeys(TABLES, 1)

    async def test_under_the_id_of_a_turn_that_was_armed_otherwise_is_refused(self, app: App) -> None:
        await app.turns.arm(turn())
        with pytest.raises(MessageConflict):
            await app.turns.send(turn(), "agent_turn", {})
        assert await app.events.read("conv-1") == []

    @pytest.mark.parametrize("state", [state for state in StreamState if state not in OVER])
    async def test_to_a_stream_in_any_state_but_closing_and_ended_is_taken(self, app: App, state: StreamState) -> None:
        await app.events.set_state("conv-1", state)
        await app.turns.send(turn(), "agent_turn", {})
        stream = await app.events.stream("conv-1")
        assert stream is not None
        woken = {StreamState.CREATED, StreamState.SUSPENDED}
        assert (stream.state, stream.head) == (StreamState.ACTIVE if state in woken else state, 1)

    @pytest.mark.parametrize("state", OVER)
    async def test_to_a_stream_that_is_over_is_refused_and_stored_nowhere(
        self, app: App, conn: Connection, state: StreamState
    ) -> None:
        await app.events.set_state("conv-1", state)
        with pytest.raises(StreamEnded):
            await app.turns.send(turn(), "agent_turn", {})
        assert await counts(conn) == dict.fromkeys(TABLES, 0)

    async def test_again_to_a_stream_that_ended_since_returns_the_receipt(self, app: App) -> None:
        first = await app.turns.send(turn(), "agent_turn", {})
        await app.events.set_state("conv-1", StreamState.ENDED)
        assert (await app.turns.send(turn(), "agent_turn", {})).seq == first.seq

    @pytest.mark.parametrize("table", TABLES)
    async def test_that_fails_anywhere_leaves_nothing_anywhere(self, app: App, conn: Connection, table: str) -> None:
        column = {"runs": "queue", "events": "kind"}.get(table, "message_id")
        async with refusing(conn, table, f"{column} is not null"):
            with pytest.raises(Exception, match="refused"):
                await app.turns.send(turn(), "agent_turn", {})
        assert await counts(conn) == dict.fromkeys(TABLES, 0)
        await app.turns.send(turn(), "agent_turn", {})
        assert await counts(conn) == dict.fromkeys(TABLES, 1)

    async def test_what_cannot_be_stored_or_meant_is_refused(self, app: App, conn: Connection) -> None:
        with pytest.raises(PayloadRefused):
            await app.turns.send(turn(), "agent_turn", {"text": "a\x00b"})
        with pytest.raises(ConfigError, match="singleton_key"):
            await app.turns.send(turn(), "agent_turn", {}, singleton_key="k")
        assert await counts(conn) == dict.fromkeys(TABLES, 0)

    async def test_tells_followers_and_workers(self, app: App, session: Session) -> None:
        listening = await session()
        await listening.execute("listen queue_service_events")
        await listening.execute("listen queue_service_runs")
        for number in range(3):
            await app.turns.send(turn(f"m{number}"), "agent_turn", {})
        heard = set()
        async for notice in listening.notifies(timeout=10):
            heard.add((notice.channel, notice.payload))
            if ("queue_service_events", "3 conv-1") in heard and len({channel for channel, _ in heard}) == 2:
                break
        assert ("queue_service_runs", "0 default") in heard

    @pytest.mark.parametrize("table", ["receipts", "renderings"])
    async def test_what_is_kept_with_turns_goes_with_them(self, app: App, conn: Connection, table: str) -> None:
        for message_id in ("old", "new", "owed"):
            await app.turns.send(turn(message_id), "agent_turn", {})
        await conn.execute(
            "insert into queue_service.renderings (deployment, message_id, platform_message_id) "
            "select deployment, message_id, 'ts' from queue_service.turn_outcomes"
        )
        await app.turns.commit_reply("dep-1", ["old", "new"], {})
        await conn.execute(
            "update queue_service.turn_outcomes set armed_at = armed_at - interval '20 days' where message_id <> 'new'"
        )
        assert await app.fetch(queries.prune(timedelta(days=14), limit=100)) == 1
        left = await rows(conn, f"select message_id from queue_service.{table} order by message_id")
        assert left == [("new",), ("owed",)]


@pytest.mark.parametrize("commit", [True, False], ids=["commit", "rollback"])
class TestRace:
    async def test_two_of_the_same_message_become_one(self, session: Session, conn: Connection, commit: bool) -> None:
        a, b = await session(), await session()
        await a.execute("begin")
        first = await fetch(a, statement())
        assert first == Sent("sent", 1, "d")
        waiting = asyncio.create_task(fetch(b, statement()))
        await eventually(lambda: blocked(conn, b))
        await a.execute("commit" if commit else "rollback")
        # After the commit its snapshot shows neither: to be sent again.
        assert await waiting == (None if commit else Sent("sent", 1, "d"))
        assert await fetch(b, statement()) == Sent("known", 1, "d")
        assert await counts(conn) == dict.fromkeys(TABLES, 1)

    async def test_two_messages_of_a_stream_get_the_order_of_their_commits(
        self, session: Session, conn: Connection, commit: bool
    ) -> None:
        a, b = await session(), await session()
        await a.execute("begin")
        await fetch(a, statement("m1"))
        waiting = asyncio.create_task(fetch(b, statement("m2")))
        await eventually(lambda: blocked(conn, b))
        await a.execute("commit" if commit else "rollback")
        assert await waiting == Sent("sent", 2 if commit else 1, "d")

    @pytest.mark.parametrize("state", OVER)
    async def test_a_message_and_the_end_of_its_stream(
        self, app: App, session: Session, conn: Connection, commit: bool, state: StreamState
    ) -> None:
        a = await session()
        await app.turns.send(turn("m0"), "agent_turn", {})
        await a.execute("begin")
        await a.execute("update queue_service.streams set state = %s", [state.value])
        waiting = asyncio.create_task(app.turns.send(turn("m1"), "agent_turn", {}))
        await eventually(lambda: one(conn, "select true from pg_locks where not granted limit 1"))
        await a.execute("commit" if commit else "rollback")
        if commit:
            # Taken in now, it would get an ending that no follower waits for any more.
            with pytest.raises(StreamEnded):
                await waiting
        else:
            assert (await waiting).seq == 2
        assert await counts(conn) == dict.fromkeys(TABLES, 1 if commit else 2)


class TestInTheCallersTransaction:
    async def test_a_message_is_taken_in_with_the_commit_or_not_at_all(self, app: App, conn: Connection) -> None:
        turn = Turn(deployment="dep-1", message_id="m1", stream="conv-1")
        async with conn.transaction(force_rollback=True):
            assert (await app.turns.send(turn, "agent_turn", {"text": "hi"}, conn=conn)).new
        for table in TABLES:
            assert await one(conn, f"select count(*) from queue_service.{table}") == 0
        async with conn.transaction():
            receipt = await app.turns.send(turn, "agent_turn", {"text": "hi"}, conn=conn)
        assert (receipt.seq, receipt.new) == (1, True)
        again = await app.turns.send(turn, "agent_turn", {"text": "hi"})
        assert (again.seq, again.new) == (1, False)

    async def test_it_interrupts_with_the_commit(self, app: App, conn: Connection) -> None:
        begun = asyncio.Event()

        @app.task()
        async def agent_turn(run: Run, text: str) -> None:
            assert run.turn is not None
            if text == "first":
                begun.set()
                await asyncio.Event().wait()
            await app.turns.commit_reply("dep-1", [run.turn.message_id], {})

        async with working(app):
            first, second = (Turn(deployment="dep-1", message_id=each, stream="conv-1") for each in ("m1", "m2"))
            await app.turns.send(first, "agent_turn", {"text": "first"}, ordering_key="conv-1")
            await begun.wait()
            async with conn.transaction():
                await app.turns.send(second, "agent_turn", {"text": "second"}, mode="interrupt", conn=conn)
                assert await app.turns.is_live("dep-1", "m1")
            assert (await app.turns.wait("dep-1", "m1", timeout=10)).code == "cancelled"
            assert (await app.turns.wait("dep-1", "m2", timeout=10)).kind == "reply"
