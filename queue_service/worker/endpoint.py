"""A few paths over HTTP/1.1, for probes: GET and HEAD, one request for each connection, and nothing that a caller can
hold up.

A connection gets so many bytes and so many seconds. When too many are open, the oldest is dropped and not the newest:
whoever opens many and sends nothing does not keep a probe out.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import NamedTuple

from queue_service.errors import ConfigError
from queue_service.logs import get_logger

log = get_logger(__name__)

MAX_HEAD = 8 * 1024
MAX_CONNECTIONS = 32
# For all of a connection: what it asks, what it is answered, and its end.
CONNECTION_SECONDS = 5.0


class HttpAnswer(NamedTuple):
    status: HTTPStatus
    body: bytes
    media_type: str = "text/plain; charset=utf-8"


Paths = Mapping[str, Callable[[], Awaitable[HttpAnswer]]]


class Endpoint:
    """Listens at once, so that a port that is taken is an error here: ConfigError. `port` 0 takes a free one."""

    def __init__(self, host: str, port: int) -> None:
        self._open: OrderedDict[asyncio.Task[None], None] = OrderedDict()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family)
        except OSError as refused:
            raise ConfigError(
                f"Probes cannot be answered on {host}:{port}: {refused.strerror or refused}. Stop what listens there, or "
                "choose another health port or host."
            ) from None
        host, port = self._socket.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def close(self) -> None:
        self._socket.close()

    async def run(self, paths: Paths) -> None:
        """Answer until cancelled. What is wrong with an answer is logged, and its caller gets 500."""
        async with asyncio.TaskGroup() as group:

            def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                if len(self._open) >= MAX_CONNECTIONS:
                    self._open.popitem(last=False)[0].cancel()

                def ended(task: asyncio.Task[None]) -> None:
                    self._open.pop(task, None)
                    writer.transport.abort()

                task = group.create_task(_serve(paths, reader, writer))
                self._open[task] = None
                task.add_done_callback(ended)

            # Another handle, which ends with the server: we may be called again.
            with contextlib.ExitStack() as unserved:
                listening = unserved.enter_context(self._socket.dup())
                server = await asyncio.start_server(accept, sock=listening, limit=MAX_HEAD)
                unserved.pop_all()
            try:
                # Not serve_forever, whose end waits for every connection's.
                await asyncio.get_running_loop().create_future()
            finally:
                server.close()
                for task in self._open:
                    task.cancel()


async def _serve(paths: Paths, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        async with asyncio.timeout(CONNECTION_SECONDS):
            verb, answer = await _answer(paths, reader)
            writer.write(_head(answer) + (b"" if verb == "HEAD" else answer.body))
            await writer.drain()
            writer.close()
            await writer.wait_closed()
    except (TimeoutError, OSError, EOFError):
        pass
    except Exception:
        # Whatever it is, the others are answered.
        log.exception("a connection of a probe has failed")


async def _answer(paths: Paths, reader: asyncio.StreamReader) -> tuple[str, HttpAnswer]:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError:
        return "GET", _text(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
    line = head.partition(b"\r\n")[0].decode("latin-1").split(" ")
    if len(line) != 3 or not line[2].startswith("HTTP/1."):
        return "GET", _text(HTTPStatus.BAD_REQUEST)
    verb, path = line[0], line[1].partition("?")[0]
    if path not in paths:
        return verb, _text(HTTPStatus.NOT_FOUND, f"There is {', '.join(paths)}.")
    if verb not in {"GET", "HEAD"}:
        return verb, _text(HTTPStatus.METHOD_NOT_ALLOWED)
    try:
        return verb, await paths[path]()
    except Exception:
        log.exception("a probe could not be answered", path=path)
        return verb, _text(HTTPStatus.INTERNAL_SERVER_ERROR)


def _text(status: HTTPStatus, more: str = "") -> HttpAnswer:
    return HttpAnswer(status, f"{status.phrase}. {more}".strip().encode() + b"\n")


def _head(answer: HttpAnswer) -> bytes:
    allow = "Allow: GET, HEAD\r\n" if answer.status == HTTPStatus.METHOD_NOT_ALLOWED else ""
    return (
        f"HTTP/1.1 {answer.status.value} {answer.status.phrase}\r\n"
        f"Content-Type: {answer.media_type}\r\nContent-Length: {len(answer.body)}\r\n{allow}"
        "Cache-Control: no-store\r\nConnection: close\r\n\r\n"
    ).encode()
