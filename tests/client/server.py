"""A gateway for tests of the client: HTTP/1.1 on a real socket, as `docs/gateway.md` says, and misbehaving on request."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

REASONS = {200: "OK", 202: "Accepted", 204: "No Content"}


@dataclass
class Answer:
    """What to do with a request. `hold` delays it; with `lost` the socket is closed instead of answering. `does`: the
    request is carried out all the same."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = None
    hold: asyncio.Event | None = None
    lost: bool = False
    does: bool = False


@dataclass
class Request:
    method: str
    path: str
    query: list[tuple[str, str]]
    headers: dict[str, str]
    body: Any
    at: float

    @property
    def name(self) -> str:
        return "history" if self.path.startswith("/api/sessions/") else self.path.rsplit("/", 1)[-1]

    @property
    def connection(self) -> str:
        return self.headers["x-connection-id"]

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.query if key == name]


class Line:
    """One response of events."""

    def __init__(self, number: int, request: Request, writer: asyncio.StreamWriter) -> None:
        self.id = f"c{number}"
        self.request = request
        self.streams: set[str] = set()
        self.is_over = asyncio.Event()
        self._writer = writer

    async def say(self, text: str) -> None:
        try:
            self._writer.write(text.encode())
            await self._writer.drain()
        except ConnectionError:
            self.is_over.set()

    @property
    def is_blocked(self) -> bool:
        """The client does not read what is sent to it, and the socket takes no more."""
        return self._writer.transport.get_write_buffer_size() > 0

    async def frame(self, name: str, data: Any, *, retry: int | None = None) -> None:
        hint = "" if retry is None else f"retry: {retry}\n"
        await self.say(f"event: {name}\n{hint}data: {json.dumps(data)}\n\n")

    async def welcome(self, number: str, *, heartbeat: float = 15.0, retry: int | None = None) -> None:
        self.id = number
        data = {"connection_id": number, "heartbeat": heartbeat, "streams": {}}
        await self.frame("welcome", data, retry=retry)

    async def event(self, event: dict[str, Any]) -> None:
        await self.say(f"id: {event['stream']}:{event['seq']}\ndata: {json.dumps(event)}\n\n")

    async def gap(self, stream: str, first: int, last: int, head: int) -> None:
        await self.frame("gap", {"stream": stream, "from": first, "to": last, "head": head})

    async def beat(self) -> None:
        await self.say(": beat\n\n")

    def finish(self) -> None:
        """The response ends as it should."""
        self.is_over.set()

    def cut(self) -> None:
        """The connection is gone."""
        self._writer.transport.abort()
        self.is_over.set()


