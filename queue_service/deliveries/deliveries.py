"""Hands events to the renderers of chat platforms, in the process that is connected to the channel.

A delivery is a run on `thread_response`. Those of one channel are a lane: they are rendered one after the other, in the
order in which they were stored, whatever is tried again. A delivery is reserved for the process that holds the channel's
connection, and where another claims it, that one's renderer says so and the run goes to the owner. At its last try it is
rendered wherever it is: a person who waits gets the answer late rather than never.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from datetime import timedelta
from typing import Final, Self

import msgspec

from queue_service.app import App
from queue_service.connections import queries as connections
from queue_service.connections.queries import NewDelivery
from queue_service.db import channels
from queue_service.deliveries.holding import Holding
from queue_service.deliveries.model import QUEUE, TASK, Renderer, check_renderer
from queue_service.deliveries.rendering import FailedHook, Rendering
from queue_service.errors import AnswerRefused, ConfigError, DatabaseUnavailable
from queue_service.events.model import RESERVED, Event
from queue_service.logs import get_logger
from queue_service.services.loop import Services, every
from queue_service.tasks import Retry, duration
from queue_service.turn import Turn
from queue_service.words import check_word

log = get_logger(__name__)

# Six tries within a minute: a platform that is restarted is back by then, and what waits behind in its channel goes on.
RETRY: Final = Retry(max_attempts=6, base=2, cap=30)
# Of an event of a turn that goes on, which is not to keep its ending waiting for that long.
SENT_ATTEMPTS: Final = 3
TIMEOUT: Final = timedelta(minutes=1)
SNOOZE_LIMIT: Final = timedelta(hours=1)


class Deliveries:
    """The deliveries of an App: making one registers their task. A worker with the queue `thread_response` renders them.

    A turn whose `metadata["source"]` is in `headless`, or that has no channel, is rendered where it is claimed. `retry` is
    for renderers that raise: six tries within a minute, if not said; what was sent is tried three times at most. A callable
    `backoff` may be asked twice about one failure. `timeout` bounds each call of a renderer, `snooze_limit` the snoozes of
    one delivery together; both are seconds or timedelta. `failed` is called (and awaited, if it is a coroutine) with each
    FailedDelivery, in the process that made its last try. `lost` is called with platform and channel id when a connection
    went to another process.
    Connections are held inside `async with`; what only renders, or only sends, need not enter it.
    """

    def __init__(
        self,
        app: App,
        *,
        headless: Collection[str] = ("schedule", "automation"),
        retry: Retry | None = None,
        timeout: timedelta | float = TIMEOUT,
        snooze_limit: timedelta | float = SNOOZE_LIMIT,
        failed: FailedHook | None = None,
        lost: Callable[[str, str], object] | None = None,
    ) -> None:
        if isinstance(headless, str):
            raise ConfigError(f"headless is a list of sources, not the one text {headless!r}.")
        self._app = app
        self._holding = Holding(app, lost)
        self._renderers: dict[str, Renderer] = {}
        self._services: Services | None = None
        retry = _never_in_vain(RETRY if retry is None else retry)
        self._sent_attempts = min(SENT_ATTEMPTS, retry.max_attempts)
        rendering = Rendering(
            app, self._renderers, headless=tuple(headless), timeout=duration(timeout, "timeout", positive=True),
            snooze_limit=duration(snooze_limit, "snooze_limit"), failed=failed,
        )  # fmt: skip
        app.task(queue=QUEUE, name=TASK, retry=retry)(rendering.deliver)

    def register(self, platform: str, renderer: Renderer) -> None:
        """Let this renderer show the events of this platform, in this process. ConfigError where that cannot be meant."""
        check_word(platform, "platform")
        if platform == "api":
            raise ConfigError(
                "Platform 'api' takes no renderer: the event in the stream is the delivery. Follow the stream."
            )
        if platform in self._renderers:
            raise ConfigError(f"Platform {platform!r} has a renderer already. Register one for each platform.")
        check_renderer(renderer)
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
            await self._holding.release_all()
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
        return await self._holding.hold((platform, channel_id))

    async def disconnect(self, platform: str, channel_id: str) -> bool:
        """Let go of a connection. Returns False if it was not held here."""
        return await self._holding.release((platform, channel_id))

    def holds(self, platform: str, channel_id: str | None) -> bool:
        """Return whether this process is connected to the channel, as far as it knows."""
        return (platform, channel_id) in self._holding

    async def renew(self) -> None:
        """Push the deadline of every connection that is held here. Inside `async with` this happens by itself."""
        await self._holding.renew()

    # Sending

    async def send(self, turn: Turn, event: Event | int) -> int | None:
        """Have an event of a turn that goes on rendered where its person waits: an Event, or its seq in the turn's stream,
        as `app.events.append` returned it. Endings need no sending.

        Returns the id of the run; None for platform `api`, and where the database cannot be reached, which is logged: the
        event is in the stream all the same. What is sent before the turn ends is rendered before its ending, if it has a
        channel. Raises ConfigError for an ending, and for what is no event of the turn's stream.
        """
        if isinstance(event, Event):
            _check_sendable(event.kind)
            if event.stream != turn.stream:
                raise ConfigError(
                    f"Event {event.seq} of stream {event.stream!r} is not of the turn's, {turn.stream!r}."
                )
            seq = event.seq
        elif isinstance(event, bool) or not isinstance(event, int) or not 1 <= event < 2**63:
            raise ConfigError(f"What is sent is an Event of the turn's stream, or its seq, not {event!r}.")
        else:
            seq = event
        if turn.platform == "api" and isinstance(event, Event):
            return None
        try:
            run_id = await self._store(turn, event)
        except DatabaseUnavailable as lost:
            log.warning("an event will not be delivered", stream=turn.stream, seq=seq, why=str(lost))
            return None
        if run_id is not None:
            self._app.notify([channels.enqueued(QUEUE, 0)])
        return run_id

    async def _store(self, turn: Turn, event: Event | int) -> int | None:
        payload = turn.fields(self._app.settings.payload_limit)
        organization_id = payload.pop("organization_id")
        if isinstance(event, Event):
            payload |= {"seq": event.seq, "kind": event.kind}
        new = NewDelivery(
            turn.platform, turn.channel_id, msgspec.json.encode(payload).decode(), organization_id, self._sent_attempts
        )
        if isinstance(event, Event):
            return await self._app.fetch(connections.deliver(new))
        found = await self._app.fetch(connections.deliver_seq(new, event))
        if found is None:
            raise ConfigError(f"Stream {turn.stream!r} has no event {event}.")
        kind, run_id = found
        _check_sendable(kind)
        return run_id


def _check_sendable(kind: str) -> None:
    if kind in RESERVED:
        raise ConfigError(f"An event of kind {kind!r} is not for sending: endings are delivered by themselves.")


def _never_in_vain(retry: Retry) -> Retry:
    """What would fail again however often it is tried is not."""
    if not isinstance(retry, Retry):
        raise ConfigError(f"retry must be a Retry, such as Retry(max_attempts=5), not {retry!r}.")
    never = retry.never if isinstance(retry.never, tuple) else (retry.never,)
    return replace(retry, never=(*never, AnswerRefused))
