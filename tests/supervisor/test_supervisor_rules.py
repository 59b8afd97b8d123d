"""What a supervisor does when the database or the child does not do its part: it logs, tries again, and ends once."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from queue_service import App, Outcome, Turn
from queue_service.db.execute import Connection
from queue_service.supervisor import Supervisor
from tests.support import eventually, one, refusing, rows

CHILD = [sys.executable, str(Path(__file__).with_name("child_for_tests.py"))]
ADMITTED = "select admitted_at is not null from queue_service.turn_markers where message_id = %s"
ENDINGS = "select body -> 'message_ids' ->> 0, kind from queue_service.events where terminal order by seq"


async def armed(app: App, message_id: str = "m", **deadlines: float) -> Turn:
    turn = Turn(deployment="d", message_id=message_id, stream="s")
    await app.turns.arm(turn, **deadlines)
    return turn


async def given(app: App, child: Supervisor, *steps: list[Any], message_id: str = "m") -> None:
    await child.send(await armed(app, message_id), list(steps))


async def ended(app: App, message_id: str = "m") -> Outcome:
    outcome = await app.turns.outcome("d", message_id)
    assert outcome is not None
    return outcome


def levels(caplog: pytest.LogCaptureFixture, words: str) -> list[str]:
    """The levels at which this was logged."""
    return [record.levelname for record in caplog.records if words in record.message]


# Signs of life


@pytest.mark.parametrize(
    "line",
    [{"type": "beat"}, {"type": "event", "message_id": "m", "kind": "delta"}, {"type": "news"}, {"type": "withhold"},
     {"type": "event", "message_id": "stranger", "kind": "delta"}],
    ids=["a beat", "an event", "an unknown word", "half a word", "a stranger's event"],
)  # fmt: skip
async def test_whatever_a_child_says_is_a_sign_of_life(app: App, conn: Connection, line: dict[str, Any]) -> None:
    await armed(app, "before")
    async with Supervisor(app, "d", CHILD, grace=0.3) as child:
        # What it said when it was ready is logged; what extends the next turn is what it says now.
        await eventually(lambda: one(conn, ADMITTED, "before"))
        await given(app, child)
        assert not await one(conn, ADMITTED, "m")
        await given(app, child, ["say", line], message_id="next")
        await eventually(lambda: one(conn, ADMITTED, "m"))


async def test_a_failing_extend_ends_no_child_and_is_made_good_by_the_next_one(
    app: App, conn: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    async with Supervisor(app, "d", CHILD, grace=0.3) as child:
        async with refusing(conn, "turn_markers", "admitted_at is not null"):
            await given(app, child, ["beat", 1, 0])
            await eventually(lambda: levels(caplog, "sign of life"))
        await given(app, child, ["beat", 1, 0], message_id="next")
        await eventually(lambda: one(conn, ADMITTED, "m"))
        assert child.pid is not None
    assert set(levels(caplog, "sign of life")) == {"ERROR"}


# A child that ends by itself


async def test_a_child_that_ends_in_good_order_without_being_asked_to_ends_its_turns(app: App) -> None:
    async with Supervisor(app, "d", CHILD, grace=0.3) as child:
        await given(app, child, ["exit", 0])
        end = await child.wait()
    assert (end.deliberate, end.message_ids) == (False, ["m"])
    assert (await ended(app)).code == "worker_died"


async def test_a_crash_whose_ending_is_refused_is_logged_and_tried_until_it_is_taken(
    app: App, conn: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    async with Supervisor(app, "d", CHILD, grace=0.3) as child:
        async with refusing(conn, "events", "terminal"):
            await given(app, child, ["exit", 3])
            await eventually(lambda: len(levels(caplog, "trying again")) >= 2)
            assert await app.turns.is_live("d", "m")
        assert (await asyncio.wait_for(child.wait(), 30)).message_ids == ["m"]
    assert set(levels(caplog, "trying again")) == {"ERROR"}
    assert await rows(conn, ENDINGS) == [("m", "error")]


async def test_a_supervisor_that_fails_itself_ends_its_child_and_its_turns_and_tells(
    app: App, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken() -> str:
        raise RuntimeError("a mistake of ours")

    child = Supervisor(app, "d", CHILD, grace=0.3)
    await child.start()
    monkeypatch.setattr(child._writer, "_answer", lambda _: broken())
    await given(app, child, ["reply", {}])
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        await child.wait()
    assert (await ended(app)).code == "internal_error"
    assert child.pid is None
    assert levels(caplog, "a supervisor has failed") == ["ERROR"]


# A child that is stopped


async def test_a_stop_that_cannot_store_what_was_said_before_tells_so_and_ends_no_turn(
    app: App, conn: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    child = Supervisor(app, "d", CHILD, grace=0.2)
    await child.start()
    async with refusing(conn, "events", "kind = 'reply'"):
        await given(app, child, ["reply", {}])
        await eventually(lambda: levels(caplog, "trying again"))
        await asyncio.wait_for(child.stop(), 30)
        assert levels(caplog, "gave up what a child left") == ["ERROR"]
    assert await app.turns.is_live("d", "m")
    assert await rows(conn, ENDINGS) == []
