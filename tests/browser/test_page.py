"""The page in a real browser, while gateway and worker are killed under it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from playwright.async_api import Browser, Route, expect
from starlette.applications import Starlette
from starlette.routing import Mount

from queue_service import App, Run, Turn
from queue_service.gateway import Gateway, loopback, page
from tests.browser.conftest import Chat, Site, Visit
from tests.chaos.proxy import Proxy
from tests.gateway.served import serving
from tests.support import one, working

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180), pytest.mark.asyncio(loop_scope="session")]

SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
SEND = "**/api/chat/send"


async def turns(app: App, stream: str) -> tuple[int, int]:
    """How many messages a stream has, and how many endings."""
    count = "select count(*) from queue_service.events where stream = %s and "
    async with app.pool.connection() as conn:
        return await one(conn, f"{count} kind = 'message'", stream), await one(conn, f"{count} terminal", stream)


async def picture(chat: Chat, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    await chat.page.screenshot(path=SCREENSHOTS / f"{name}.png", animations="disabled")


async def test_a_message_gets_its_reply_word_by_word(site: Site, visit: Visit, app: App) -> None:
    await site.start("gateway", "worker")
    chat = await visit()
    await expect(chat.connection).to_have_text("Connected")
    await chat.say("one two (wait) three")
    await expect(chat.growing).to_contain_text("You said: one two")
    await expect(chat.page.get_by_text("Thinking", exact=True)).to_be_visible()
    await expect(chat.button("Stop")).to_be_visible()
    await chat.go_on()
    await expect(chat.replies).to_have_text(["You said: one two (wait) three"])
    await expect(chat.growing).to_have_count(0)
    await expect(chat.button("Stop")).to_be_hidden()
    # A kind of event that the page does not know.
    await expect(chat.page.locator(".line.other")).to_have_text(["go"])
    assert await turns(app, chat.stream) == (1, 1)


async def test_a_gateway_killed_in_the_middle_of_a_turn_costs_the_page_nothing(
    site: Site, visit: Visit, app: App
) -> None:
    await site.start("gateway", "worker")
    chat = await visit()
    await chat.say("one two (wait) three four")
    await expect(chat.growing).to_contain_text("You said: one two")
    await chat.page.evaluate("window.isTheSame = true")
    site.kill("gateway")
    await expect(chat.connection).to_have_text("Reconnecting…")
    await chat.go_on()
    await expect(chat.growing).not_to_contain_text("four")
    await site.start("gateway")
    await expect(chat.connection).to_have_text("Connected")
    await expect(chat.replies).to_have_text(["You said: one two (wait) three four"])
    await expect(chat.mine).to_have_text(["one two (wait) three four"])
    assert await chat.page.evaluate("window.isTheSame")
    assert await turns(app, chat.stream) == (1, 1)


async def test_a_message_typed_while_the_gateway_is_down_is_sent_once(site: Site, visit: Visit, app: App) -> None:
    await site.start("gateway", "worker")
    chat = await visit()
    await expect(chat.connection).to_have_text("Connected")
    site.kill("gateway")
    await expect(chat.connection).to_have_text("Reconnecting…")
    await chat.say("first")
    await chat.say("second")
    await expect(chat.page.locator(".waiting .note")).to_have_text(["Waiting for the connection…"] * 2)
    await site.start("gateway")
    await expect(chat.replies).to_have_text(["You said: first", "You said: second"])
    await expect(chat.page.locator(".waiting")).to_have_count(0)
    assert await turns(app, chat.stream) == (2, 2)


async def test_a_message_whose_receipt_is_lost_is_accepted_once(site: Site, visit: Visit, app: App) -> None:
    await site.start("gateway", "worker")
    chat = await visit()

    async def lose(route: Route) -> None:
        await route.fetch()
        await route.abort()

    await chat.page.route(SEND, lose, times=1)
    await chat.say("hello")
    await expect(chat.replies).to_have_text(["You said: hello"])
    assert await turns(app, chat.stream) == (1, 1)


async def test_a_reload_shows_the_conversation_again(site: Site, visit: Visit) -> None:
    await site.start("gateway", "worker")
    chat = await visit()
    await chat.say("first")
    await expect(chat.replies).to_have_text(["You said: first"])
    await chat.say("second (wait) third")
    await expect(chat.growing).to_contain_text("You said: second")
    address = chat.page.url
    await chat.page.reload()
    assert chat.page.url == address
    await expect(chat.mine).to_have_text(["first", "second (wait) third"])
    await expect(chat.replies).to_have_text(["You said: first"])
    await expect(chat.growing).to_contain_text("You said: second")
    await expect(chat.button("Stop")).to_be_visible()
    await chat.go_on()
    await expect(chat.replies).to_have_text(["You said: first", "You said: second (wait) third"])


async def test_messages_that_were_not_sent_survive_a_reload(site: Site, visit: Visit, app: App) -> None:
    await site.start("gateway", "worker")
    chat = await visit()
    # Under way, and never answered: of one that fails, the page tries three times within moments.
    await chat.page.route(SEND, lambda _: None)
    await chat.say("before")
    await expect(chat.page.locator(".waiting .text")).to_have_text(["before"])
    await chat.page.unroute(SEND)
    await chat.page.reload()
    await expect(chat.replies).to_have_text(["You said: before"])
    await expect(chat.page.locator(".waiting")).to_have_count(0)
    assert await turns(app, chat.stream) == (1, 1)


async def test_a_worker_that_dies_shows_its_error(site: Site, visit: Visit, app: App) -> None:
    await site.start("gateway", "worker", EXECUTION="3s")
    chat = await visit()
    await chat.say("one (wait) two")
    await expect(chat.growing).to_contain_text("You said: one")
    site.kill("worker")
    await expect(chat.errors).to_have_text(["The agent stopped responding. Please send the message again."])
    await expect(chat.growing).to_have_count(0)
    await expect(chat.button("Stop")).to_be_hidden()
    assert await turns(app, chat.stream) == (1, 1)
    await site.start("worker")
    await chat.go_on()
    await chat.button("Send again").click()
    await expect(chat.replies.last).to_have_text("You said: one (wait) two")
    assert await turns(app, chat.stream) == (2, 2)


async def test_a_message_that_is_refused_says_why_and_can_be_sent_again(site: Site, visit: Visit, app: App) -> None:
    await site.start("gateway", "worker")
    chat = await visit()
    refusal = '{"error": "This is not to be said.", "field": "body"}'
    await chat.page.route(SEND, lambda route: route.fulfill(status=400, body=refusal))
    await chat.say("hello")
    await expect(chat.page.locator(".failed .note")).to_have_text("Not sent. This is not to be said.")
    await chat.page.reload()
    await expect(chat.page.locator(".failed .note")).to_have_text("Not sent. This is not to be said.")
    await picture(chat, "refused")
    await chat.page.unroute(SEND)
    await chat.button("Send again").click()
    await expect(chat.replies).to_have_text(["You said: hello"])
    await expect(chat.page.locator(".failed")).to_have_count(0)
    assert await turns(app, chat.stream) == (1, 1)


async def test_the_keyboard_alone_is_enough(site: Site, visit: Visit) -> None:
    await site.start("gateway", "worker")
    chat = await visit()
    keyboard = chat.page.keyboard
    await expect(chat.field).to_be_focused()
    await keyboard.type("one")
    await keyboard.press("Shift+Enter")
    await keyboard.type("(wait) two")
    await keyboard.press("Enter")
    await expect(chat.mine).to_have_text(["one (wait) two"])
    assert await chat.mine.inner_text() == "one\n(wait) two"
    await expect(chat.growing).to_contain_text("You said: one")
    await keyboard.press("Tab")
    await expect(chat.button("Stop")).to_be_focused()
    await keyboard.press("Enter")
    await expect(chat.page.locator(".stopped .text")).to_have_text(["The turn was cancelled."])
    await expect(chat.button("Stop")).to_be_hidden()
    await expect(chat.field).to_be_focused()
    await keyboard.type("three")
    await keyboard.press("Enter")
    await expect(chat.replies.last).to_have_text("You said: three")
    await keyboard.press("Shift+Tab")
    await keyboard.press("Shift+Tab")
    await expect(chat.page.get_by_role("link", name="New conversation")).to_be_focused()
    was = chat.stream
    await keyboard.press("Enter")
    await expect(chat.mine).to_have_count(0)
    await chat.page.wait_for_url(lambda url: "stream=" in url and was not in url)


async def test_a_gateway_that_wants_a_token_asks_for_it_and_goes_on(site: Site, visit: Visit) -> None:
    token = "a token of this test"  # noqa: S105
    await site.start("gateway", "worker", GATEWAY_TOKEN=token)
    chat = await visit()
    await expect(chat.page.get_by_role("dialog", name="Sign in")).to_be_visible()
    await expect(chat.connection).to_have_text("Signed out")
    await chat.page.get_by_label("Token").fill("another")
    await chat.page.keyboard.press("Enter")
    await expect(chat.page.get_by_role("dialog")).to_contain_text("That is not the token.")
    await picture(chat, "sign-in")
    await chat.page.get_by_label("Token").fill(token)
    await chat.page.keyboard.press("Enter")
    await expect(chat.connection).to_have_text("Connected")
    await expect(chat.page.get_by_role("dialog")).to_be_hidden()
    await chat.say("hello")
    await expect(chat.replies).to_have_text(["You said: hello"])


async def test_an_answer_that_begins_again_is_shown_once(site: Site, visit: Visit) -> None:
    await site.start("gateway", "worker")
    chat = await visit()
    await chat.say("one two (wait) three")
    await expect(chat.growing).to_have_text("Agent: You said: one two ")
    site.kill("worker")
    await site.start("worker")
    # The reset takes the half answer away, and the second attempt begins anew.
    await expect(chat.page.get_by_text("Thinking", exact=True)).to_have_count(2)
    await expect(chat.growing).to_have_count(1)
    await expect(chat.growing).to_have_text("Agent: You said: one two ")
    await chat.go_on()
    await expect(chat.replies).to_have_text(["You said: one two (wait) three"])


async def test_a_message_shows_its_place_and_an_answer_to_two_is_shown_once(site: Site, visit: Visit, app: App) -> None:
    await site.start("gateway")
    chat = await visit()
    await expect(chat.connection).to_have_text("Connected")
    for message_id, text in (("m1", "a tent"), ("m2", "make it red")):
        turn = Turn(deployment=chat.stream, message_id=message_id, stream=chat.stream)
        await app.turns.send(turn, "agent_turn", {"text": text}, queue="agent", ordering_key=chat.stream)
    second = chat.page.locator('[data-message-id="m2"] .note')
    await expect(second).to_have_text("One before it.")
    await app.turns.commit_reply(chat.stream, ["m1", "m2"], {"text": "A red tent"})
    await expect(chat.replies).to_have_text(["A red tent"])
    await expect(second).to_have_text("")
    await expect(chat.button("Stop")).to_be_hidden()


async def test_what_is_written_is_text_and_nothing_else(site: Site, visit: Visit) -> None:
    await site.start("gateway", "worker")
    chat = await visit()
    markup = "<img src=x onerror=alert(1)><b>bold</b>"
    await chat.say(markup)
    await expect(chat.replies).to_have_text([f"You said: {markup}"])
    await expect(chat.mine).to_have_text([markup])
    await expect(chat.page.locator("#log img, #log b")).to_have_count(0)


async def test_a_connection_that_dies_without_a_sign_is_noticed_and_costs_the_page_nothing(
    browser: Browser, app: App
) -> None:
    gateway = Gateway(app, authorize=loopback, heartbeat=0.5)
    async with (
        serving(app, gateway=gateway, asgi=gateway.asgi(with_page=True)) as served,
        Proxy(int(served.address.rpartition(":")[2])).open() as proxy,
    ):
        shown = await browser.new_page()
        await shown.goto(proxy.address)
        await shown.wait_for_url("**/?*stream=*")
        chat = Chat(shown, app)
        await expect(chat.connection).to_have_text("Connected")
        stalling = asyncio.create_task(proxy.stall(3_600))
        await expect(chat.connection).to_have_text("Reconnecting…")
        await app.events.append(chat.stream, "happened meanwhile", {})
        stalling.cancel()
        await expect(chat.connection).to_have_text("Connected")
        await expect(chat.page.locator(".line.other")).to_have_text(["happened meanwhile"])
        await shown.close()


async def test_the_page_works_mounted_under_a_prefix(browser: Browser, app: App) -> None:
    @app.task(queue="agent")
    async def agent_turn(run: Run, text: str) -> None:
        turn = run.turn
        assert turn is not None
        await app.turns.commit_reply(turn.deployment, [turn.message_id], {"text": f"You said: {text}"})

    gateway = Gateway(app, authorize=loopback)
    mounted = Mount("/some/where", routes=[*gateway.routes(), *page.routes()])
    async with (
        serving(app, asgi=Starlette(routes=[mounted], lifespan=gateway.lifespan)) as served,
        working(app, {"agent": 1}),
    ):
        shown = await browser.new_page()
        await shown.goto(f"{served.address}/some/where/")
        chat = Chat(shown, app)
        await chat.say("hello")
        await expect(chat.replies).to_have_text(["You said: hello"])
        await shown.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("name", "width", "height"), [("desktop", 1100, 800), ("phone", 390, 780)])
async def test_the_page_fits(site: Site, visit: Visit, scheme: str, name: str, width: int, height: int) -> None:
    await site.start("gateway", "worker", EXECUTION="4s")
    chat = await visit("/?stream=trip-to-lisbon", color_scheme=scheme, viewport={"width": width, "height": height})

    async def shot(moment: str) -> None:
        wide = "[document.documentElement, scroller].filter((each) => each.scrollWidth > each.clientWidth).length"
        assert await chat.page.evaluate(wide) == 0
        await picture(chat, f"{name}-{scheme}-{moment}")

    await expect(chat.connection).to_have_text("Connected")
    await shot("empty")
    await chat.say("Which trains go from Porto to Lisbon on a Sunday evening?")
    await expect(chat.replies).to_have_text(["You said: Which trains go from Porto to Lisbon on a Sunday evening?"])
    await chat.say("And a long word: " + "Donaudampfschifffahrt" * 4 + " (wait) and the rest of it")
    await expect(chat.growing).to_contain_text("Donaudampf")
    await chat.say("Meanwhile, something else.")
    await expect(chat.replies.last).to_have_text("You said: Meanwhile, something else.")
    await shot("streaming")
    site.kill("worker")
    await expect(chat.errors).to_have_count(1)
    await expect(chat.page.locator(".error .quote")).to_contain_text("And a long word")
    site.kill("gateway")
    await expect(chat.connection).to_have_text("Reconnecting…")
    await chat.say("Is anybody there?")
    await expect(chat.page.locator(".waiting .note")).to_be_visible()
    await shot("reconnecting")
