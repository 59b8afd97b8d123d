"""The client that programs hold. Its tasks live and die together: whatever ends one of them ends `events()`, every future
and `connect`, and each of these says why.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import httpx2

from queue_service.client.buffer import Buffer
from queue_service.client.model import MessageReceipt, State
from queue_service.client.outbox import FileOutbox, Outbox
from queue_service.client.sending import ATTEMPTS, Sender, is_forgotten, may_pass
from queue_service.client.stream import EventStream
from queue_service.client.timing import Timing
from queue_service.client.tracks import Delivered, Tracks
from queue_service.client.wire import StateOf, Stopped, Stored, Unsent, Watching, Wire, encoded
from queue_service.errors import ConfigError, NotConnected, PayloadRefused, SendFailed
from queue_service.events.model import Event
from queue_service.logs import get_logger

log = get_logger(__name__)

T = TypeVar("T")


class ChatClient:
    """A client of one gateway, for one event loop and one reader of `events()`.

    `outbox` is a file that keeps messages until they are answered, also after this process is gone; without it they are in
    memory. At most `cap` messages wait; at most `buffer` events that were not taken are held, and while there are that
    many, the socket is not read. `on_open` and `on_close` are called when the connection is ready and when it is no more;
    what they raise ends the client. `http` is a client of your own, which stays open. Durations are in seconds:
    `heartbeat_grace` is how many of the gateway's heartbeats may be missing before the connection counts as dead.
    """

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        outbox: str | Path | None = None,
        cap: int = 100,
        buffer: int = 500,
        on_open: Callable[[], None] | None = None,
        on_close: Callable[[], None] | None = None,
        http: httpx2.AsyncClient | None = None,
        first_pause: float = 0.5,
        longest_pause: float = 30.0,
        heartbeat_grace: float = 3.0,
        answer_timeout: float = 10.0,
    ) -> None:
        if min(cap, buffer) < 1 or min(first_pause, longest_pause, heartbeat_grace, answer_timeout) <= 0:
            raise ConfigError("cap, buffer, pauses, heartbeat_grace and answer_timeout are positive.")
        self._timing = Timing(
            first_pause=first_pause,
            longest_pause=longest_pause,
            heartbeat_grace=heartbeat_grace,
            answer_timeout=answer_timeout,
        )
        used_http = httpx2.AsyncClient() if http is None else http
        self._own_http = used_http if http is None else None
        self._wire = Wire(used_http, url, headers or {}, self._timing)
        self._outbox = Outbox() if outbox is None else FileOutbox(Path(outbox))
        self._buffer: Buffer[Delivered] = Buffer(buffer)
        self._tracks = Tracks(self._wire, self._buffer, self._timing)
        self._sender = Sender(self._wire, self._outbox, self._timing, cap=cap, forgotten=self._forget)
        self._stream = EventStream(
            self._wire, self._tracks, self._sender, self._timing, on_open=on_open, on_close=on_close
        )
        self._running: asyncio.Task[None] | None = None
        # Changes to what is watched, in the order they were asked for.
        self._watching = asyncio.Lock()
        self._failure: BaseException | None = None
        self._is_closed = False
        #: Messages that an earlier client left in the outbox, by client_message_id; there from `connect` on.
        self.recovered: dict[str, asyncio.Future[MessageReceipt]] = {}

    # Life

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def connect(self, streams: Mapping[str, int] | None = None, *, timeout: float = 30.0) -> None:
        """Watch these streams, each after the last `seq` that was seen of it, and return once the connection is open. It
        is kept open from then on. Raises NotConnected if it is not open in time, or is refused; it may be called again
        then, unless the client has ended."""
        if self._running is not None or self._is_closed:
            raise ConfigError("connect is for a client that is neither connected nor closed.")
        for stream, cursor in (streams or {}).items():
            self._tracks.add(stream, cursor).is_settled = True
        self.recovered |= self._sender.recover()
        self._stream.begin()
        self._running = asyncio.create_task(self._run(), name="chat client")
        try:
            async with asyncio.timeout(timeout):
                await self._stream.opened()
        except NotConnected:
            if self._failure is not None:
                raise self._failure from None
            raise
        except BaseException as why:
            await self._stop()
            self._stream.close()
            if isinstance(why, TimeoutError):
                raise NotConnected(f"There is no connection after {timeout:g} s: {self._stream.why}.") from None
            raise

    async def close(self) -> None:
        """End everything. `events()` ends after what was read already. What is not sent fails with SendFailed, and stays in
        the outbox, if there is one, for the next client."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            await self._stop()
            self._end(None, why="the client was closed")
        finally:
            self._outbox.close()
            if self._own_http is not None:
                await self._own_http.aclose()

    @property
    def state(self) -> State:
        """`connecting`, `open`, or `closed`: before `connect`, and after the end."""
        return self._stream.state

    # Events

    @property
    def cursors(self) -> dict[str, int]:
        """The last `seq` that `events()` gave of each watched stream: what to `connect` with next time."""
        return self._tracks.given()

    async def events(self) -> AsyncGenerator[Event, None]:
        """Events as they come, of each stream in order and once. Ends when all streams have ended, or with `close`;
        raises what ended the client, if anything went wrong."""
        while (delivered := await self._buffer.take()) is not None:
            track, event, cursor = delivered
            # What was read of a stream before it was left is wanted by nobody.
            if self._tracks.is_current(track):
                track.given = cursor
                yield event

    async def watch(self, stream: str, cursor: int = 0) -> None:
        """Watch one more stream, after a cursor; one that is watched already stays where it is. Waits for a connection.
        Raises SendFailed, NotConnected: then it is not watched."""
        async with self._watching:
            track = self._tracks.add(stream, cursor)
            if not track.is_settled:
                try:
                    await self._insist("watch", {"stream": stream, "cursor": track.cursor})
                except BaseException:
                    self._tracks.remove(stream)
                    raise
                track.is_settled = True

    async def switch(self, stream: str, cursor: int = 0) -> None:
        """Watch this stream, and no other. Raises as `watch`, and then nothing has changed."""
        async with self._watching:
            track = self._tracks.add(stream, cursor)
            try:
                await self._insist("switch", {"stream": stream, "cursor": track.cursor})
            except BaseException:
                if not track.is_settled:
                    self._tracks.remove(stream)
                raise
            track.is_settled = True
            self._tracks.keep_only(stream)

    async def unwatch(self, stream: str) -> None:
        """Watch a stream no longer: no event of it is given from now on."""
        async with self._watching:
            self._tracks.remove(stream)
            if (connection := self._stream.connection) is None:
                return
            try:
                await self._wire.post("unwatch", encoded({"stream": stream}), connection, object)
            except SendFailed as failed:
                # Its events are dropped here, and the next reconnect does not name it.
                log.info("the gateway does not know that a stream is watched no longer", stream=stream, why=str(failed))

    # Messages

    def send(
        self,
        stream: str,
        body: Mapping[str, Any],
        client_message_id: str | None = None,
        *,
        mode: Literal["queue", "steer", "interrupt"] = "queue",
    ) -> asyncio.Future[MessageReceipt]:
        """Send a message, after those sent before; the receipt comes when it is stored. It is tried three times, and waits
        for a connection as long as it takes; then the future fails with SendFailed. To cancel the future takes nothing
        back (`unsend` does). With an outbox, the message is on disk when this returns.

        `mode` says what it does while another message is answered: wait, be offered to the agent at work, or interrupt it.

        Raises OutboxFull, PayloadRefused, NotConnected (the client has ended) and OSError; the message was not taken.
        """
        message_id = uuid.uuid4().hex if client_message_id is None else client_message_id
        if not isinstance(body, Mapping):
            raise PayloadRefused(f"The body of a message is a dict (a JSON object), not {type(body).__name__}.")
        message: dict[str, Any] = {"stream": stream, "client_message_id": message_id, "body": dict(body)}
        if mode != "queue":
            message["mode"] = mode
        return self._sender.send("send", encoded(message))

    async def permission(self, stream: str, request_id: str, answer: Any) -> int:
        """Answer what the agent asks. It waits its turn among the messages and is tried as they are. Returns the `seq` of
        its event. Raises as `send` and its future."""
        body = encoded({"stream": stream, "request_id": request_id, "answer": answer})
        stored: Stored = await self._sender.send("permission", body)
        return stored.seq

    async def stop(self, stream: str, message_id: str | None = None) -> list[str]:
        """End the turn of a message, or all that are owed an ending. Returns the ids of those that this ended.

        This and what follows is said once and at once, for late it would mean something else: NotConnected is raised
        while there is no connection, and SendFailed if the gateway does not take it.
        """
        return (await self._say("stop", _about(stream, message_id), Stopped)).stopped

    async def unsend(self, stream: str, client_message_id: str) -> bool:
        """Take back a message that the agent has not begun to answer. Returns False if it was too late for that."""
        asked = {"stream": stream, "client_message_id": client_message_id}
        return (await self._say("unsend", asked, Unsent)).taken_back

    async def interrupt(self, stream: str, message_id: str | None = None) -> int:
        """Ask the agent to interrupt what it does. Returns the `seq` of the event that says so."""
        return (await self._say("interrupt", _about(stream, message_id), Stored)).seq

    async def mode(self, stream: str, mode: str) -> int:
        """Ask the agent for a mode. Returns the `seq` of the event that says so."""
        return (await self._say("mode", {"stream": stream, "mode": mode}, Stored)).seq

    async def suspend(self, stream: str) -> str:
        """Suspend the stream. Returns its state."""
        return (await self._say("suspend", {"stream": stream}, StateOf)).state

    async def close_stream(self, stream: str) -> str:
        """End the stream. Turns that are owed an ending end `cancelled`. Returns the state of the stream."""
        return (await self._say("close", {"stream": stream}, StateOf)).state

    # Inside

    async def _run(self) -> None:
        failure: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as group:
                self._tracks.spawn = group.create_task
                sending = group.create_task(self._sender.run())
                await self._stream.run()
                # Backfills are left, and the group waits for them.
                sending.cancel()
        except* Exception as broken:  # noqa: BLE001 - raised for whoever waits
            failure = broken.exceptions[0]
        self._end(failure, why=None if failure is None else str(failure))

    def _end(self, failure: BaseException | None, *, why: str | None) -> None:
        self._failure = self._failure or failure
        self._buffer.end(failure)
        self._sender.close(failure)
        # Last, for it calls what is not ours.
        self._stream.close(why)

    async def _stop(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running

    def _forget(self, connection: str) -> None:
        self._stream.forget(connection)

    async def _say(self, name: str, body: Mapping[str, Any], answer: type[T]) -> T:
        content, connection = encoded(body), self._stream.connection
        if connection is None:
            raise NotConnected(f"`{name}` was not sent, for there is no connection: {self._stream.why}.")
        return await self._wire.post(name, content, connection, answer)

    async def _insist(self, name: str, body: Mapping[str, Any]) -> None:
        """POST what may be said twice, until a connection has taken it that is still the one then."""
        content, pauses, attempts = encoded(body), self._timing.pauses(), 0
        while True:
            connection = await self._stream.opened()
            try:
                await self._wire.post(name, content, connection, Watching)
            except SendFailed as failed:
                attempts += 1
                if attempts == ATTEMPTS or not may_pass(failed):
                    raise
                if is_forgotten(failed):
                    self._forget(connection)
                else:
                    await asyncio.sleep(pauses.next(floor=failed.retry_after))
            else:
                if connection == self._stream.connection:
                    return


def _about(stream: str, message_id: str | None) -> dict[str, str]:
    return {"stream": stream} if message_id is None else {"stream": stream, "message_id": message_id}
