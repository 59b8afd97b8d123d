"""The runs that work on messages: in what order, and with which options."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from queue_service import App, Retry, Run
from queue_service.db.execute import Connection
from queue_service.errors import ConfigError, PayloadRefused
from queue_service.gateway import Gateway, Principal, access
from tests.gateway.served import Client, named, serving
from tests.support import eventually, one, quick_app, rows, working


def message(client_message_id: str = "m1", stream: str = "ann/a", **body: Any) -> dict[str, Any]:
    return {"stream": stream, "client_message_id": client_message_id, "body": body or {"text": "hi"}}


async def stored_run(app: App, stream: str = "ann/a") -> Run:
    (marker,) = await app.turns.list(stream=stream)
    run = await app.get(marker.run_id or 0)
    assert run is not None
    return run


async def send(client: Client, *ids: str, stream: str = "ann/a") -> None:
    """At once."""
    answers = await asyncio.gather(*(client.post("send", None, message(each, stream, text=each)) for each in ids))
    assert [answer.status_code for answer in answers] == [202] * len(ids), answers[0].text


class TestTheMessagesOfAStream:
    async def test_are_worked_on_one_after_the_other_on_whatever_worker_with_all_their_attempts(
        self, app: App, database: str
    ) -> None:
        began: list[tuple[str, int]] = []
        at_work = 0

        async with quick_app(database) as second, serving(app) as served, served.client() as ann:
            for each in (app, second):

                @each.task(name="agent_turn", retry=Retry(max_attempts=3, base=0.05))
                async def agent_turn(run: Run, text: str) -> None:
                    nonlocal at_work
                    began.append((text, run.attempt))
                    at_work += 1
                    assert at_work == 1
                    await asyncio.sleep(0.02)  # the work, in which the other one might begin
                    at_work -= 1
                    if began[-1] == (began[0][0], 1):
                        raise RuntimeError("the first attempt of the first")
                    turn = run.turn
                    assert turn is not None
                    await app.turns.commit_reply(turn.deployment, [turn.message_id], {})

            await send(ann, "one", "two", "three")
            said = [each.body["message_id"] for each in await app.events.read("ann/a") if each.kind == "message"]
            async with working(app), working(second):
                await eventually(lambda: nothing_owed(app), within=20)
        first, *others = [(text, 1) for text in said]
        assert began == [first, (said[0], 2), *others]

    async def test_are_worked_on_at_the_same_time_where_nobody_asks_for_an_order(self, app: App) -> None:
        met = asyncio.Barrier(2)

        @app.task(name="agent_turn")
        async def agent_turn(run: Run, text: str) -> None:
            await met.wait()
            turn = run.turn
            assert turn is not None
            await app.turns.commit_reply(turn.deployment, [turn.message_id], {})

        async with serving(app, ordering="none") as served, served.client() as ann:
            await send(ann, "one", "two")
            async with working(app):
                await eventually(lambda: nothing_owed(app), within=20)

    async def test_have_the_stream_for_their_key_however_long_its_name_is(self, app: App, ann: Client) -> None:
        stream = "ann/" + "ß" * 510
        assert len(stream.encode()) == 1_024
        await send(ann, "m1", stream=stream)
        assert (await stored_run(app, stream)).ordering_key == stream
        assert (await ann.post("send", None, message(stream=stream + "x"))).status_code == 400


class TestOptions:
    async def test_are_those_of_each_run(self, app: App, conn: Connection) -> None:
        options: dict[str, Any] = {
            "priority": 7,
            "max_attempts": 2,
            "timeout": 9,
            "retry_delay": 3,
            "metadata": {"plan": "free"},
        }
        options |= {"expires_in": 3_600, "admission": 500, "execution": 600}
        async with serving(app, options=options, queue="agents") as served, served.client() as ann:
            await send(ann, "m1")
        run = await stored_run(app)
        assert (run.queue, run.priority, run.max_attempts, run.ordering_key) == ("agents", 7, 2, "ann/a")
        assert (run.metadata or {})["plan"] == "free"
        assert (run.metadata or {})["turn"]["message_id"] == "m1"
        assert await rows(
            conn, "select extract(epoch from timeout), extract(epoch from retry_delay) from queue_service.runs"
        ) == [(9, 3)]
        assert await one(conn, "select expires_at > clock_timestamp() + interval '59 min' from queue_service.runs")
        assert await rows(
            conn,
            "select extract(epoch from admission), extract(epoch from execution) from queue_service.turn_markers",
        ) == [(500, 600)]

    @pytest.mark.parametrize("ordering", ["stream", "none"])
    async def test_may_name_another_key(self, app: App, ordering: str) -> None:
        async with serving(app, ordering=ordering, options={"ordering_key": "all"}) as served, served.client() as ann:
            await send(ann, "m1")
        assert (await stored_run(app)).ordering_key == "all"

    async def test_may_say_that_a_message_has_no_key(self, app: App) -> None:
        async with serving(app, options={"ordering_key": None}) as served, served.client() as ann:
            await send(ann, "m1")
        assert (await stored_run(app)).ordering_key is None

    @pytest.mark.parametrize("later", [False, True])
    async def test_may_be_found_for_each_message(self, app: App, later: bool) -> None:
        asked: list[tuple[Any, ...]] = []

        def at_once(principal: Principal, stream: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
            asked.append((principal.id, principal.organization_id, stream, body))
            return {"priority": body["n"], "queue": "mine"}

        async def slowly(principal: Principal, stream: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
            await asyncio.sleep(0)
            return at_once(principal, stream, body)

        options = slowly if later else at_once
        async with serving(app, options=options, queue="default") as served, served.client() as ann:
            assert (await ann.post("send", None, message(n=3))).status_code == 202
        assert asked == [("ann", "org", "ann/a", {"n": 3})]
        run = await stored_run(app)
        assert (run.priority, run.queue, run.ordering_key) == (3, "mine", "ann/a")

    @pytest.mark.parametrize("given", [None, [], {"colour": 1}, {"priority": "high"}, {"singleton_key": "x"}, "raise"])
    async def test_that_cannot_be_had_refuse_this_message_only_and_are_logged(
        self, app: App, conn: Connection, caplog: pytest.LogCaptureFixture, given: Any
    ) -> None:
        def options(_principal: Principal, _stream: str, body: Mapping[str, Any]) -> Any:
            if "text" not in body:
                return {}
            if given == "raise":
                raise RuntimeError("the price list is down")
            return given

        async with serving(app, options=options) as served, served.client() as ann:
            answer = await ann.post("send", None, message())
            assert (answer.status_code, answer.json()["field"]) == (500, None)
            assert "price" not in answer.text
            assert await one(conn, "select count(*) from queue_service.events") == 0
            assert await app.turns.list() == []
            assert (await ann.post("send", None, message(other=1))).status_code == 202
        (record,) = [each for each in caplog.records if "the options of a run cannot be had" in each.getMessage()]
        assert record.levelname == "ERROR"

    async def test_that_do_not_come_in_time_are_503(
        self, app: App, conn: Connection, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(access, "HOOK_DEADLINE", 0.05)

        async def never(*_: object) -> Mapping[str, Any]:
            await asyncio.Event().wait()
            return {}

        async with serving(app, options=never) as served, served.client() as ann:
            answer = await ann.post("send", None, message())
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert await one(conn, "select count(*) from queue_service.events") == 0

    @pytest.mark.parametrize(
        ("options", "why"),
        [
            ({"options": {"priorty": 1}}, "no option 'priorty'. Did you mean 'priority'?"),
            ({"options": {"singleton_key": "x"}}, "no option 'singleton_key'"),
            ({"options": {"conn": None}}, "no option 'conn'"),
            ({"options": {"priority": "high"}}, "priority must be a whole number"),
            ({"options": {"admission": -1}}, "admission must be positive"),
            ({"options": {"queue": "a"}, "queue": "b"}, "both name the queue"),
            ({"options": 5}, "a mapping, or a function"),
            ({"queue": 200 * "x"}, "queue is 200 bytes long"),
            ({"ordering": "steam"}, "Did you mean 'stream'?"),
            ({"ordering": None}, "one of stream, none"),
            ({"options": {"metadata": {"at": object()}}}, "is not JSON"),
        ],
    )
    def test_that_no_run_can_have_are_refused_when_it_is_made(self, options: dict[str, Any], why: str) -> None:
        with pytest.raises((ConfigError, PayloadRefused)) as refused:
            Gateway(App("postgresql:///unused"), authorize=named, **options)
        assert why in str(refused.value)


async def nothing_owed(app: App) -> bool:
    return not await app.turns.list()
