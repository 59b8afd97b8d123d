"""A real browser, and what it looks at: a gateway and a worker, each a process of its own.

All tests of a process share the browser and the connection to it, which belongs to one event loop: so they share that, too.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import pytest_asyncio
from playwright.async_api import Browser, ConsoleMessage, Locator, Page, async_playwright, expect

from queue_service import App
from tests.support import eventually, free_port, quick_app

# A page that nobody looks at keeps its timers.
QUIET = (
    "quic", "background-networking", "component-update", "sync", "gpu", "background-timer-throttling",
    "backgrounding-occluded-windows", "renderer-backgrounding",
)  # fmt: skip
FLAGS = ["--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{what}" for what in QUIET)]
GATEWAYS = ("gateway", "second gateway")
COMMANDS = {
    **{name: ["gateway", "-a", "tests.browser.tasks_for_tests:app"] for name in GATEWAYS},
    "worker": ["worker", "-a", "tests.browser.tasks_for_tests:app", "-q", "agent:10"],
}

expect.set_options(timeout=40_000)


fixture = partial(pytest_asyncio.fixture, loop_scope="session")


@fixture(scope="session")
async def chromium(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Browser]:
    """A Chromium with an empty profile. One for all tests: its start, and the connection, cost more than most of them."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.fail(
            "There is no Chromium on PATH: install Debian's `chromium`, or leave these out with -m 'not browser'."
        )
    profile = tmp_path_factory.mktemp("chromium")
    flags = [*FLAGS, "--remote-debugging-port=0", f"--user-data-dir={profile}"]
    running = await asyncio.create_subprocess_exec(
        program, *flags, "about:blank", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    written = profile / "DevToolsActivePort"

    def port() -> str | None:
        assert running.returncode is None, "Chromium did not start."
        lines = written.read_text().splitlines() if written.exists() else []
        return lines[0] if len(lines) > 1 else None

    try:
        address = f"http://127.0.0.1:{await eventually(port, within=60)}"
        async with async_playwright() as playwright:
            yield await playwright.chromium.connect_over_cdp(address)
    finally:
        running.kill()
        await running.wait()


@fixture
async def browser(chromium: Browser) -> AsyncIterator[Browser]:
    """The Chromium of all tests; the windows that this test opens are closed when it ends, and shared with no other."""
    before = chromium.contexts
    yield chromium
    for context in chromium.contexts:
        if context not in before:
            await context.close()


@fixture
async def app(database: str) -> AsyncIterator[App]:
    async with quick_app(database) as opened:
        yield opened


class Site:
    """The processes. `start` and `kill` take `gateway`, `second gateway` or `worker`."""

    def __init__(self, database: str, logs: Path) -> None:
        self._database = database
        self._logs = logs
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self.ports = {name: free_port() for name in GATEWAYS}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.ports['gateway']}"

    async def start(self, *names: str, **settings: str) -> None:
        """Returns once the gateways can be reached."""
        paces = {"LEASE": "5s", "POLL_INTERVAL": "100ms", "SWEEP_INTERVAL": "100ms"}
        env = {f"QUEUE_SERVICE_{name}": value for name, value in (paces | settings).items()}
        for name in names:
            self._running[name] = self._started(name, env)
        for name in self.ports.keys() & names:
            await eventually(partial(self._answers, name), within=60)

    def kill(self, name: str) -> None:
        process = self._running.pop(name)
        process.kill()
        process.wait()

    def end(self) -> None:
        for name in [*self._running]:
            self.kill(name)

    def _started(self, name: str, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        with (self._logs / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "queue_service", *COMMANDS[name]],
                env={
                    **os.environ,
                    "QUEUE_SERVICE_DATABASE_URL": self._database,
                    "QUEUE_SERVICE_GATEWAY_PORT": str(self.ports.get(name, 0)),
                    **env,
                },
                stderr=log,
            )

    async def _answers(self, name: str) -> bool:
        assert self._running[name].poll() is None, (self._logs / f"{name}.log").read_text()
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", self.ports[name])
        except ConnectionRefusedError:
            return False
        writer.close()
        return True


@pytest.fixture
def site(database: str, tmp_path: Path) -> Iterator[Site]:
    made = Site(database, tmp_path)
    yield made
    made.end()


@dataclass
class Chat:
    """The page, as a person sees it."""

    page: Page
    app: App

    @property
    def stream(self) -> str:
        return parse_qs(urlsplit(self.page.url).query)["stream"][0]

    @property
    def field(self) -> Locator:
        return self.page.get_by_role("textbox", name="Message")

    @property
    def connection(self) -> Locator:
        return self.page.locator("#connection")

    @property
    def mine(self) -> Locator:
        return self.page.locator(".person .text")

    @property
    def replies(self) -> Locator:
        """The complete ones: what grows says the same before its turn has ended."""
        return self.page.locator("#events .agent:not(.growing) .text")

    @property
    def growing(self) -> Locator:
        return self.page.locator(".growing")

    @property
    def errors(self) -> Locator:
        return self.page.locator(".error .text")

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    async def say(self, text: str) -> None:
        await self.field.fill(text)
        await self.field.press("Enter")

    async def go_on(self) -> None:
        """Tell the agent, which waits."""
        await self.app.events.append(self.stream, "go", {})


Visit = Callable[..., Awaitable[Chat]]


@fixture
async def visit(browser: Browser, site: Site, app: App) -> AsyncIterator[Visit]:
    """Opens the page in a window of its own. No page may throw, or try what its policy forbids."""
    wrong: list[str] = []

    def note(message: ConsoleMessage) -> None:
        if "Content Security Policy" in message.text:
            wrong.append(message.text)

    async def open_page(path: str = "/", **options: Any) -> Chat:
        # What moves for ever is drawn for ever, here by the processor.
        context = await browser.new_context(**{"base_url": site.address, "reduced_motion": "reduce", **options})
        page = await context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", note)
        await page.goto(path)
        # The page names its conversation in its address, by itself where it was given none.
        await page.wait_for_url("**/?*stream=*")
        return Chat(page, app)

    yield open_page
    assert wrong == []
