"""What is sent arrives once and in order, or its caller hears why not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import pairwise
from types import MappingProxyType

import pytest

from queue_service.client import ChatClient, MessageReceipt
from queue_service.client.wire import _seconds
from queue_service.errors import NotConnected, OutboxFull, PayloadRefused, SendFailed
from tests.client.server import Answer, Gateway
from tests.client.taking import seqs
from tests.support import eventually

Make = Callable[..., ChatClient]


def say(chat: ChatClient, *texts: str) -> list[asyncio.Future[MessageReceipt]]:
    return [chat.send("s", {"text": text}) for text in texts]


class TestTheQueue:
    async def test_a_receipt_says_where_the_message_is(self, gateway: Gateway, chat: ChatClient) -> None:
        await chat.connect()
        receipt = await chat.send("s", MappingProxyType({"text": "hi"}), client_message_id="m1")
        assert receipt == MessageReceipt(stream="s", client_message_id="m1", seq=1)
        assert gateway.asked("send")[0].body == {"stream": "s", "client_message_id": "m1", "body": {"text": "hi"}}

    async def test_each_message_gets_an_id_of_its_own(self, chat: ChatClient) -> None:
        await chat.connect()
        receipts = await asyncio.gather(*say(chat, "1", "2"))
        assert receipts[0].client_message_id != receipts[1].client_message_id

    async def test_more_messages_than_the_cap_are_refused_by_send_itself(self, gateway: Gateway, client: Make) -> None:
        chat = client(cap=3)
        receipts = say(chat, "1", "2", "3")
        with pytest.raises(OutboxFull, match="3 messages wait"):
            chat.send("s", {"text": "4"})
        await chat.connect()
        await asyncio.gather(*receipts)
        await chat.send("s", {"text": "5"})
        assert gateway.sent() == ["1", "2", "3", "5"]

    async def test_what_is_no_json_is_refused_by_send_itself(self, chat: ChatClient) -> None:
        with pytest.raises(PayloadRefused):
            chat.send("s", {"text": object()})
        with pytest.raises(PayloadRefused):
            chat.send("s", ["a list"])  # type: ignore[arg-type]

    async def test_a_message_is_what_it_was_when_it_was_sent(self, gateway: Gateway, chat: ChatClient) -> None:
        body = {"text": "before"}
        receipt = chat.send("s", body)
        body["text"] = "after"
        await chat.connect()
        await receipt
        assert gateway.sent() == ["before"]

    async def test_whoever_waits_no_longer_takes_nothing_back(self, gateway: Gateway, chat: ChatClient) -> None:
        first, second = say(chat, "1", "2")
        first.cancel()
        await chat.connect()
        await second
        assert gateway.sent() == ["1", "2"]


class TestRetries:
    @pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
    async def test_what_may_pass_is_tried_again_under_the_same_id(
        self, gateway: Gateway, chat: ChatClient, status: int
    ) -> None:
        await chat.connect()
        gateway.next["send"].append(Answer(status))
        receipt = await chat.send("s", {"text": "hi"}, client_message_id="m1")
        assert receipt.seq == 1
        assert chat._sender._pauses.count == 0
        assert [request.body["client_message_id"] for request in gateway.asked("send")] == ["m1", "m1"]

    async def test_a_message_whose_receipt_was_lost_is_accepted_once(self, gateway: Gateway, chat: ChatClient) -> None:
        await chat.connect({"s": 0})
        gateway.next["send"].append(Answer(lost=True, does=True))
        assert (await chat.send("s", {"text": "hi"})).seq == 1
        assert len(gateway.asked("send")) == 2
        await gateway.append("s", "delta")
        assert await seqs(chat, 2) == [1, 2]

    async def test_a_forgotten_connection_is_replaced_before_the_next_attempt(
        self, gateway: Gateway, chat: ChatClient
    ) -> None:
        await chat.connect()
        gateway.next["send"].append(Answer(404))
        await chat.send("s", {"text": "hi"})
        assert [request.connection for request in gateway.asked("send")] == ["c1", "c2"]

    @pytest.mark.parametrize("status", [302, 400, 401, 403, 409, 413, 422])
    async def test_what_was_refused_is_not_tried_again(self, gateway: Gateway, chat: ChatClient, status: int) -> None:
        await chat.connect()
        gateway.next["send"].append(Answer(status, body={"error": "No, never.", "field": "body"}))
        refused, after = say(chat, "1", "2")
        with pytest.raises(SendFailed, match=f"{status} No, never") as failed:
            await refused
        assert (failed.value.status, failed.value.field) == (status, "body")
        await after
        assert gateway.sent() == ["1", "2"]

    async def test_a_stream_that_is_not_there_is_no_reason_to_connect_again(
        self, gateway: Gateway, chat: ChatClient
    ) -> None:
        await chat.connect()
        gateway.next["send"].append(Answer(404, body={"error": "You have no stream 's'.", "field": "stream"}))
        with pytest.raises(SendFailed, match="no stream"):
            await chat.send("s", {"text": "hi"})
        assert (len(gateway.lines), len(gateway.asked("send"))) == (1, 1)

    @pytest.mark.parametrize("answer", [Answer(500), Answer(404), Answer(lost=True)])
    async def test_after_three_attempts_the_caller_hears_what_happened(
        self, gateway: Gateway, chat: ChatClient, answer: Answer
    ) -> None:
        await chat.connect()
        gateway.next["send"].extend([answer] * 3)
        given_up, after = say(chat, "1", "2")
        with pytest.raises(SendFailed) as failed:
            await given_up
        assert failed.value.status == (None if answer.lost else answer.status)
        await after
        assert gateway.sent() == ["1", "1", "1", "2"]

    async def test_waits_as_long_as_the_gateway_asks(self, gateway: Gateway, chat: ChatClient) -> None:
        await chat.connect()
        gateway.next["send"].append(Answer(429, {"Retry-After": "0.3"}))
        await chat.send("s", {"text": "hi"})
        first, second = gateway.asked("send")
        assert second.at - first.at >= 0.3

    def test_knows_both_kinds_of_retry_after(self) -> None:
        then = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
        assert [_seconds("2"), _seconds("0.5"), _seconds(""), _seconds("soon"), _seconds("-1")] == [2, 0.5, 0, 0, 0]
        assert 55 < _seconds(then) <= 60
        assert _seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0
        assert _seconds("Fri, 31 Dec 99999999999999999999 23:59:59 GMT") == 0

    async def test_to_wait_for_a_connection_is_no_attempt(self, gateway: Gateway, chat: ChatClient) -> None:
        await chat.connect()
        gateway.always["events"] = Answer(503)
        gateway.line.cut()
        await eventually(lambda: chat.state == "connecting")
        receipt = chat.send("s", {"text": "hi"})
        await eventually(lambda: len(gateway.asked("events")) > 6)
        assert gateway.sent() == []
        del gateway.always["events"]
        assert (await receipt).seq == 1
        assert gateway.sent() == ["hi"]

    async def test_an_answer_that_cannot_be_understood_is_none(self, gateway: Gateway, chat: ChatClient) -> None:
        await chat.connect()
        gateway.next["send"].append(Answer(body={"welcome to": "the hotel's network"}))
        assert (await chat.send("s", {"text": "hi"})).seq == 1

    @pytest.mark.parametrize("status", [200, 503])
    async def test_an_answer_that_is_no_utf_8_is_none(self, gateway: Gateway, chat: ChatClient, status: int) -> None:
        await chat.connect()
        said = '{"error": "nicht verfügbar", "stream": "für dich"}'.encode("latin-1")
        gateway.next["send"].append(Answer(status, body=said))
        assert (await chat.send("s", {"text": "hi"})).seq == 1

    async def test_an_answer_that_does_not_come_is_none(self, gateway: Gateway, client: Make) -> None:
        chat = client(answer_timeout=1.0)
        await chat.connect()
        gateway.next["send"].append(Answer(hold=asyncio.Event()))
        assert (await chat.send("s", {"text": "hi"})).seq == 1


class TestAFlush:
    async def test_is_in_order_and_over_before_the_connection_is_open(self, gateway: Gateway, client: Make) -> None:
        receipts: list[asyncio.Future[MessageReceipt]] = []
        done_when_opened: list[bool] = []
        chat = client(on_open=lambda: done_when_opened.extend(receipt.done() for receipt in receipts))
        receipts += say(chat, "1", "2", "3")
        go_on = asyncio.Event()
        gateway.next["send"].append(Answer(hold=go_on))
        connecting = asyncio.ensure_future(chat.connect())
        await eventually(lambda: gateway.sent() == ["1"])
        assert (chat.state, connecting.done()) == ("connecting", False)
        during = chat.send("s", {"text": "4"})
        go_on.set()
        await connecting
        assert done_when_opened == [True, True, True]
        await during
        assert gateway.sent() == ["1", "2", "3", "4"]

    async def test_ends_at_a_failure_and_the_rest_waits_with_it(self, gateway: Gateway, chat: ChatClient) -> None:
        gateway.next["send"].append(Answer(503, {"Retry-After": "60"}))
        receipts = say(chat, "1", "2", "3")
        await chat.connect()
        gateway.line.cut()
        await eventually(lambda: len(gateway.lines) == 2 and chat.state == "open")
        assert gateway.sent() == ["1"]
        await chat.close()
        failures = await asyncio.gather(*receipts, return_exceptions=True)
        assert ["may have been taken" in str(failure) for failure in failures] == [True, False, False]

    async def test_is_waited_for_again_once_a_pause_has_passed(self, gateway: Gateway, chat: ChatClient) -> None:
        await chat.connect()
        gateway.next["send"].append(Answer(503))
        await chat.send("s", {"text": "1"})
        go_on = asyncio.Event()
        gateway.next["send"].append(Answer(hold=go_on))
        is_seen = asyncio.Event()
        gateway.next["events"].append(Answer(503, hold=is_seen))
        gateway.line.cut()
        await eventually(lambda: chat.state == "connecting")
        receipt = chat.send("s", {"text": "2"})
        is_seen.set()
        await eventually(lambda: gateway.sent() == ["1", "1", "2"])
        assert (chat.state, receipt.done()) == ("connecting", False)
        go_on.set()
        await receipt
        await eventually(lambda: chat.state == "open")

    async def test_does_not_burn_the_attempts_of_the_rest(self, gateway: Gateway, client: Make) -> None:
        chat = client(first_pause=0.1, longest_pause=0.1)
        chat._sender._pauses._jitter = lambda: 1.0
        gateway.next["send"].extend([Answer(503)] * 3)
        given_up, after = say(chat, "1", "2")
        await chat.connect()
        with pytest.raises(SendFailed):
            await given_up
        await after
        at = [request.at for request in gateway.asked("send")]
        assert gateway.sent() == ["1", "1", "1", "2"]
        assert all(later - earlier >= 0.1 for earlier, later in pairwise(at))

    async def test_is_one_at_a_time(self, gateway: Gateway, chat: ChatClient) -> None:
        go_on = asyncio.Event()
        gateway.next["send"].append(Answer(hold=go_on))
        receipts = say(chat, "1", "2", "3")
        connecting = asyncio.ensure_future(chat.connect({"s": 0}))
        await eventually(lambda: gateway.sent() == ["1"])
        gateway.line.cut()
        await eventually(lambda: len(gateway.asked("reconnect")) == 2)
        await gateway.append("t", "delta")
        await gateway.append("s", "delta")
        assert await seqs(chat, 1) == [1]
        assert gateway.sent() == ["1"]
        go_on.set()
        await connecting
        assert [receipt.seq for receipt in await asyncio.gather(*receipts)] == [2, 3, 4]
        assert gateway.sent() == ["1", "1", "2", "3"]


class TestADirectSend:
    async def test_is_tried_again_though_the_event_stream_never_reconnects(
        self, gateway: Gateway, chat: ChatClient
    ) -> None:
        await chat.connect()
        gateway.next["send"].extend([Answer(503), Answer(lost=True)])
        await chat.send("s", {"text": "hi"})
        assert (len(gateway.lines), len(gateway.asked("send"))) == (1, 3)

    async def test_is_never_overtaken(self, gateway: Gateway, chat: ChatClient) -> None:
        await chat.connect()
        gateway.next["send"].extend([Answer(503), Answer(404), Answer(), Answer(lost=True)])
        receipts = await asyncio.gather(*say(chat, *map(str, range(6))))
        assert [receipt.seq for receipt in receipts] == [1, 2, 3, 4, 5, 6]
        assert gateway.sent() == ["0", "0", "0", "1", "1", "2", "3", "4", "5"]


class TestWhatElseIsPosted:
    async def test_an_answer_to_the_agent_waits_its_turn_and_is_tried_again(
        self, gateway: Gateway, chat: ChatClient
    ) -> None:
        before = chat.send("s", {"text": "hi"})
        answering = asyncio.ensure_future(chat.permission("s", "r1", {"allow": True}))
        gateway.next["permission"].append(Answer(503))
        await asyncio.gather(chat.connect(), before)
        assert await answering == 7
        assert [request.name for request in gateway.requests] == ["events", "send", "permission", "permission"]
        assert gateway.asked("permission")[0].body == {"stream": "s", "request_id": "r1", "answer": {"allow": True}}

    async def test_commands_are_posted_as_they_should_be(self, gateway: Gateway, chat: ChatClient) -> None:
        await chat.connect()
        assert await chat.stop("s") == ["m1"]
        assert await chat.stop("s", "m1") == ["m1"]
        assert await chat.interrupt("s", message_id="m1") == 7
        assert await chat.mode("s", "plan") == 7
        assert await chat.suspend("s") == "ended"
        assert await chat.close_stream("s") == "ended"
        assert [(request.name, request.body) for request in gateway.requests[1:]] == [
            ("stop", {"stream": "s"}),
            ("stop", {"stream": "s", "message_id": "m1"}),
            ("interrupt", {"stream": "s", "message_id": "m1"}),
            ("mode", {"stream": "s", "mode": "plan"}),
            ("suspend", {"stream": "s"}),
            ("close", {"stream": "s"}),
        ]
        assert {request.connection for request in gateway.requests[1:]} == {"c1"}

    async def test_a_stop_and_an_interrupt_are_not_tried_again(self, gateway: Gateway, chat: ChatClient) -> None:
        await chat.connect()
        for name, call in (("stop", chat.stop), ("interrupt", chat.interrupt)):
            gateway.next[name].append(Answer(503))
            with pytest.raises(SendFailed, match="503"):
                await call("s")
            assert len(gateway.asked(name)) == 1

    async def test_a_stop_does_not_wait_for_a_connection(self, gateway: Gateway, chat: ChatClient) -> None:
        with pytest.raises(NotConnected):
            await chat.stop("s")
        await chat.connect()
        assert gateway.asked("stop") == []
