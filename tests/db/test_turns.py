"""Turns on a real database: what is armed ends once, and whoever comes second hears of it."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any

import msgspec
import psycopg
import pytest
from psycopg import errors as pg

from queue_service import App, Outcome, RunState, Turn, TurnFailure
from queue_service.app.sync import SyncApp
from queue_service.db import channels
from queue_service.db.execute import Connection
from queue_service.errors import (
    ConfigError,
    DatabaseRefused,
    DatabaseUnavailable,
    PayloadRefused,
    TurnEnded,
    TurnUnknown,
    ValueRefused,
)  # fmt: skip
from queue_service.services import sweeper
from queue_service.turns.model import SENTENCES, Marker
from tests.support import eventually, is_heard, one, rows, working

MINUTE = timedelta(minutes=1)
DIED = TurnFailure("worker_died")
Session = Callable[[], Awaitable[Connection]]


def turn(message_id: str = "m1", **fields: Any) -> Turn:
    return Turn(**{"deployment": "dep-1", "message_id": message_id, "stream": "conv-1"} | fields)


async def armed(app: App, *message_ids: str, **fields: Any) -> None:
    for message_id in message_ids or ("m1",):
        assert await app.turns.arm(turn(message_id, **fields))


async def lapse(conn: Connection, message_id: str | None = None) -> None:
    """Let deadlines have passed a minute ago."""
    await conn.execute(
        "update queue_service.turn_markers set deadline = clock_timestamp() - interval '1 minute' "
        "where message_id = coalesce(%s, message_id)",
        [message_id],
    )


async def only(app: App, message_id: str = "m1") -> Marker:
    (marker,) = await app.turns.list(message_id=message_id)
    return marker


async def ended(app: App, message_id: str = "m1", deployment: str = "dep-1") -> Outcome:
    found = await app.turns.outcome(deployment, message_id)
    assert found is not None
    return found


async def events(conn: Connection, stream: str = "conv-1") -> list[tuple[Any, ...]]:
    return await rows(conn, "select seq, kind, body from queue_service.events where stream = %s order by seq", stream)


@pytest.fixture
def q(app: App) -> Iterator[SyncApp]:
    with app.sync as opened:
        yield opened


class TestArming:
    async def test_owes_the_turn_an_ending_until_the_admission_is_over(self, app: App) -> None:
        one_turn = turn(platform="slack", channel_id="c", user_id="u", organization_id="acme", metadata={"ts": "1"})
        assert await app.turns.arm(one_turn, admission=90, execution=MINUTE) is True
        marker = await only(app)
        assert (marker.platform, marker.channel_id, marker.user_id) == ("slack", "c", "u")
        assert (marker.organization_id, marker.metadata) == ("acme", {"ts": "1"})
        assert (marker.admission, marker.execution) == (timedelta(seconds=90), MINUTE)
        assert abs(marker.deadline - marker.armed_at - timedelta(seconds=90)) < timedelta(seconds=1)
        assert (marker.admitted_at, marker.run_id, marker.failure_code, marker.overdue) == (None, None, None, False)
        assert await app.turns.outcome("dep-1", "m1") is None

    async def test_takes_its_deadlines_from_the_settings(self, app: App) -> None:
        await armed(app)
        marker = await only(app)
        assert (marker.admission, marker.execution) == (app.settings.admission, app.settings.execution)

    async def test_again_changes_nothing(self, app: App) -> None:
        await armed(app)
        before = await only(app)
        assert await app.turns.arm(turn(stream="elsewhere", platform="slack"), admission=1) is False
        assert await only(app) == before

    async def test_is_for_one_message_of_one_deployment(self, app: App) -> None:
        assert await app.turns.arm(turn("1", deployment="a", stream="a"))
        assert await app.turns.arm(turn("1", deployment="b", stream="b"))
        assert await app.turns.commit_reply("a", ["1"], {}) == ["1"]
        assert [marker.deployment for marker in await app.turns.list()] == ["b"]

    async def test_of_an_ended_turn_is_refused_with_its_outcome(self, app: App) -> None:
        await armed(app)
        await app.turns.commit_reply("dep-1", ["m1"], {"text": "hi"})
        with pytest.raises(TurnEnded, match="ended with a reply") as refused:
            await app.turns.arm(turn())
        assert refused.value.outcome == await ended(app)
        assert refused.value.outcome.body["text"] == "hi"
        assert await app.turns.list() == []

    async def test_stops_whoever_cannot_store_it(self, database: str) -> None:
        app = App(database)
        async with app:
            await armed(app)
            app.opened.pool.fetch = _gone  # type: ignore[method-assign, assignment]
            with pytest.raises(DatabaseUnavailable):
                await app.turns.arm(turn("m2"))
            with pytest.raises(DatabaseUnavailable):
                await app.turns.dispatch(turn("m2"), "noop", {})
            with pytest.raises(DatabaseUnavailable):
                await app.turns.reject("dep-1", "m1", "no")

    async def test_from_many_sides_at_once_is_done_once(self, app: App, session: Session) -> None:
        sessions = [await session() for _ in range(4)]
        calls = [app.turns.arm(turn(), conn=each) for each in sessions] + [app.turns.arm(turn()) for _ in range(20)]
        assert sorted(await asyncio.gather(*calls)) == [False] * 23 + [True]

    async def test_is_part_of_the_callers_transaction(self, app: App, database: str) -> None:
        async with await psycopg.AsyncConnection.connect(database) as mine:
            assert await app.turns.arm(turn(), conn=mine)
            assert await app.turns.list() == []
            await mine.rollback()
            assert await app.turns.arm(turn(), conn=mine)
            assert not await app.turns.arm(turn(), conn=mine)
            await mine.commit()
        assert (await only(app)).message_id == "m1"

    async def test_waits_for_another_session_that_has_not_committed_yet(
        self, app: App, database: str, conn: Connection
    ) -> None:
        async with await psycopg.AsyncConnection.connect(database) as mine:
            await app.turns.arm(turn(), conn=mine)
            second = asyncio.ensure_future(app.turns.arm(turn()))
            await eventually(lambda: one(conn, "select count(*) > 0 from pg_locks where not granted"))
            assert not second.done()
            await mine.commit()
        assert await second is False

    async def test_does_not_wait_for_whoever_writes_to_its_stream(self, app: App, database: str) -> None:
        await app.events.append("conv-1", "delta", {})
        async with await psycopg.AsyncConnection.connect(database) as mine:
            await app.events.append("conv-1", "delta", {}, conn=mine)
            async with asyncio.timeout(5):
                await armed(app)

    @pytest.mark.parametrize("word", ["admission", "execution"])
    @pytest.mark.parametrize("value", [0, -1, math.nan, 10**12, "soon"])
    async def test_needs_a_deadline_that_comes(self, app: App, word: str, value: Any) -> None:
        with pytest.raises(ConfigError, match=word):
            await app.turns.arm(turn(), **{word: value})
        assert await app.turns.list() == []


async def _gone(_query: Any) -> Any:
    raise DatabaseUnavailable("gone")


class TestAMalformedMarkerCannotExist:
    @pytest.mark.parametrize(
        ("column", "value", "error"),
        [
            ("deployment", "''", pg.CheckViolation), ("message_id", "''", pg.CheckViolation),
            ("stream", "''", pg.CheckViolation), ("stream", "null", pg.NotNullViolation),
            ("platform", "''", pg.CheckViolation), ("platform", "null", pg.NotNullViolation),
            ("channel_id", "''", pg.CheckViolation), ("organization_id", "''", pg.CheckViolation),
            ("deadline", "null", pg.NotNullViolation), ("deadline", "'infinity'", pg.CheckViolation),
            ("deadline", "'-infinity'", pg.CheckViolation), ("admission", "'0'", pg.CheckViolation),
            ("execution", "'-1 s'", pg.CheckViolation), ("execution", "'100000 days'", pg.CheckViolation),
            ("failure_reason", "'no code'", pg.CheckViolation), ("metadata", "'[]'", pg.CheckViolation),
            ("metadata", "'null'", pg.CheckViolation), ("metadata", "null", pg.NotNullViolation),
        ],
    )  # fmt: skip
    async def test_in_its(self, app: App, conn: Connection, column: str, value: str, error: type[Exception]) -> None:
        await armed(app)
        with pytest.raises(error):
            await conn.execute(f"update queue_service.turn_markers set {column} = {value}".encode())

    @pytest.mark.parametrize(
        "change",
        ["kind = 'reply'", "ended_at = now()", "kind = 'answered', ended_at = now(), seq = 1", "code = 'worker_died'",
         "kind = 'error', ended_at = now(), seq = 1", "kind = 'discharged', ended_at = now(), seq = 1",
         "kind = 'reply', ended_at = now(), seq = 1, code = 'worker_died'"],
    )  # fmt: skip
    async def test_nor_an_outcome_that_is_half_of_one(self, app: App, conn: Connection, change: str) -> None:
        await armed(app)
        with pytest.raises(pg.CheckViolation):
            await conn.execute(f"update queue_service.turn_outcomes set {change}".encode())


class TestDispatching:
    async def test_arms_the_turn_and_enqueues_its_run(self, app: App) -> None:
        spoken = turn(organization_id="acme", platform="slack", metadata={"ts": "1"})
        run_id = await app.turns.dispatch(
            spoken, "agent_turn", {"text": "hi"}, admission=30, queue="agents", priority=3, metadata={"mine": 1}
        )
        run = await app.get(run_id)
        assert run is not None
        assert (run.task, run.queue, run.priority, run.payload) == ("agent_turn", "agents", 3, {"text": "hi"})
        assert run.organization_id == "acme"
        assert run.metadata is not None
        assert run.metadata["mine"] == 1
        assert run.metadata["turn"] == {
            "deployment": "dep-1", "message_id": "m1", "stream": "conv-1", "platform": "slack", "channel_id": None,
            "user_id": None, "organization_id": "acme", "metadata": {"ts": "1"},
        }  # fmt: skip
        marker = await only(app)
        assert (marker.run_id, marker.admission) == (run_id, timedelta(seconds=30))

    async def test_twice_gives_the_same_run(self, app: App, conn: Connection) -> None:
        run_id = await app.turns.dispatch(turn(), "agent_turn", {"n": 1})
        assert await app.turns.dispatch(turn(), "agent_turn", {"n": 2}) == run_id
        assert await one(conn, "select count(*) from queue_service.runs") == 1

    async def test_from_many_sides_at_once_gives_one_run(self, app: App, conn: Connection, session: Session) -> None:
        sessions = [await session() for _ in range(4)]
        calls = [app.turns.dispatch(turn(), "t", {}, conn=each) for each in sessions]
        calls += [app.turns.dispatch(turn(), "t", {}) for _ in range(8)]
        assert len(set(await asyncio.gather(*calls))) == 1
        assert await one(conn, "select count(*) from queue_service.runs") == 1

    async def test_is_undone_with_the_callers_transaction(self, app: App, database: str, conn: Connection) -> None:
        async with await psycopg.AsyncConnection.connect(database) as mine:
            await app.turns.dispatch(turn(), "agent_turn", {}, conn=mine)
            await mine.rollback()
            assert await one(conn, "select count(*) from queue_service.runs") == 0
            assert await rows(conn, "select from queue_service.turn_outcomes") == []
            assert await app.turns.list() == []
            run_id = await app.turns.dispatch(turn(), "agent_turn", {}, conn=mine)
            await mine.commit()
        assert (await only(app)).run_id == run_id

    async def test_leaves_nothing_behind_where_the_run_is_refused(self, app: App, conn: Connection) -> None:
        with pytest.raises(ValueRefused, match="cannot store a value"):
            await app.turns.dispatch(turn(), "agent_turn", {"n": msgspec.Raw(b"1e-20000")})
        with pytest.raises(PayloadRefused):
            await app.turns.dispatch(turn(), "agent_turn", {"n": math.nan})
        assert await rows(conn, "select from queue_service.turn_outcomes") == []
        assert await app.turns.list() == []

    async def test_gives_an_armed_turn_its_run_and_a_fresh_admission(self, app: App, conn: Connection) -> None:
        await armed(app)
        await app.turns.extend("dep-1")
        await lapse(conn)
        run_id = await app.turns.dispatch(turn(), "agent_turn", {})
        marker = await only(app)
        assert (marker.run_id, marker.admitted_at, marker.overdue) == (run_id, None, False)

    async def test_of_an_ended_turn_is_refused_and_enqueues_nothing(self, app: App, conn: Connection) -> None:
        await armed(app)
        await app.turns.fail("dep-1", "m1", DIED)
        with pytest.raises(TurnEnded, match="error worker_died"):
            await app.turns.dispatch(turn(), "agent_turn", {})
        assert await one(conn, "select count(*) from queue_service.runs") == 0

    @pytest.mark.parametrize("option", [{"singleton_key": "s"}, {"on_conflict": "raise"}])
    async def test_takes_no_key_of_its_own(self, app: App, option: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match="the turn itself is what is unique"):
            await app.turns.dispatch(turn(), "agent_turn", {}, **option)

    async def test_wakes_a_worker_whose_handler_answers(self, database: str) -> None:
        app = App(database)

        @app.task
        async def agent_turn(text: str) -> None:
            await app.turns.extend("dep-1")
            await app.turns.commit_reply("dep-1", ["m1"], {"text": text.upper()})

        async with app, working(app):
            run_id = await app.turns.dispatch(turn(), "agent_turn", {"text": "hi"})
            outcome = await app.turns.wait("dep-1", "m1", timeout=10)
            assert (outcome.kind, outcome.body and outcome.body["text"]) == ("reply", "HI")
            assert (await app.wait(run_id, timeout=10)).state is RunState.SUCCEEDED


class TestASignOfLife:
    async def test_collapses_the_admission_to_the_execution(self, app: App) -> None:
        await app.turns.arm(turn(), admission=3_600, execution=60)
        before = await only(app)
        assert await app.turns.extend("dep-1") == ["m1"]
        after = await only(app)
        assert after.admitted_at is not None
        assert abs(after.deadline - after.admitted_at - MINUTE) < timedelta(seconds=1)
        assert after.deadline < before.deadline

    async def test_extends_every_turn_of_the_deployment_and_no_other(self, app: App, conn: Connection) -> None:
        await armed(app, "m1", "m2")
        await app.turns.arm(turn("m3", deployment="other"))
        await lapse(conn)
        assert sorted(await app.turns.extend("dep-1")) == ["m1", "m2"]
        assert {marker.message_id for marker in await app.turns.list(overdue=True)} == {"m3"}

    async def test_keeps_when_the_turn_was_taken_up_first(self, app: App) -> None:
        await armed(app)
        await app.turns.extend("dep-1")
        first = (await only(app)).admitted_at
        await app.turns.extend("dep-1")
        assert (await only(app)).admitted_at == first

    async def test_of_a_deployment_that_owes_nothing_extends_nothing(self, app: App) -> None:
        assert await app.turns.extend("dep-1") == []

    async def test_does_not_extend_a_turn_whose_provider_failed(self, app: App) -> None:
        await armed(app)
        await app.turns.extend("dep-1")
        assert await app.turns.withhold("dep-1", "provider_quota_exhausted", "429") == ["m1"]
        withheld = await only(app)
        assert (withheld.failure_code, withheld.failure_reason) == ("provider_quota_exhausted", "429")
        assert await app.turns.extend("dep-1") == []
        assert (await only(app)).deadline == withheld.deadline

    async def test_of_a_turn_withheld_before_any_other_ends_its_admission_once(self, app: App) -> None:
        await app.turns.arm(turn(), admission=3_600, execution=60)
        await app.turns.withhold("dep-1", "provider_overloaded")
        for _ in range(2):
            assert await app.turns.extend("dep-1") == []
            marker = await only(app)
            assert marker.admitted_at is not None
            assert abs(marker.deadline - marker.admitted_at - MINUTE) < timedelta(seconds=1)
        assert (await only(app)).deadline == marker.deadline

    async def test_never_gives_a_withheld_turn_more_time(self, app: App) -> None:
        await app.turns.arm(turn(), admission=30, execution=60)
        await app.turns.withhold("dep-1", "provider_overloaded")
        before = await only(app)
        await app.turns.extend("dep-1")
        assert (await only(app)).deadline == before.deadline

    async def test_does_not_touch_what_was_withheld_and_extends_what_was_armed_since(self, app: App) -> None:
        await armed(app, "m1")
        await app.turns.withhold("dep-1", "provider_overloaded")
        await armed(app, "m2")
        assert await app.turns.extend("dep-1") == ["m2"]

    async def test_comes_with_a_recovery(self, app: App, conn: Connection) -> None:
        await armed(app, "m1")
        await app.turns.withhold("dep-1", "provider_overloaded")
        await armed(app, "m2")
        await lapse(conn)
        assert await app.turns.restore("dep-1") == ["m1"]
        marker = await only(app, "m1")
        assert (marker.failure_code, marker.failure_reason, marker.overdue) == (None, None, False)
        assert marker.admitted_at is not None
        assert await app.turns.restore("dep-1") == []

    async def test_a_withheld_turn_that_lapses_ends_with_its_code_and_reason(self, app: App, conn: Connection) -> None:
        await armed(app)
        await app.turns.withhold("dep-1", "provider_quota_exhausted", "429")
        await lapse(conn)
        assert await app.turns.sweep() == 1
        outcome = await ended(app)
        assert (outcome.code, outcome.message) == (
            "provider_quota_exhausted", SENTENCES["provider_quota_exhausted"],
        )  # fmt: skip
        assert outcome.body is not None
        assert outcome.body["reason"] == "429"

    async def test_a_code_is_one_of_the_catalogue_when_it_is_written(self, app: App) -> None:
        with pytest.raises(ConfigError, match="Did you mean 'provider_overloaded'"):
            await app.turns.withhold("dep-1", "provider_overload")

    async def test_and_checked_again_when_it_is_read_back(self, app: App, conn: Connection) -> None:
        await armed(app)
        await conn.execute("update queue_service.turn_markers set failure_code = 'made_up', failure_reason = 'why'")
        assert (await only(app)).failure_code == "internal_error"
        await lapse(conn)
        await app.turns.sweep()
        outcome = await ended(app)
        assert (outcome.code, outcome.message) == ("internal_error", SENTENCES["internal_error"])
        await conn.execute("update queue_service.turn_outcomes set code = 'made_up_too'")
        assert (await ended(app)).code == "internal_error"

    async def test_a_turn_released_from_behind_another_waits_to_be_taken_up_again(
        self, app: App, conn: Connection
    ) -> None:
        await app.turns.arm(turn(), admission=3_600, execution=60)
        await app.turns.extend("dep-1")
        assert await app.turns.reset_admission("dep-1", "m1") is True
        marker = await only(app)
        assert marker.admitted_at is None
        left = await one(conn, "select extract(epoch from deadline - now())::int from queue_service.turn_markers")
        assert 3_590 < left <= 3_600
        assert await app.turns.reset_admission("dep-1", "m2") is False


class TestIsLive:
    async def test_only_while_that_very_turn_is_armed(self, app: App) -> None:
        assert await app.turns.is_live("dep-1", "m1") is False
        await armed(app, "m1", "m2")
        assert await app.turns.is_live("dep-1", "m1") is True
        assert await app.turns.is_live("other", "m1") is False
        await app.turns.commit_reply("dep-1", ["m1"], {})
        assert await app.turns.is_live("dep-1", "m1") is False
        assert await app.turns.is_live("dep-1", "m2") is True

    async def test_not_once_its_deadline_has_passed_even_before_a_sweep(self, app: App, conn: Connection) -> None:
        await armed(app, "m1", "m2")
        await lapse(conn, "m1")
        assert await app.turns.is_live("dep-1", "m1") is False
        assert await app.turns.is_live("dep-1", "m2") is True


class TestAReply:
    async def test_ends_its_turn_with_an_event_that_says_whose_it_is(self, app: App, conn: Connection) -> None:
        await app.events.append("conv-1", "delta", {"text": "h"})
        await armed(app, organization_id="acme")
        assert await app.turns.commit_reply("dep-1", ["m1"], {"text": "hi", "message_ids": "mine"}) == ["m1"]
        assert (await events(conn))[-1] == (2, "reply", {
            "text": "hi", "deployment": "dep-1", "message_ids": ["m1"], "platform": "api", "organization_id": "acme",
        })  # fmt: skip
        outcome = await ended(app)
        assert (outcome.kind, outcome.seq, outcome.stream, outcome.code) == ("reply", 2, "conv-1", None)
        assert outcome.message is None
        assert await app.turns.list() == []

    async def test_ends_several_messages_with_an_event_for_each(self, app: App, conn: Connection) -> None:
        await armed(app, "m1", "m2")
        await armed(app, "m3", stream="conv-2")
        ids = await app.turns.commit_reply("dep-1", ["m2", "m1", "m1", "unknown", "m3"], {"text": "hi"})
        assert sorted(ids) == ["m1", "m2", "m3"]
        stored = [(seq, body["message_ids"]) for seq, _, body in await events(conn)]
        assert stored == [(1, ["m1"]), (2, ["m2"])]
        assert [seq for seq, _, _ in await events(conn, "conv-2")] == [1]

    async def test_that_comes_too_late_is_dropped_and_said_to_be(self, app: App, conn: Connection) -> None:
        await armed(app, "m1", "m2")
        await app.turns.fail("dep-1", "m1", DIED)
        assert await app.turns.commit_reply("dep-1", ["m1"], {"text": "late"}) == []
        assert await app.turns.commit_reply("dep-1", ["m1", "m2"], {"text": "hi"}) == ["m2"]
        assert await app.turns.commit_reply("dep-1", ["never"], {}) == []
        assert await app.turns.commit_reply("dep-1", [], {}) == []
        assert [kind for _, kind, _ in await events(conn)] == ["error", "reply"]

    async def test_and_its_ending_are_undone_together(self, app: App, database: str, conn: Connection) -> None:
        await armed(app)
        async with await psycopg.AsyncConnection.connect(database) as mine:
            assert await app.turns.commit_reply("dep-1", ["m1"], {}, conn=mine) == ["m1"]
            await mine.rollback()
        assert await events(conn) == []
        assert await app.turns.is_live("dep-1", "m1")
        assert await app.turns.commit_reply("dep-1", ["m1"], {}) == ["m1"]

    async def test_on_a_connection_that_dies_before_the_commit_leaves_the_turn_owed(
        self, app: App, database: str, conn: Connection
    ) -> None:
        await armed(app)
        mine = await psycopg.AsyncConnection.connect(database)
        await app.turns.commit_reply("dep-1", ["m1"], {}, conn=mine)
        await conn.execute("select pg_terminate_backend(%s)", [mine.info.backend_pid])
        await eventually(lambda: app.turns.is_live("dep-1", "m1"))
        with suppress(psycopg.Error):
            await mine.close()
        assert await events(conn) == []
        assert await app.turns.commit_reply("dep-1", ["m1"], {}) == ["m1"]

    async def test_takes_a_list_of_ids_and_not_one(self, app: App) -> None:
        with pytest.raises(ConfigError, match="list of ids"):
            await app.turns.commit_reply("dep-1", "m1", {})

    @pytest.mark.parametrize(
        ("body", "kind"),
        [
            ({"t": "a\x00b"}, "reply"), ({"t": "\ud800"}, "reply"), ({"n": math.nan}, "reply"), ({"\x00": 1}, "reply"),
            ({"t": "x" * 300_000}, "error"), (json.loads('{"a":' * 250 + "1" + "}" * 250), "error"), ("text", "error"),
            ([], "error"), (None, "error"), ({"o": object()}, "error"), ({"n": msgspec.Raw(b"1e-20000")}, "error"),
            ({"n": msgspec.Raw(b"no json")}, "error"),
        ],
        ids=["NUL", "half", "NaN", "NUL key", "large", "deep", "text", "list", "None", "object", "number", "raw"],
    )  # fmt: skip
    async def test_that_cannot_be_stored_ends_the_turn_all_the_same(self, app: App, body: Any, kind: str) -> None:
        await armed(app)
        assert await app.turns.commit_reply("dep-1", ["m1"], body) == ["m1"]
        outcome = await ended(app)
        assert outcome.kind == kind
        assert outcome.body is not None
        assert outcome.body["message_ids"] == ["m1"]
        if kind == "error":
            assert (outcome.code, outcome.message) == ("reply_refused", SENTENCES["reply_refused"])
            assert outcome.body["reason"]

    async def test_for_a_platform_enqueues_its_delivery_with_it(self, app: App, conn: Connection) -> None:
        await conn.execute("insert into queue_service.connections values ('slack', 'C1', 'me', now() + interval '1h')")
        await armed(app, platform="slack", channel_id="C1", user_id="U1", organization_id="acme", metadata={"ts": "1"})
        await app.turns.commit_reply("dep-1", ["m1"], {"text": "hi"})
        assert await rows(conn, "select queue, task, organization_id, reserved_for from queue_service.runs") == [
            ("thread_response", "deliver", "acme", "me")
        ]
        assert await one(conn, "select payload from queue_service.runs") == {
            "stream": "conv-1", "seq": 1, "kind": "reply", "deployment": "dep-1", "message_id": "m1",
            "platform": "slack", "channel_id": "C1", "user_id": "U1", "metadata": {"ts": "1"},
        }  # fmt: skip

    async def test_for_the_api_enqueues_none(self, app: App, conn: Connection) -> None:
        await armed(app)
        await app.turns.commit_reply("dep-1", ["m1"], {})
        assert await one(conn, "select count(*) from queue_service.runs") == 0

    async def test_is_stored_even_where_the_stream_has_ended(self, app: App) -> None:
        await armed(app)
        await app.events.set_state("conv-1", "ended")
        assert await app.turns.commit_reply("dep-1", ["m1"], {}) == ["m1"]
        assert await app.events.head("conv-1") == 1


class TestAFailure:
    async def test_ends_one_turn_with_code_message_platform_and_tenant(self, app: App, conn: Connection) -> None:
        await armed(app, organization_id="acme")
        assert await app.turns.fail("dep-1", "m1", TurnFailure("worker_startup_failed", reason="exit 1")) is True
        assert await events(conn) == [(1, "error", {
            "code": "worker_startup_failed", "message": SENTENCES["worker_startup_failed"], "reason": "exit 1",
            "deployment": "dep-1", "message_ids": ["m1"], "platform": "api", "organization_id": "acme",
        })]  # fmt: skip

    async def test_of_a_turn_that_has_ended_or_never_was_writes_nothing(self, app: App, conn: Connection) -> None:
        assert await app.turns.fail("dep-1", "m1", DIED) is False
        await armed(app)
        await app.turns.commit_reply("dep-1", ["m1"], {})
        assert await app.turns.fail("dep-1", "m1", DIED) is False
        assert len(await events(conn)) == 1

    async def test_of_a_deployment_ends_every_turn_of_it_at_once(self, app: App, conn: Connection) -> None:
        await armed(app, "m1", "m2")
        await armed(app, "m3", stream="conv-2", platform="slack")
        await app.turns.arm(turn("m4", deployment="other"))
        assert sorted(await app.turns.fail_deployment("dep-1", DIED)) == ["m1", "m2", "m3"]
        assert await app.turns.fail_deployment("dep-1", DIED) == []
        assert [body["message_ids"] for _, _, body in await events(conn)] == [["m1"], ["m2"]]
        assert [body["platform"] for _, _, body in await events(conn, "conv-2")] == ["slack"]
        assert [marker.message_id for marker in await app.turns.list()] == ["m4"]

    async def test_is_written_even_for_a_turn_whose_marker_was_put_back_by_hand(
        self, app: App, conn: Connection
    ) -> None:
        await armed(app)
        await app.turns.commit_reply("dep-1", ["m1"], {})
        await conn.execute(
            "insert into queue_service.turn_markers (deployment, message_id, deadline, admission, execution, stream) "
            "values ('dep-1', 'm1', now() - interval '1s', '1s', '1s', 'conv-1')"
        )
        assert await app.turns.sweep() == 0
        assert [kind for _, kind, _ in await events(conn)] == ["reply"]
        assert await app.turns.list() == []

    async def test_and_a_reply_at_once_end_the_turn_once(self, app: App, database: str, conn: Connection) -> None:
        async with App(database) as other:
            for number in range(20):
                message_id = f"m{number}"
                await armed(app, message_id)
                await lapse(conn)
                answers = await asyncio.gather(
                    app.turns.commit_reply("dep-1", [message_id], {}),
                    other.turns.fail("dep-1", message_id, DIED),
                    other.turns.fail_deployment("dep-1", DIED),
                    app.turns.sweep(),
                    other.turns.sweep(),
                )
                assert sum(len(each) if isinstance(each, list) else each for each in answers) == 1
        assert [seq for seq, _, _ in await events(conn)] == list(range(1, 21))


class TestARejection:
    async def test_ends_the_turn_with_the_reason_as_its_sentence(self, app: App) -> None:
        await armed(app)
        outcome = await app.turns.reject("dep-1", "m1", "Not allowed here.")
        assert (outcome.kind, outcome.code, outcome.message) == ("error", "rejected", "Not allowed here.")

    async def test_tells_how_the_turn_ended_before(self, app: App) -> None:
        await armed(app)
        await app.turns.commit_reply("dep-1", ["m1"], {})
        assert (await app.turns.reject("dep-1", "m1", "no")).kind == "reply"

    async def test_of_a_turn_never_armed_is_an_error(self, app: App) -> None:
        with pytest.raises(TurnUnknown):
            await app.turns.reject("dep-1", "m1", "no")


class TestADischarge:
    async def test_forgets_the_obligation_without_an_event(self, app: App, conn: Connection) -> None:
        await armed(app)
        assert await app.turns.discharge("dep-1", "m1") is True
        assert await app.turns.discharge("dep-1", "m1") is False
        outcome = await ended(app)
        assert (outcome.kind, outcome.seq, outcome.body) == ("discharged", None, None)
        assert await events(conn) == []
        assert await app.turns.commit_reply("dep-1", ["m1"], {}) == []
        with pytest.raises(TurnEnded):
            await app.turns.arm(turn())

    async def test_is_heard_by_whoever_waits(self, app: App) -> None:
        await armed(app)
        waiting = asyncio.ensure_future(app.turns.wait("dep-1", "m1", timeout=10))
        await eventually(lambda: is_heard(app, channels.EVENTS))
        await app.turns.discharge("dep-1", "m1")
        assert (await waiting).kind == "discharged"

    async def test_is_found_by_whoever_waits_where_its_notice_is_lost(self, app: App, conn: Connection) -> None:
        await armed(app)
        waiting = asyncio.ensure_future(app.turns.wait("dep-1", "m1", timeout=10))
        await eventually(lambda: is_heard(app, channels.EVENTS))
        await conn.execute("delete from queue_service.turn_markers")
        await conn.execute("update queue_service.turn_outcomes set kind = 'discharged', ended_at = clock_timestamp()")
        assert (await waiting).kind == "discharged"


class TestWaiting:
    async def test_for_a_turn_that_has_ended_answers_at_once(self, app: App) -> None:
        await armed(app)
        await app.turns.commit_reply("dep-1", ["m1"], {"text": "hi"})
        assert await app.turns.wait("dep-1", "m1", timeout=5) == await ended(app)

    async def test_is_over_when_another_replica_ends_the_turn(self, app: App, database: str) -> None:
        await armed(app)
        waiting = asyncio.ensure_future(app.turns.wait("dep-1", "m1", timeout=10))
        await eventually(lambda: app.opened.fanout._tails)
        async with App(database) as other:
            await other.turns.commit_reply("dep-1", ["m1"], {"text": "hi"})
        body = (await waiting).body
        assert body is not None
        assert body["text"] == "hi"

    async def test_with_no_worker_anywhere_ends_with_the_deadline(self, app: App) -> None:
        began = time.monotonic()
        await app.turns.arm(turn(), admission=0.3)
        outcome = await app.turns.wait("dep-1", "m1", timeout=10)
        assert (outcome.code, time.monotonic() - began >= 0.3) == ("worker_unresponsive", True)
        assert outcome.body is not None
        assert outcome.body["reason"] == "No worker took it up within 00:00:00.3."

    async def test_goes_on_while_somebody_gives_signs_of_life(self, app: App, conn: Connection) -> None:
        await app.turns.arm(turn(), admission=5, execution=60)
        waiting = asyncio.ensure_future(app.turns.wait("dep-1", "m1", timeout=30))
        await eventually(lambda: app.opened.fanout._tails)
        deadline = (await only(app)).deadline
        await app.turns.extend("dep-1")
        await eventually(lambda: one(conn, "select clock_timestamp() > %s::timestamptz + interval '0.2 s'", deadline))
        assert not waiting.done()
        await app.turns.commit_reply("dep-1", ["m1"], {})
        assert (await waiting).kind == "reply"

    async def test_for_a_turn_never_armed_is_an_error(self, app: App) -> None:
        with pytest.raises(TurnUnknown, match="never armed"):
            await app.turns.wait("dep-1", "m1", timeout=1)

    async def test_no_longer_than_it_may_leaves_the_turn_as_it_is(self, app: App) -> None:
        await armed(app)
        with pytest.raises(TimeoutError, match=r"did not end within 0.1 s. It goes on"):
            await app.turns.wait("dep-1", "m1", timeout=0.1)
        assert await app.turns.is_live("dep-1", "m1")
        assert app.opened.fanout._tails == {}

    async def test_many_who_wait_all_hear_of_it(self, app: App) -> None:
        await armed(app)
        waiting = [asyncio.ensure_future(app.turns.wait("dep-1", "m1", timeout=10)) for _ in range(20)]
        await eventually(lambda: app.opened.fanout._tails and app.opened.fanout._tails["conv-1"].watchers == 20)
        await app.turns.fail("dep-1", "m1", DIED)
        assert {outcome.code for outcome in await asyncio.gather(*waiting)} == {"worker_died"}


class TestTheSweep:
    async def test_ends_only_what_has_lapsed(self, app: App, conn: Connection) -> None:
        await armed(app, "m1", "m2")
        assert await app.turns.sweep() == 0
        await lapse(conn, "m1")
        assert await app.turns.sweep() == 1
        outcome = await ended(app)
        assert (outcome.code, outcome.body and outcome.body["platform"]) == ("worker_unresponsive", "api")
        assert await app.turns.is_live("dep-1", "m2")

    async def test_says_whether_a_worker_ever_took_the_turn_up(self, app: App, conn: Connection) -> None:
        await app.turns.arm(turn("m1"), execution=60)
        await app.turns.extend("dep-1")
        await app.turns.arm(turn("m2"), admission=90)
        await lapse(conn)
        await app.turns.sweep()
        assert [body["reason"] for _, _, body in await events(conn)] == [
            "No sign of life for 00:01:00.", "No worker took it up within 00:01:30.",
        ]  # fmt: skip

    async def test_is_bounded_and_goes_on_until_nothing_is_left(
        self, app: App, conn: Connection, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sweeper, "TURN_LIMIT", 3)
        await asyncio.gather(*(app.turns.arm(turn(f"m{number}")) for number in range(10)))
        await lapse(conn)
        assert await app.turns.sweep() == 10
        assert [seq for seq, _, _ in await events(conn)] == list(range(1, 11))

    async def test_on_many_replicas_at_once_ends_each_turn_once(
        self, app: App, database: str, conn: Connection
    ) -> None:
        await asyncio.gather(*(app.turns.arm(turn(f"m{n}", stream=f"conv-{n % 7}")) for n in range(100)))
        await lapse(conn)
        async with App(database) as second, App(database) as third:

            async def over() -> bool:
                swept = await asyncio.gather(*(each.turns.sweep() for each in (app, second, third)))
                counts.extend(swept)
                return sum(counts) >= 100

            counts: list[int] = []
            await eventually(over)
        assert sum(counts) == 100
        assert await rows(conn, "select count(*), count(distinct body -> 'message_ids') from queue_service.events") == [
            (100, 100)
        ]

    async def test_steps_over_a_turn_that_another_session_holds(
        self, app: App, conn: Connection, session: Session
    ) -> None:
        await armed(app, "m1", "m2")
        await lapse(conn)
        other = await session()
        async with other.transaction(), asyncio.timeout(5):
            await other.execute("select from queue_service.turn_markers where message_id = 'm1' for update")
            assert await app.turns.sweep() == 1
            assert await app.turns.outcome("dep-1", "m1") is None
        assert await app.turns.sweep() == 1

    async def test_steps_over_a_stream_that_somebody_writes_to(self, app: App, conn: Connection, database: str) -> None:
        await app.events.append("conv-1", "delta", {})
        await armed(app, "m1")
        await armed(app, "m2", stream="conv-2")
        await lapse(conn)
        async with await psycopg.AsyncConnection.connect(database) as mine:
            await app.events.append("conv-1", "delta", {}, conn=mine)
            async with asyncio.timeout(5):
                assert await app.turns.sweep() == 1
            assert await app.turns.outcome("dep-1", "m1") is None
        assert await app.turns.sweep() == 1
        assert [(seq, kind) for seq, kind, _ in await events(conn)] == [(1, "delta"), (2, "delta"), (3, "error")]

    async def test_is_not_held_up_by_a_turn_that_cannot_be_ended(self, app: App, conn: Connection) -> None:
        await app.events.append("conv-1", "delta", {})
        await armed(app, "m1")
        await armed(app, "m2", stream="conv-2")
        await armed(app, "m3", stream="conv-3")
        # Now the next event of the stream has the key of one that is there.
        await conn.execute("delete from queue_service.streams where stream = 'conv-1'")
        await lapse(conn)
        with pytest.raises(DatabaseRefused, match="2 were ended, and the database refuses to end m1"):
            await app.turns.sweep()
        assert [marker.message_id for marker in await app.turns.list()] == ["m1"]
        await conn.execute("insert into queue_service.streams (stream, head) values ('conv-1', 1)")
        assert await app.turns.sweep() == 1

    async def test_lets_a_sign_of_life_win_that_commits_first(
        self, app: App, conn: Connection, session: Session
    ) -> None:
        await armed(app)
        await lapse(conn)
        other = await session()
        async with other.transaction():
            await other.execute("update queue_service.turn_markers set deadline = clock_timestamp() + interval '1h'")
            looking = asyncio.ensure_future(app.turns.wait("dep-1", "m1", timeout=10))
            await eventually(lambda: one(conn, "select count(*) > 0 from pg_locks where not granted"))
        assert await app.turns.is_live("dep-1", "m1")
        await app.turns.commit_reply("dep-1", ["m1"], {})
        assert (await looking).kind == "reply"

    async def test_ends_a_turn_whose_worker_dispatched_it_and_died(self, app: App, conn: Connection) -> None:
        run_id = await app.turns.dispatch(turn(), "agent_turn", {})
        await lapse(conn)
        assert await app.turns.sweep() == 1
        run = await app.get(run_id)
        assert run is not None
        assert run.state is RunState.QUEUED


class TestTheListOfWhatIsOwed:
    async def test_shows_first_what_lapses_first(self, app: App) -> None:
        for number, admission in enumerate([30, 10, 20]):
            await app.turns.arm(turn(f"m{number}"), admission=admission)
        assert [marker.message_id for marker in await app.turns.list()] == ["m1", "m2", "m0"]
        assert [marker.message_id for marker in await app.turns.list(limit=1)] == ["m1"]

    async def test_can_be_narrowed(self, app: App, conn: Connection) -> None:
        await armed(app, "m1")
        await armed(app, "m2", deployment="other", stream="other", platform="slack", organization_id="acme")
        await lapse(conn, "m2")
        filters: list[dict[str, Any]] = [
            {"deployment": "other"}, {"stream": "other"}, {"platform": "slack"}, {"organization_id": "acme"},
            {"overdue": True}, {"message_id": "m2"},
        ]  # fmt: skip
        for narrow in filters:
            assert [marker.message_id for marker in await app.turns.list(**narrow)] == ["m2"], narrow
        assert await app.turns.list(deployment="dep-1", overdue=True) == []

    async def test_is_counted(self, app: App, conn: Connection) -> None:
        assert tuple(await app.turns.tally()) == (0, 0, None)
        await armed(app, "m1", "m2")
        await lapse(conn, "m1")
        owed, overdue, oldest = await app.turns.tally()
        assert (owed, overdue) == (2, 1)
        assert oldest is not None
        assert MINUTE <= oldest < 2 * MINUTE


class TestManyCallsAtOnce:
    async def test_share_statements_and_each_gets_its_own_answer(self, app: App, conn: Connection) -> None:
        asked: list[str] = []
        fetch = app.opened.pool.fetch

        async def counted(query: Any) -> Any:
            asked.append(query.text)
            return await fetch(query)

        app.opened.pool.fetch = counted  # type: ignore[method-assign, assignment]
        assert await asyncio.gather(*(app.turns.arm(turn(f"m{n}")) for n in range(100))) == [True] * 100
        assert len(asked) <= 10
        asked.clear()
        answers = await asyncio.gather(
            *(app.turns.commit_reply("dep-1", [f"m{n}", f"m{n + 1}"], {"n": n}) for n in range(0, 100, 2)),
            *(app.turns.fail("dep-1", f"m{n}", DIED) for n in range(100)),
        )
        assert answers[:50] == [[f"m{n}", f"m{n + 1}"] for n in range(0, 100, 2)]
        assert answers[50:] == [False] * 100
        assert len(asked) <= 10
        assert len(await events(conn)) == 100
        for n in range(0, 100, 33):
            body = (await ended(app, f"m{n}")).body
            assert body is not None
            assert body["n"] == n - n % 2

    async def test_a_reply_that_the_database_refuses_fails_alone(self, app: App) -> None:
        await armed(app, *(f"m{n}" for n in range(10)))
        bodies: list[dict[str, Any]] = [{"n": n} for n in range(10)]
        bodies[4] = {"n": msgspec.Raw(b"1e-20000")}
        answers = await asyncio.gather(
            *(app.turns.commit_reply("dep-1", [f"m{n}"], body) for n, body in enumerate(bodies))
        )
        assert answers == [[f"m{n}"] for n in range(10)]
        kinds = [(await ended(app, f"m{n}")).kind for n in range(10)]
        assert kinds == ["reply"] * 4 + ["error"] + ["reply"] * 5

    async def test_an_arm_that_is_refused_fails_alone(self, app: App) -> None:
        await armed(app, "m3")
        await app.turns.commit_reply("dep-1", ["m3"], {})
        poisoned = turn("m5", metadata={"n": msgspec.Raw(b"1e-20000")})
        turns = [poisoned if n == 5 else turn(f"m{n}") for n in range(10)]
        answers = await asyncio.gather(*map(app.turns.arm, turns), return_exceptions=True)
        assert [type(each) for each in answers if each is not True] == [TurnEnded, ValueRefused]
        assert len(await app.turns.list()) == 8


class TestBlockingCode:
    async def test_has_the_same_methods(self, q: SyncApp) -> None:
        assert q.turns.arm(turn()) is True
        assert q.turns.extend("dep-1") == ["m1"]
        assert q.turns.is_live("dep-1", "m1") is True
        assert q.turns.commit_reply("dep-1", ["m1"], {"text": "hi"}) == ["m1"]
        assert q.turns.wait("dep-1", "m1", timeout=5).kind == "reply"
        with pytest.raises(TurnEnded):
            q.turns.dispatch(turn(), "agent_turn", {})

    async def test_waits_without_a_worker_too(self, q: SyncApp) -> None:
        q.turns.arm(turn(), admission=0.1)
        assert q.turns.wait("dep-1", "m1", timeout=10).code == "worker_unresponsive"

    async def test_dispatches_and_answers_in_the_callers_transaction(self, q: SyncApp, app: App, database: str) -> None:
        with psycopg.connect(database) as mine:
            q.turns.dispatch(turn(), "agent_turn", {}, conn=mine)
            mine.rollback()
            assert q.turns.list() == []
            run_id = q.turns.dispatch(turn(), "agent_turn", {}, conn=mine)
            assert q.turns.dispatch(turn(), "agent_turn", {}, conn=mine) == run_id
            mine.commit()
            assert q.turns.commit_reply("dep-1", ["m1"], {"text": "hi"}, conn=mine) == ["m1"]
            assert q.turns.is_live("dep-1", "m1") is True
            with pytest.raises(TurnEnded):
                q.turns.arm(turn(), conn=mine)
            mine.commit()
        assert (await ended(app)).kind == "reply"

    async def test_refuses_connections_that_are_asynchronous(self, q: SyncApp, conn: Connection) -> None:
        with pytest.raises(ConfigError, match="asynchronous"):
            q.turns.arm(turn(), conn=conn)
