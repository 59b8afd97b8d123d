"""Scenarios of the gateway: a process of its own, a thousand clients, and endings from elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from benchmarks.scenario import scenario
from queue_service import App, Turn

CLIENTS, STREAMS, RATE = 1_000, 100, 200
RESTARTED = 500


class Gateway:
    """A gateway's process."""

    def __init__(self, conninfo: str, port: int = 0) -> None:
        command = [sys.executable, "-m", "queue_service", "gateway", "--database-url", conninfo, "--port", str(port)]
        self._child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self._child.stderr is not None
        for line in self._child.stderr:
            if found := re.search(r"gateway on http://\S+:(\d+)\.", line):
                self.port = int(found[1])
                return
        raise AssertionError("the gateway did not start")

    @property
    def rss(self) -> float:
        """In MB, at its peak."""
        status = Path(f"/proc/{self._child.pid}/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) / 1024

    def stop(self) -> None:
        self._child.send_signal(signal.SIGTERM)
        self._child.wait()
        assert self._child.stderr is not None
        self._child.stderr.close()


class Reader:
    """The least that a client can be: it reads frames, and comes again after the pause it was told, from where it was."""

    def __init__(self, port: int, stream: str, heard: Callable[[Reader, dict[str, object]], None]) -> None:
        self.seqs: list[int] = []
        self.connected_at = 0.0
        self._port = port
        self._stream = stream
        self._heard = heard
        self._pause = 1.0
        self.greeted = asyncio.Event()

    async def run(self) -> None:
        while True:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
                await self._connected()
            await asyncio.sleep(self._pause)

    async def _connected(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            last = self.seqs[-1] if self.seqs else 0
            writer.write(
                f"GET /api/chat/events?cursor={self._stream}:{last} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
            )
            while True:
                frame = await reader.readuntil(b"\n\n")
                if b"event: welcome" in frame:
                    self.connected_at = time.perf_counter()
                    self._pause = int(re.findall(rb"retry: (\d+)", frame)[0]) / 1_000
                    self.greeted.set()
                elif b"id: " in frame:
                    event = json.loads(frame[frame.index(b"data: ") + 6 :])
                    self.seqs.append(event["seq"])
                    self._heard(self, event)
        finally:
            writer.close()


@asynccontextmanager
async def reading(
    port: int, count: int, heard: Callable[[Reader, dict[str, object]], None]
) -> AsyncIterator[list[Reader]]:
    """So many readers, connected."""
    readers = [Reader(port, f"s{number % STREAMS}", heard) for number in range(count)]
    running = []
    for reader in readers:
        running.append(asyncio.create_task(reader.run()))
        if len(running) % 50 == 0:
            await asyncio.gather(*(each.greeted.wait() for each in readers[: len(running)]))
    await asyncio.gather(*(reader.greeted.wait() for reader in readers))
    try:
        yield readers
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


@scenario
async def clients(app: App, count: int) -> dict[str, float]:
    """1,000 clients of one gateway, 200 events a second over 100 streams: from append to client."""
    number = min(CLIENTS, count // 50)
    events = min(20 * RATE, count // 5)
    taken: list[float] = []
    gateway = Gateway(app.conninfo)
    try:
        async with reading(gateway.port, number, lambda _, event: taken.append(_since(event))) as readers:
            await _append(app, events)
            watching = Counter(each % STREAMS for each in range(number))
            expected = sum(watching[each % STREAMS] for each in range(events))
            async with asyncio.timeout(30):
                while len(taken) < expected:
                    await asyncio.sleep(0.01)
            lost = sum(reader.seqs != list(range(1, len(reader.seqs) + 1)) for reader in readers)
            rss = gateway.rss
    finally:
        gateway.stop()
    cut = statistics.quantiles(taken, n=100)
    return {"p50 ms": cut[49], "p99 ms": cut[98], "lost or twice": lost + len(taken) - expected, "RSS MB": rss}


async def _append(app: App, events: int) -> None:
    """Appends at the rate."""
    begun, calls = time.perf_counter(), []
    for number in range(events):
        await asyncio.sleep(max(0.0, begun + number / RATE - time.perf_counter()))
        body = {"at": time.perf_counter()}
        calls.append(asyncio.create_task(app.events.append(f"s{number % STREAMS}", "delta", body)))
    await asyncio.gather(*calls)


def _since(event: dict[str, object]) -> float:
    body = event["body"]
    assert isinstance(body, dict)
    # The clock is the machine's, the same for every process.
    return 1_000 * (time.perf_counter() - float(body["at"]))


@scenario
async def replicas(app: App, count: int) -> dict[str, float]:
    """An ending stored by another process, to a client of this gateway."""
    samples = min(500, count // 50)
    seen: asyncio.Queue[float] = asyncio.Queue()

    def heard(_reader: Reader, event: dict[str, object]) -> None:
        if event["terminal"]:
            seen.put_nowait(time.perf_counter())

    taken = []
    gateway = Gateway(app.conninfo)
    try:
        async with reading(gateway.port, 1, heard):
            for number in range(samples):
                await app.turns.arm(Turn(deployment="d", message_id=f"m{number}", stream="s0"))
                begun = time.perf_counter()
                await app.turns.commit_reply("d", [f"m{number}"], {"text": "Hello."})
                taken.append(1_000 * (await seen.get() - begun))
                await asyncio.sleep(random.uniform(0, 0.02))
    finally:
        gateway.stop()
    cut = statistics.quantiles(taken, n=100)
    return {"p50 ms": cut[49], "p99 ms": cut[98]}


@scenario
async def restart(app: App, count: int) -> dict[str, float]:
    """A gateway is restarted under 500 clients: until each has what it missed, and over how long they came back."""
    number = min(RESTARTED, count // 100)
    gateway = Gateway(app.conninfo)
    try:
        async with reading(gateway.port, number, lambda _reader, _event: None) as readers:
            await asyncio.to_thread(gateway.stop)
            for stream in range(STREAMS):
                await app.events.append_many(f"s{stream}", [("delta", n) for n in range(5)])
            gateway = await asyncio.to_thread(Gateway, app.conninfo, gateway.port)
            begun = time.perf_counter()
            async with asyncio.timeout(30):
                while any(reader.seqs != [1, 2, 3, 4, 5] for reader in readers):
                    await asyncio.sleep(0.01)
            caught_up = time.perf_counter() - begun
            arrivals = sorted(reader.connected_at for reader in readers)
    finally:
        gateway.stop()
    return {"all caught up, seconds": caught_up, "spread of arrivals, seconds": arrivals[-1] - arrivals[0]}
