"""Events come in order and once, whatever the connection does, and what is missing is fetched or reported."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from queue_service.client import ChatClient, Event
from queue_service.client.buffer import Buffer
from tests.client.server import Answer, Gateway
from tests.client.taking import seqs, take
from tests.support import eventually

Make = Callable[..., ChatClient]


def contents(events: list[Event]) -> list[Any]:
    """The seq of each event; of a gap, what it says."""
    return [event.body if event.kind == "gap" else event.seq for event in events]


async def stored(gateway: Gateway, stream: str, *kinds: str) -> None:
    """Append events that are announced to nobody."""
    gateway.is_silent = True
    await gateway.append(stream, *kinds)
    gateway.is_silent = False


class TestAnEvent:
    async def test_is_delivered_with_all_that_is_known_of_it(self, gateway: Gateway, chat: ChatClient) -> None:
        await chat.connect({"s": 0})
        await gateway.append("s", "reply", body={"message_ids": ["m1"]})
        (event,) = await take(chat, 1)
        assert (event.stream, event.seq, event.kind, event.terminal) == ("s", 1, "reply", True)
        assert event.body == {"message_ids": ["m1"]}
        assert event.created_at is not None
        assert event.created_at.isoformat() == "2026-01-02T03:04:05.678901+00:00"

    async def test_may_hold_every_kind_of_line_end(self, gateway: Gateway, chat: ChatClient) -> None:
        text = "a\u2028b\u2029c\u0085d\x0be\nf\r\ng"
        await chat.connect({"s": 0})
        await gateway.append("s", "delta", body=text)
        assert (await take(chat, 1))[0].body == text

    async def test_that_comes_twice_is_delivered_once(self, gateway: Gateway, chat: ChatClient) -> None:
        await gateway.append("s", "delta", "delta", "reply")
        await chat.connect({"s": 0})
        for event in gateway.streams["s"]:
            await gateway.line.event(event)
        await gateway.append("s", "delta")
        assert await seqs(chat, 4) == [1, 2, 3, 4]

    async def test_of_a_stream_that_is_not_watched_is_wanted_by_nobody(
        self, gateway: Gateway, chat: ChatClient
    ) -> None:
        await chat.connect({"s": 0})
        await gateway.append("t", "delta")
        await gateway.line.event(gateway.streams["t"][0])
        await gateway.append("s", "delta")
        assert [(event.stream, event.seq) for event in await take(chat, 1)] == [("s", 1)]

    async def test_that_was_missed_comes_after_a_reconnect(self, gateway: Gateway, chat: ChatClient) -> None:
        await chat.connect({"s": 0})
        await gateway.append("s", "delta")
        assert await seqs(chat, 1) == [1]
        gateway.line.cut()
        await gateway.append("s", "delta", "reply")
        assert await seqs(chat, 2) == [2, 3]

    async def test_counts_as_seen_only_when_it_was_taken(self, gateway: Gateway, chat: ChatClient) -> None:
        await gateway.append("s", "delta", "delta", "delta")
        await chat.connect({"s": 0})
        await eventually(lambda: chat._tracks.settled() == {"s": 3})
        assert chat.cursors == {"s": 0}
        await take(chat, 2)
        assert chat.cursors == {"s": 2}


class TestAGap:
    async def test_that_is_announced_is_filled_before_what_follows(self, gateway: Gateway, chat: ChatClient) -> None:
        await chat.connect({"s": 0})
        await stored(gateway, "s", *["delta"] * 5)
        await gateway.line.gap("s", 1, 5, 5)
        await gateway.append("s", "delta", "reply")
        assert await seqs(chat, 7) == [1, 2, 3, 4, 5, 6, 7]

    async def test_that_nobody_announced_is_filled_too(self, gateway: Gateway, chat: ChatClient) -> None:
        await chat.connect({"s": 0})
        await stored(gateway, "s", *["delta"] * 5)
        await gateway.append("s", "delta")
        assert await seqs(chat, 6) == [1, 2, 3, 4, 5, 6]

    async def test_longer_than_a_page_is_filled_page_by_page(self, gateway: Gateway, chat: ChatClient) -> None:
        await chat.connect({"s": 0})
        await stored(gateway, "s", *["delta"] * 1_200)
        await gateway.line.gap("s", 1, 1_200, 1_200)
        assert await seqs(chat, 1_200) == list(range(1, 1_201))
        assert len(gateway.asked("history")) == 3

    async def test_that_the_history_does_not_have_is_reported(self, gateway: Gateway, chat: ChatClient) -> None:
        await chat.connect({"s": 0})
        await stored(gateway, "s", *["delta"] * 5)
        gateway.trim("s", 3)
        await gateway.line.gap("s", 1, 5, 5)
        assert contents(await take(chat, 3)) == [{"stream": "s", "from": 1, "to": 3, "head": 5}, 4, 5]
        await gateway.append("s", "delta")
        assert contents(await take(chat, 1)) == [6]

    async def test_of_which_nothing_is_left_is_reported(self, gateway: Gateway, chat: ChatClient) -> None:
        await chat.connect({"s": 0})
        await stored(gateway, "s", *["delta"] * 5)
        gateway.trim("s", 5)
        await gateway.line.gap("s", 1, 5, 5)
        assert contents(await take(chat, 1)) == [{"stream": "s", "from": 1, "to": 5, "head": 5}]
        await gateway.append("s", "delta")
        assert contents(await take(chat, 1)) == [6]

    async def test_inside_the_history_is_reported_where_it_is(self, gateway: Gateway, chat: ChatClient) -> None:
        await chat.connect({"s": 0})
        await stored(gateway, "s", "delta", "reply", "delta", "delta", "delta")
        gateway.streams["s"] = [event for event in gateway.streams["s"] if event["seq"] in {2, 5}]
        await gateway.line.gap("s", 1, 5, 5)
        gaps = [{"stream": "s", "from": 1, "to": 1, "head": 5}, {"stream": "s", "from": 3, "to": 4, "head": 5}]
        assert contents(await take(chat, 4)) == [gaps[0], 2, gaps[1], 5]

    async def test_is_asked_for_until_the_history_answers(self, gateway: Gateway, chat: ChatClient) -> None:
        await chat.connect({"s": 0})
        await stored(gateway, "s", "delta", "delta")
        gateway.next["history"].extend([Answer(503), Answer(lost=True), Answer(404), Answer(body={"not": "a page"})])
        await gateway.line.gap("s", 1, 2, 2)
        assert await seqs(chat, 2) == [1, 2]

    async def test_whose_history_begins_too_early_is_reported_once(self, gateway: Gateway, chat: ChatClient) -> None:
        await chat.connect({"s": 2})
        await stored(gateway, "s", "delta", "delta", "reply")
        gateway.next["history"].append(Answer(body={"head": 3, "events": gateway.streams["s"]}))
        await gateway.line.gap("s", 3, 3, 3)
        await gateway.append("s", "delta")
        assert await seqs(chat, 2) == [3, 4]

    async def test_is_not_believed_to_be_for_ever_while_the_history_is_behind(
        self, gateway: Gateway, chat: ChatClient
    ) -> None:
        await chat.connect({"s": 0})
        await stored(gateway, "s", "delta", "delta")
        behind = [{"head": 0, "events": []}, {"head": 1, "events": gateway.streams["s"][:1]}]
        gateway.next["history"].extend(Answer(body=page) for page in behind)
        await gateway.line.gap("s", 1, 2, 2)
        assert contents(await take(chat, 2)) == [1, 2]

    async def test_does_not_hold_up_other_streams(self, gateway: Gateway, chat: ChatClient) -> None:
        go_on = asyncio.Event()
        gateway.always["history"] = Answer(hold=go_on)
        await chat.connect({"s": 0, "t": 0})
        await stored(gateway, "s", "delta", "delta")
        await gateway.append("s", "delta")
        await gateway.append("t", "delta")
        await gateway.append("s", "reply")
        assert [(event.stream, event.seq) for event in await take(chat, 1)] == [("t", 1)]
        go_on.set()
        assert [(event.stream, event.seq) for event in await take(chat, 4)] == [("s", seq) for seq in (1, 2, 3, 4)]

    async def test_whose_events_come_live_meanwhile_is_delivered_once(self, gateway: Gateway, client: Make) -> None:
        chat = client(buffer=1)
        await chat.connect({"s": 0})
        await stored(gateway, "s", *["delta"] * 3)
        await gateway.line.gap("s", 1, 3, 3)
        # The backfill waits for room for the second one, which then comes once more.
        await eventually(lambda: chat._tracks.settled() == {"s": 1})
        for event in gateway.streams["s"]:
            await gateway.line.event(event)
        await gateway.append("s", "delta")
        assert await chat.stop("s") == ["m1"]
        await gateway.append("s", "reply")
        assert await seqs(chat, 5) == [1, 2, 3, 4, 5]

    async def test_that_is_still_filled_when_all_has_ended_is_filled(self, gateway: Gateway, chat: ChatClient) -> None:
        go_on = asyncio.Event()
        gateway.next["history"].append(Answer(hold=go_on))
        await chat.connect({"s": 0})
        await stored(gateway, "s", "delta", "reply")
        await gateway.line.gap("s", 1, 2, 2)
        await eventually(lambda: gateway.asked("history"))
        gateway.next["events"].append(Answer(204))
        gateway.line.finish()
        await eventually(lambda: len(gateway.asked("events")) == 2)
        go_on.set()
        assert [event.kind for event in await take(chat, 3)] == ["delta", "reply"]

    async def test_beyond_the_head_means_that_the_database_went_back(self, gateway: Gateway, chat: ChatClient) -> None:
        await stored(gateway, "s", *["delta"] * 5)
        await chat.connect({"s": 9})
        await gateway.line.gap("s", 6, 9, 5)
        await gateway.append("s", "delta", "reply")
        assert contents(await take(chat, 3)) == [{"stream": "s", "from": 6, "to": 9, "head": 5}, 6, 7]
        assert chat.cursors == {"s": 7}

    async def test_beyond_the_head_that_is_reported_twice_loses_nothing_between(
        self, gateway: Gateway, chat: ChatClient
    ) -> None:
        await stored(gateway, "s", *["delta"] * 5)
        await chat.connect({"s": 9})
        await gateway.line.gap("s", 6, 9, 5)
        await stored(gateway, "s", "reply")
        await gateway.line.gap("s", 7, 9, 6)
        assert contents(await take(chat, 2)) == [{"stream": "s", "from": 6, "to": 9, "head": 5}, 6]

    async def test_beyond_the_head_bounds_what_is_missing(self, gateway: Gateway, chat: ChatClient) -> None:
        go_on = asyncio.Event()
        await stored(gateway, "s", *["delta"] * 5)
        await chat.connect({"s": 2})
        gateway.next["history"].append(Answer(hold=go_on))
        await gateway.line.gap("s", 3, 9, 9)
        await eventually(lambda: gateway.asked("history"))
        await gateway.line.gap("s", 6, 9, 5)
        await gateway.line.frame("end", {"stream": "s", "head": 5})
        gateway.line.finish()
        gateway.always["events"] = Answer(204)
        go_on.set()
        assert contents(await take(chat, 4)) == [3, 4, 5]


class TestAnEnding:
    async def test_is_fetched_if_it_was_believed_to_be_sent(self, gateway: Gateway, chat: ChatClient) -> None:
        await chat.connect({"s": 0})
        await stored(gateway, "s", "delta", "reply")
        await gateway.line.frame("end", {"stream": "s", "head": 2})
        gateway.line.finish()
        assert [event.kind for event in await take(chat, 3)] == ["delta", "reply"]

    async def test_is_reported_once_over_reconnects_and_backfills(self, gateway: Gateway, chat: ChatClient) -> None:
        go_on = asyncio.Event()
        gateway.next["history"].append(Answer(hold=go_on))
        await chat.connect({"s": 0})
        await stored(gateway, "s", "delta", "delta")
        await gateway.append("s", "reply")
        await eventually(lambda: gateway.asked("history"))
        # Once live, once replayed by each request of the reconnect, once from the history.
        gateway.line.cut()
        await eventually(lambda: len(gateway.asked("reconnect")) == 2)
        await gateway.line.event(gateway.streams["s"][-1])
        go_on.set()
        await gateway.append("s", "delta")
        kinds = [event.kind for event in await take(chat, 4)]
        assert kinds == ["delta", "delta", "reply", "delta"]


class TestAReaderThatDoesNotRead:
    async def test_stops_the_client_from_reading_and_loses_nothing(self, gateway: Gateway, client: Make) -> None:
        many, body = 600, "x" * 65_536
        chat = client(buffer=5)
        await chat.connect({"s": 0})
        pushing = asyncio.ensure_future(gateway.append("s", *["delta"] * many, body=body))
        await eventually(lambda: gateway.line.is_blocked and len(chat._buffer._items) == 5)
        # A round trip, in which more would be read if it were.
        assert await chat.stop("s") == ["m1"]
        assert (pushing.done(), len(chat._buffer._items), gateway.line.is_blocked) == (False, 5, True)
        gateway.line.cut()
        await pushing
        assert await seqs(chat, many) == list(range(1, many + 1))
        assert len(chat._buffer._items) == 0

    async def test_holds_up_no_message(self, gateway: Gateway, client: Make) -> None:
        chat = client(buffer=1)
        await gateway.append("s", *["delta"] * 10)
        await chat.connect({"s": 0})
        assert (await chat.send("s", {"text": "hi"})).seq == 11
        assert await seqs(chat, 11) == list(range(1, 12))

    async def test_bounds_what_a_backfill_reads(self, gateway: Gateway, client: Make) -> None:
        chat = client(buffer=5)
        await chat.connect({"s": 0})
        await stored(gateway, "s", *["delta"] * 1_200)
        await gateway.line.gap("s", 1, 1_200, 1_200)
        await eventually(lambda: len(chat._buffer._items) == 5)
        assert await chat.stop("s") == ["m1"]
        assert (len(chat._buffer._items), len(gateway.asked("history"))) == (5, 1)
        assert await seqs(chat, 1_200) == list(range(1, 1_201))

    async def test_put_that_is_cancelled_has_put_nothing(self) -> None:
        buffer: Buffer[int] = Buffer(1)
        await buffer.put(1)
        waiting = asyncio.ensure_future(buffer.put(2))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await buffer.put(3) if await buffer.take() == 1 else None
        assert await buffer.take() == 3
