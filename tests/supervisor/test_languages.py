"""One protocol, whatever the child is written in: the same rules for a child in Python, in JavaScript and in the shell."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from queue_service import App, Outcome, Run, Supervisors, Turn, TurnFailure, Worker
from queue_service.db.execute import Connection
from queue_service.supervisor import Supervisor
from tests.supervisor.agents import AGENTS
from tests.support import eventually, one, rows

HEARD = "select body ->> 'line', body ->> 'about' from queue_service.events where kind = 'heard' order by seq"
WITHHELD = "select message_id from queue_service.turn_markers where failure_code is not null order by 1"


@pytest.fixture(params=AGENTS)
def command(request: pytest.FixtureRequest) -> list[str]:
    return AGENTS[request.param]


def supervisor(app: App, command: list[str], *arguments: str) -> Supervisor:
    return Supervisor(app, "d", [*command, *arguments], grace=0.5)


async def armed(app: App, message_id: str, stream: str = "s") -> Turn:
    turn = Turn(deployment="d", message_id=message_id, stream=stream)
    await app.turns.arm(turn)
    return turn


async def given(app: App, child: Supervisor, message_id: str, words: str) -> Turn:
    turn = await armed(app, message_id)
    await child.send(turn, words)
    return turn


async def held(app: App, child: Supervisor, conn: Connection, message_id: str = "m") -> Turn:
    """A turn that the child has begun, and works on until it is cancelled."""
    turn = await given(app, child, message_id, "delta hold")
    # What is said to it from here on comes after its turn.
    await eventually(lambda: one(conn, "select count(*) > 0 from queue_service.events where kind = 'delta'"))
    return turn


async def ending(app: App, message_id: str = "m") -> Outcome:
    return await app.turns.wait("d", message_id, timeout=20)


async def test_it_streams_and_answers(app: App, command: list[str], conn: Connection) -> None:
    async with supervisor(app, command) as child:
        await given(app, child, "m", "delta delta delta reply")
        outcome = await ending(app)
    assert (outcome.kind, (outcome.body or {})["text"]) == ("reply", "done")
    assert [kind for (kind,) in await rows(conn, "select kind from queue_service.events order by seq")] == [
        "delta", "delta", "delta", "reply",
    ]  # fmt: skip


async def test_its_crash_ends_what_it_was_given_and_what_waits_is_answered_by_the_next_one(
    app: App, command: list[str]
) -> None:
    waits = await armed(app, "waits")
    async with supervisor(app, command) as child:
        await given(app, child, "held", "hold")
        await given(app, child, "crash", "crash")
        end = await child.wait()
    assert (end.reason, sorted(end.message_ids)) == ("exit code 3", ["crash", "held"])
    assert {(await ending(app, name)).code for name in ("crash", "held")} == {"worker_died"}
    async with supervisor(app, command) as child:
        assert (await child.answer(waits, "reply")).kind == "reply"


async def test_what_it_said_of_its_provider_ends_with_it(app: App, command: list[str], conn: Connection) -> None:
    await armed(app, "waits")
    async with supervisor(app, command) as child:
        await given(app, child, "m", "withhold")
        await eventually(lambda: _equal(rows(conn, WITHHELD), [("m",), ("waits",)]))
        await given(app, child, "crash", "crash")
        await child.wait()
        assert await rows(conn, WITHHELD) == [("waits",)]
    async with supervisor(app, command):
        await eventually(lambda: _equal(rows(conn, WITHHELD), []))


async def test_it_hears_that_a_turn_was_ended_by_somebody_else(app: App, command: list[str], conn: Connection) -> None:
    async with supervisor(app, command) as child:
        await held(app, child, conn)
        await given(app, child, "other", "hold")
        await app.turns.fail("d", "other", TurnFailure("cancelled"))
        await eventually(lambda: _equal(rows(conn, HEARD), [("cancelled", "other")]))
        assert child._given.message_ids == ["m"]
        await given(app, child, "crash", "crash")
        assert sorted((await child.wait()).message_ids) == ["crash", "m"]


async def test_it_hears_that_a_turn_was_taken_back(app: App, command: list[str], conn: Connection) -> None:
    async with supervisor(app, command) as child:
        await held(app, child, conn)
        answering = asyncio.create_task(child.answer(await armed(app, "other"), "delta hold"))
        await eventually(lambda: _equal(_count(conn, "delta"), 2))
        answering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await answering
        await eventually(lambda: _equal(rows(conn, HEARD), [("cancelled", "other")]))
        assert await app.turns.is_live("d", "other")
        await given(app, child, "crash", "crash")
        assert "other" not in (await child.wait()).message_ids


async def test_it_hears_what_people_say_to_the_stream_of_its_turn(
    app: App, command: list[str], conn: Connection
) -> None:
    async def say(kind: str, stream: str = "s", **body: Any) -> None:
        await app.events.append(stream, kind, {**body, "user_id": "ada"})

    # Before the turn was given, and elsewhere.
    await say("permission", request_id="may I", answer="no")
    await say("interrupt", message_id=None)
    async with supervisor(app, command) as child:
        await held(app, child, conn)
        await say("interrupt", message_id=None, stream="another")
        await say("permission", request_id="may I", answer="yes")
        await eventually(lambda: _equal(_count(conn, "heard"), 1))
        await say("decision", key="gate-1", state="passed")
        await eventually(lambda: _equal(_count(conn, "heard"), 2))
        await say("message", message_id="queued", body={"text": "later"})
        await say("message", message_id="steers", body={"text": "sooner"}, mode="steer")
        await eventually(lambda: _equal(_count(conn, "heard"), 3))
        await say("interrupt", message_id="another")
        await say("interrupt", message_id=None)
        await eventually(lambda: _equal(_count(conn, "heard"), 4))
    assert await rows(conn, HEARD) == [
        ("permission", "may I"), ("decision", "gate-1"), ("input", "steers"), ("interrupt", None),
    ]  # fmt: skip


async def test_it_may_answer_what_it_was_offered_together_with_its_turn(app: App, command: list[str]) -> None:
    steers = await armed(app, "steers")
    async with supervisor(app, command) as child:
        answering = asyncio.create_task(child.answer(await armed(app, "m"), "take"))
        await eventually(lambda: "m" in child._given)
        message = {"message_id": "steers", "user_id": "ada", "body": {"text": "sooner"}, "mode": "steer"}
        await app.events.append(steers.stream, "message", message)
        assert ((await answering).body or {})["text"] == "both"
        assert ((await ending(app, "steers")).body or {})["text"] == "both"


async def test_a_drain_lets_it_finish(app: App, command: list[str]) -> None:
    child = Supervisor(app, "d", command, grace=20)
    await child.start()
    answering = asyncio.create_task(child.answer(await armed(app, "m"), "slow"))
    await eventually(lambda: "m" in child._given)
    await asyncio.wait_for(child.stop(), 10)
    assert (await answering).kind == "reply"
    assert (await child.wait()).deliberate


async def test_a_newer_protocol_is_refused_with_the_reason(app: App, command: list[str], conn: Connection) -> None:
    @app.task
    async def agent_turn(run: Run) -> Any:
        return await supervisors.take(run, "hold")

    async with Supervisors(app, [*command, "2"], grace=0.5) as supervisors:
        await app.turns.dispatch(Turn(deployment="d", message_id="m", stream="s"), "agent_turn", {})
        await Worker(app).run(once=True)
    outcome = await ending(app)
    assert outcome.code == "worker_startup_failed"
    assert "it speaks protocol 2" in (outcome.body or {})["reason"]


async def _equal(asked: Any, expected: object) -> bool:
    return bool(await asked == expected)


async def _count(conn: Connection, kind: str) -> int:
    return int(await one(conn, "select count(*) from queue_service.events where kind = %s", kind))
