"""What comes down: welcome, events, gaps and ends, from whichever replica."""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from queue_service import App, StreamState, Turn, TurnFailure
from queue_service.db.execute import Connection
from queue_service.gateway import Principal, frames
from tests.gateway.served import Client, Frame, Served, serving
from tests.support import eventually, one, service


async def say(app: App, stream: str, count: int, kind: str = "delta") -> list[int]:
    return await app.events.append_many(stream, [(kind, {"n": n}) for n in range(count)])


class TestAConnection:
    async def test_is_greeted_with_an_id_that_nobody_can_guess(self, ann: Client) -> None:
        ids = set()
        for _ in range(20):
            async with ann.connected() as (_, connection_id):
                ids.add(connection_id)
        assert len(ids) == 20
        assert {len(each.partition(".")[2]) for each in ids} == {32}

    async def test_hears_when_to_come_again_each_at_a_time_of_its_own(self, app: App) -> None:
        async with serving(app, retry=(1.0, 3.0)) as served, served.client() as client:
            pauses = []
            for _ in range(20):
                async with client.connected() as (stream, _):
                    pauses.append(stream.frames[0].retry)
        assert all(pause is not None and 1_000 <= pause <= 3_000 for pause in pauses)
        assert len(set(pauses)) > 15

    async def test_hears_where_each_stream_goes_on(self, ann: Client) -> None:
        async with ann.connected("?stream=ann/a&cursor=ann/b:7") as (stream, _):
            assert stream.frames[0].data["streams"] == {"ann/a": 0, "ann/b": 7}

    async def test_hears_a_heartbeat_when_there_is_nothing_else_to_hear(self, app: App) -> None:
        async with serving(app, heartbeat=0.02) as served, served.client() as client:
            async with client.connected("?stream=ann/a") as (stream, _):
                reading = asyncio.create_task(stream.next())
                await eventually(lambda: stream.beats >= 3)
                await say(app, "ann/a", 1)
                assert await reading

    async def test_hears_it_as_an_event_if_it_asks_for_that(self, app: App) -> None:
        async with serving(app, heartbeat=0.02) as served, served.client() as client:
            async with client.connected("?stream=ann/a&heartbeat=event") as (stream, _):
                heartbeat = await stream.next()
                assert heartbeat is not None
                assert (heartbeat.event, heartbeat.id, heartbeat.data) == ("heartbeat", None, {})
                await say(app, "ann/a", 1)
                assert await stream.until("message")
                assert stream.beats == 0
            refused = await client.get("/api/chat/events?heartbeat=loud")
            assert (refused.status_code, refused.json()["field"]) == (400, "heartbeat")

    async def test_may_watch_nothing_and_stays_open(self, app: App) -> None:
        async with serving(app, heartbeat=0.02) as served, served.client() as client:
            async with client.connected() as (stream, connection_id):
                reading = asyncio.create_task(stream.next())
                await eventually(lambda: stream.beats >= 3)
                assert (await client.post("watch", connection_id, {"stream": "ann/a"})).status_code == 200
                await say(app, "ann/a", 1)
                assert await reading

    async def test_ends_when_its_principal_expires(self, app: App) -> None:
        def briefly(_request: object) -> Principal:
            return Principal("ann", lambda _: True, expires_at=datetime.now(UTC) + timedelta(seconds=1))

        async with serving(app, authorize=briefly) as served, served.client() as client:
            async with client.connected("?stream=ann/a") as (stream, _):
                goodbye = await stream.until("goodbye")
                assert goodbye.data == {"reason": "expired"}
                assert await stream.next() is None

    async def test_that_is_gone_leaves_nothing_behind(self, app: App, served: Served, ann: Client) -> None:
        async with ann.connected("?stream=ann/a&stream=ann/b"):
            assert served.gateway.connections == 1
            assert app.opened.fanout._tails.keys() == {"ann/a", "ann/b"}
        await eventually(lambda: served.gateway.connections == 0)
        await eventually(lambda: not app.opened.fanout._tails)

    async def test_is_not_made_by_who_only_asks_for_the_headers(self, served: Served, ann: Client) -> None:
        answer = await ann.http.head("/api/chat/events?stream=ann/a", headers=ann.headers)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        assert served.gateway.connections == 0

    @pytest.mark.parametrize(
        ("name", "body"),
        [("reconnect", {"streams": {"a": 0}}), ("watch", {"stream": "a"}), ("switch", {"stream": "a"})],
    )
    async def test_that_is_gone_watches_nothing_that_was_asked_for_before(
        self, app: App, name: str, body: dict[str, Any]
    ) -> None:
        asked, answer = asyncio.Event(), asyncio.Event()

        async def owns(_stream: str) -> bool:
            asked.set()
            return await answer.wait()

        async with serving(app, authorize=lambda _: Principal("ann", owns)) as served, served.client() as client:
            async with client.connected() as (_, connection_id):
                posting = asyncio.ensure_future(client.post(name, connection_id, body))
                await asyncio.wait_for(asked.wait(), 10)
            await eventually(lambda: served.gateway.connections == 0)
            answer.set()
            await posting
            assert not app.opened.fanout._tails


