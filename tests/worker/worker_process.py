"""A worker in a process of its own, as it is started in earnest: its answers to probes, and its log."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from tests.support import eventually


class Response(NamedTuple):
    status: int
    body: Any
    headers: dict[str, str]

    @property
    def checks(self) -> dict[str, str]:
        checks: dict[str, str] = self.body["checks"]
        return checks


async def ask(url: str, path: str, *, verb: str = "GET", timeout: float = 60.0) -> Response:
    return await asyncio.to_thread(asked, url, path, verb=verb, timeout=timeout)


def asked(url: str, path: str, *, verb: str = "GET", timeout: float = 60.0) -> Response:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=timeout)
    try:
        connection.request(verb, path)
        answer = connection.getresponse()
        content = answer.read()
        is_json = answer.headers["content-type"] == "application/json" and content
        body = json.loads(content) if is_json else content.decode()
        return Response(answer.status, body, {name.lower(): value for name, value in answer.headers.items()})
    finally:
        connection.close()


class WorkerProcess:
    def __init__(self, database: str, *arguments: str) -> None:
        paces = ["--lease", "5s", "--poll-interval", "100ms", "--sweep-interval", "200ms"]
        command = [sys.executable, "-m", "queue_service", "worker", "-a", "tests.worker.tasks_for_tests:app"]
        self.process = subprocess.Popen(
            [*command, *paces, "--health-port", "0", "--log-format", "json", *arguments],
            env={**os.environ, "QUEUE_SERVICE_DATABASE_URL": database}, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = ""

    def events(self, event: str) -> list[dict[str, Any]]:
        """What it has logged so far under this name."""
        return [each for each in self._events() if each["event"] == event]

    async def started(self) -> None:
        await eventually(lambda: self.events("worker started") or self.process.poll() is not None, within=30)
        assert self.process.poll() is None, "".join(self.lines)
        self.url = self.events("worker started")[0]["health"]

    async def says(self, path: str, status: int, *, within: float = 30) -> Response:
        """What it answers once it answers with this status."""

        async def answered() -> Response | None:
            answer = await ask(self.url, path)
            return answer if answer.status == status else None

        return await eventually(answered, within=within)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()

    def _events(self) -> Iterator[dict[str, Any]]:
        for line in list(self.lines):
            if line.startswith("{"):
                yield json.loads(line)

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(iter(self.process.stderr.readline, ""))