class Gateway:
    """What it is to answer next is in `next`, by the name of the request (`events`, `send`, …; `history` for pages of a
    stream). While `is_silent`, what is appended is stored and announced to nobody."""

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[Request] = []
        self.lines: list[Line] = []
        self.next: defaultdict[str, deque[Answer]] = defaultdict(deque)
        self.always: dict[str, Answer] = {}
        self.streams: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        self.heads: Counter[str] = Counter()
        self.receipts: dict[str, dict[str, Any]] = {}
        self.is_silent = False
        self.heartbeat = 15.0
        self.retry: int | None = None
        self.greets = True
        self._tasks: set[asyncio.Task[None]] = set()

    # What tests say and ask

    async def append(self, stream: str, *kinds: str, body: Any = None) -> None:
        for kind in kinds:
            self.heads[stream] += 1
            seq = self.heads[stream]
            terminal = kind in {"reply", "error"}
            event = {"stream": stream, "seq": seq, "kind": kind, "body": body, "terminal": terminal}
            self.streams[stream].append(event | {"created_at": "2026-01-02T03:04:05.678901Z"})
            for line in self.lines:
                if stream in line.streams and not line.is_over.is_set() and not self.is_silent:
                    await line.event(self.streams[stream][-1])

    def trim(self, stream: str, upto: int) -> None:
        self.streams[stream] = [event for event in self.streams[stream] if event["seq"] > upto]

    @property
    def line(self) -> Line:
        """The latest."""
        return self.lines[-1]

    def asked(self, name: str) -> list[Request]:
        return [request for request in self.requests if request.name == name]

    def sent(self) -> list[str]:
        """The texts of all messages that were posted, whatever the answer."""
        return [request.body["body"]["text"] for request in self.asked("send")]

    # HTTP

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        # A client may go at any time, and so may a test.
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while (request := await self._request(reader)) is not None:
                self.requests.append(request)
                if not await self._answered(request, writer):
                    break
        self._tasks.discard(task)
        writer.close()

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _request(self, reader: asyncio.StreamReader) -> Request | None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.strip().split("\r\n")
        method, target, _ = first.split(" ")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        content = await reader.readexactly(int(headers.get("content-length", "0")))
        url = urlsplit(target)
        now = asyncio.get_running_loop().time()
        return Request(method, unquote(url.path), parse_qsl(url.query), headers, json.loads(content or b"null"), now)

    async def _answered(self, request: Request, writer: asyncio.StreamWriter) -> bool:
        """Whether the socket can be used again."""
        name = request.name
        answer = self.next[name].popleft() if self.next[name] else self.always.get(name)
        if answer is not None and answer.hold is not None:
            await answer.hold.wait()
        if name == "events" and (answer is None or answer.status == 200):
            await self._follow(request, writer)
            return False
        status, body = 200, None
        if answer is None or answer.does or (answer.status == 200 and answer.body is None):
            status, body = await self._do(name, request)
        if answer is not None and answer.lost:
            writer.transport.abort()
            return False
        if answer is not None and (answer.status != 200 or answer.body is not None):
            status, body = answer.status, answer.body or {"error": "as the test wants it", "field": None}
        await self._respond(writer, status, body, answer.headers if answer is not None else {})
        return True

    async def _respond(self, writer: asyncio.StreamWriter, status: int, body: Any, headers: dict[str, str]) -> None:
        content = b"" if status == 204 else body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"HTTP/1.1 {status} {REASONS.get(status, 'Refused')}", f"Content-Length: {len(content)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + content)
        await writer.drain()

    # The protocol

    async def _follow(self, request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        line = Line(len(self.lines) + 1, request, writer)
        self.lines.append(line)
        if self.greets:
            await line.welcome(line.id, heartbeat=self.heartbeat, retry=self.retry)
        for place in request.values("cursor"):
            stream, _, seq = place.rpartition(":")
            await self._replay(line, stream, int(seq))
        try:
            await line.is_over.wait()
        finally:
            line.is_over.set()

    async def _replay(self, line: Line, stream: str, after: int) -> None:
        line.streams.add(stream)
        if self.is_silent:
            return
        for event in list(self.streams[stream]):
            if event["seq"] > after:
                await line.event(event)

    async def _do(self, name: str, request: Request) -> tuple[int, Any]:
        if name == "history":
            return 200, self._page(request)
        line = next((line for line in self.lines if line.id == request.connection), None)
        if line is None or line.is_over.is_set():
            return 404, {"error": "You have no such connection (any more).", "field": "X-Connection-ID"}
        body = request.body
        if name == "reconnect":
            line.streams.clear()
            for stream, seq in body["streams"].items():
                await self._replay(line, stream, seq)
            return 200, {"streams": {stream: self.heads[stream] for stream in body["streams"]}}
        if name in {"watch", "switch"}:
            if name == "switch":
                line.streams.clear()
            await self._replay(line, body["stream"], body["cursor"])
            return 200, {"stream": body["stream"], "head": self.heads[body["stream"]]}
        if name == "send":
            return 202, await self._accept(body)
        if name == "unwatch":
            line.streams.discard(body["stream"])
        # What any of the others is answered with.
        return 200, {"stopped": ["m1"], "seq": 7, "stream": body["stream"], "state": "ended"}

    async def _accept(self, body: Any) -> Any:
        message_id = body["client_message_id"]
        if message_id not in self.receipts:
            await self.append(body["stream"], "message", body={"message_id": message_id, "body": body["body"]})
            self.receipts[message_id] = {
                "status": "accepted",
                "stream": body["stream"],
                "client_message_id": message_id,
                "seq": self.heads[body["stream"]],
            }
        return self.receipts[message_id]

    def _page(self, request: Request) -> Any:
        stream = request.path.removeprefix("/api/sessions/").removesuffix("/events")
        after, limit = int(request.values("after")[0]), int(request.values("limit")[0])
        events = [event for event in self.streams[stream] if event["seq"] > after]
        return {"stream": stream, "head": self.heads[stream], "events": events[:limit]}


@asynccontextmanager
async def serving(port: int = 0) -> AsyncIterator[Gateway]:
    gateway = Gateway()
    server = await asyncio.start_server(gateway.serve, "127.0.0.1", port)
    gateway.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield gateway
    finally:
        server.close()
        await gateway.close()
        await server.wait_closed()
