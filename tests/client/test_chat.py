"""What is watched, how the client ends, and that nothing in it dies unnoticed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

import queue_service.client
from queue_service.client import ChatClient
from queue_service.errors import ConfigError, NotConnected, SendFailed
from tests.client.server import Answer, Gateway
from tests.client.taking import seqs, take
from tests.support import eventually

Make = Callable[..., ChatClient]


def broken(*_: object, **__: object) -> Any:
    raise RuntimeError("a bug")


class TestWatching:
    async def test_one_more_stream_adds_its_events(self, gateway: Gateway, chat: ChatClient) -> None:
        await gateway.append("t", "delta", "delta")
        await chat.connect({"s": 0})
        await chat.watch("t", 1)
        assert [(event.stream, event.seq) for event in await take(chat, 1)] == [("t", 2)]
        assert gateway.asked("watch")[0].body == {"stream": "t", "cursor": 1}
        gateway.line.cut()
        await eventually(lambda: len(gateway.asked("reconnect")) == 2)
        assert gateway.asked("reconnect")[-1].body == {"streams": {"s": 0, "t": 2}}

    async def test_a_watched_stream_again_leaves_it_where_it_is(self, gateway: Gateway, chat: ChatClient) -> None:
        await gateway.append("s", "delta")
        await chat.connect({"s": 0})
        assert await seqs(chat, 1) == [1]
        await chat.watch("s")
        assert chat.cursors == {"s": 1}
        assert gateway.asked("watch") == []

    async def test_a_stream_that_is_not_ours_leaves_the_connection_as_it_was(
        self, gateway: Gateway, chat: ChatClient
    ) -> None:
        await chat.connect({"s": 0})
        gateway.next["watch"].append(Answer(404, body={"error": "You have no stream 't'.", "field": "stream"}))
        with pytest.raises(SendFailed, match="no stream"):
            await chat.watch("t")
        assert (chat.cursors, chat.state, len(gateway.lines)) == ({"s": 0}, "open", 1)

    @pytest.mark.parametrize("answer", [Answer(503), Answer(404), Answer(lost=True)])
    async def test_is_tried_again(self, gateway: Gateway, chat: ChatClient, answer: Answer) -> None:
        await chat.connect()
        gateway.next["watch"].append(answer)
        await chat.watch("t")
        assert len(gateway.lines) == (2 if answer.status == 404 else 1)
        await gateway.append("t", "delta")
        assert await seqs(chat, 1) == [1]

    async def test_is_given_up_after_three_attempts(self, gateway: Gateway, chat: ChatClient) -> None:
        await chat.connect()
        gateway.always["watch"] = Answer(503)
        with pytest.raises(SendFailed, match="503"):
            await chat.watch("t")
        assert (len(gateway.asked("watch")), chat.cursors) == (3, {})

    async def test_is_said_again_when_the_connection_was_replaced_meanwhile(
        self, gateway: Gateway, chat: ChatClient
    ) -> None:
        took = asyncio.Event()
        await chat.connect()
        gateway.next["watch"].append(Answer(hold=took, body={"stream": "t", "head": 0}))
        watching = asyncio.ensure_future(chat.watch("t"))
        await eventually(lambda: gateway.asked("watch"))
        gateway.line.cut()
        await eventually(lambda: len(gateway.lines) == 2 and chat.state == "open")
        took.set()
        await watching
        assert [request.connection for request in gateway.asked("watch")] == ["c1", "c2"]
        assert gateway.asked("reconnect") == []

    @pytest.mark.parametrize("greeted", [True, False])
    async def test_answered_that_an_earlier_connection_is_forgotten_leaves_this_one(
        self, gateway: Gateway, chat: ChatClient, *, greeted: bool
    ) -> None:
        answer = asyncio.Event()
        await chat.connect({"s": 0})
        gateway.next["watch"].append(Answer(404, hold=answer))
        watching = asyncio.ensure_future(chat.watch("t"))
        await eventually(lambda: gateway.asked("watch"))
        gateway.greets = greeted
        gateway.line.cut()
        await eventually(lambda: len(gateway.lines) == 2 and (chat.state == "open") is greeted)
        answer.set()
        # What comes down after that answer is handled after it.
        await gateway.append("s", "delta")
        assert await seqs(chat, 1) == [1]
        if not greeted:
            await gateway.line.welcome("c2")
        await watching
        assert (chat.state, len(gateway.lines)) == ("open", 2)

    async def test_loses_no_event_that_comes_before_the_answer(self, gateway: Gateway, chat: ChatClient) -> None:
        took = asyncio.Event()
        await chat.connect()
        gateway.next["watch"].append(Answer(hold=took))
        watching = asyncio.ensure_future(chat.watch("t"))
        await eventually(lambda: gateway.asked("watch"))
        gateway.line.streams.add("t")
        await gateway.append("t", "delta")
        assert await seqs(chat, 1) == [1]
        took.set()
        await watching

    async def test_needs_a_client_that_is_connected(self, chat: ChatClient) -> None:
        with pytest.raises(NotConnected):
            await chat.watch("s")
        assert chat.cursors == {}


class TestLeaving:
    async def test_a_stream_ends_its_events_at_once(self, gateway: Gateway, chat: ChatClient) -> None:
        await gateway.append("s", "delta", "delta")
        await chat.connect({"s": 0, "t": 0})
        await eventually(lambda: chat._tracks.settled() == {"s": 2, "t": 0})
        await chat.unwatch("s")
        await gateway.append("t", "delta")
        assert [event.stream for event in await take(chat, 1)] == ["t"]
        assert gateway.asked("unwatch")[0].body == {"stream": "s"}
        assert chat.cursors == {"t": 1}

    async def test_a_stream_while_its_backfill_runs_ends_that(self, gateway: Gateway, chat: ChatClient) -> None:
        gateway.always["history"] = Answer(503)
        await chat.connect({"s": 0})
        await gateway.line.gap("s", 1, 5, 5)
        await eventually(lambda: gateway.asked("history"))
        backfill = chat._tracks._tracks["s"].backfill
        assert backfill is not None
        await chat.unwatch("s")
        await eventually(backfill.cancelled)

    async def test_a_stream_does_not_fail_for_a_gateway_that_does(self, gateway: Gateway, chat: ChatClient) -> None:
        await chat.connect({"s": 0})
        gateway.next["unwatch"].append(Answer(503))
        await chat.unwatch("s")
        assert chat.cursors == {}

    async def test_a_stream_while_the_list_is_sent_sends_it_again(self, gateway: Gateway, chat: ChatClient) -> None:
        took = asyncio.Event()
        gateway.next["reconnect"].append(Answer(hold=took))
        connecting = asyncio.ensure_future(chat.connect({"s": 0, "t": 0}))
        await eventually(lambda: gateway.asked("reconnect"))
        await chat.unwatch("s")
        took.set()
        await connecting
        assert [sorted(request.body["streams"]) for request in gateway.asked("reconnect")] == [["s", "t"], ["t"]]

    async def test_all_others_for_one_is_a_switch(self, gateway: Gateway, chat: ChatClient) -> None:
        await gateway.append("u", "delta", "delta")
        await chat.connect({"s": 0, "t": 0})
        await chat.switch("u", 1)
        assert chat.cursors.keys() == {"u"}
        assert await seqs(chat, 1) == [2]
        assert gateway.asked("switch")[0].body == {"stream": "u", "cursor": 1}

    async def test_nothing_when_the_switch_is_refused(self, gateway: Gateway, chat: ChatClient) -> None:
        await chat.connect({"s": 0, "t": 0})
        gateway.always["switch"] = Answer(403)
        for stream in ("u", "t"):
            with pytest.raises(SendFailed, match="403"):
                await chat.switch(stream)
        assert chat.cursors.keys() == {"s", "t"}


class TestTheEnd:
    async def test_of_the_block_closes_everything(self, gateway: Gateway) -> None:
        async with ChatClient(gateway.url) as chat:
            await chat.connect({"s": 0})
            await gateway.append("s", "delta")
            reading = asyncio.ensure_future(take(chat, 2))
            await eventually(lambda: chat.cursors == {"s": 1})
        assert [event.seq for event in await reading] == [1]
        assert chat.state == "closed"
        with pytest.raises(NotConnected):
            chat.send("s", {"text": "too late"})
        with pytest.raises(ConfigError):
            await chat.connect()
        await chat.close()

    async def test_tells_what_was_not_sent(self, gateway: Gateway, chat: ChatClient) -> None:
        gateway.next["send"].append(Answer(hold=asyncio.Event()))
        await chat.connect()
        on_its_way, waiting = (chat.send("s", {"text": text}) for text in "12")
        await eventually(lambda: gateway.sent() == ["1"])
        await chat.close()
        with pytest.raises(SendFailed, match="it may have been taken"):
            await on_its_way
        with pytest.raises(SendFailed, match="it was never sent"):
            await waiting

    async def test_ends_a_watch_that_waits(self, gateway: Gateway, chat: ChatClient) -> None:
        await chat.connect()
        gateway.always["events"] = Answer(503)
        gateway.line.cut()
        await eventually(lambda: chat.state == "connecting")
        watching = asyncio.ensure_future(chat.watch("s"))
        await chat.close()
        with pytest.raises(NotConnected, match="closed"):
            await watching

    async def test_leaves_a_http_client_of_the_users_open(self, gateway: Gateway) -> None:
        async with httpx2.AsyncClient() as http:
            async with ChatClient(gateway.url, http=http) as chat:
                await chat.connect()
            assert not http.is_closed


class TestADeath:
    """Whatever dies in the client, everyone who waits hears of it."""

    async def heard(self, chat: ChatClient, receipt: asyncio.Future[Any]) -> None:
        with pytest.raises(RuntimeError, match="a bug"):
            await receipt
        with pytest.raises(RuntimeError, match="a bug"):
            await take(chat, 1)
        assert chat.state == "closed"

    async def test_of_what_sends(self, chat: ChatClient, monkeypatch: pytest.MonkeyPatch) -> None:
        await chat.connect()
        monkeypatch.setattr(chat._wire, "post", broken)
        await self.heard(chat, chat.send("s", {"text": "hi"}))

    async def test_of_what_reads(self, gateway: Gateway, chat: ChatClient, monkeypatch: pytest.MonkeyPatch) -> None:
        gateway.next["send"].append(Answer(hold=asyncio.Event()))
        await chat.connect({"s": 0})
        receipt = chat.send("s", {"text": "hi"})
        monkeypatch.setattr(chat._tracks, "take", broken)
        await gateway.append("s", "delta")
        await self.heard(chat, receipt)

    async def test_of_what_fills_gaps(
        self, gateway: Gateway, chat: ChatClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gateway.next["send"].append(Answer(hold=asyncio.Event()))
        await chat.connect({"s": 0})
        receipt = chat.send("s", {"text": "hi"})
        monkeypatch.setattr(chat._wire, "history", broken)
        await gateway.line.gap("s", 1, 5, 5)
        await self.heard(chat, receipt)

    async def test_of_a_callback(self, gateway: Gateway, client: Make) -> None:
        chat = client(on_open=broken)
        gateway.next["send"].append(Answer(503, {"Retry-After": "60"}))
        receipt = chat.send("s", {"text": "hi"})
        with pytest.raises(RuntimeError, match="a bug"):
            await chat.connect()
        await self.heard(chat, receipt)


def test_the_public_names_are_there() -> None:
    assert set(queue_service.client.__all__) == {"ChatClient", "Event", "MessageReceipt"}
    assert set(queue_service.client.__all__) <= set(dir(queue_service.client))
