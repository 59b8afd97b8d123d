"""The protocol (`docs/gateway.md`) as requests and frames. An answer is what was asked for, or an error that says what came
instead; nothing here tries twice.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import quote

import httpx2
import msgspec

from queue_service.client.timing import Timing
from queue_service.errors import ConfigError, PayloadRefused, SendFailed
from queue_service.events.model import Event

T = TypeVar("T")

# Events in a page of the history; the gateway gives 1,000 at most.
HISTORY_LIMIT = 500
# Servers and proxies refuse long URLs; what does not fit goes with the POST `reconnect`, as all is.
LONGEST_QUERY = 4_000
NO_TIMEOUT = httpx2.Timeout(None)


class Welcome(msgspec.Struct, frozen=True):
    connection_id: str
    heartbeat: float


class Gap(msgspec.Struct, frozen=True, rename={"first": "from", "last": "to"}):
    stream: str
    first: int
    last: int
    head: int


class End(msgspec.Struct, frozen=True):
    stream: str
    head: int


class Goodbye(msgspec.Struct, frozen=True):
    reason: str = "no reason given"


class HistoryPage(msgspec.Struct, frozen=True):
    head: int
    events: list[Event]


class Watching(msgspec.Struct, frozen=True):
    head: int


class Unsent(msgspec.Struct, frozen=True):
    taken_back: bool


class Stopped(msgspec.Struct, frozen=True):
    stopped: list[str]


class Stored(msgspec.Struct, frozen=True):
    seq: int


class StateOf(msgspec.Struct, frozen=True):
    state: str


class _Refusal(msgspec.Struct, frozen=True):
    error: str
    field: str | None = None


class Pulse(httpx2.AsyncByteStream):
    """The bytes of a response, each chunk awaited for `limit` seconds at most: heartbeats are comments, which whoever reads
    events does not see. Time that the reader of this takes does not count."""

    def __init__(self, stream: httpx2.AsyncByteStream, limit: float) -> None:
        self.limit = limit
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        chunks = aiter(self._stream)
        while True:
            try:
                async with asyncio.timeout(self.limit):
                    chunk = await anext(chunks)
            except StopAsyncIteration:
                return
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


class Wire:
    def __init__(self, http: httpx2.AsyncClient, url: str, headers: Mapping[str, str], timing: Timing) -> None:
        if httpx2.URL(url).scheme not in {"http", "https"} or not httpx2.URL(url).host:
            raise ConfigError(f"The gateway's URL begins with http:// or https://, unlike {url!r}.")
        self._http = http
        self._url = url.rstrip("/")
        self._headers = dict(headers)
        self._timing = timing

    async def post(self, name: str, body: bytes, connection: str, answer: type[T]) -> T:
        """POST once. Raises SendFailed."""
        headers = self._headers | {"Content-Type": "application/json", "X-Connection-ID": connection}
        request = self._http.build_request(
            "POST", f"{self._url}/api/chat/{name}", content=body, headers=headers, timeout=NO_TIMEOUT
        )
        return await self._answer(request, name, answer)

    async def history(self, stream: str, after: int) -> HistoryPage:
        """Stored events after a cursor. Raises SendFailed."""
        url = f"{self._url}/api/sessions/{quote(stream, safe='')}/events"
        params = {"after": after, "limit": HISTORY_LIMIT}
        request = self._http.build_request("GET", url, params=params, headers=self._headers, timeout=NO_TIMEOUT)
        return await self._answer(request, "events", HistoryPage)

    @contextlib.asynccontextmanager
    async def events(self, cursors: Mapping[str, int]) -> AsyncIterator[tuple[httpx2.EventSource, Pulse] | None]:
        """The frames of a new connection, or None if all of its streams have ended. Raises SendFailed."""
        places = httpx2.QueryParams({"cursor": [f"{stream}:{seq}" for stream, seq in cursors.items()]})
        request = self._http.build_request(
            "GET",
            f"{self._url}/api/chat/events",
            params=places if len(str(places)) <= LONGEST_QUERY else None,
            headers={"Accept": "text/event-stream", "Cache-Control": "no-store"} | self._headers,
            timeout=NO_TIMEOUT,
        )
        with _failing_as("events"):
            async with asyncio.timeout(self._timing.answer_timeout):
                response = await self._http.send(request, stream=True)
        try:
            if response.status_code == httpx2.codes.NO_CONTENT:
                yield None
                return
            if response.status_code != httpx2.codes.OK:
                with _failing_as("events"):
                    async with asyncio.timeout(self._timing.answer_timeout):
                        await response.aread()
                raise _refused("events", response)
            assert isinstance(response.stream, httpx2.AsyncByteStream)
            response.stream = pulse = Pulse(response.stream, self._timing.answer_timeout)
            # An event may be as large as the database stores them; to refuse it would be to meet it again for ever.
            yield httpx2.EventSource(response, max_event_size=None), pulse
        finally:
            await response.aclose()

    async def _answer(self, request: httpx2.Request, what: str, answer: type[T]) -> T:
        with _failing_as(what):
            async with asyncio.timeout(self._timing.answer_timeout):
                response = await self._http.send(request)
        if not response.is_success:
            raise _refused(what, response)
        try:
            return msgspec.json.decode(response.content, type=answer)
        except (msgspec.DecodeError, UnicodeDecodeError) as wrong:
            raise SendFailed(what, f"its answer cannot be understood: {wrong}.") from wrong


def encoded(body: Mapping[str, Any]) -> bytes:
    """JSON. Raises PayloadRefused."""
    try:
        return msgspec.json.encode(body)
    except (TypeError, ValueError, OverflowError, RecursionError) as refused:
        raise PayloadRefused(f"This cannot be sent, for it is not JSON: {refused}.") from None


@contextlib.contextmanager
def _failing_as(what: str) -> Iterator[None]:
    try:
        yield
    except TimeoutError as late:
        raise SendFailed(what, "it did not answer in time.") from late
    except httpx2.RequestError as lost:
        raise SendFailed(what, f"{type(lost).__name__}, {lost or 'without a word'}.") from lost


def _refused(what: str, response: httpx2.Response) -> SendFailed:
    try:
        said = msgspec.json.decode(response.content, type=_Refusal)
    except (msgspec.DecodeError, UnicodeDecodeError):
        said = _Refusal(response.reason_phrase)
    return SendFailed(
        what,
        f"{response.status_code} {said.error}",
        status=response.status_code,
        field=said.field,
        retry_after=_seconds(response.headers.get("Retry-After", "")),
    )


def _seconds(retry_after: str) -> float:
    """Of a Retry-After header, which is a number of seconds or a date; 0 where it is neither."""
    try:
        return max(0.0, float(retry_after)) if retry_after[:1].isdigit() else _seconds_until(retry_after)
    except (ValueError, OverflowError):
        return 0.0


def _seconds_until(date: str) -> float:
    then = parsedate_to_datetime(date)
    return max(0.0, (then.replace(tzinfo=then.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
