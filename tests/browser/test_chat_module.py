"""The rules of the page's client, in a real browser, against a server that misbehaves on command."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from playwright.async_api import Browser, Page

from tests.browser.conftest import fixture
from tests.browser.scripted import Answer, Scripted, event
from tests.support import eventually

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="session")]

OPEN_CLIENT = """
async ([streams, options]) => {
  const { ChatClient } = await import("/static/chat.js");
  window.log = [];
  window.client = new ChatClient({
    firstPause: 20, longestPause: 100, patience: 200, ...options,
    onEvent: (event) => log.push(`${event.kind} ${event.kind === "gap" ? event.body.from + "-" : ""}${event.seq}`),
    onState: (state) => log.push(state),
    onOpen: () => log.push("onOpen"),
    onClose: () => log.push("onClose"),
    onEnd: (stream) => log.push(`end of ${stream}`),
  });
  for (const { fields, receipt } of client.unsent) {
    receipt.then(() => log.push(`receipt for ${fields.body.text}`));
  }
  client.connect(streams);
}
"""
SEND = """
(text) => {
  client.send("s", { text }).then(
    () => log.push(`receipt for ${text}`),
    (error) => log.push(`no receipt for ${text}: ${error.status ?? ""} ${error.message}`),
  );
}
"""


class Client:
    def __init__(self, page: Page, server: Scripted) -> None:
        self.page = page
        self._server = server

    async def open(self, streams: dict[str, int] | None = None, **options: Any) -> None:
        await self.page.goto(self._server.address)
        await self.page.evaluate(OPEN_CLIENT, [{"s": 0} if streams is None else streams, options])

    async def send(self, *texts: str) -> None:
        for text in texts:
            await self.page.evaluate(SEND, text)

    async def log(self) -> list[str]:
        entries: list[str] = await self.page.evaluate("log")
        return entries

    async def heard(self, *entries: str) -> list[str]:
        """The log, once all of these are in it."""
        await self.page.wait_for_function(
            "(all) => all.every((each) => log.includes(each))", arg=entries, timeout=40_000
        )
        return await self.log()

    async def state(self) -> str:
        state: str = await self.page.evaluate("client.state")
        return state


@fixture
async def server() -> AsyncIterator[Scripted]:
    made = Scripted()
    async with made.serving():
        yield made


@fixture(scope="module")
async def page(chromium: Browser) -> AsyncIterator[Page]:
    """One for all tests here: each has a server of its own, and so an origin, and a page costs more than most of them."""
    context = await chromium.new_context()
    yield await context.new_page()
    await context.close()


@fixture
async def client(page: Page, server: Scripted) -> AsyncIterator[Client]:
    yield Client(page, server)
    if page.url != "about:blank":
        await page.evaluate("sessionStorage.clear(), localStorage.clear()")
        await page.goto("about:blank")


class TestOpening:
    async def test_without_a_stream_it_is_open_at_once(self, server: Scripted, client: Client) -> None:
        await client.open({})
        await client.heard("onOpen")
        assert server.asked("reconnect") == []

    async def test_it_is_open_once_the_server_knows_what_it_watches_and_what_waited_is_sent(
        self, server: Scripted, client: Client
    ) -> None:
        known = server.hold("reconnect")
        await client.open({"s": 4})
        await client.send("first", "second")
        (await server.connected()).event(5)
        await client.heard("delta 5")
        assert await client.state() == "connecting"
        assert server.asked("send") == []
        known.set()
        log = await client.heard("onOpen")
        assert log == ["connecting", "delta 5", "receipt for first", "receipt for second", "open", "onOpen"]
        (seen,) = server.asked("reconnect")
        assert (seen.body, seen.headers["x-connection-id"]) == ({"streams": {"s": 4}}, "c1")

    async def test_a_reconnect_says_what_was_seen_last(self, server: Scripted, client: Client) -> None:
        await client.open()
        connection = await server.connected()
        await client.heard("open")
        connection.event(1)
        connection.event(2)
        await client.heard("delta 2")
        connection.drop()
        await server.connected(2)
        await eventually(lambda: len(server.asked("reconnect")) == 2)
        assert server.asked("reconnect")[1].body == {"streams": {"s": 2}}
        await client.page.wait_for_function("client.state === 'open'")
        assert [entry for entry in await client.log() if entry.startswith("on")] == ["onOpen", "onClose", "onOpen"]

    async def test_an_answer_to_an_older_connection_changes_nothing(self, server: Scripted, client: Client) -> None:
        stale = server.hold("reconnect", Answer(500))
        await client.open()
        first = await server.connected()
        await eventually(lambda: server.asked("reconnect"))
        first.drop()
        await client.heard("open")
        stale.set()
        second = server.connections[-1]
        second.event(1)
        await client.heard("delta 1")
        assert await client.log() == ["connecting", "reconnecting", "open", "onOpen", "delta 1"]
        assert len(server.connections) == 2

    async def test_a_late_success_opens_nothing(self, server: Scripted, client: Client) -> None:
        stale, current = server.hold("reconnect"), server.hold("reconnect")
        await client.open()
        (await server.connected()).drop()
        second = await server.connected(2)
        await eventually(lambda: len(server.asked("reconnect")) == 2)
        await client.send("kept")
        stale.set()
        # Two answers later, that one has come.
        for _ in range(2):
            await client.page.evaluate("client.stop('s')")
        second.event(1)
        await client.heard("delta 1")
        assert await client.state() == "reconnecting"
        assert server.asked("send") == []
        current.set()
        await client.heard("open")

    async def test_what_it_watches_is_said_in_the_order_of_the_changes(self, server: Scripted, client: Client) -> None:
        await client.open()
        await client.heard("open")
        known = server.hold("reconnect")
        await client.page.evaluate("client.watch('t'); client.watch('u'); client.unwatch('t')")
        await eventually(lambda: len(server.asked("reconnect")) == 2)
        # However long an answer takes, the next one waits for it.
        await client.page.evaluate("client.stop('s')")
        assert len(server.asked("reconnect")) == 2
        known.set()
        await eventually(lambda: len(server.asked("reconnect")) == 4)
        assert server.asked("reconnect")[-1].body == {"streams": {"s": 0, "u": 0}}

    async def test_a_reconnect_that_is_refused_makes_another_connection(self, server: Scripted, client: Client) -> None:
        server.will("reconnect", Answer(500), Answer(0))
        await client.open()
        await client.heard("open")
        assert len(server.connections) == 3
        assert "onClose" not in await client.log()

    async def test_a_connection_that_is_refused_is_made_anew(self, server: Scripted, client: Client) -> None:
        server.will("events", Answer(503), Answer(503))
        await client.open()
        await client.heard("open")
        assert len(server.asked("events")) == 3

    async def test_it_asks_who_we_are_only_once_and_goes_on_when_asked(self, server: Scripted, client: Client) -> None:
        server.will("events", Answer(401))
        server.will("state", Answer(401))
        await client.open()
        await client.heard("signed-out")
        await client.send("kept")
        assert len(server.asked("events")) == 1
        await client.page.evaluate("client.connect()")
        await client.heard("open", "receipt for kept")

    async def test_what_has_ended_is_not_asked_for_again(self, server: Scripted, client: Client) -> None:
        server.history = [event(1), event(2, "reply")]
        server.state = "ended"
        server.will("events", Answer(204))
        await client.open()
        log = await client.heard("ended")
        assert log[-4:] == ["delta 1", "reply 2", "end of s", "ended"]
        await client.send("late")
        await client.heard("no receipt for late: 409 This conversation has ended.")
        assert len(server.asked("events")) == 1


class TestAConnectionThatDiesWithoutASign:
    async def test_is_made_anew_when_no_heartbeat_comes_and_goes_on_where_it_was(
        self, server: Scripted, client: Client
    ) -> None:
        server.heartbeat = 1.0
        await client.open()
        first = await server.connected()
        server.heartbeat = 15.0
        await client.heard("open")
        first.event(1)
        second = await server.connected(2)
        assert second.request.query == {"heartbeat": ["event"], "cursor": ["s:1"]}
        await client.page.wait_for_function("client.state === 'open'")
        # The first one is not listened to any more.
        first.event(9)
        second.event(2)
        log = [entry for entry in await client.heard("delta 2") if not entry.startswith("on")]
        assert log == ["connecting", "open", "delta 1", "reconnecting", "open", "delta 2"]

    async def test_is_kept_for_as_long_as_heartbeats_come(self, server: Scripted, client: Client) -> None:
        server.heartbeat = 1.0
        await client.open()
        connection = await server.connected()
        for _ in range(20):
            connection.frame({}, event="heartbeat")
            await asyncio.sleep(0.25)  # the gateway's pace: together longer than the grace
        assert len(server.connections) == 1
        assert await client.state() == "open"

    async def test_is_given_up_while_it_is_made(self, server: Scripted, client: Client) -> None:
        never = server.hold("events")
        await client.open({"s": 3}, timeout=2_000)
        assert (await server.connected()).request.query["cursor"] == ["s:3"]
        assert len(server.asked("events")) > 1
        await client.heard("open")
        never.set()


class TestEvents:
    async def test_an_event_that_comes_twice_is_delivered_once(self, server: Scripted, client: Client) -> None:
        await client.open()
        connection = await server.connected()
        for seq, kind in [(1, "delta"), (2, "reply"), (1, "delta"), (2, "reply"), (3, "delta")]:
            connection.event(seq, kind)
        log = await client.heard("delta 3", "open")
        assert [entry for entry in log if entry[-1].isdigit()] == ["delta 1", "reply 2", "delta 3"]

    @pytest.mark.parametrize("is_announced", [True, False])
    async def test_what_was_skipped_is_delivered_from_the_history_before_what_came_after(
        self, server: Scripted, client: Client, *, is_announced: bool
    ) -> None:
        server.history = [event(seq) for seq in range(1, 1_205)] + [event(1_205, "reply")]
        slow = server.hold("history")
        await client.open()
        connection = await server.connected()
        if is_announced:
            connection.gap(1, 1_203, 1_205)
            connection.event(1_204)
        connection.event(1_205, "reply")
        connection.event(1_206)
        await eventually(lambda: server.asked("history"))
        await client.heard("open")
        assert "delta 1206" not in await client.log()
        slow.set()
        log = await client.heard("delta 1206")
        seen = [int(entry.split()[1]) for entry in log if entry[-1].isdigit()]
        assert seen == list(range(1, 1_207))
        assert [entry for entry in log if "reply" in entry] == ["reply 1205"]

    async def test_a_history_that_cannot_be_reached_is_asked_again(self, server: Scripted, client: Client) -> None:
        server.history = [event(1), event(2)]
        server.will("history", Answer(0), Answer(503))
        await client.open()
        (await server.connected()).event(3)
        log = await client.heard("delta 3", "open")
        assert [entry for entry in log if entry[-1].isdigit()] == ["delta 1", "delta 2", "delta 3"]

    async def test_what_the_history_has_no_more_is_reported(self, server: Scripted, client: Client) -> None:
        server.history = [event(3, "reply"), event(4), event(9)]
        await client.open()
        (await server.connected()).event(9)
        log = await client.heard("delta 9", "open")
        assert [entry for entry in log if entry[-1].isdigit()] == [
            "gap 1-2",
            "reply 3",
            "delta 4",
            "gap 5-8",
            "delta 9",
        ]

    async def test_a_stream_that_went_back_is_followed_from_there(self, server: Scripted, client: Client) -> None:
        await client.open({"s": 9})
        connection = await server.connected()
        connection.gap(4, 9, 3)
        connection.event(4)
        log = await client.heard("delta 4", "open")
        assert [entry for entry in log if entry[-1].isdigit()] == ["gap 4-3", "delta 4"]

    async def test_a_stream_that_went_back_is_reported_once_and_nothing_of_it_is_lost(
        self, server: Scripted, client: Client
    ) -> None:
        server.history = [event(4, "reply")]
        await client.open({"s": 9})
        connection = await server.connected()
        connection.gap(4, 9, 3)
        connection.gap(4, 9, 3)
        connection.gap(5, 9, 4)
        log = await client.heard("reply 4", "open")
        assert [entry for entry in log if entry[-1].isdigit()] == ["gap 4-3", "reply 4"]

    async def test_a_stream_that_goes_back_while_its_history_is_read_is_read_to_its_head(
        self, server: Scripted, client: Client
    ) -> None:
        server.history = [event(seq) for seq in range(1, 4)]
        slow = server.hold("history")
        await client.open({"s": 0, "t": 0})
        connection = await server.connected()
        connection.gap(1, 9, 9)
        await eventually(lambda: server.asked("history"))
        connection.gap(4, 9, 3)
        connection.event(1, "status", stream="t")
        await client.heard("status 1", "open")
        slow.set()
        connection.event(4)
        log = await client.heard("delta 4")
        assert [entry for entry in log if entry[-1].isdigit() and "status" not in entry] == [
            f"delta {seq}" for seq in range(1, 5)
        ]

    async def test_a_stream_that_ends_while_its_history_is_read_is_delivered_to_its_end(
        self, server: Scripted, client: Client
    ) -> None:
        server.history = [event(seq) for seq in range(1, 4)]
        slow = server.hold("history")
        await client.open()
        connection = await server.connected()
        connection.event(3)
        connection.frame({"stream": "s", "head": 3}, event="end")
        await eventually(lambda: server.asked("history"))
        await client.heard("onOpen")
        slow.set()
        log = await client.heard("ended")
        assert log[-6:] == ["delta 1", "delta 2", "delta 3", "end of s", "onClose", "ended"]


class TestSending:
    async def test_a_message_that_fails_is_sent_again_under_its_id_and_the_next_one_waits(
        self, server: Scripted, client: Client
    ) -> None:
        server.will("send", Answer(503), Answer(0))
        await client.open()
        await client.heard("open")
        await client.send("first", "second")
        log = await client.heard("receipt for second")
        assert log[-2:] == ["receipt for first", "receipt for second"]
        assert server.texts == ["first", "first", "first", "second"]
        assert len({request.body["client_message_id"] for request in server.asked("send")}) == 2
        assert len(server.connections) == 1

    async def test_a_failure_waits_for_its_pause_before_the_next_attempt(
        self, server: Scripted, client: Client
    ) -> None:
        server.will("send", Answer(503))
        await client.open(firstPause=3_600_000, longestPause=3_600_000)
        await client.page.evaluate("Math.random = () => 1")
        await client.heard("open")
        await client.send("first", "second")
        await eventually(lambda: server.texts)
        await client.page.evaluate("client.stop('s').then(() => log.push('stopped'))")
        await client.heard("stopped")
        server.connections[0].event(1)
        await client.heard("delta 1")
        assert server.texts == ["first"]
        # A new connection is worth an attempt at once.
        server.connections[0].drop()
        await client.heard("receipt for first", "receipt for second")

    @pytest.mark.parametrize("status", [0, 408, 429, 500])
    async def test_after_three_attempts_the_sender_gets_an_error(
        self, server: Scripted, client: Client, status: int
    ) -> None:
        server.will("send", *[Answer(status)] * 3)
        await client.open()
        await client.send("first", "second")
        why = "The server cannot be reached." if status == 0 else f"Refused with {status}."
        await client.heard(f"no receipt for first: {status} {why}", "receipt for second")
        assert server.texts == ["first", "first", "first", "second"]

    async def test_what_the_server_refuses_is_reported_at_once(self, server: Scripted, client: Client) -> None:
        server.will("send", Answer(400))
        await client.open()
        await client.send("first", "second")
        await client.heard("no receipt for first: 400 Refused with 400.", "receipt for second")
        assert server.texts == ["first", "second"]

    async def test_a_pause_that_the_server_asks_for_is_kept_across_connections(
        self, server: Scripted, client: Client
    ) -> None:
        server.will("send", Answer(429, headers={"Retry-After": "1"}))
        await client.open()
        await client.heard("open")
        await client.page.evaluate("window.begun = performance.now()")
        await client.send("first")
        await eventually(lambda: server.texts)
        server.connections[-1].drop()
        await server.connected(2)
        await client.heard("receipt for first")
        assert await client.page.evaluate("performance.now() - begun") >= 1_000

    async def test_a_stale_connection_is_made_anew_and_the_message_goes_there(
        self, server: Scripted, client: Client
    ) -> None:
        server.will("send", Answer(404))
        await client.open()
        await client.heard("open")
        await client.send("first")
        await client.heard("receipt for first")
        assert [request.headers["x-connection-id"] for request in server.asked("send")] == ["c1", "c2"]

    async def test_a_message_that_failed_is_sent_again_though_no_connection_comes(
        self, server: Scripted, client: Client
    ) -> None:
        lost = server.hold("send", Answer(500))
        await client.open()
        await client.heard("open")
        await client.send("first")
        await eventually(lambda: server.texts)
        server.will("events", *[Answer(503)] * 1_000)
        (await server.connected()).drop()
        await client.heard("reconnecting")
        await client.send("second")
        lost.set()
        await client.heard("receipt for first")
        assert server.texts == ["first", "first"]
        assert len(server.connections) == 1

    async def test_more_than_a_hundred_are_refused_and_none_is_dropped(self, server: Scripted, client: Client) -> None:
        known = server.hold("reconnect")
        await client.open()
        await client.send(*(f"m{number}" for number in range(101)))
        await client.page.wait_for_function(
            "log.some((entry) => entry.startsWith('no receipt for m100:  100 messages'))"
        )
        known.set()
        await client.heard("open", "receipt for m99")
        assert server.texts == [f"m{number}" for number in range(100)]

    async def test_what_was_not_sent_is_sent_after_a_reload_under_the_same_ids(
        self, server: Scripted, client: Client
    ) -> None:
        server.hold("send")
        await client.open()
        await client.send("first", "second")
        await eventually(lambda: server.texts)
        await client.open()
        await client.heard("receipt for first", "receipt for second")
        assert server.texts == ["first", "first", "second"]
        ids = [request.body["client_message_id"] for request in server.asked("send")]
        assert ids[0] == ids[1] != ids[2]
        assert await client.page.evaluate("sessionStorage['queue_service.outbox']") == "[]"

    async def test_the_event_of_a_message_is_as_good_as_its_receipt(self, server: Scripted, client: Client) -> None:
        server.hold("send")
        await client.open()
        await client.heard("open")
        await client.send("first")
        await eventually(lambda: server.texts)
        message = {"message_id": server.asked("send")[0].body["client_message_id"], "body": {}}
        server.connections[0].event(1, "message", message)
        await client.heard("receipt for first", "message 1")
        assert await client.page.evaluate("client.unsent") == []

    async def test_ids_are_made_up_where_the_browser_makes_none(self, server: Scripted, browser: Browser) -> None:
        client = Client(await browser.new_page(), server)
        await client.page.add_init_script("Crypto.prototype.randomUUID = undefined")
        await client.open()
        await client.send("first", "second")
        await client.heard("receipt for first", "receipt for second")
        assert len({request.body["client_message_id"] for request in server.asked("send")}) == 2

    async def test_a_stop_is_not_sent_twice(self, server: Scripted, client: Client) -> None:
        server.will("stop", Answer(503))
        await client.open()
        await client.heard("open")
        await client.page.evaluate("client.stop('s').catch((error) => log.push(`stop: ${error.status}`))")
        await client.heard("stop: 503")
        assert len(server.asked("stop")) == 1