class TestEvents:
    async def test_come_in_order_each_with_the_id_that_resumes_after_it(self, app: App, ann: Client) -> None:
        await say(app, "ann/a", 3)
        async with ann.connected("?stream=ann/a") as (stream, _):
            assert [(await stream.event())["seq"] for _ in range(3)] == [1, 2, 3]
            await say(app, "ann/a", 2)
            assert [(await stream.event())["seq"] for _ in range(2)] == [4, 5]
        assert [frame.id for frame in stream.frames[1:]] == [f"ann/a:{seq}" for seq in range(1, 6)]

    async def test_say_all_that_is_stored_of_them(self, app: App, ann: Client) -> None:
        await app.events.append("ann/a", "card", {"title": "ü\u2028 <b>", "n": [1, None, 2.5]})
        async with ann.connected("?stream=ann/a") as (stream, _):
            event = await stream.event()
        stored = (await app.events.read("ann/a"))[0]
        assert datetime.fromisoformat(event.pop("created_at")) == stored.created_at
        body = {"title": "ü\u2028 <b>", "n": [1, None, 2.5]}
        assert event == {"stream": "ann/a", "seq": 1, "kind": "card", "body": body, "terminal": False}

    @pytest.mark.parametrize(
        ("query", "headers"),
        [
            ("?cursor=ann/a:2", {}),
            ("?stream=ann/a&cursor=2", {}),
            ("?stream=ann/a", {"last-event-id": "ann/a:2"}),
            ("?stream=ann/a&cursor=1", {"last-event-id": "ann/a:2"}),
            ("", {"last-event-id": "ann/a:2"}),
        ],
    )
    async def test_are_resumed_after_a_cursor(self, app: App, ann: Client, query: str, headers: dict[str, str]) -> None:
        await say(app, "ann/a", 4)
        async with ann.connected(query, headers=headers) as (stream, _):
            assert [(await stream.event())["seq"] for _ in range(2)] == [3, 4]

    async def test_of_a_stream_with_any_name_are_resumed(self, app: App, ann: Client) -> None:
        name = "ann/ü: 日本:7"
        await say(app, name, 2)
        async with ann.connected("", headers={"last-event-id": f"{name}:1".encode()}) as (stream, _):
            assert (await stream.event())["seq"] == 2

    @pytest.mark.parametrize("cursor", ["x", "ann/a:", "ann/a:-1", "ann/a:1.5", ":3", "ann/a:" + 30 * "9", "ann/a:٣"])
    async def test_are_not_resumed_after_what_is_no_cursor(self, ann: Client, cursor: str) -> None:
        answer = await ann.http.get("/api/chat/events", params={"cursor": cursor}, headers=ann.headers)
        assert (answer.status_code, answer.json()["field"]) == (400, "cursor")

    async def test_cannot_forge_a_frame(self, app: App, ann: Client) -> None:
        evil = "\n\nevent: welcome\ndata: {}\r\rid: ann/a:99\n\n\u2028"
        await app.events.append("ann/a", "delta", {evil: evil})
        await app.events.append("ann/a", "delta", evil)
        await say(app, "ann/a", 1)
        async with ann.connected("?stream=ann/a") as (stream, _):
            assert (await stream.event())["body"] == {evil: evil}
            assert (await stream.event())["body"] == evil
            assert (await stream.event())["seq"] == 3

    async def test_of_two_streams_come_over_one_connection(self, app: App, ann: Client) -> None:
        async with ann.connected("?stream=ann/a&stream=ann/b") as (stream, _):
            await say(app, "ann/a", 2)
            await say(app, "ann/b", 2)
            got = {(event["stream"], event["seq"]) for event in [await stream.event() for _ in range(4)]}
        assert got == {("ann/a", 1), ("ann/a", 2), ("ann/b", 1), ("ann/b", 2)}

    async def test_of_a_stream_that_is_watched_twice_come_once(self, app: App, ann: Client) -> None:
        async with ann.connected("?stream=ann/a&stream=ann/a") as (stream, connection_id):
            await ann.post("watch", connection_id, {"stream": "ann/a"})
            await say(app, "ann/a", 1)
            assert (await stream.event())["seq"] == 1
            await app.events.set_state("ann/a", StreamState.ENDED)
            assert (await stream.next() or Frame()).event == "end"

    async def test_of_a_stream_that_does_not_exist_yet_come_once_it_does(self, app: App, ann: Client) -> None:
        assert (await ann.get("/api/sessions/ann/new/events")).json() == {"stream": "ann/new", "head": 0, "events": []}
        async with ann.connected("?stream=ann/new") as (stream, _):
            await say(app, "ann/new", 1)
            assert (await stream.event())["seq"] == 1

    async def test_come_to_everyone_who_watches(self, app: App, ann: Client, bob: Client) -> None:
        async with ann.connected("?stream=shared") as (hers, _), bob.connected("?stream=shared") as (his, _):
            await say(app, "shared", 3)
            assert [(await hers.event())["seq"] for _ in range(3)] == [1, 2, 3]
            assert [(await his.event())["seq"] for _ in range(3)] == [1, 2, 3]


