"""Workers as processes."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

import pytest

from queue_service import App
from tests.worker.worker_process import WorkerProcess

Start = Callable[..., subprocess.Popen[bytes]]
Observe = Callable[..., Awaitable[WorkerProcess]]


@pytest.fixture
def start(database: str) -> Iterator[Start]:
    """Starts `queue-service worker` as a process, with quick clocks."""
    started: list[subprocess.Popen[bytes]] = []
    paces = {"LEASE": "2s", "POLL_INTERVAL": "100ms", "SWEEP_INTERVAL": "100ms", "DRAIN_TIMEOUT": "60s"}
    quick = {f"QUEUE_SERVICE_{name}": value for name, value in paces.items()}

    def begin(*arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "queue_service", "worker", "-a", "tests.worker.tasks_for_tests:app"]
        env = {**os.environ, **quick, "QUEUE_SERVICE_DATABASE_URL": database, **environment}
        started.append(
            subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
        )
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def observe() -> Iterator[Observe]:
    """Starts a worker process on a database, with more arguments if there are any, and waits until it works."""
    running: list[WorkerProcess] = []

    async def start_one(database: str, *arguments: str) -> WorkerProcess:
        running.append(WorkerProcess(database, *arguments))
        await running[-1].started()
        return running[-1]

    yield start_one
    for each in running:
        each.end()


@dataclass
class Stalling:
    """Runs so short that many are claimed ahead, and behind them as many that wait until `release` is set. `blocked` are
    the numbers of those that wait in a handler."""

    ids: list[int]
    blocked: list[int] = field(default_factory=list)
    release: asyncio.Event = field(default_factory=asyncio.Event)


async def short_then_slow(app: App) -> Stalling:
    """4,000 runs, of which the second half waits."""

    @app.task(name="short then slow")
    async def handle(n: int) -> None:
        if n >= 2_000:
            runs.blocked.append(n)
            await runs.release.wait()
        elif n % 50 == 0:
            await asyncio.sleep(0)

    runs = Stalling(await app.enqueue_many("short then slow", [{"n": n} for n in range(4_000)]))
    return runs
