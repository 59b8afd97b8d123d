"""A server that speaks the gateway's protocol as a test tells it to, and remembers what was asked of it."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import queue_service.gateway
from tests.support import eventually

STATIC = Path(queue_service.gateway.__file__).parent / "static"
TYPES = {".js": "text/javascript", ".css": "text/css", ".html": "text/html"}


@dataclass
class Answer:
    """To one request. It is given once `held` is set."""

    status: int = 200
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    held: asyncio.Event | None = None


@dataclass
class Request:
    name: str
    body: Any
    headers: Mapping[str, str]
    query: Mapping[str, list[str]]


class Connection:
    """An event stream that is open."""

    def __init__(self, writer: asyncio.StreamWriter, request: Request, connection_id: str) -> None:
        self.id = connection_id
        self.request = request
        self._writer = writer

    def frame(self, data: Any, *, event: str | None = None, id: str | None = None, retry: int | None = None) -> None:  # noqa: A002
        fields = {"retry": retry, "event": event, "id": id, "data": json.dumps(data)}
        text = "".join(f"{name}: {value}\n" for name, value in fields.items() if value is not None)
        self._writer.write(f"{text}\n".encode())

    def event(self, seq: int, kind: str = "delta", body: Any = None, *, stream: str = "s") -> None:
        self.frame(event(seq, kind, body, stream=stream), id=f"{stream}:{seq}")

    def gap(self, first: int, last: int, head: int) -> None:
        self.frame({"stream": "s", "from": first, "to": last, "head": head}, event="gap", id=f"s:{last}")

    def drop(self) -> None:
        self._writer.transport.abort()


def event(seq: int, kind: str = "delta", body: Any = None, *, stream: str = "s") -> dict[str, Any]:
    terminal = kind in {"reply", "error"}
    return {"stream": stream, "seq": seq, "kind": kind, "body": body, "terminal": terminal, "created_at": None}


class Scripted:
    def __init__(self) -> None:
        self.address = ""
        self.requests: list[Request] = []
        self.connections: list[Connection] = []
        self.history: list[dict[str, Any]] = []
        self.state = "active"
        self.heartbeat = 15.0
        self._answers: defaultdict[str, deque[Answer]] = defaultdict(deque)
        self._accepted: list[str] = []
        self._handling: set[asyncio.Task[None]] = set()

    def will(self, name: str, *answers: Answer) -> None:
        """The next answers to requests of this name, instead of the usual ones."""
        self._answers[name].extend(answers)

    def hold(self, name: str, answer: Answer | None = None) -> asyncio.Event:
        """The next answer is given when this event is set."""
        held = asyncio.Event()
        self.will(name, Answer(held=held) if answer is None else Answer(answer.status, answer.body, held=held))
        return held

    def asked(self, name: str) -> list[Request]:
        return [request for request in self.requests if request.name == name]

    @property
    def texts(self) -> list[str]:
        """What was sent, as often as it was."""
        return [request.body["body"]["text"] for request in self.asked("send")]

    async def connected(self, count: int = 1) -> Connection:
        """The connection of this number."""
        await eventually(lambda: len(self.connections) >= count, within=20)
        return self.connections[count - 1]

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        server = await asyncio.start_server(self._handle, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        self.address = f"http://{host}:{port}"
        try:
            yield
        finally:
            server.close()
            for handling in self._handling:
                handling.cancel()
            await asyncio.gather(*self._handling, return_exceptions=True)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handling = asyncio.current_task()
        assert handling is not None
        self._handling.add(handling)
        handling.add_done_callback(self._handling.discard)
        with closing(writer.transport), suppress(ConnectionError, asyncio.IncompleteReadError):
            request, path = await _read(reader)
            if path.startswith("/api/"):
                self.requests.append(request)
                await self._api(request, reader, writer)
            else:
                file = STATIC / Path(path).name
                known = file.is_file()
                _write(
                    writer, 200, TYPES.get(file.suffix, "text/html"), file.read_bytes() if known else b"<!doctype html>"
                )
            await writer.drain()

    async def _api(self, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        scripted = self._answers[request.name]
        answer = scripted.popleft() if scripted else Answer()
        if answer.held is not None:
            await answer.held.wait()
        if answer.status == 0:
            writer.transport.abort()
        elif request.name == "events" and answer.status == 200:
            await self._stream(request, reader, writer)
        else:
            body = answer.body if answer.body is not None else self._usual(request, answer.status)
            status = 202 if request.name == "send" and answer.status == 200 else answer.status
            _write(writer, status, "application/json", json.dumps(body).encode(), answer.headers)

    async def _stream(self, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        connection = Connection(writer, request, f"c{len(self.connections) + 1}")
        welcome = {"connection_id": connection.id, "heartbeat": self.heartbeat, "streams": {}}
        connection.frame(welcome, event="welcome", retry=20)
        self.connections.append(connection)
        await reader.read()

    def _usual(self, request: Request, status: int) -> Any:
        if status >= 400:
            return {"error": f"Refused with {status}.", "field": None}
        if request.name == "send":
            message_id = request.body["client_message_id"]
            if message_id not in self._accepted:
                self._accepted.append(message_id)
            return {"status": "accepted", "client_message_id": message_id, "seq": self._accepted.index(message_id) + 1}
        head = self.history[-1]["seq"] if self.history else 0
        if request.name == "history":
            after, limit = int(request.query["after"][0]), int(request.query["limit"][0])
            page = [each for each in self.history if each["seq"] > after][:limit]
            return {"stream": "s", "head": head, "events": page}
        return {"stream": "s", "state": self.state, "head": head, "streams": {}, "stopped": []}


async def _read(reader: asyncio.StreamReader) -> tuple[Request, str]:
    line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
    headers = {name.lower(): value for name, _, value in (each.partition(": ") for each in lines)}
    data = await reader.readexactly(int(headers.get("content-length", 0)))
    target = urlsplit(line.split()[1])
    path = unquote(target.path)
    name = Path(path).name
    if path.startswith("/api/sessions/") and name == "events":
        name = "history"
    return Request(name, json.loads(data) if data else None, headers, parse_qs(target.query)), path


def _write(
    writer: asyncio.StreamWriter, status: int, kind: str, body: bytes, headers: Mapping[str, str] | None = None
) -> None:
    every = {"Content-Type": kind, "Content-Length": str(len(body)), "Connection": "close", **(headers or {})}
    if status == 204:
        body = b""
        every.pop("Content-Length")
    head = "".join(f"{name}: {value}\r\n" for name, value in every.items())
    writer.write(f"HTTP/1.1 {status} Said\r\n{head}\r\n".encode() + body)
