"""Two replicas, each a process of its own, behind balancers without stickiness; the Python client holds conversations."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from queue_service import App, Run, Turn
from queue_service.client import ChatClient, Event
from tests.balancer import Balancer
from tests.support import eventually, free_port, quick_app, working

PAGE = Path(__file__).parents[2] / "docs" / "gateway.md"
CLIENTS = 12

pytestmark = pytest.mark.timeout(120)


class Replicas:
    """`kill` and `start` take the number of one."""

    def __init__(self, database: str, logs: Path) -> None:
        self.ports = [free_port(), free_port()]
        self._database = database
        self._logs = logs
        self._running: dict[int, subprocess.Popen[bytes]] = {}

    async def start(self, *numbers: int) -> None:
        """Returns once they can be reached."""
        for number in numbers:
            self._running[number] = self._started(number)
        for number in numbers:
            await eventually(partial(self._answers, number), within=60)

    def kill(self, number: int) -> None:
        process = self._running.pop(number)
        process.kill()
        process.wait()

    def end(self) -> None:
        for number in [*self._running]:
            self.kill(number)

    def _started(self, number: int) -> subprocess.Popen[bytes]:
        env = {"QUEUE_SERVICE_DATABASE_URL": self._database, "QUEUE_SERVICE_POLL_INTERVAL": "100ms"}
        command = [sys.executable, "-m", "queue_service", "gateway", "--port", str(self.ports[number])]
        with (self._logs / f"gateway-{number}.log").open("ab") as log:
            return subprocess.Popen(command, env={**os.environ, **env}, stderr=log)

    async def _answers(self, number: int) -> bool:
        log = self._logs / f"gateway-{number}.log"
        assert self._running[number].poll() is None, log.read_text()
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", self.ports[number])
        except ConnectionRefusedError:
            return False
        writer.close()
        return True


@pytest.fixture
async def replicas(database: str, tmp_path: Path) -> AsyncIterator[Replicas]:
    made = Replicas(database, tmp_path)
    try:
        await made.start(0, 1)
        yield made
    finally:
        made.end()


@pytest.fixture
async def app(database: str) -> AsyncIterator[App]:
    """With a worker that answers each message word by word."""
    async with quick_app(database) as opened:

        @opened.task
        async def agent_turn(run: Run, text: str) -> None:
            turn = Turn(**(run.metadata or {})["turn"])
            for word in text.split():
                await opened.events.append(turn.stream, "delta", {"text": word})
            await opened.turns.commit_reply(turn.deployment, [turn.message_id], {"text": text.upper()})

        async with working(opened):
            yield opened


class Person:
    """A client, and all that it heard."""

    def __init__(self, address: str) -> None:
        self.opened = 0
        self.closed = 0
        self.seen: list[Event] = []
        self.chat = ChatClient(
            address, first_pause=0.05, longest_pause=0.5, on_open=self._was_opened, on_close=self._was_closed
        )

    def _was_opened(self) -> None:
        self.opened += 1

    def _was_closed(self) -> None:
        self.closed += 1

    async def listen(self) -> None:
        async for event in self.chat.events():
            self.seen.append(event)

    def replies(self, stream: str) -> list[str]:
        return [event.body["text"] for event in self.seen if event.stream == stream and event.kind == "reply"]

    def seqs(self, stream: str) -> list[int]:
        return [event.seq for event in self.seen if event.stream == stream]


@asynccontextmanager
async def person(address: str) -> AsyncIterator[Person]:
    made = Person(address)
    listening = asyncio.create_task(made.listen())
    try:
        yield made
    finally:
        await made.chat.close()
        await listening


async def a_conversation(someone: Person) -> None:
    """Every request that a client knows."""
    chat = someone.chat
    await chat.connect({"s": 0})
    receipts = [chat.send("s", {"text": f"one two {n}"}) for n in range(6)]
    seqs = [(await each).seq for each in receipts]
    assert seqs == sorted(set(seqs))
    await eventually(lambda: len(someone.replies("s")) == 6, within=30)
    # In order, as they were sent.
    assert someone.replies("s") == [f"ONE TWO {n}" for n in range(6)]
    for stream in ("t", "u", "v"):
        await chat.watch(stream)
        await chat.send(stream, {"text": "hi"})
        await eventually(partial(someone.replies, stream), within=30)
        assert someone.replies(stream) == ["HI"]
    await chat.unwatch("t")
    await chat.switch("v", chat.cursors["v"])
    await chat.interrupt("v")
    await chat.mode("v", "plan")
    await chat.permission("v", "r1", True)
    assert await chat.stop("v") == []
    await eventually(lambda: [event.kind for event in someone.seen[-3:]] == ["interrupt", "mode", "permission"])
    assert await chat.suspend("v") == "suspended"
    assert await chat.close_stream("v") == "ended"
    await eventually(lambda: chat.state == "closed")
    for stream in "suv":
        assert someone.seqs(stream) == list(range(1, len(someone.seqs(stream)) + 1))


@pytest.mark.usefixtures("app")
async def test_a_client_connects_once_whichever_replica_its_requests_come_to(replicas: Replicas) -> None:
    async with Balancer(replicas.ports).open() as balancer, person(balancer.address) as someone:
        await a_conversation(someone)
        assert (someone.opened, someone.closed) == (1, 1)
        # The connection is at one, and what is about it came to both.
        assert len(balancer.ports("/events")) == 1
        about = balancer.ports("/reconnect") + balancer.ports("/watch") + balancer.ports("/switch")
        assert set(about) == set(balancer.ports("/send")) == set(replicas.ports)


async def test_a_replica_that_is_killed_costs_its_clients_nothing(app: App, replicas: Replicas) -> None:
    async with Balancer(replicas.ports).open() as balancer, person(balancer.address) as someone:
        await someone.chat.connect({"s": 0})
        await someone.chat.send("s", {"text": "before"})
        (holder,) = balancer.ports("/events")
        replicas.kill(replicas.ports.index(holder))
        during = someone.chat.send("s", {"text": "during"})
        await during
        await eventually(lambda: someone.replies("s") == ["BEFORE", "DURING"], within=30)
        await replicas.start(replicas.ports.index(holder))
        await someone.chat.watch("t")
        await someone.chat.send("t", {"text": "after"})
        await eventually(lambda: someone.replies("t") == ["AFTER"], within=30)
        assert someone.opened == 2
        assert someone.seqs("s") == list(range(1, len(someone.seqs("s")) + 1))
        assert await app.turns.list() == []


@pytest.mark.usefixtures("app")
async def test_clients_that_come_back_all_at_once_are_all_connected(replicas: Replicas) -> None:
    async with Balancer(replicas.ports).open() as balancer:
        people = [Person(balancer.address) for _ in range(CLIENTS)]
        listening = [asyncio.create_task(each.listen()) for each in people]
        await asyncio.gather(*(each.chat.connect({f"s{n}": 0}) for n, each in enumerate(people)))
        replicas.kill(0)
        await asyncio.gather(*(each.chat.send(f"s{n}", {"text": "hi"}) for n, each in enumerate(people)))
        await replicas.start(0)
        replicas.kill(1)
        await eventually(lambda: all(each.replies(f"s{n}") == ["HI"] for n, each in enumerate(people)), within=40)
        for each in people:
            await each.chat.close()
        await asyncio.gather(*listening)


def haproxy_configuration(port: int, targets: list[int]) -> str:
    """The example in `docs/gateway.md`, for these ports of this machine."""
    (example,) = re.findall(r"```haproxy\n(.*?)```", PAGE.read_text(), re.DOTALL)
    configuration = re.sub(r"bind \S+", f"bind 127.0.0.1:{port}", example)
    addresses = iter(f"127.0.0.1:{target}" for target in targets)
    configuration, count = re.subn(r"10\.0\.0\.\d+:8000", lambda _: next(addresses), configuration)
    assert count == len(targets)
    return configuration


@pytest.fixture
def haproxy(replicas: Replicas, tmp_path: Path) -> Iterator[str]:
    """Its address, once it was started."""
    program = shutil.which("haproxy")
    if program is None:
        pytest.skip("haproxy is not installed on this machine: the example configuration was not run")
    port, file = free_port(), tmp_path / "haproxy.cfg"
    file.write_text(haproxy_configuration(port, replicas.ports))
    running = subprocess.Popen([program, "-db", "-f", str(file)])
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        running.kill()
        running.wait()


@pytest.mark.usefixtures("app")
async def test_the_example_for_haproxy_needs_no_stickiness(haproxy: str) -> None:
    async def answers() -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", int(haproxy.rpartition(":")[2]))
        except ConnectionRefusedError:
            return False
        writer.close()
        return True

    await eventually(answers, within=30)
    async with person(haproxy) as someone:
        await a_conversation(someone)
        assert (someone.opened, someone.closed) == (1, 1)


def test_the_example_for_haproxy_names_two_replicas_and_no_cookie() -> None:
    configuration = haproxy_configuration(1, [2, 3])
    assert "balance roundrobin" in configuration
    for sticky in ("cookie", "stick", "source", "hash"):
        assert not re.search(rf"^\s+(?:balance )?{sticky}\b", configuration, re.MULTILINE)


def test_a_setting_that_would_cut_a_quiet_connection_is_not_in_the_example() -> None:
    seconds: dict[str, Any] = dict(re.findall(r"timeout (server|client) +(\d+)s", haproxy_configuration(1, [2, 3])))
    # A heartbeat comes every 15 s.
    assert {name: int(value) > 2 * 15 for name, value in seconds.items()} == {"server": True, "client": True}