class TestAGap:
    async def test_takes_a_cursor_that_is_far_behind_near_the_head_and_says_so(self, app: App, ann: Client) -> None:
        await say(app, "ann/a", 500)
        async with ann.connected("?stream=ann/a&cursor=20") as (stream, _):
            gap = await stream.next()
            assert gap is not None
            assert (gap.event, gap.id) == ("gap", "ann/a:300")
            assert gap.data == {"stream": "ann/a", "from": 21, "to": 300, "head": 500}
            assert [(await stream.event())["seq"] for _ in range(200)] == list(range(301, 501))

    async def test_is_not_made_for_a_cursor_that_is_near_enough(self, app: App, ann: Client) -> None:
        await say(app, "ann/a", 500)
        async with ann.connected("?stream=ann/a&cursor=300") as (stream, _):
            assert [(await stream.event())["seq"] for _ in range(200)] == list(range(301, 501))

    async def test_can_be_filled_from_the_history(self, app: App, ann: Client) -> None:
        await say(app, "ann/a", 500)
        async with ann.connected("?stream=ann/a&cursor=20") as (stream, _):
            gap = (await stream.until("gap")).data
        after, filled = gap["from"] - 1, []
        while after < gap["to"]:
            page = (await ann.get(f"/api/sessions/ann/a/events?after={after}&limit=100")).json()
            filled += [event["seq"] for event in page["events"] if event["seq"] <= gap["to"]]
            after = page["events"][-1]["seq"]
        assert filled == list(range(21, 301))

    async def test_tells_of_events_that_were_trimmed(self, app: App, ann: Client) -> None:
        await say(app, "ann/a", 10)
        await app.events.trim("ann/a", upto=6)
        async with ann.connected("?stream=ann/a") as (stream, _):
            gap = await stream.next()
            assert gap is not None
            assert gap.data == {"stream": "ann/a", "from": 1, "to": 6, "head": 10}
            assert (await stream.event())["seq"] == 7

    async def test_of_a_database_that_went_back_resumes_at_its_head(self, app: App, ann: Client) -> None:
        await say(app, "ann/a", 3)
        async with ann.connected("?stream=ann/a&cursor=90") as (stream, _):
            gap = await stream.next()
            assert gap is not None
            assert gap.data == {"stream": "ann/a", "from": 4, "to": 90, "head": 3}
            assert gap.id == "ann/a:3"
            await say(app, "ann/a", 1)
            assert (await stream.event())["seq"] == 4


