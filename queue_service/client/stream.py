"""The connection: one response of events at a time, which is asked for streams, and replaced when it is lost.

It is open only when the gateway has taken the list of streams and what was queued has been flushed. All that leads there
belongs to one `welcome`, and is cancelled with it, in the same step that notices a newer one or a loss: so an answer that
comes late changes nothing, be it yes or no.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import httpx2
import msgspec

from queue_service.client.model import State
from queue_service.client.sending import Sender, may_pass
from queue_service.client.timing import Timing
from queue_service.client.tracks import Tracks
from queue_service.client.wire import End, Gap, Goodbye, Pulse, Welcome, Wire, encoded
from queue_service.errors import NotConnected, SendFailed
from queue_service.events.model import Event
from queue_service.logs import get_logger

log = get_logger(__name__)


class Lost(Exception):
    """A response that is of no use any more."""


class EventStream:
    def __init__(
        self,
        wire: Wire,
        tracks: Tracks,
        sender: Sender,
        timing: Timing,
        *,
        on_open: Callable[[], None] | None,
        on_close: Callable[[], None] | None,
    ) -> None:
        self._wire = wire
        self._tracks = tracks
        self._sender = sender
        self._timing = timing
        self._on_open = on_open
        self._on_close = on_close
        self.state: State = "closed"
        # Why there is no connection, while there is none.
        self.why = "it was never connected"
        # The id of the latest welcome, and whether its connection is open.
        self._greeted: str | None = None
        self._arriving: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._lost: asyncio.Future[str | None]
        self._pauses = timing.pauses()
        # Seconds that the gateway wants to pass before each reconnect, and before the next one.
        self._retry = self._asked = 0.0

    @property
    def connection(self) -> str | None:
        """The id to say with POSTs, while it is open."""
        return self._greeted if self.state == "open" else None

    async def opened(self) -> str:
        """The id of the connection, once it is open. Raises NotConnected where it will not be."""
        while (connection := self.connection) is None:
            if self.state == "closed":
                raise NotConnected(f"There is no connection: {self.why}.")
            await self._changed.wait()
        return connection

    def begin(self) -> None:
        """`run` is about to be."""
        self._become("connecting")

    async def run(self) -> None:
        """Until all streams have ended."""
        while True:
            self._lost = asyncio.get_running_loop().create_future()
            reading = self._tracks.spawn(self._read())
            why = await self._lost
            reading.cancel()
            await asyncio.wait([reading])
            if why is None:
                return
            log.info("the event stream was lost", why=why)
            await asyncio.sleep(self._pauses.next(floor=max(self._retry, self._asked)))
            self._asked = 0.0

    def lose(self, why: str | None) -> None:
        """Give up this response; None: because all streams have ended. What was on its way to be open is not any more."""
        if not self._lost.done():
            self.why = why or "all of its streams have ended"
            self._lost.set_result(why)
            self._leave()

    def forget(self, connection: str) -> None:
        """The gateway does not know this connection. If it is the latest, another one is needed."""
        if connection == self._greeted:
            self.lose("the gateway has forgotten the connection")

    def close(self, why: str | None = None) -> None:
        """For good, or until the next `begin`."""
        self.why = why or self.why
        self._become("closed")

    # One response

    async def _read(self) -> None:
        why: str | None
        try:
            why = await self._follow()
        except Lost as lost:
            why = str(lost)
        except SendFailed as failed:
            if not may_pass(failed) and failed.status != httpx2.codes.NOT_FOUND:
                raise NotConnected(f"The gateway refuses this client: {failed}") from failed
            self._asked = failed.retry_after
            why = str(failed)
        except TimeoutError:
            why = "nothing was heard from the gateway, not even a heartbeat"
        except (httpx2.RequestError, msgspec.DecodeError) as broken:
            why = f"{type(broken).__name__}: {broken}"
        self.lose(why)

    async def _follow(self) -> str | None:
        """Why there is nothing more to read; None if all streams have ended."""
        async with self._wire.events(self._tracks.settled()) as response:
            if response is None:
                return None
            frames, pulse = response
            async for frame in frames:
                await self._take(frame, pulse)
        return None if self._tracks.all_ended else "the gateway ended the response"

    async def _take(self, frame: httpx2.ServerSentEvent, pulse: Pulse) -> None:
        if self._lost.done():
            raise Lost("it was given up already")
        if frame.retry is not None:
            self._retry = frame.retry / 1000
        # Frames of other names are those of a later gateway.
        if frame.event == "message":
            await self._tracks.take(msgspec.json.decode(frame.data, type=Event))
        elif frame.event == "gap":
            await self._tracks.skip(msgspec.json.decode(frame.data, type=Gap))
        elif frame.event == "end":
            self._tracks.end(msgspec.json.decode(frame.data, type=End))
        elif frame.event == "welcome":
            welcome = msgspec.json.decode(frame.data, type=Welcome)
            pulse.limit = welcome.heartbeat * self._timing.heartbeat_grace
            self._leave()
            self._greeted = welcome.connection_id
            self._arriving = self._tracks.spawn(self._arrive(welcome.connection_id))
        elif frame.event == "goodbye":
            raise Lost(f"the gateway said goodbye: {msgspec.json.decode(frame.data, type=Goodbye).reason}")

    async def _arrive(self, connection: str) -> None:
        """From the welcome to open."""
        announced: set[str] = set()
        # A stream may be left, or be watched for good, while the gateway learns of those before.
        while announced != (streams := self._tracks.settled()).keys():
            try:
                await self._wire.post("reconnect", encoded({"streams": streams}), connection, msgspec.Raw)
            except SendFailed as failed:
                self._asked = failed.retry_after
                self.lose(str(failed))
                return
            announced = set(streams)
        await self._sender.flush(connection)
        self._pauses.reset()
        self._become("open")

    def _leave(self) -> None:
        """From now on there is no connection."""
        if self._arriving is not None:
            self._arriving.cancel()
            self._arriving = None
        self._greeted = None
        self._sender.hold()
        self._become("connecting")

    def _become(self, state: State) -> None:
        before, self.state = self.state, state
        # Before anyone goes on: what the callback raises ends the client.
        if state == "open" and self._on_open is not None:
            self._on_open()
        self._changed.set()
        self._changed = asyncio.Event()
        if before == "open" and self._on_close is not None:
            self._on_close()
