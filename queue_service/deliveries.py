"""Hands events to the renderers of chat platforms, in the process that is connected to the channel.

A delivery is a run on `thread_response`. It is reserved for the process that holds the channel's connection, and where
another claims it, that one's renderer says so and the run goes to the owner. At its last try it is rendered wherever it
is: a person who waits gets the answer late rather than never.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Protocol, Self

import msgspec

from queue_service.app import App
from queue_service.connections import queries as connections
from queue_service.connections.queries import Channel
from queue_service.db import channels
from queue_service.errors import ConfigError, DatabaseUnavailable, QueueServiceError, nearest
from queue_service.events.model import RESERVED, Event
from queue_service.exceptions import message, type_name
from queue_service.logs import get_logger
from queue_service.runs.model import Run
from queue_service.services.loop import Services, every
from queue_service.tasks import Cancel, Defer, Retry
from queue_service.turn import Turn
from queue_service.words import check_word

log = get_logger(__name__)

# As the statements that end turns spell them.
QUEUE, TASK = "thread_response", "deliver"

MAX_ATTEMPTS = 30
RETRY_DELAY = 1.0

HANDLERS: Mapping[str, str] = {
    "delta": "handle_delta",
    "card": "handle_delta",
    "ephemeral": "handle_ephemeral",
    "reply": "handle_completion",
    "error": "handle_error",
}
# What any other kind is: a word about how the turn goes on.
STATUS_METHOD = "handle_status"


class Answer(Enum):
    NOT_MINE = "not mine"


NOT_MINE: Final = Answer.NOT_MINE


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """An event, and whom it is for. `headless`: nobody is connected to this turn, so render it here. `last`: no other
    process gets to try, so render it here, by whatever means do without the connection.
    """

    event: Event
    platform: str
    channel_id: str | None
    user_id: str | None
    message_id: str
    deployment: str
    metadata: Mapping[str, Any]
    last: bool
    headless: bool


class Renderer(Protocol):
    """Shows events on one platform. Each method returns None when it is done, or NOT_MINE to leave the event to the process
    that holds the connection, which costs no attempt. An exception is a failure, and retried. The same event may come
    twice, and events of one stream may come at the same time or out of order: `event.seq` says which is which.
    """

    async def handle_delta(self, delivery: Delivery, /) -> Answer | None:
        """A piece of the reply (`delta`), or a `card`."""

    async def handle_status(self, delivery: Delivery, /) -> Answer | None:
        """A word about how the turn goes on, and any kind that has no method of its own."""

    async def handle_error(self, delivery: Delivery, /) -> Answer | None:
        """The turn failed: `body["message"]` is a sentence for the person who waits. Nothing follows."""

    async def handle_completion(self, delivery: Delivery, /) -> Answer | None:
        """The reply. Nothing follows."""

    async def handle_ephemeral(self, delivery: Delivery, /) -> Answer | None:
        """Something for this moment and this person only."""


class Deliveries:
    """The deliveries of an App: making one registers their task. A worker with the queue `thread_response` renders them.

    A turn whose `metadata["source"]` is in `headless`, or that has no channel, is rendered where it is claimed. `retry` is
    for renderers that raise. `lost` is called with platform and channel id when a connection went to another process.
    Connections are held inside `async with`; what only renders, or only sends, need not enter it.
    """

    def __init__(
        self,
        app: App,
        *,
        headless: Collection[str] = ("schedule", "automation"),
        retry: Retry | None = None,
        lost: Callable[[str, str], object] | None = None,
    ) -> None:
        if isinstance(headless, str):
            raise ConfigError(f"headless is a list of sources, not the one text {headless!r}.")
        self._app = app
        self._headless = tuple(headless)
        self._lost = lost
        self._renderers: dict[str, Renderer] = {}
        self._held: set[Channel] = set()
        self._changing = asyncio.Lock()
        self._services: Services | None = None
        app.task(queue=QUEUE, name=TASK, retry=retry)(self._deliver)

    def register(self, platform: str, renderer: Renderer) -> None:
        """Let this renderer show the events of this platform, in this process. ConfigError where that cannot be meant."""
        check_word(platform, "platform")
        if platform == "api":
            raise ConfigError(
                "Platform 'api' takes no renderer: the event in the stream is the delivery. Follow the stream."
            )
        if platform in self._renderers:
            raise ConfigError(f"Platform {platform!r} has a renderer already. Register one for each platform.")
        missing = [
            name for name in sorted({*HANDLERS.values(), STATUS_METHOD}) if not callable(getattr(renderer, name, None))
        ]
        if missing:
            raise ConfigError(f"{type(renderer).__name__} is no renderer: it lacks {', '.join(missing)}.")
        self._renderers[platform] = renderer

    # Connections

    async def __aenter__(self) -> Self:
        if self._services is not None:
            raise ConfigError("These Deliveries are in use already. Enter them once, and share them.")
        await self._app.open()
        self._services = Services()
        self._services.ensure("connections", every(self._app.settings.lease / 3, self.renew))
        return self

    async def __aexit__(self, *_: object) -> None:
        services, self._services = self._services, None
        try:
            if services is not None:
                await services.close()
            held, self._held = self._held, set()
            # Out of reach, they lapse by themselves.
            with contextlib.suppress(DatabaseUnavailable):
                await self._app.fetch(connections.release(held, self._app.identity))
        finally:
            await self._app.close()

    async def connect(self, platform: str, channel_id: str) -> bool:
        """Hold the connection to a channel, so that its deliveries come here first. Returns False if another live process
        holds it. Connecting again changes nothing."""
        check_word(platform, "platform")
        check_word(channel_id, "channel_id")
        if self._services is None:
            raise ConfigError(
                "Connections are held inside `async with Deliveries(app) as deliveries:`. Enter it first."
            )
        async with self._changing:
            hold = connections.hold((platform, channel_id), self._app.identity, self._app.settings.lease)
            # A connection we had may have lapsed, and be another's by now.
            self._held.discard((platform, channel_id))
            if await self._app.fetch(hold):
                self._held.add((platform, channel_id))
            return (platform, channel_id) in self._held

    async def disconnect(self, platform: str, channel_id: str) -> bool:
        """Let go of a connection. Returns False if it was not held here."""
        channel = (platform, channel_id)
        async with self._changing:
            self._held.discard(channel)
            return channel in await self._app.fetch(connections.release([channel], self._app.identity))

    def holds(self, platform: str, channel_id: str | None) -> bool:
        """Return whether this process is connected to the channel, as far as it knows."""
        return (platform, channel_id) in self._held

    async def renew(self) -> None:
        """Push the deadline of every connection that is held here. Inside `async with` this happens by itself."""
        async with self._changing:
            if not self._held:
                return
            query = connections.renew(self._held, self._app.identity, self._app.settings.lease)
            gone = self._held - await self._app.fetch(query)
            self._held -= gone
        self._tell(gone)

    def _tell(self, gone: Collection[Channel]) -> None:
        for platform, channel_id in sorted(gone):
            log.warning("lost the connection to a channel", platform=platform, channel_id=channel_id)
            try:
                if self._lost is not None:
                    self._lost(platform, channel_id)
            except BaseException as error:  # noqa: BLE001 - the caller's mistake must not end the renewal of the others
                log.error("the callback for a lost connection raised", error=type_name(error), why=message(error))

    # Deliveries

    async def send(self, turn: Turn, event: Event) -> int | None:
        """Have an event, of a turn that goes on, rendered where its person waits. Endings need no sending.

        Returns the id of the run; None for platform `api`, and where the database cannot be reached, which is logged: the
        event is in the stream all the same. A delivery may be rendered late, even after the ending.
        """
        if event.kind in RESERVED:
            raise ConfigError(
                f"An event of kind {event.kind!r} is not for sending: endings are delivered by themselves."
            )
        if event.stream != turn.stream:
            raise ConfigError(f"Event {event.seq} of stream {event.stream!r} is not of the turn's, {turn.stream!r}.")
        if turn.platform == "api":
            return None
        row = {**turn.fields(self._app.settings.payload_limit), "seq": event.seq, "kind": event.kind}
        organization_id = row.pop("organization_id")
        payload = msgspec.json.encode(row).decode()
        try:
            run_id = await self._app.fetch(
                connections.deliver(turn.platform, turn.channel_id, payload, organization_id)
            )
        except DatabaseUnavailable as lost:
            log.warning("an event will not be delivered", stream=event.stream, seq=event.seq, why=str(lost))
            return None
        self._app.notify([channels.enqueued(QUEUE, 0)])
        return run_id

    async def _deliver(
        self,
        run: Run,
        *,
        stream: str,
        seq: int,
        kind: str,
        deployment: str,
        message_id: str,
        platform: str,
        channel_id: str | None,
        user_id: str | None,
        metadata: Mapping[str, Any],
    ) -> Cancel | Defer | None:
        stored = await self._app.events.read(stream, after=seq - 1, limit=1)
        event = next((each for each in stored if each.seq == seq), None)
        misfit = _misfit(event, kind, deployment, message_id, platform)
        if event is None or misfit is not None:
            log.error("a delivery was dropped", run_id=run.id, stream=stream, seq=seq, platform=platform, why=misfit)
            return Cancel(f"Nothing was delivered. {misfit}")
        delivery = Delivery(
            event=event,
            platform=platform,
            channel_id=channel_id,
            user_id=user_id,
            message_id=message_id,
            deployment=deployment,
            metadata=metadata,
            last=run.attempt >= MAX_ATTEMPTS,
            headless=channel_id is None or metadata.get("source") in self._headless,
        )
        if await self._handler(delivery)(delivery) is not NOT_MINE:
            return None
        return await self._defer(delivery)

    def _handler(self, delivery: Delivery) -> Callable[[Delivery], Awaitable[Answer | None]]:
        renderer = self._renderers.get(delivery.platform)
        if renderer is None:
            known = ", ".join(sorted(self._renderers)) or "none"
            raise ConfigError(
                f"No renderer is registered here for platform {delivery.platform!r}."
                f"{nearest(delivery.platform, self._renderers)} Registered platforms: {known}."
            )
        handler: Callable[[Delivery], Awaitable[Answer | None]] = getattr(
            renderer, HANDLERS.get(delivery.event.kind, STATUS_METHOD)
        )
        return handler

    async def _defer(self, delivery: Delivery) -> Defer:
        if delivery.headless or delivery.last or delivery.channel_id is None:
            why = f"this was the last of {MAX_ATTEMPTS} tries" if delivery.last else "the turn is headless"
            raise QueueServiceError(
                f"The renderer of platform {delivery.platform!r} left the event to another process, but {why}. "
                "Let it render where `delivery.last` or `delivery.headless` is set."
            )
        owner = await self._app.fetch(connections.owner((delivery.platform, delivery.channel_id)))
        if owner is None or owner == self._app.identity:
            # Nobody to hand it to: the connection may be on its way from one process to another.
            return Defer(RETRY_DELAY)
        return Defer(0, owner)


def _misfit(event: Event | None, kind: str, deployment: str, message_id: str, platform: str) -> str | None:
    """Why the event is not the one that the run was made for; None where it is."""
    if event is None:
        return "Its event does not exist any more."
    if event.kind != kind:
        return f"Its event is of kind {event.kind!r}, and the run says {kind!r}."
    if not event.terminal:
        return None
    if event.body.get("platform") != platform:
        return f"Its event is for another platform than the run's, {platform!r}."
    if event.body.get("deployment") != deployment or message_id not in list(event.body.get("message_ids") or ()):
        return f"Its event does not end message {message_id!r} of deployment {deployment!r}."
    return None