class TestTheEnd:
    async def test_of_a_stream_comes_after_its_last_event_and_ends_the_response(self, app: App, ann: Client) -> None:
        await app.turns.arm(Turn(deployment="d", message_id="m", stream="ann/a"))
        async with ann.connected("?stream=ann/a") as (stream, _):
            await app.turns.commit_reply("d", ["m"], {"text": "done"})
            await app.events.set_state("ann/a", StreamState.ENDED)
            assert (await stream.event())["terminal"] is True
            end = await stream.next()
            assert end is not None
            assert (end.event, end.data) == ("end", {"stream": "ann/a", "head": 1})
            assert await stream.next() is None

    async def test_of_one_stream_leaves_the_others(self, app: App, ann: Client) -> None:
        async with ann.connected("?stream=ann/a&stream=ann/b") as (stream, _):
            await app.events.set_state("ann/a", StreamState.ENDED)
            assert (await stream.until("end")).data["stream"] == "ann/a"
            await say(app, "ann/b", 1)
            assert (await stream.event())["stream"] == "ann/b"

    async def test_once_delivered_is_not_waited_for_again(self, app: App, ann: Client) -> None:
        await say(app, "ann/a", 2)
        await app.events.set_state("ann/a", StreamState.ENDED)
        assert (await ann.get("/api/chat/events?stream=ann/a&cursor=2")).status_code == 204
        async with ann.connected("?stream=ann/a&cursor=1") as (stream, _):
            assert (await stream.event())["seq"] == 2
            assert (await stream.until("end")).data["head"] == 2


class TestAnyReplica:
    async def test_delivers_the_ending_that_another_one_stored(self, app: App, database: str) -> None:
        async with App(database) as other, serving(app) as here, here.client() as client:
            await app.turns.arm(Turn(deployment="d", message_id="m", stream="ann/a"))
            async with client.connected("?stream=ann/a") as (stream, _):
                assert await other.turns.commit_reply("d", ["m"], {"text": "from elsewhere"})
                event = await stream.event()
        assert (event["kind"], event["body"]["text"], event["body"]["message_ids"]) == (
            "reply",
            "from elsewhere",
            ["m"],
        )

    async def test_takes_a_message_and_another_shows_its_ending_without_a_queue_between(
        self, app: App, database: str, conn: Connection
    ) -> None:
        async with App(database, settings=app.settings) as other, serving(app) as a, serving(other) as b:
            async with a.client() as here, b.client() as there, there.connected("?stream=ann/a") as (stream, _):
                async with here.connected() as (_, connection_id):
                    sent = {"stream": "ann/a", "client_message_id": "m", "body": {}}
                    assert (await here.post("send", connection_id, sent)).status_code == 202
                assert (await stream.event())["kind"] == "message"
                await app.turns.fail("ann/a", "m", TurnFailure("worker_died"))
                assert (await stream.event())["body"]["code"] == "worker_died"
        assert await one(conn, "select count(*) from queue_service.runs where queue = 'thread_response'") == 0

    async def test_ends_the_turn_that_its_client_waits_for_though_no_worker_lives(self, app: App, ann: Client) -> None:
        async with ann.connected("?stream=ann/a") as (stream, _):
            await app.turns.arm(Turn(deployment="d", message_id="m", stream="ann/a"), admission=0.05)
            assert (await stream.event())["body"]["code"] == "worker_unresponsive"

    async def test_sweeps_again_when_somebody_else_has_cancelled_the_sweep(self, app: App, ann: Client) -> None:
        async with ann.connected("?stream=ann/a") as (stream, _):
            sweeping = service(app.opened.services, "sweeper").task
            assert sweeping is not None
            sweeping.cancel()
            await app.turns.arm(Turn(deployment="d", message_id="m", stream="ann/a"), admission=0.05)
            assert (await stream.event())["body"]["code"] == "worker_unresponsive"

    async def test_delivers_though_every_notice_is_lost(self, ann: Client, conn: Connection) -> None:
        async with ann.connected("?stream=ann/a") as (stream, _):
            await conn.execute(
                "with head as (insert into queue_service.streams (stream, head) values ('ann/a', 1)) "
                "insert into queue_service.events (stream, seq, kind, body) values ('ann/a', 1, 'delta', '{}')"
            )
            assert (await stream.event())["seq"] == 1


