"""A deployment's child is in one process at a time, and who has lost the deployment writes nothing for it any more."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from queue_service import App, Turn
from queue_service.db.execute import Connection
from queue_service.errors import DeploymentDown, DeploymentHeld
from queue_service.supervisor import Supervisor
from tests.support import eventually, is_gone, one, quick_app, refusing, rows

CHILD = [sys.executable, str(Path(__file__).with_name("child_for_tests.py"))]
LAPSED = "update queue_service.deployments set expires_at = clock_timestamp() - interval '1 minute'"
OWNER = "select owner from queue_service.deployments where expires_at > clock_timestamp()"
KINDS = "select kind from queue_service.events order by seq"


@pytest.fixture
async def other(database: str) -> AsyncIterator[App]:
    """Another process, as far as the database knows."""
    async with quick_app(database) as opened:
        yield opened


def supervisor(app: App, grace: float = 0.3) -> Supervisor:
    return Supervisor(app, "d", CHILD, grace=grace)


async def given(app: App, child: Supervisor, *steps: list[Any], message_id: str = "m") -> Turn:
    turn = Turn(deployment="d", message_id=message_id, stream="s")
    await app.turns.arm(turn)
    await child.send(turn, list(steps))
    return turn


async def test_who_comes_second_starts_no_child_and_hears_who_has_it(app: App, other: App) -> None:
    async with supervisor(app) as first:
        for there in (other, app):
            second = supervisor(there)
            with pytest.raises(DeploymentHeld) as held:
                await second.start()
            assert held.value.owner == app.identity
            assert second.pid is None
        assert first.pid is not None
    # It may try again, and what was stopped is free at once.
    await second.start()
    assert second.pid is not None
    await second.stop()


async def test_who_waits_gets_it_from_one_that_is_idle_at_once(app: App, other: App) -> None:
    async with supervisor(app, grace=20) as first:
        second = supervisor(other)
        await second.start(wait=20)
        # It has been asked, and its child ended before the other began.
        assert (await first.wait()).deliberate
        await second.stop()


async def test_who_waits_gets_it_from_one_that_is_busy_when_its_turns_have_ended(app: App, other: App) -> None:
    async with supervisor(app) as first:
        turn = await given(app, first)
        second = supervisor(other)
        waiting = asyncio.create_task(second.start(wait=None))
        await eventually(lambda: first._child is not None and first._child.is_draining)
        assert not waiting.done()
        assert first.pid is not None
        # What comes meanwhile is for the next one.
        with pytest.raises(DeploymentDown, match="being stopped"):
            await given(app, first, message_id="next")
        await app.turns.commit_reply("d", [turn.message_id], {})
        await waiting
        assert (await first.wait()).message_ids == []
        await second.stop()


async def test_who_has_waited_for_long_enough_hears_who_has_it(app: App, other: App) -> None:
    async with supervisor(app) as first:
        await given(app, first)
        with pytest.raises(DeploymentHeld):
            await supervisor(other).start(wait=0.05)


async def test_a_deployment_that_was_taken_over_ends_its_child_and_none_of_its_turns(
    app: App, other: App, conn: Connection
) -> None:
    first = supervisor(app)
    await first.start()
    await given(app, first)
    pid = first.pid
    assert pid is not None
    await conn.execute(LAPSED)
    second = supervisor(other)
    await second.start()
    end = await asyncio.wait_for(first.wait(), 10)
    assert (end.deliberate, end.message_ids) == (True, [])
    assert "taken the deployment over" in end.reason
    assert is_gone(pid)
    assert await app.turns.is_live("d", "m")
    # Nor does it let go of what is another's.
    assert await one(conn, OWNER) == other.identity
    await second.stop()


async def test_what_a_child_says_after_its_deployment_was_taken_over_is_not_stored(
    app: App, other: App, conn: Connection
) -> None:
    first = supervisor(app)
    await first.start()
    # While nothing can be stored, and nothing renewed: as if the process had been frozen.
    async with refusing(conn, "deployments", f"owner = '{app.identity}'"):
        await eventually(lambda: not first._lease.is_sure)
        first._writer.put(_reply("m"))
        await app.turns.arm(Turn(deployment="d", message_id="m", stream="s"))
        second = supervisor(other)
        await conn.execute("delete from queue_service.deployments")
        await second.start()
    await asyncio.wait_for(first.wait(), 10)
    assert await rows(conn, KINDS) == []
    assert await app.turns.is_live("d", "m")
    await second.stop()


def _reply(message_id: str) -> Any:
    from queue_service.supervisor.protocol import ReplyLine

    return ReplyLine([message_id], {})


async def test_a_lease_that_cannot_be_renewed_ends_the_child_before_another_begins_and_its_turn_is_given_again(
    app: App, other: App, conn: Connection
) -> None:
    first, second = supervisor(app), supervisor(other)
    await first.start()
    turn = Turn(deployment="d", message_id="m", stream="s")
    await app.turns.arm(turn)
    answering = asyncio.create_task(first.answer(turn, []))
    await eventually(lambda: "m" in first._given)
    pid = first.pid
    assert pid is not None
    # It cannot be let go either: as if the process could not reach the database.
    until = await one(conn, "select expires_at from queue_service.deployments")
    async with refusing(conn, "deployments", f"owner = '{app.identity}' and expires_at > '{until}'"):
        first._lease.release = _nothing  # type: ignore[method-assign]
        await second.start(wait=None)
        assert is_gone(pid)
    end = await asyncio.wait_for(first.wait(), 10)
    assert (end.reason, end.message_ids) == ("its supervisor could not renew the deployment's lease in time", [])
    with pytest.raises(DeploymentDown, match="could not renew"):
        await answering
    assert (await second.answer(turn, [["reply", {}]])).kind == "reply"
    await second.stop()


async def _nothing() -> None:
    """In place of letting go."""


async def test_what_was_said_before_is_stored_when_it_turns_out_that_nobody_took_the_deployment(
    app: App, conn: Connection
) -> None:
    first = supervisor(app)
    await first.start()
    turn = await given(app, first, ["delta", "begun"])
    await eventually(lambda: _equal(rows(conn, KINDS), [("delta",)]))
    await given(app, first, message_id="lost")
    async with refusing(conn, "deployments", "true"):
        async with refusing(conn, "events", "kind = 'reply'"):
            await first.send(turn, [["reply", {}], ["exit", 3]])
            await eventually(lambda: first.pid is None)
            await eventually(lambda: not first._lease.is_sure, within=10)
        # It could be stored now, and is not: it may be another's.
        assert not first._over.is_set()
    end = await asyncio.wait_for(first.wait(), 20)
    # It had ended by itself before, and that is what is told.
    assert (end.reason, end.deliberate, end.message_ids) == ("exit code 3", False, ["lost"])
    assert await rows(conn, KINDS) == [("delta",), ("reply",), ("error",)]


async def test_a_closed_app_ends_its_children_and_lets_their_deployments_go(database: str, conn: Connection) -> None:
    async with quick_app(database) as app:
        child = supervisor(app)
        await child.start()
        await given(app, child, message_id="m")
        pid = child.pid
    assert pid is not None and is_gone(pid)
    assert (await child.wait()).deliberate
    assert await rows(conn, "select * from queue_service.deployments") == []
    assert await one(conn, "select count(*) from queue_service.turn_markers") == 1


async def _equal(asked: Any, expected: object) -> bool:
    return bool(await asked == expected)
