"""Two gateways behind proxies that cut, stall and half-close, gateways and workers killed, fifty clients: every client sees
its streams whole, and every message that was accepted becomes one turn with one ending.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from queue_service import App, Run
from queue_service.client import ChatClient, Event, MessageReceipt
from queue_service.db.execute import Connection
from tests.chaos.proxy import Proxy
from tests.support import eventually, free_port, one, rows

SECONDS = float(os.environ.get("QUEUE_SERVICE_CHAOS_SECONDS", "10"))
CLIENTS, STREAMS = 50, 25
BETWEEN_FAULTS = 0.5

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(180 + int(2 * SECONDS))]

# In the workers

app = App(os.environ.get("QUEUE_SERVICE_DATABASE_URL", "postgresql:///unused"))


@app.task
async def agent_turn(run: Run, text: str) -> None:
    turn = run.turn
    assert turn is not None
    for word in text.split():
        await app.events.append(turn.stream, "delta", {"of": turn.message_id, "text": word})
        await asyncio.sleep(random.uniform(0, 0.05))  # the work of the agent
    await app.turns.commit_reply(turn.deployment, [turn.message_id], {"text": text.upper()})


# The test

Party = tuple[list[int], list["Process"], list["Process"]]


class Process:
    """A process that is started again when it was killed."""

    def __init__(self, database: str, *arguments: str, log: Path) -> None:
        self._command = [sys.executable, "-m", "queue_service", *arguments]
        quick = {"ADMISSION": "8s", "EXECUTION": "4s", "LEASE": "2s", "SWEEP_INTERVAL": "500ms"}
        self._env = {
            **os.environ,
            **{f"QUEUE_SERVICE_{name}": value for name, value in quick.items()},
            "QUEUE_SERVICE_DATABASE_URL": database,
        }
        self._log = log.open("ab")
        self.killed = 0
        self.start()

    def start(self) -> None:
        self._child = subprocess.Popen(self._command, env=self._env, stderr=self._log, stdout=self._log)

    async def kill(self) -> None:
        self._child.kill()
        await asyncio.to_thread(self._child.wait)
        self.killed += 1
        self.start()

    def end(self) -> None:
        self._child.send_signal(signal.SIGKILL)
        self._child.wait()
        self._log.close()


class Person:
    """Sends messages into a stream and notes all that comes back."""

    def __init__(self, number: int, address: str) -> None:
        self.stream = f"conv-{number % STREAMS}"
        self.chat = ChatClient(address)
        self.seen: list[Event] = []
        self.accepted: list[MessageReceipt] = []
        self.refused = 0
        self._number = number

    async def listen(self) -> None:
        async for event in self.chat.events():
            self.seen.append(event)

    async def talk(self, until: float) -> None:
        count = 0
        while time.monotonic() < until:
            count += 1
            sent = self.chat.send(self.stream, {"text": f"one two three from {self._number} the {count}th"})
            try:
                self.accepted.append(await sent)
            except Exception:  # noqa: BLE001 - it knows that it failed, which is all it is owed
                self.refused += 1
            await asyncio.sleep(random.uniform(0.2, 1.0))  # a person

    def has_seen_everything(self, head: int) -> bool:
        return bool(self.seen) and self.seen[-1].seq >= head


async def harm(proxies: list[Proxy], gateways: list[Process], workers: list[Process], until: float) -> Counter[str]:
    done: Counter[str] = Counter()
    while time.monotonic() < until:
        fault = random.choice(["cut", "half-close", "stall", "cut all", "kill a gateway", "kill a worker"])
        proxy = random.choice(proxies)
        done[fault] += 1
        match fault:
            case "cut":
                proxy.cut(0.3)
            case "cut all":
                proxy.cut(1.0)
            case "half-close":
                proxy.half_close(0.3)
            case "stall":
                await proxy.stall(random.uniform(0.5, 2))
            case "kill a gateway":
                await random.choice(gateways).kill()
            case _:
                await random.choice(workers).kill()
        await asyncio.sleep(BETWEEN_FAULTS)  # faults come so often
    return done


async def serves(port: int) -> bool:
    def ask() -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=2) as got:
            return bool(got.status == 200)
        return False

    return await asyncio.to_thread(ask)


@pytest.fixture
async def party(database: str, tmp_path: Path) -> AsyncIterator[Party]:
    ports = [free_port(), free_port()]
    gateways = [Process(database, "gateway", "--port", str(port), log=tmp_path / "gateways.log") for port in ports]
    workers = [
        Process(database, "worker", "-a", "tests.chaos.test_gateway:app", log=tmp_path / "workers.log")
        for _ in range(2)
    ]
    try:
        for port in ports:
            await eventually(lambda: serves(port), within=60)  # noqa: B023
        yield ports, gateways, workers
    finally:
        for each in [*gateways, *workers]:
            each.end()
        for log in ("gateways.log", "workers.log"):
            sys.stdout.write(f"{log}:\n{await asyncio.to_thread((tmp_path / log).read_text)}"[-3_000:] + "\n")


async def test_every_client_sees_its_streams_whole_and_every_accepted_message_has_one_ending(
    party: Party, conn: Connection
) -> None:
    ports, gateways, workers = party
    async with contextlib.AsyncExitStack() as stack:
        proxies = [await stack.enter_async_context(Proxy(port).open()) for port in ports]
        people = [Person(number, proxies[number % 2].address) for number in range(CLIENTS)]
        for person in people:
            await stack.enter_async_context(person.chat)
            await person.chat.connect({person.stream: 0})
        listening = [asyncio.create_task(person.listen()) for person in people]
        until = time.monotonic() + SECONDS
        harming = asyncio.create_task(harm(proxies, gateways, workers, until))
        await asyncio.gather(*(person.talk(until) for person in people))
        done = await harming
        await eventually(lambda: nothing_is_owed(conn), within=60)
        heads = dict(await rows(conn, "select stream, head from queue_service.streams"))
        late = [person for person in people if person.stream in heads]
        await eventually(lambda: all(each.has_seen_everything(heads[each.stream]) for each in late), within=60)
        for each in listening:
            each.cancel()
        await asyncio.gather(*listening, return_exceptions=True)
    tell(done, proxies, people)
    assert sum(len(person.accepted) for person in people) > CLIENTS
    for person in late:
        assert [event.seq for event in person.seen] == list(range(1, heads[person.stream] + 1))
        assert {event.stream for event in person.seen} == {person.stream}
    await assert_each_message_has_one_ending(conn, people)


async def nothing_is_owed(conn: Connection) -> bool:
    """Whether no event will come any more: the handler of a turn that has ended may still append to its stream."""
    return bool(
        await one(
            conn,
            "select not exists (select from queue_service.turn_markers) and not exists (select from queue_service.runs)",
        )
    )


async def assert_each_message_has_one_ending(conn: Connection, people: list[Person]) -> None:
    turns = dict(await rows(conn, "select message_id, kind from queue_service.turn_outcomes"))
    for person in people:
        endings = Counter(each for event in person.seen if event.terminal for each in event.body["message_ids"])
        assert set(endings.values()) <= {1}
        for receipt in person.accepted:
            assert turns[receipt.client_message_id] in {"reply", "error"}
            assert endings[receipt.client_message_id] == 1
    stored = await one(conn, "select count(*) from queue_service.events where kind = 'message'")
    assert stored == len(turns)
    assert await one(conn, "select count(*) from queue_service.events where terminal") == len(turns)


def tell(done: Counter[str], proxies: list[Proxy], people: list[Person]) -> None:
    faults = sum((Counter(proxy.faults) for proxy in proxies), Counter())
    endings = Counter(event.kind for person in people[:STREAMS] for event in person.seen if event.terminal)
    accepted, refused = sum(len(each.accepted) for each in people), sum(each.refused for each in people)
    sys.stdout.write(
        f"{dict(done)}, connections {dict(faults)}, {accepted} accepted, {refused} refused, {dict(endings)}\n"
    )
