"""Events of some kinds, and the last ones: found in bounded walks, whatever lies between."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from queue_service import App, Event, Turn
from queue_service.app import events as face
from queue_service.db.execute import Connection
from queue_service.errors import ConfigError, PayloadRefused

Read = Callable[..., Awaitable[list[int]]]


@pytest.fixture(params=[10_000, 3], ids=["in one walk", "in many walks"])
async def read(app: App, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Read:
    """Reads the seqs of a stream of twenty events: every fifth is a card, the seventh a status, the last a reply."""
    monkeypatch.setattr(face, "SCAN", request.param)
    await app.turns.arm(Turn(deployment="dep-1", message_id="m1", stream="s"))
    kinds = ["status" if n == 7 else "card" if n % 5 == 0 else "delta" for n in range(1, 20)]
    await app.events.append_many("s", [(kind, {"n": n}) for n, kind in enumerate(kinds, 1)])
    await app.events.append("other", "card")
    await app.turns.commit_reply("dep-1", ["m1"], {})

    async def seqs(**options: Any) -> list[int]:
        return [event.seq for event in await app.events.read("s", **options)]

    return seqs


@pytest.mark.parametrize(
    ("options", "seqs"),
    [
        ({"kinds": ["card"]}, [5, 10, 15]),
        ({"kinds": ("card", "status")}, [5, 7, 10, 15]),
        ({"kinds": ("card", "reply"), "after": 5}, [10, 15, 20]),
        ({"kinds": ["card"], "limit": 2}, [5, 10]),
        ({"kinds": ["card"], "limit": 2, "after": 10}, [15]),
        ({"kinds": ["delta"], "limit": 5, "after": 6}, [8, 9, 11, 12, 13]),
        ({"kinds": ["nothing like it"]}, []),
        ({"kinds": []}, []),
        ({"kinds": ["card"], "after": 20}, []),
        ({"last": 3}, [18, 19, 20]),
        ({"last": 1_000}, list(range(1, 21))),
        ({"last": 2, "kinds": ["card"]}, [10, 15]),
        ({"last": 5, "kinds": ["card", "status"]}, [5, 7, 10, 15]),
        ({"last": 1, "kinds": ["status"]}, [7]),
        ({"last": 1, "kinds": ["reply"], "after": 0}, [20]),
        ({"last": 4, "kinds": []}, []),
        ({"last": 4, "kinds": ["nothing like it"]}, []),
        ({"after": 18}, [19, 20]),
    ],
    ids=str,
)
async def test_what_is_asked_for_comes_in_order(read: Read, options: dict[str, Any], seqs: list[int]) -> None:
    assert await read(**options) == seqs


async def test_what_was_trimmed_is_passed_over(read: Read, app: App) -> None:
    await app.events.trim("s", upto=12)
    assert await read(kinds=["card"]) == [15]
    assert await read(last=3, kinds=["card", "status"]) == [15]
    assert await read(last=4, kinds=["delta"]) == [16, 17, 18, 19]


async def test_a_stream_that_does_not_exist_has_none(app: App) -> None:
    assert await app.events.read("nowhere", kinds=["card"]) == []
    assert await app.events.read("nowhere", last=3) == []


async def test_an_event_is_the_same_however_it_is_read(read: Read, app: App, conn: Connection) -> None:
    await conn.execute("update queue_service.events set created_at = 'infinity' where stream = 's' and seq = 5")
    (by_kind,) = await app.events.read("s", kinds=["card"], limit=1)
    assert [by_kind] == await app.events.read("s", after=4, limit=1)
    assert [by_kind] == (await app.events.read("s", last=16))[:1]
    assert isinstance(by_kind, Event)
    assert "unreadable" in by_kind.body


async def test_the_blocking_twin_reads_them_too(read: Read, app: App) -> None:
    with app.sync as q:
        assert [event.seq for event in q.events.read("s", last=2, kinds=["card"])] == [10, 15]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"kinds": "card"}, "kinds is a list of kinds"),
        ({"kinds": b"card"}, "kinds is a list of kinds"),
        ({"kinds": 3}, "kinds is a list of kinds"),
        ({"kinds": [3]}, "A kind must be a text"),
        ({"kinds": [""]}, "A kind must be a text"),
        ({"last": 0}, "last is a whole number from 1 to 1,000"),
        ({"last": 1_001}, "last is a whole number from 1 to 1,000"),
        ({"last": True}, "last is a whole number"),
        ({"last": 3, "after": 1}, "goes with kinds=, not with after= or limit="),
        ({"last": 3, "limit": 3}, "goes with kinds=, not with after= or limit="),
        ({"kinds": ["card"], "limit": 0}, "limit is a whole number"),
        ({"kinds": ["card"], "after": -1}, "after is a seq"),
    ],
    ids=str,
)
async def test_what_cannot_be_meant_is_refused(app: App, options: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        await app.events.read("s", **options)


async def test_a_kind_that_no_event_can_have_is_refused(app: App) -> None:
    with pytest.raises(PayloadRefused):
        await app.events.read("s", kinds=["a\x00b"])
