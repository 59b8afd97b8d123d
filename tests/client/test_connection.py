"""When the connection is open, what makes it so, and what makes the client look for another one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import httpx2
import pytest

from queue_service.backoff import Pauses
from queue_service.client import ChatClient
from queue_service.client.stream import Lost
from queue_service.client.wire import Pulse
from queue_service.errors import ConfigError, NotConnected, SendFailed
from tests.client.server import Answer, Gateway
from tests.client.taking import Signals, seqs, take
from tests.support import eventually

Make = Callable[..., ChatClient]
OK: dict[str, object] = {"streams": {}}


class TestBecomingOpen:
    async def test_without_streams_it_is_open_at_once_after_the_welcome(
        self, gateway: Gateway, chat: ChatClient
    ) -> None:
        await chat.connect()
        assert chat.state == "open"
        assert [request.name for request in gateway.requests] == ["events"]

    async def test_it_is_not_open_before_the_welcome(self, gateway: Gateway, chat: ChatClient) -> None:
        gateway.greets = False
        connecting = asyncio.ensure_future(chat.connect())
        await eventually(lambda: gateway.lines)
        assert (chat.state, connecting.done()) == ("connecting", False)
        await gateway.line.welcome("c1")
        await connecting

    async def test_with_streams_it_is_open_only_when_the_gateway_took_their_list(
        self, gateway: Gateway, chat: ChatClient
    ) -> None:
        took = asyncio.Event()
        gateway.next["reconnect"].append(Answer(hold=took))
        await gateway.append("s", "delta", "delta")
        connecting = asyncio.ensure_future(chat.connect({"s": 1}))
        receipt = chat.send("s", {"text": "hi"})
        await eventually(lambda: gateway.asked("reconnect"))
        assert await seqs(chat, 1) == [2]
        assert (chat.state, connecting.done(), gateway.sent()) == ("connecting", False, [])
        took.set()
        await connecting
        assert chat.state == "open"
        assert (await receipt).seq == 3

    async def test_a_reconnect_says_where_each_stream_was(self, gateway: Gateway, chat: ChatClient) -> None:
        await gateway.append("s", "delta", "delta")
        await chat.connect({"s": 0, "t": 4})
        assert await seqs(chat, 2) == [1, 2]
        gateway.line.cut()
        await eventually(lambda: len(gateway.asked("reconnect")) == 2)
        assert gateway.asked("reconnect")[-1].body == {"streams": {"s": 2, "t": 4}}
        assert sorted(gateway.asked("events")[-1].values("cursor")) == ["s:2", "t:4"]
        await eventually(lambda: chat.state == "open")

    async def test_a_list_too_long_for_a_url_is_sent_by_the_post_alone(
        self, gateway: Gateway, chat: ChatClient
    ) -> None:
        streams = {f"conversation-{n:040}": n for n in range(200)}
        await chat.connect(streams)
        assert gateway.asked("events")[0].query == []
        assert gateway.asked("reconnect")[0].body == {"streams": streams}

    async def test_headers_go_with_every_request(self, gateway: Gateway, client: Make) -> None:
        chat = client(headers={"Authorization": "Bearer secret"})
        gateway.is_silent = True
        await gateway.append("s", "delta", "delta")
        await chat.connect({"s": 0})
        await gateway.line.event(gateway.streams["s"][1])
        assert await seqs(chat, 2) == [1, 2]
        assert {request.name for request in gateway.requests} == {"events", "reconnect", "history"}
        assert len(gateway.requests) == 3
        assert {request.headers["authorization"] for request in gateway.requests} == {"Bearer secret"}


class TestAStalePost:
    @pytest.mark.parametrize("status", [200, 500])
    async def test_changes_nothing_after_a_newer_welcome(self, gateway: Gateway, chat: ChatClient, status: int) -> None:
        old, new = asyncio.Event(), asyncio.Event()
        gateway.next["reconnect"].extend([Answer(status, hold=old, body=OK), Answer(hold=new)])
        connecting = asyncio.ensure_future(chat.connect({"s": 0}))
        await eventually(lambda: len(gateway.asked("reconnect")) == 1)
        await gateway.line.welcome("newer")
        await eventually(lambda: len(gateway.asked("reconnect")) == 2)
        old.set()
        # What comes down after that answer is handled after it.
        await gateway.append("s", "delta")
        assert await seqs(chat, 1) == [1]
        assert (chat.state, len(gateway.lines)) == ("connecting", 1)
        new.set()
        await connecting
        await chat.send("s", {"text": "hi"})
        assert [request.connection for request in gateway.asked("send")] == ["newer"]
        assert len(gateway.lines) == 1

    @pytest.mark.parametrize("status", [200, 500])
    async def test_changes_nothing_after_the_event_stream_was_replaced(
        self, gateway: Gateway, chat: ChatClient, status: int
    ) -> None:
        old, new = asyncio.Event(), asyncio.Event()
        gateway.next["reconnect"].extend([Answer(status, hold=old, body=OK), Answer(hold=new)])
        connecting = asyncio.ensure_future(chat.connect({"s": 0}))
        await eventually(lambda: len(gateway.asked("reconnect")) == 1)
        gateway.line.cut()
        await eventually(lambda: len(gateway.asked("reconnect")) == 2)
        old.set()
        await gateway.append("s", "delta")
        assert await seqs(chat, 1) == [1]
        assert (chat.state, len(gateway.lines)) == ("connecting", 2)
        new.set()
        await connecting
        assert len(gateway.lines) == 2

    @pytest.mark.parametrize("status", [200, 500])
    async def test_changes_nothing_after_a_disconnect(self, gateway: Gateway, client: Make, status: int) -> None:
        signals, old = Signals(), asyncio.Event()
        chat = client(on_open=signals.on_open, on_close=signals.on_close)
        gateway.next["reconnect"].append(Answer(status, hold=old, body=OK))
        connecting = asyncio.ensure_future(chat.connect({"s": 0}))
        await eventually(lambda: gateway.asked("reconnect"))
        gateway.always["events"] = Answer(503)
        gateway.line.cut()
        await eventually(lambda: len(gateway.asked("events")) > 1)
        old.set()
        seen = len(gateway.asked("events"))
        await eventually(lambda: len(gateway.asked("events")) > seen + 1)
        assert (chat.state, signals.opened, signals.closed) == ("connecting", 0, 0)
        del gateway.always["events"]
        await connecting
        assert (signals.opened, signals.closed) == (1, 0)

    async def test_is_not_even_made_for_a_welcome_that_comes_too_late(self, gateway: Gateway, chat: ChatClient) -> None:
        await chat.connect({"s": 0})
        chat._stream.lose("as the test wants it")
        late = httpx2.ServerSentEvent("welcome", '{"connection_id": "late", "heartbeat": 15}')
        with pytest.raises(Lost):
            await chat._stream._take(late, Pulse(httpx2.ByteStream(b""), 1.0))
        await eventually(lambda: chat.state == "open")
        assert [request.connection for request in gateway.asked("reconnect")] == ["c1", "c2"]


class TestAFailedReconnectPost:
    @pytest.mark.parametrize("answer", [Answer(500), Answer(404), Answer(429), Answer(lost=True)])
    async def test_makes_it_connect_again_though_the_stream_is_healthy(
        self, gateway: Gateway, client: Make, answer: Answer
    ) -> None:
        signals = Signals()
        chat = client(on_open=signals.on_open, on_close=signals.on_close)
        gateway.next["reconnect"].append(answer)
        await chat.connect({"s": 0})
        assert len(gateway.lines) == 2
        assert not gateway.lines[0].is_over.is_set()
        assert (signals.opened, signals.closed) == (1, 0)

    async def test_signals_a_close_only_if_it_had_been_open(self, gateway: Gateway, client: Make) -> None:
        signals = Signals()
        chat = client(on_open=signals.on_open, on_close=signals.on_close)
        await chat.connect({"s": 0})
        gateway.next["reconnect"].extend([Answer(500), Answer(500)])
        gateway.line.cut()
        await eventually(lambda: signals.opened == 2)
        assert len(gateway.lines) == 4
        assert signals.closed == 1
        await chat.close()
        assert (chat.state, signals.closed) == ("closed", 2)


class TestReconnecting:
    def test_pauses_double_up_to_the_longest_with_full_jitter(self) -> None:
        widest = Pauses(1, 10, jitter=lambda: 1.0)
        assert [widest.next() for _ in range(6)] == [1, 2, 4, 8, 10, 10]
        widest.reset()
        assert widest.next() == 1
        none = Pauses(1, 10, jitter=lambda: 0.0)
        assert [none.next() for _ in range(3)] == [0, 0, 0]
        assert none.next(floor=2.5) == 2.5

    def test_pauses_go_on_for_ever(self) -> None:
        pauses = Pauses(1, 10, jitter=lambda: 1.0)
        assert {pauses.next() for _ in range(5_000)} == {1, 2, 4, 8, 10}

    async def test_once_it_succeeded_the_next_begins_with_the_first_pause(
        self, gateway: Gateway, chat: ChatClient
    ) -> None:
        gateway.next["events"].extend([Answer(503)] * 3)
        await chat.connect()
        assert (len(gateway.asked("events")), chat._stream._pauses.count) == (4, 0)

    async def test_waits_at_least_as_long_as_the_gateway_says(self, gateway: Gateway, chat: ChatClient) -> None:
        gateway.retry = 300
        await chat.connect()
        lost = asyncio.get_running_loop().time()
        gateway.line.cut()
        await eventually(lambda: len(gateway.lines) == 2)
        assert gateway.asked("events")[1].at - lost >= 0.3

    async def test_waits_as_long_as_a_refusal_says_and_only_then(self, gateway: Gateway, chat: ChatClient) -> None:
        gateway.next["events"].append(Answer(503, {"Retry-After": "2"}))
        await chat.connect()
        first, second = gateway.asked("events")
        assert second.at - first.at >= 2
        gateway.line.cut()
        lost = asyncio.get_running_loop().time()
        await eventually(lambda: len(gateway.lines) == 2)
        assert gateway.asked("events")[2].at - lost < 2

    async def test_a_gateway_without_heartbeats_is_dead(self, gateway: Gateway, client: Make) -> None:
        signals = Signals()
        chat = client(on_close=signals.on_close, answer_timeout=60.0)
        gateway.heartbeat = 0.05
        await chat.connect()
        gateway.heartbeat = 15.0
        begun = gateway.asked("events")[0].at
        await eventually(lambda: len(gateway.lines) == 2)
        assert signals.closed == 1
        assert gateway.asked("events")[1].at - begun >= 0.15

    async def test_heartbeats_keep_it(self, gateway: Gateway, chat: ChatClient) -> None:
        gateway.heartbeat = 0.5
        await chat.connect()
        for _ in range(40):
            await gateway.line.beat()
            await asyncio.sleep(0.05)  # as often as they come, for longer than it would wait without them
        assert (chat.state, len(gateway.lines)) == ("open", 1)

    async def test_a_goodbye_makes_it_come_again(self, gateway: Gateway, chat: ChatClient) -> None:
        await chat.connect()
        await gateway.line.frame("goodbye", {"reason": "shutdown"}, retry=10)
        await eventually(lambda: len(gateway.lines) == 2)
        await eventually(lambda: chat.state == "open")

    async def test_what_is_no_frame_makes_it_come_again(self, gateway: Gateway, chat: ChatClient) -> None:
        await chat.connect()
        await gateway.line.say("data: {nonsense\n\n")
        await eventually(lambda: len(gateway.lines) == 2)

    async def test_frames_of_a_later_gateway_are_passed_by(self, gateway: Gateway, chat: ChatClient) -> None:
        await chat.connect({"s": 0})
        await gateway.line.frame("novelty", {"of": "the future"})
        await gateway.append("s", "delta")
        assert await seqs(chat, 1) == [1]
        assert len(gateway.lines) == 1


class TestTheEnd:
    async def test_204_means_that_everything_has_ended(self, gateway: Gateway, client: Make) -> None:
        signals = Signals()
        chat = client(on_close=signals.on_close)
        await chat.connect({"s": 0})
        await gateway.append("s", "reply")
        gateway.next["events"].append(Answer(204))
        gateway.line.finish()
        assert [event.kind for event in await take(chat, 2)] == ["reply"]
        assert (chat.state, signals.closed, len(gateway.asked("events"))) == ("closed", 1, 2)
        with pytest.raises(NotConnected):
            chat.send("s", {"text": "too late"})

    async def test_what_waits_to_be_sent_hears_of_it(self, gateway: Gateway, chat: ChatClient) -> None:
        await chat.connect({"s": 0})
        go_on = asyncio.Event()
        gateway.next["events"].extend([Answer(503, hold=go_on), Answer(204)])
        gateway.line.cut()
        await eventually(lambda: chat.state == "connecting")
        receipt = chat.send("s", {"text": "hi"})
        go_on.set()
        with pytest.raises(SendFailed, match="it was never sent"):
            await receipt

    async def test_it_does_not_ask_again_when_it_has_heard_that_all_have_ended(
        self, gateway: Gateway, chat: ChatClient
    ) -> None:
        await gateway.append("s", "delta", "reply")
        await chat.connect({"s": 0, "t": 0})
        await gateway.line.frame("end", {"stream": "t", "head": 0})
        await gateway.line.frame("end", {"stream": "s", "head": 2})
        gateway.line.finish()
        assert [event.kind for event in await take(chat, 3)] == ["delta", "reply"]
        assert len(gateway.asked("events")) == 1

    async def test_it_goes_on_while_one_stream_does(self, gateway: Gateway, chat: ChatClient) -> None:
        await chat.connect({"s": 0, "t": 0})
        await gateway.line.frame("end", {"stream": "t", "head": 0})
        gateway.line.finish()
        await eventually(lambda: len(gateway.lines) == 2)
        await gateway.append("s", "delta")
        assert await seqs(chat, 1) == [1]


class TestConnect:
    async def test_says_why_there_is_no_connection_and_can_be_called_again(
        self, gateway: Gateway, chat: ChatClient
    ) -> None:
        gateway.always["events"] = Answer(503, body={"error": "The database cannot be reached.", "field": None})
        with pytest.raises(NotConnected, match=r"after 3 s.*503 The database cannot be reached"):
            await chat.connect({"s": 0}, timeout=3)
        assert chat.state == "closed"
        del gateway.always["events"]
        receipt = chat.send("s", {"text": "hi"})
        await chat.connect()
        assert (await receipt).seq == 1
        assert await seqs(chat, 1) == [1]

    async def test_hears_that_nobody_listens_there(self) -> None:
        async with ChatClient("http://127.0.0.1:1", first_pause=0.01) as chat:
            with pytest.raises(NotConnected, match="ConnectError"):
                await chat.connect(timeout=3)

    async def test_hears_at_once_that_the_gateway_does_not_want_it(self, gateway: Gateway, chat: ChatClient) -> None:
        gateway.always["events"] = Answer(401, body={"error": "Nobody is signed in.", "field": None})
        receipt = chat.send("s", {"text": "hi"})
        with pytest.raises(NotConnected, match="Nobody is signed in"):
            await chat.connect()
        with pytest.raises(NotConnected, match="Nobody is signed in"):
            await receipt
        with pytest.raises(NotConnected, match="Nobody is signed in"):
            await take(chat, 1)

    async def test_is_for_a_client_that_is_not_connected(self, chat: ChatClient) -> None:
        await chat.connect()
        with pytest.raises(ConfigError):
            await chat.connect()

    async def test_needs_a_url(self) -> None:
        with pytest.raises(ConfigError, match="http://"):
            ChatClient("localhost:8000")

    async def test_given_up_leaves_nothing_behind(self, gateway: Gateway, chat: ChatClient) -> None:
        gateway.greets = False
        connecting = asyncio.ensure_future(chat.connect())
        await eventually(lambda: gateway.lines)
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting
        assert chat.state == "closed"
        gateway.greets = True
        await chat.connect()
