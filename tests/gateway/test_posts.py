"""What goes up: messages that are taken in once, and everything that is refused."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from queue_service import App, Run, StreamState, Turn
from queue_service.db.cluster import Cluster
from queue_service.db.execute import Connection
from queue_service.gateway import Limits, access, bodies
from tests.gateway.served import Client, Served, serving
from tests.support import eventually, one, working

BODIES: dict[str, dict[str, Any]] = {
    "reconnect": {"streams": {"ann/a": 0}},
    "watch": {"stream": "ann/a"},
    "unwatch": {"stream": "ann/a"},
    "switch": {"stream": "ann/a"},
    "send": {"stream": "ann/a", "client_message_id": "m1", "body": {"text": "hi"}},
    "unsend": {"stream": "ann/a", "client_message_id": "m1"},
    "stop": {"stream": "ann/a"},
    "interrupt": {"stream": "ann/a"},
    "permission": {"stream": "ann/a", "request_id": "r", "answer": True},
    "mode": {"stream": "ann/a", "mode": "plan"},
    "suspend": {"stream": "ann/a"},
    "close": {"stream": "ann/a"},
}


ABOUT_A_CONNECTION = ("reconnect", "watch", "unwatch", "switch")
ABOUT_A_STREAM = tuple(name for name in BODIES if name not in ABOUT_A_CONNECTION)


def message(client_message_id: str = "m1", stream: str = "ann/a", **body: Any) -> dict[str, Any]:
    return {"stream": stream, "client_message_id": client_message_id, "body": body or {"text": "hi"}}


class TestEveryPost:
    @pytest.mark.parametrize("name", BODIES)
    async def test_is_answered(self, ann: Client, name: str) -> None:
        async with ann.connected() as (_, connection_id):
            answer = await ann.post(name, connection_id, BODIES[name])
        assert answer.status_code == (202 if name == "send" else 200), answer.text

    @pytest.mark.parametrize("name", BODIES)
    async def test_about_a_stream_of_somebody_else_is_404(self, bob: Client, name: str, conn: Connection) -> None:
        async with bob.connected() as (_, connection_id):
            answer = await bob.post(name, connection_id, BODIES[name])
        assert answer.status_code == 404
        assert answer.json()["field"] in {"stream", "streams"}
        assert await one(conn, "select count(*) from queue_service.streams") == 0
        assert await one(conn, "select count(*) from queue_service.runs") == 0

    @pytest.mark.parametrize("name", ABOUT_A_CONNECTION)
    async def test_of_a_connection_that_is_gone_is_404(self, served: Served, ann: Client, name: str) -> None:
        async with ann.connected() as (_, connection_id):
            pass
        await eventually(lambda: served.gateway.connections == 0)
        answer = await ann.post(name, connection_id, BODIES[name])
        assert (answer.status_code, answer.json()["field"]) == (404, "X-Connection-ID")

    @pytest.mark.parametrize("name", ABOUT_A_CONNECTION)
    async def test_with_the_connection_of_somebody_else_is_404(self, ann: Client, bob: Client, name: str) -> None:
        async with bob.connected() as (_, his):
            answer = await ann.post(name, his, BODIES[name])
        assert (answer.status_code, answer.json()["field"]) == (404, "X-Connection-ID")

    @pytest.mark.parametrize("name", ABOUT_A_CONNECTION)
    @pytest.mark.parametrize("connection_id", ["", ".", "x", "x.y.z", "%", 5_000 * "x"])
    async def test_of_what_is_no_connection_at_all_is_404(self, ann: Client, name: str, connection_id: str) -> None:
        answer = await ann.post(name, None, BODIES[name], **{"x-connection-id": connection_id})
        assert (answer.status_code, answer.json()["field"]) == (404, "X-Connection-ID")

    @pytest.mark.parametrize("name", ABOUT_A_CONNECTION)
    async def test_about_a_connection_without_its_id_is_400(self, ann: Client, name: str) -> None:
        answer = await ann.post(name, None, BODIES[name])
        assert (answer.status_code, answer.json()["field"]) == (400, "X-Connection-ID")

    @pytest.mark.parametrize("name", ABOUT_A_STREAM)
    @pytest.mark.parametrize("connection_id", [None, "gone.for-ever"])
    async def test_about_a_stream_needs_no_connection(self, ann: Client, name: str, connection_id: str | None) -> None:
        answer = await ann.post(name, connection_id, BODIES[name])
        assert answer.status_code == (202 if name == "send" else 200), answer.text

    @pytest.mark.parametrize("name", BODIES)
    async def test_of_nobody_is_401(self, ann: Client, name: str) -> None:
        async with ann.connected() as (_, connection_id):
            answer = await ann.http.post(f"/api/chat/{name}", content=b"{}", headers={"x-connection-id": connection_id})
        assert answer.status_code == 401

    @pytest.mark.parametrize("name", BODIES)
    @pytest.mark.parametrize(
        "body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b'{"\xff": 1}', b"{} {}", 5_000 * b"["]
    )
    async def test_that_is_no_json_object_is_400(self, ann: Client, name: str, body: bytes) -> None:
        async with ann.connected() as (_, connection_id):
            answer = await ann.post(name, connection_id, body)
        assert answer.status_code == 400
        assert answer.json()["error"]

    @pytest.mark.parametrize(
        ("name", "field", "value"),
        [(name, field, 7.5) for name, body in BODIES.items() for field in body if field != "answer"]
        + [("watch", "cursor", -1), ("switch", "cursor", "1"), ("stop", "message_id", 3), ("stop", "mesage_id", "m")]
        + [(name, "stream", bad) for name in ("send", "watch") for bad in ("", "a\nb", "a\x00b", 2_000 * "x", None)]
        + [("send", "client_message_id", ""), ("send", "client_message_id", 513 * "x"), ("send", "body", [])]
        + [("send", "extra", 1), ("mode", "mode", ""), ("reconnect", "streams", {"ann/a": -1})]
        + [(name, "message_id", "a\x00b") for name in ("stop", "interrupt")],
    )
    async def test_that_cannot_be_meant_is_400_with_the_field(
        self, ann: Client, name: str, field: str, value: Any
    ) -> None:
        async with ann.connected() as (_, connection_id):
            answer = await ann.post(name, connection_id, {**BODIES[name], field: value})
        assert (answer.status_code, answer.json()["field"]) == (400, field), answer.text

    @pytest.mark.parametrize(("name", "field"), [(name, field) for name, body in BODIES.items() for field in body])
    async def test_that_lacks_something_is_400_with_the_field(self, ann: Client, name: str, field: str) -> None:
        lacking = {key: value for key, value in BODIES[name].items() if key != field}
        async with ann.connected() as (_, connection_id):
            answer = await ann.post(name, connection_id, lacking)
        assert (answer.status_code, answer.json()["field"]) == (400, field), answer.text

    async def test_that_is_too_large_is_413(self, ann: Client, app: App) -> None:
        async with ann.connected() as (_, connection_id):
            answer = await ann.post("send", connection_id, message(text="x" * app.settings.payload_limit))
        assert answer.status_code == 413

    async def test_whose_body_does_not_come_is_408(
        self, served: Served, ann: Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bodies, "BODY_DEADLINE", 0.05)
        async with ann.connected() as (_, connection_id):
            host, port = served.address.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            head = f"POST /api/chat/send HTTP/1.1\r\nHost: x\r\nX-User: ann\r\nX-Connection-ID: {connection_id}\r\n"
            writer.write(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            assert (await asyncio.wait_for(reader.readline(), 10)).startswith(b"HTTP/1.1 408")
            writer.close()
            await writer.wait_closed()

    async def test_whose_body_is_cut_off_is_no_error_of_the_gateway(
        self, served: Served, ann: Client, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with ann.connected() as (_, connection_id):
            host, port = served.address.removeprefix("http://").split(":")
            _, writer = await asyncio.open_connection(host, int(port))
            head = f"POST /api/chat/send HTTP/1.1\r\nHost: x\r\nX-User: ann\r\nX-Connection-ID: {connection_id}\r\n"
            writer.write(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            await eventually(lambda: len(served.server.server_state.tasks) == 2)
            writer.close()
            await eventually(lambda: len(served.server.server_state.tasks) == 1)
        assert [record.name for record in caplog.records if record.levelname == "ERROR"] == []

    async def test_that_does_not_exist_is_404(self, ann: Client) -> None:
        async with ann.connected() as (_, connection_id):
            assert (await ann.post("shout", connection_id, {})).status_code == 404


class TestWatching:
    async def test_begins_after_the_cursor_it_is_given(self, app: App, ann: Client) -> None:
        await app.events.append_many("ann/a", [("delta", n) for n in range(4)])
        async with ann.connected() as (stream, connection_id):
            answer = await ann.post("watch", connection_id, {"stream": "ann/a", "cursor": 2})
            assert answer.json() == {"stream": "ann/a", "head": 4}
            assert [(await stream.event())["seq"] for _ in range(2)] == [3, 4]

    async def test_again_leaves_nothing_of_the_first_time(self, app: App, ann: Client) -> None:
        async with ann.connected("?stream=ann/a") as (_, connection_id):
            for _ in range(3):
                await ann.post("watch", connection_id, {"stream": "ann/a"})
            tail = app.opened.fanout._tails["ann/a"]
            assert (tail.watchers, len(tail.moved.listeners)) == (1, 1)

    async def test_ends_where_it_was_asked_to(self, app: App, ann: Client) -> None:
        async with ann.connected("?stream=ann/a&stream=ann/b") as (stream, connection_id):
            await ann.post("unwatch", connection_id, {"stream": "ann/a"})
            await app.events.append("ann/a", "delta")
            await app.events.append("ann/b", "delta")
            assert (await stream.event())["stream"] == "ann/b"

    async def test_switches_to_one_stream_and_no_other(self, app: App, ann: Client) -> None:
        async with ann.connected("?stream=ann/a&stream=ann/b") as (stream, connection_id):
            await ann.post("switch", connection_id, {"stream": "ann/c"})
            for each in ("ann/a", "ann/b", "ann/c"):
                await app.events.append(each, "delta")
            assert (await stream.event())["stream"] == "ann/c"

    async def test_goes_on_after_a_reconnect_where_the_client_says(self, app: App, ann: Client) -> None:
        for each in ("ann/a", "ann/b", "ann/c"):
            await app.events.append_many(each, [("delta", n) for n in range(3)])
        async with ann.connected("?stream=ann/c&cursor=3") as (stream, connection_id):
            answer = await ann.post("reconnect", connection_id, {"streams": {"ann/a": 2, "ann/b": 1}})
            assert answer.json() == {"streams": {"ann/a": 3, "ann/b": 3}}
            got = {(event["stream"], event["seq"]) for event in [await stream.event() for _ in range(3)]}
            assert got == {("ann/a", 3), ("ann/b", 2), ("ann/b", 3)}
            await app.events.append("ann/c", "delta")
            await app.events.append("ann/a", "delta")
            assert (await stream.event())["stream"] == "ann/a"


class TestAMessage:
    async def test_is_stored_shown_and_owed_an_ending_when_its_receipt_is_given(
        self, app: App, ann: Client, conn: Connection
    ) -> None:
        async with ann.connected("?stream=ann/a") as (stream, connection_id):
            answer = await ann.post("send", connection_id, message(text="hello"))
            receipt = {"status": "accepted", "stream": "ann/a", "client_message_id": "m1", "seq": 1}
            assert (answer.status_code, answer.json()) == (202, receipt)
            event = await stream.event()
        assert (event["kind"], event["seq"]) == ("message", 1)
        assert event["body"] == {"message_id": "m1", "user_id": "ann", "body": {"text": "hello"}}
        assert await app.turns.is_live("ann/a", "m1")
        (marker,) = await app.turns.list(stream="ann/a")
        assert (marker.user_id, marker.organization_id, marker.platform) == ("ann", "org", "api")
        run = await app.get(marker.run_id or 0)
        assert run is not None
        assert (run.task, run.payload, run.organization_id) == ("agent_turn", {"text": "hello"}, "org")
        assert await one(conn, "select state from queue_service.streams") == "active"

    async def test_waits_behind_another_shows_its_place_and_can_be_taken_back(self, ann: Client) -> None:
        async with ann.connected("?stream=ann/a") as (stream, connection_id):
            await ann.post("send", connection_id, message())
            await ann.post("send", connection_id, message("m2") | {"mode": "steer"})
            told = [await stream.event() for _ in range(3)]
            unsend = {"stream": "ann/a", "client_message_id": "m2"}
            first, again = [await ann.post("unsend", connection_id, unsend) for _ in range(2)]
            ending = await stream.event()
        assert [event["kind"] for event in told] == ["message", "message", "queued"]
        assert told[1]["body"]["mode"] == "steer"
        assert told[2]["body"] == {"message_id": "m2", "ahead": 1}
        assert first.json() == {**unsend, "taken_back": True}
        assert again.json() == {**unsend, "taken_back": False}
        assert (ending["kind"], ending["body"]["reason"]) == ("error", "The message was taken back.")

    async def test_interrupts_what_is_answered(self, app: App, ann: Client) -> None:
        begun = asyncio.Event()

        @app.task(name="agent_turn")
        async def agent_turn(run: Run, text: str) -> None:
            assert run.turn is not None
            if text == "hi":
                begun.set()
                await asyncio.Event().wait()
            await app.turns.commit_reply(run.turn.deployment, [run.turn.message_id], {"text": text})

        async with working(app), ann.connected() as (_, connection_id):
            await ann.post("send", connection_id, message())
            await begun.wait()
            await ann.post("send", connection_id, message("m2", text="stop that") | {"mode": "interrupt"})
            assert (await app.turns.wait("ann/a", "m2", timeout=10)).kind == "reply"
        outcome = await app.turns.outcome("ann/a", "m1")
        assert outcome is not None
        assert outcome.code == "cancelled"

    async def test_is_worked_on_and_its_reply_comes_back(self, app: App, ann: Client) -> None:
        @app.task(name="agent_turn")
        async def agent_turn(run: Run, text: str) -> None:
            turn = run.turn
            assert turn is not None
            await app.events.append(turn.stream, "delta", {"text": text})
            await app.turns.commit_reply(turn.deployment, [turn.message_id], {"text": f"You said {text}."})

        async with working(app), ann.connected("?stream=ann/a") as (stream, connection_id):
            await ann.post("send", connection_id, message(text="hello"))
            kinds = [await stream.event() for _ in range(3)]
        assert [event["kind"] for event in kinds] == ["message", "delta", "reply"]
        assert kinds[2]["body"]["message_ids"] == ["m1"]

    async def test_that_is_sent_again_gets_the_same_receipt_and_is_stored_once(
        self, app: App, ann: Client, conn: Connection
    ) -> None:
        async with ann.connected() as (_, connection_id):
            first = await ann.post("send", connection_id, message())
            again = await ann.post("send", connection_id, message())
            await app.turns.commit_reply("ann/a", ["m1"], {"text": "done"})
            late = await ann.post("send", connection_id, message())
        assert first.json() == again.json() == late.json()
        assert {first.status_code, again.status_code, late.status_code} == {202}
        assert await one(conn, "select count(*) from queue_service.runs") == 1
        kinds = [event.kind for event in await app.events.read("ann/a")]
        assert kinds == ["message", "reply"]

    async def test_that_comes_at_once_through_two_replicas_becomes_one_turn(
        self, app: App, database: str, conn: Connection
    ) -> None:
        async with App(database) as other, serving(app) as a, serving(other) as b:
            async with a.client() as here, b.client() as there:
                async with here.connected() as (_, at_a), there.connected() as (_, at_b):
                    answers = await asyncio.gather(
                        *(here.post("send", at_a, message()) for _ in range(10)),
                        *(there.post("send", at_b, message()) for _ in range(10)),
                    )
        assert {(answer.status_code, answer.text) for answer in answers} == {(202, answers[0].text)}
        assert await one(conn, "select count(*) from queue_service.runs") == 1
        assert await one(conn, "select count(*) from queue_service.events") == 1

    @pytest.mark.parametrize("changed", [{"text": "other"}, {"text": "hi", "more": 1}])
    async def test_of_another_body_under_the_same_id_is_409(
        self, app: App, ann: Client, changed: dict[str, Any]
    ) -> None:
        async with ann.connected() as (_, connection_id):
            await ann.post("send", connection_id, message())
            answer = await ann.post("send", connection_id, message(**changed))
        assert answer.status_code == 409
        assert "m1" in answer.json()["error"]
        assert len(await app.events.read("ann/a")) == 1

    async def test_with_its_keys_in_another_order_is_the_same_message(self, ann: Client) -> None:
        async with ann.connected() as (_, connection_id):
            first = await ann.post("send", connection_id, message(text="hi", n=1))
            again = await ann.post("send", connection_id, message(n=1, text="hi"))
        assert first.json() == again.json()
        assert again.status_code == 202

    async def test_under_an_id_that_another_stream_used_is_a_message_of_its_own(self, app: App, ann: Client) -> None:
        async with ann.connected() as (_, connection_id):
            for stream in ("ann/a", "ann/b"):
                assert (await ann.post("send", connection_id, message(stream=stream))).status_code == 202
        assert len(await app.turns.list()) == 2

    async def test_to_a_stream_that_has_ended_is_409_and_stored_nowhere(self, app: App, ann: Client) -> None:
        await app.events.set_state("ann/a", StreamState.ENDED)
        async with ann.connected() as (_, connection_id):
            answer = await ann.post("send", connection_id, message())
        assert answer.status_code == 409
        assert await app.turns.list() == []
        assert await app.events.read("ann/a") == []

    async def test_that_the_task_does_not_take_is_400(self, app: App, ann: Client) -> None:
        @app.task(name="agent_turn")
        async def agent_turn(text: str) -> None: ...

        async with ann.connected() as (_, connection_id):
            answer = await ann.post("send", connection_id, message(words="hi"))
        assert answer.status_code == 400
        assert await app.turns.list() == []

    async def test_that_postgres_cannot_store_is_400(self, app: App, ann: Client) -> None:
        async with ann.connected() as (_, connection_id):
            answer = await ann.post("send", connection_id, message(text="a\x00b"))
        assert answer.status_code == 400
        assert await app.turns.list() == []

    async def test_wakes_a_stream_that_was_suspended(self, app: App, ann: Client) -> None:
        await app.events.set_state("ann/a", StreamState.SUSPENDED)
        async with ann.connected() as (_, connection_id):
            await ann.post("send", connection_id, message())
        stream = await app.events.stream("ann/a")
        assert stream is not None
        assert stream.state is StreamState.ACTIVE

    async def test_too_many_of_them_are_429_for_a_moment_and_for_their_sender_only(
        self, app: App, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = 1_000.0
        monkeypatch.setattr(access, "time", SimpleNamespace(monotonic=lambda: now))
        async with serving(app, limits=Limits(messages=3)) as served:
            async with served.client() as ann, served.client("bob") as bob, ann.connected() as (_, connection_id):
                sent = [message(stream="shared", client_message_id=f"m{n}") for n in range(15)]
                answers = [await ann.post("send", connection_id, each) for each in sent[:10]]
                async with bob.connected() as (_, his):
                    assert (await bob.post("send", his, message("b", "shared"))).status_code == 202
                now += 1
                later = [await ann.post("send", connection_id, each) for each in sent[10:]]
        assert [answer.status_code for answer in answers] == [202] * 6 + [429] * 4
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers[6:])
        assert [answer.status_code for answer in later] == [202] * 3 + [429] * 2

    async def test_may_be_fewer_than_one_a_second(self, app: App) -> None:
        async with serving(app, limits=Limits(messages=0.01)) as served, served.client() as ann:
            async with ann.connected() as (_, connection_id):
                first, second = [await ann.post("send", connection_id, message(each)) for each in ("m1", "m2")]
        assert (first.status_code, second.status_code) == (202, 429)
        assert 90 < int(second.headers["retry-after"]) <= 100


class TestStopping:
    async def test_ends_the_turns_of_a_stream_and_cancels_their_runs(self, app: App, ann: Client) -> None:
        begun = asyncio.Event()
        cancelled = asyncio.Event()

        @app.task(name="agent_turn")
        async def agent_turn(text: str) -> None:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        async with working(app), ann.connected("?stream=ann/a") as (stream, connection_id):
            await ann.post("send", connection_id, message())
            await asyncio.wait_for(begun.wait(), 10)
            answer = await ann.post("stop", connection_id, {"stream": "ann/a"})
            assert answer.json() == {"stopped": ["m1"]}
            await stream.event()
            ending = await stream.event()
            assert (ending["kind"], ending["body"]["code"]) == ("error", "cancelled")
            await asyncio.wait_for(cancelled.wait(), 10)
            again = await ann.post("stop", connection_id, {"stream": "ann/a"})
            assert again.json() == {"stopped": []}

    async def test_may_mean_one_message_only(self, app: App, ann: Client) -> None:
        async with ann.connected() as (_, connection_id):
            for each in ("m1", "m2"):
                await ann.post("send", connection_id, message(each))
            answer = await ann.post("stop", connection_id, {"stream": "ann/a", "message_id": "m1"})
        assert answer.json() == {"stopped": ["m1"]}
        assert await app.turns.is_live("ann/a", "m2")

    async def test_leaves_the_turns_of_other_streams(self, app: App, ann: Client) -> None:
        async with ann.connected() as (_, connection_id):
            await ann.post("send", connection_id, message(stream="ann/b"))
            answer = await ann.post("stop", connection_id, {"stream": "ann/a"})
        assert answer.json() == {"stopped": []}
        assert len(await app.turns.list()) == 1

    async def test_closing_ends_what_is_owed_and_then_the_stream(self, app: App, ann: Client) -> None:
        async with ann.connected("?stream=ann/a") as (stream, connection_id):
            await ann.post("send", connection_id, message())
            answer = await ann.post("close", connection_id, {"stream": "ann/a"})
            assert answer.json() == {"stream": "ann/a", "state": "ended"}
            assert [(await stream.event())["kind"] for _ in range(2)] == ["message", "error"]
            assert (await stream.until("end")).data == {"stream": "ann/a", "head": 2}
        assert await app.turns.list() == []

    async def test_suspending_is_a_state_that_every_replica_sees(self, ann: Client) -> None:
        async with ann.connected() as (_, connection_id):
            await ann.post("suspend", connection_id, {"stream": "ann/a"})
        state = (await ann.get("/api/sessions/ann/a/state")).json()
        assert state == {"stream": "ann/a", "state": "suspended", "head": 0, "owed": []}

    @pytest.mark.parametrize("state", [StreamState.CLOSING, StreamState.ENDED])
    async def test_suspending_does_not_bring_back_what_was_closed(
        self, app: App, ann: Client, state: StreamState
    ) -> None:
        await app.events.set_state("ann/a", state)
        async with ann.connected() as (_, connection_id):
            answer = await ann.post("suspend", connection_id, {"stream": "ann/a"})
            assert (answer.status_code, answer.json()["field"]) == (409, "stream")
            assert (await ann.post("send", connection_id, message())).status_code == 409
        assert (await ann.get("/api/sessions/ann/a/state")).json()["state"] == state


class TestWordsToTheAgent:
    @pytest.mark.parametrize(
        ("name", "said", "body"),
        [
            ("interrupt", {}, {"message_id": None}),
            ("interrupt", {"message_id": "m1"}, {"message_id": "m1"}),
            (
                "permission",
                {"request_id": "r1", "answer": {"allow": True}},
                {"request_id": "r1", "answer": {"allow": True}},
            ),
            ("mode", {"mode": "plan"}, {"mode": "plan"}),
        ],
    )
    async def test_are_events_of_the_stream(
        self, app: App, ann: Client, name: str, said: dict[str, Any], body: dict[str, Any]
    ) -> None:
        async with ann.connected() as (_, connection_id):
            answer = await ann.post(name, connection_id, {"stream": "ann/a", **said})
        assert answer.json() == {"seq": 1}
        (event,) = await app.events.read("ann/a")
        assert (event.kind, event.body) == (name, {**body, "user_id": "ann"})

    async def test_are_refused_by_a_stream_that_has_ended(self, app: App, ann: Client) -> None:
        await app.events.set_state("ann/a", StreamState.ENDED)
        async with ann.connected() as (_, connection_id):
            assert (await ann.post("interrupt", connection_id, {"stream": "ann/a"})).status_code == 409


class TestHistory:
    async def test_is_paged_in_order(self, app: App, ann: Client) -> None:
        await app.events.append_many("ann/a", [("delta", n) for n in range(450)])
        seqs: list[int] = []
        while True:
            page = (await ann.get(f"/api/sessions/ann/a/events?after={seqs[-1] if seqs else 0}")).json()
            assert page["head"] == 450
            if not page["events"]:
                break
            assert len(page["events"]) <= 200
            seqs += [event["seq"] for event in page["events"]]
        assert seqs == list(range(1, 451))

    @pytest.mark.parametrize(
        "query", ["after=-1", "after=x", "after=1.5", "limit=1001", "limit=-1", "after=" + 20 * "9"]
    )
    async def test_is_refused_for_numbers_that_cannot_be_meant(self, ann: Client, query: str) -> None:
        answer = await ann.get(f"/api/sessions/ann/a/events?{query}")
        assert (answer.status_code, answer.json()["field"]) == (400, query.partition("=")[0])

    @pytest.mark.parametrize("path", ["events", "state"])
    async def test_of_a_stream_of_somebody_else_is_404(self, app: App, bob: Client, path: str) -> None:
        await app.events.append("ann/a", "delta", "secret")
        answer = await bob.get(f"/api/sessions/ann/a/{path}")
        assert answer.status_code == 404
        assert "secret" not in answer.text
        assert answer.text == (await bob.get(f"/api/sessions/ann/a/{path}")).text

    async def test_state_tells_what_is_owed(self, app: App, ann: Client) -> None:
        await app.turns.arm(Turn(deployment="d", message_id="m7", stream="ann/a"))
        state = (await ann.get("/api/sessions/ann/a/state")).json()
        assert state == {"stream": "ann/a", "state": "created", "head": 0, "owed": ["m7"]}


async def test_health_is_that_of_the_database(own_cluster: Cluster) -> None:
    async with App(own_cluster.conninfo) as app, serving(app) as served, served.client() as client:
        async with client.connected():
            answer = await client.http.get("/healthz")
            assert answer.status_code == 200
            assert answer.json().items() >= {"status": "ok", "connections": 1}.items()
            assert answer.json()["services"]["sweeper"]["ok"]
        own_cluster.stop()
        answer = await client.http.get("/healthz")
        assert (answer.status_code, answer.json()["status"]) == (503, "the database does not answer")


async def test_json_of_errors_tells_nothing_of_the_database(ann: Client, conn: Connection) -> None:
    async with ann.connected() as (_, connection_id):
        await conn.execute("alter table queue_service.receipts rename to hidden")
        answer = await ann.post("send", connection_id, message())
        await conn.execute("alter table queue_service.hidden rename to receipts")
    assert answer.status_code == 500
    assert json.loads(answer.text)["field"] is None
