"""The product of the pages, in a storm: workers, agents and gateways killed, and all of them restarted one after the other.
Every turn gets one ending with a reason that is true, none is answered twice, the order of each conversation and channel is
kept, and what a step does is done once.
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
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil  # type: ignore[import-untyped]
import pytest

from queue_service import App
from queue_service.db.execute import Connection
from tests.support import eventually, free_port, one, rows

TURNS = int(os.environ.get("QUEUE_SERVICE_CHAOS_TURNS", "150"))
CONVERSATIONS = CHANNELS = 8
AT_ONCE = 40
BETWEEN_FAULTS = 0.4
# A slow machine would otherwise be hit more often for each turn, and so become slower.
FAULTS = TURNS // 2
PRODUCT = Path(__file__).parents[2] / "examples" / "product"

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240 + TURNS)]


class Process:
    """One that is started again when it was killed, or asked to end."""

    def __init__(self, *arguments: str, env: dict[str, str], log: Path) -> None:
        self._command, self._env = [sys.executable, "-m", *arguments], env
        self._log = log.open("ab")
        self.start()

    def start(self) -> None:
        self.child = subprocess.Popen(
            self._command, env=self._env, cwd=PRODUCT, stdout=self._log, stderr=self._log, start_new_session=True
        )

    async def again(self, number: signal.Signals) -> None:
        self.child.send_signal(number)
        await asyncio.to_thread(self.child.wait)
        self.start()

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.child.kill()
        self.child.wait()
        self._log.close()

    def agents(self) -> list[Any]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return [
                each for each in psutil.Process(self.child.pid).children() if "agent.py" in " ".join(each.cmdline())
            ]
        return []


class Product:
    """Two gateways, three workers, and the bot platform, which nobody harms."""

    def __init__(self, database: str, logs: Path) -> None:
        self.ports = [free_port(), free_port()]
        platform = free_port()
        self.platform = f"http://127.0.0.1:{platform}"
        quick = {
            "LEASE": "3s",
            "POLL_INTERVAL": "200ms",
            "SWEEP_INTERVAL": "300ms",
            # No message is to be given up while the storm lasts, however slow the machine.
            "ADMISSION": "600s",
            "DRAIN_TIMEOUT": "3s",
        }
        env = {
            **os.environ, **{f"QUEUE_SERVICE_{name}": value for name, value in quick.items()},
            "QUEUE_SERVICE_DATABASE_URL": database, "PLATFORM_URL": self.platform,
            "QUEUE_SERVICE_LOG_LEVEL": "error", "QUEUE_SERVICE_MAX_LOSSES": "100",
        }  # fmt: skip
        serve = ["uvicorn", "--log-level", "error", "--timeout-graceful-shutdown", "3", "--port"]
        self._platform = Process(*serve, str(platform), "platform_stub:web", env=env, log=logs / "platform.log")
        self.gateways = [
            Process(*serve, str(port), "product:web", env=env, log=logs / f"gateway {port}.log") for port in self.ports
        ]
        work = ["queue_service", "worker", "-a", "product:app", "-q", "agents:20", "-q", "thread_response:10"]
        self.workers = [Process(*work, env=env, log=logs / f"worker {number}.log") for number in range(3)]
        self.faults: Counter[str] = Counter()

    def end(self) -> None:
        for each in (*self.workers, *self.gateways, self._platform):
            for agent in each.agents():
                with contextlib.suppress(psutil.NoSuchProcess):
                    agent.kill()
            each.end()

    async def disturb(self, dice: random.Random) -> None:
        for _ in range(FAULTS):
            await asyncio.sleep(BETWEEN_FAULTS)  # the pace of the storm
            agents = [agent for worker in self.workers for agent in worker.agents()]
            fault = dice.choices(["agent", "worker", "gateway", "restart"], [8, 1, 1, 1])[0]
            self.faults[fault] += 1
            match fault:
                case "agent":
                    with contextlib.suppress(psutil.NoSuchProcess):
                        if agents:
                            dice.choice(agents).kill()
                case "worker":
                    await dice.choice(self.workers).again(signal.SIGKILL)
                case "gateway":
                    await dice.choice(self.gateways).again(signal.SIGKILL)
                case "restart":
                    # A deploy: one after the other, each in good order.
                    for each in (*self.workers, *self.gateways):
                        await each.again(signal.SIGTERM)


@asynccontextmanager
async def running(database: str, logs: Path) -> AsyncIterator[Product]:
    product = Product(database, logs)
    try:
        yield product
    finally:
        product.end()


class People:
    """Each message is sent until it is taken, by whichever gateway; of one conversation, in its order."""

    def __init__(self, product: Product, dice: random.Random, http: httpx2.AsyncClient) -> None:
        self._product = product
        self._dice = dice
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._http = http

    async def talk(self, number: int, count: int) -> None:
        for n in range(count):
            async with self._slots:
                await self._say(number, f"m{number}-{n}", f"{'book ' if n % 4 == 1 else ''}one two {n}")

    async def _say(self, number: int, message_id: str, text: str) -> None:
        if number < CONVERSATIONS:
            path = "/api/chat/send"
            body: dict[str, Any] = {"stream": f"page/{number}", "client_message_id": message_id, "body": {"text": text}}
        else:
            path = "/bot"
            body = {"channel": f"c{number}", "id": message_id, "user": "ada", "text": text}
        while True:
            port = self._dice.choice(self._product.ports)
            with contextlib.suppress(httpx2.TransportError):
                answer = await self._http.post(f"http://127.0.0.1:{port}{path}", json=body)
                if answer.status_code == 202:
                    return
                assert answer.status_code >= 429, answer.text
            await asyncio.sleep(0.1)  # until somebody listens again


def judged(events: list[tuple[Any, ...]]) -> Counter[str]:
    """How the turns ended. In each stream the endings come in the order of the messages, one for each."""
    said: defaultdict[str, list[str]] = defaultdict(list)
    ended: defaultdict[str, list[str]] = defaultdict(list)
    how: Counter[str] = Counter()
    for stream, kind, terminal, body in events:
        if kind == "message":
            said[stream].append(body["message_id"])
        elif terminal:
            ended[stream] += body["message_ids"]
            how[body.get("code", kind)] += 1
            if kind == "error":
                assert body["reason"], body
    assert dict(ended) == dict(said)
    return how


async def test_the_product_survives_a_storm(database: str, conn: Connection, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    dice = random.Random(seed)
    begun = time.monotonic()
    parties = CONVERSATIONS + CHANNELS
    async with running(database, tmp_path) as product:
        storm = asyncio.create_task(product.disturb(dice))
        async with httpx2.AsyncClient(timeout=10) as http, asyncio.TaskGroup() as group:
            people = People(product, dice, http)
            for number in range(parties):
                group.create_task(people.talk(number, TURNS // parties))
        owed = "select count(*) = 0 from queue_service.turn_markers"
        await eventually(lambda: one(conn, owed), within=120 + TURNS / 4)
        storm.cancel()
        await asyncio.wait([storm])
        undelivered = "select count(*) = 0 from queue_service.runs where queue = 'thread_response'"
        await eventually(lambda: one(conn, undelivered), within=60)
        async with httpx2.AsyncClient() as http:
            shown = (await http.get(f"{product.platform}/messages")).json()

    how = judged(await rows(conn, "select stream, kind, terminal, body from queue_service.events order by stream, seq"))
    print(  # noqa: T201 - the counts are what this is about
        f"\nseed {seed} | {sum(how.values())} turns | {dict(product.faults)} | {dict(how)} | {time.monotonic() - begun:.0f} s"
    )
    assert sum(how.values()) == TURNS // parties * parties
    # An agent that is killed before it is ready could not be started.
    assert set(how) <= {"reply", "worker_died", "worker_startup_failed"}
    assert how["reply"] > 0
    # What a step did, it did once, and it was done for each answer that says so.
    booked = await rows(conn, "select message_id, count(*) from bookings group by message_id")
    assert {count for _, count in booked} == {1}
    # Each channel shows what its turns ended with, in the order of its messages.
    for channel in {each["channel"] for each in shown}:
        keys = [int(each["key"].split("-")[1]) for each in shown if each["channel"] == channel]
        assert keys == sorted(keys) == list(range(TURNS // parties))
    endings = dict(
        await rows(
            conn,
            "select body -> 'message_ids' ->> 0, coalesce(body ->> 'text', body ->> 'message') from queue_service.events "
            "where terminal and body ->> 'platform' = 'chat'",
        )
    )
    assert {each["key"]: each["texts"][-1] for each in shown} == endings


async def test_the_agents_take_what_is_said_meanwhile(database: str, tmp_path: Path) -> None:
    """Steering, an interrupt and a crash, as a page sees them, in the quiet."""
    async with running(database, tmp_path) as product, App(database) as app, httpx2.AsyncClient(timeout=10) as http:

        async def send(message_id: str, text: str, **more: Any) -> None:
            body = {"stream": "page/1", "client_message_id": message_id, "body": {"text": text}, **more}
            for _ in range(100):
                with contextlib.suppress(httpx2.TransportError):
                    answer = await http.post(f"http://127.0.0.1:{product.ports[0]}/api/chat/send", json=body)
                    assert answer.status_code == 202, answer.text
                    return
                await asyncio.sleep(0.1)  # until it listens

        await send("m1", " ".join(["word"] * 100))
        await eventually(lambda: _has(app, "delta"), within=30)
        await send("m2", "and more", mode="steer")
        first, second = [await app.turns.wait("page/1", each, timeout=30) for each in ("m1", "m2")]
        assert first.body is not None
        assert first.body["text"].endswith("word and more")
        assert second.body is not None
        assert second.body["together"] == ["m1", "m2"]
        await send("m3", "crash")
        assert (await app.turns.wait("page/1", "m3", timeout=30)).code == "worker_died"
        await send("m4", "again")
        assert (await app.turns.wait("page/1", "m4", timeout=30)).kind == "reply"


async def _has(app: App, kind: str) -> bool:
    return any(event.kind == kind for event in await app.events.read("page/1"))