class TestASlowClient:
    async def test_is_dropped_slows_nobody_and_catches_up(self, app: App, database: str) -> None:
        del database
        big = "x" * 100_000
        async with serving(app, stall=1) as served, served.client("bob") as other:
            host, port = served.address.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port), limit=2**10)
            writer.write(b"GET /api/chat/events?stream=shared HTTP/1.1\r\nHost: x\r\nX-User: ann\r\n\r\n")
            await reader.readuntil(b"welcome")
            reader._transport.pause_reading()  # type: ignore[attr-defined]
            async with other.connected("?stream=shared") as (stream, _):
                for n in range(100):
                    await app.events.append("shared", "delta", {"n": n, "text": big})
                    assert (await stream.event())["body"]["n"] == n
                await eventually(lambda: served.gateway.connections == 1)
            writer.close()
            async with served.client("ann") as again, again.connected("?stream=shared&cursor=3") as (stream, _):
                assert [(await stream.event())["seq"] for _ in range(97)] == list(range(4, 101))


class TestShutdown:
    async def test_says_goodbye_to_every_client_and_ends_with_streams_open(self, app: App) -> None:
        async with serving(app) as served, served.client() as client:
            async with client.connected("?stream=ann/a") as (stream, _):
                served.gateway.drain()
                goodbye = await stream.until("goodbye")
                assert goodbye.data == {"reason": "shutdown"}
                assert goodbye.retry is not None
                assert await stream.next() is None
            refused = await client.get("/api/chat/events?stream=ann/a")
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert (await client.get("/healthz")).status_code == 503

    async def test_of_one_of_two_servers_in_a_process_leaves_the_other(self, app: App) -> None:
        async with serving(app) as first, first.client() as client:
            async with serving(app) as second, second.client() as another, another.connected("?stream=ann/a"):
                pass
            async with client.connected("?stream=ann/a") as (stream, _):
                await say(app, "ann/a", 1)
                assert (await stream.event())["seq"] == 1

    async def test_a_thousand_connects_leave_no_task_behind(self, app: App) -> None:
        async with serving(app, limits=None) as served, served.client() as client:
            async with client.connected("?stream=ann/a"):
                pass
            await eventually(lambda: served.gateway.connections == 0)
            await asyncio.sleep(0)
            before = len(asyncio.all_tasks())
            for _ in range(1_000):
                async with client.connected(f"?stream=ann/{random.randrange(9)}"):
                    pass
            await eventually(lambda: served.gateway.connections == 0)
            await eventually(lambda: len(asyncio.all_tasks()) <= before + 2)


@pytest.mark.parametrize(
    ("text", "read"),
    [("a:1", ("a", 1)), ("a:b:12", ("a:b", 12)), ("ü :0", ("ü ", 0)), ("a", None), (":1", None), ("a:+1", None)],
)
def test_a_place_is_read_as_it_was_written(text: str, read: Any) -> None:
    if read is None:
        with pytest.raises(ValueError, match="no place"):
            frames.place(text)
    else:
        assert frames.place(text) == read
