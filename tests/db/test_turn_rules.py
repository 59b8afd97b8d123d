"""Rules that hold for every way to end a turn: what cannot be stored ends nothing, and what is stored says whose it is."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import psycopg
import pytest
from psycopg import errors as pg

from queue_service import App, Turn, TurnFailure
from queue_service.db.execute import Connection
from queue_service.errors import ConfigError, DatabaseRefused
from queue_service.settings import load
from queue_service.turns import queries
from queue_service.turns.model import SENTENCES
from tests.support import claimed, eventually, one, refusing, rows, working

DIED = TurnFailure("worker_died")
CHAT = {"platform": "chat", "channel_id": "c1", "organization_id": "acme"}
EVENTS = "select kind, body from queue_service.events order by seq"
DELIVERIES = (
    "select payload ->> 'platform', payload ->> 'message_id', payload ->> 'kind', organization_id "
    "from queue_service.runs where queue = 'thread_response'"
)

# Each ends turn m1 of deployment dep-1, whose deadline has passed.
ENDERS: dict[str, Callable[[App], Awaitable[object]]] = {
    "reply": lambda app: app.turns.commit_reply("dep-1", ["m1"], {"text": "Hello"}),
    "failure": lambda app: app.turns.fail("dep-1", "m1", DIED),
    "death": lambda app: app.turns.fail_deployment("dep-1", DIED),
    "rejection": lambda app: app.turns.reject("dep-1", "m1", "Not here."),
    "sweep": lambda app: app.turns.sweep(),
    "waiter": lambda app: app.turns.wait("dep-1", "m1", timeout=10),
}
every_ender = pytest.mark.parametrize("name", ENDERS)


def turn(message_id: str = "m1", **fields: Any) -> Turn:
    return Turn(**{"deployment": "dep-1", "message_id": message_id, "stream": "conv-1"} | fields)


async def overdue(app: App, conn: Connection, **fields: Any) -> None:
    """The turn is owed its ending, and should have had it a minute ago."""
    assert await app.turns.arm(turn(**fields))
    await conn.execute("update queue_service.turn_markers set deadline = clock_timestamp() - interval '1 minute'")


class TestArming:
    async def test_that_cannot_be_done_stops_the_dispatch_and_the_message_can_be_tried_again(
        self, app: App, conn: Connection
    ) -> None:
        async with refusing(conn, "turn_markers", "message_id = 'm1'"):
            with pytest.raises(pg.CheckViolation):
                await app.turns.dispatch(turn(), "agent_turn", {})
            with pytest.raises(pg.CheckViolation):
                await app.turns.arm(turn())
            for table in ("runs", "turn_outcomes", "turn_markers", "streams"):
                assert await one(conn, f"select count(*) from queue_service.{table}") == 0
        run_id = await app.turns.dispatch(turn(), "agent_turn", {})
        assert await rows(conn, "select id from queue_service.runs") == [(run_id,)]
        assert await app.turns.is_live("dep-1", "m1")

    async def test_comes_before_any_worker_can_see_the_message(self, app: App, database: str, conn: Connection) -> None:
        async with await psycopg.AsyncConnection.connect(database) as other:
            await app.turns.arm(turn(), conn=other)
            dispatching = asyncio.ensure_future(app.turns.dispatch(turn(), "agent_turn", {}))
            # It cannot be armed yet.
            await eventually(lambda: one(conn, "select count(*) > 0 from pg_locks where not granted"))
            assert await claimed(conn, tasks=("agent_turn",)) == []
            assert await one(conn, "select count(*) from queue_service.runs") == 0
            await other.rollback()
        run_id = await dispatching
        ((run, _),) = await claimed(conn, tasks=("agent_turn",))
        assert run.id == run_id
        assert await app.turns.is_live("dep-1", "m1")

    async def test_gives_longer_to_be_taken_up_than_between_two_signs_of_life(self) -> None:
        settings = load({})
        assert settings.admission > settings.execution

    async def test_does_not_let_a_turn_lapse_by_its_execution_before_somebody_took_it_up(self, app: App) -> None:
        await app.turns.arm(turn(), admission=60, execution=0.001)
        assert await app.turns.sweep() == 0
        await app.turns.extend("dep-1")
        await eventually(lambda: _is_late(app))
        await app.turns.reset_admission("dep-1", "m1")
        assert await app.turns.sweep() == 0
        await app.turns.extend("dep-1")
        await eventually(app.turns.sweep)
        outcome = await app.turns.outcome("dep-1", "m1")
        assert outcome is not None
        assert outcome.code == "worker_unresponsive"


async def _is_late(app: App) -> bool:
    return not await app.turns.is_live("dep-1", "m1")


class TestWaiting:
    async def test_lasts_until_the_first_moment_at_which_the_turn_may_have_lapsed(self, app: App) -> None:
        async def patience() -> float:
            standing = await app.fetch(queries.standing("dep-1", "m1"))
            assert standing is not None
            return app.opened.outcomes._pause(standing)

        app.opened.outcomes._poll_interval = 30
        # Its first sign of life would bring the deadline nearer.
        await app.turns.arm(turn(), admission=3_600, execution=60)
        assert await patience() == pytest.approx(60, abs=5)
        await app.turns.extend("dep-1")
        assert await patience() == pytest.approx(60, abs=5)
        # And nothing brings it further away but another one.
        await app.turns.reset_admission("dep-1", "m1")
        assert await patience() == pytest.approx(60, abs=5)
        await app.turns.arm(turn("m2", deployment="dep-2"), admission=5, execution=60)
        standing = await app.fetch(queries.standing("dep-2", "m2"))
        assert standing is not None
        assert standing.seconds_left == pytest.approx(5, abs=3)


class TestEveryEnding:
    @every_ender
    @pytest.mark.parametrize(
        ("table", "what"), [("events", "terminal"), ("runs", "task = 'deliver'")], ids=["event", "delivery"]
    )
    async def test_is_nothing_where_a_part_of_it_cannot_be_stored_and_all_of_it_where_it_can(
        self, app: App, conn: Connection, name: str, table: str, what: str
    ) -> None:
        await overdue(app, conn, **CHAT)
        async with refusing(conn, table, what):
            with suppress(psycopg.Error, DatabaseRefused):
                assert not await ENDERS[name](app)
            assert [marker.message_id for marker in await app.turns.list()] == ["m1"]
            assert await app.turns.outcome("dep-1", "m1") is None
            assert await rows(conn, EVENTS) == await rows(conn, DELIVERIES) == []
        assert await ENDERS[name](app)
        ((kind, _),) = await rows(conn, EVENTS)
        assert await rows(conn, DELIVERIES) == [("chat", "m1", kind, "acme")]
        assert await app.turns.list() == []

    @every_ender
    @pytest.mark.parametrize("fields", [{}, CHAT], ids=["api", "chat"])
    async def test_says_its_platform_its_tenant_and_the_message_it_ends(
        self, app: App, conn: Connection, name: str, fields: dict[str, Any]
    ) -> None:
        await overdue(app, conn, **fields)
        await ENDERS[name](app)
        ((kind, body),) = await rows(conn, EVENTS)
        platform, tenant = fields.get("platform", "api"), fields.get("organization_id")
        assert (body["platform"], body["organization_id"]) == (platform, tenant)
        assert (body["deployment"], body["message_ids"]) == ("dep-1", ["m1"])
        assert (kind == "reply") == (name == "reply")
        if kind == "error":
            assert body["code"] in SENTENCES
            assert body["message"] == ("Not here." if name == "rejection" else SENTENCES[body["code"]])
        # For the API the event is the delivery.
        assert await rows(conn, DELIVERIES) == ([] if platform == "api" else [("chat", "m1", kind, "acme")])

    @every_ender
    async def test_is_the_only_one_and_is_delivered_once(self, app: App, conn: Connection, name: str) -> None:
        await overdue(app, conn, **CHAT)
        await ENDERS[name](app)
        ending = await rows(conn, EVENTS)
        assert len(ending) == 1
        for late in ENDERS.values():
            await late(app)
        assert await rows(conn, EVENTS) == ending
        assert len(await rows(conn, DELIVERIES)) == 1


class TestARejection:
    async def test_that_cannot_be_stored_lets_nobody_pass_and_leaves_the_turn_to_its_deadline(
        self, app: App, conn: Connection
    ) -> None:
        await app.turns.arm(turn())
        async with refusing(conn, "events", "body ->> 'code' = 'rejected'"):
            with pytest.raises(pg.CheckViolation):
                await app.turns.reject("dep-1", "m1", "Not here.")
            assert await app.turns.is_live("dep-1", "m1")
            await conn.execute("update queue_service.turn_markers set deadline = clock_timestamp()")
            assert await app.turns.sweep() == 1
        outcome = await app.turns.reject("dep-1", "m1", "Not here.")
        assert outcome.code == "worker_unresponsive"
        assert len(await rows(conn, EVENTS)) == 1


class TestTheSweep:
    async def test_is_done_by_a_worker_of_any_queue_with_nobody_waiting(self, app: App, conn: Connection) -> None:
        async with working(app, {"elsewhere": 1}):
            # It has been through its first passes: what ends the turn is the sweep that comes round.
            await overdue(app, conn)
            await eventually(lambda: rows(conn, EVENTS))
        ((_, body),) = await rows(conn, EVENTS)
        assert body["code"] == "worker_unresponsive"


class TestAnOutage:
    async def armed(self, app: App) -> None:
        for message_id, organization_id, provider in [
            ("m1", "acme", "p1"),
            ("m2", "acme", "p2"),
            ("m3", "other", "p1"),
        ]:
            await app.turns.arm(
                turn(
                    message_id,
                    deployment=f"of {message_id}",
                    organization_id=organization_id,
                    metadata={"provider": provider},
                )
            )
        await app.turns.arm(turn("m4"))

    @pytest.mark.parametrize(
        ("whose", "expected"),
        [
            ({"provider": "p1"}, ["m1", "m3"]), ({"organization_id": "acme"}, ["m1", "m2"]),
            ({"organization_id": "acme", "provider": "p1"}, ["m1"]), ({"provider": "unknown"}, []),
        ],
    )  # fmt: skip
    async def test_withholds_and_restores_the_turns_of_many_deployments(
        self, app: App, conn: Connection, whose: dict[str, str], expected: list[str]
    ) -> None:
        await self.armed(app)
        assert sorted(await app.turns.withhold(None, "provider_overloaded", "529", **whose)) == expected
        withheld = (
            "select message_id from queue_service.turn_markers where failure_code = 'provider_overloaded' order by 1"
        )
        assert [each for (each,) in await rows(conn, withheld)] == expected
        assert sorted(await app.turns.restore(None, **whose)) == expected
        assert await rows(conn, withheld) == []

    @pytest.mark.parametrize("whose", [{}, {"deployment": "dep-1", "provider": "p1"}])
    async def test_says_whose_turns_it_is_about(self, app: App, whose: dict[str, str]) -> None:
        with pytest.raises(ConfigError, match="Say whose turns"):
            await app.turns.withhold(whose.pop("deployment", None), "provider_overloaded", **whose)
