"""What a renderer is given, and what it may answer: nothing else counts as done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Protocol

from queue_service.errors import ConfigError
from queue_service.events.model import Event
from queue_service.tasks import Cancel, Snooze
from queue_service.words import check_word

# As the statements that make deliveries spell them.
QUEUE, TASK = "thread_response", "deliver"


class Answer(Enum):
    NOT_MINE = "not mine"


NOT_MINE: Final = Answer.NOT_MINE


class Shown:
    """Returned by a renderer that is done, with the id under which its platform shows the turn: the next delivery of the
    same turn gets it as `platform_message_id`, and can edit what is there. ConfigError for what is no id."""

    def __init__(self, platform_message_id: str | int) -> None:
        is_number = isinstance(platform_message_id, int) and not isinstance(platform_message_id, bool)
        check_word(str(platform_message_id) if is_number else platform_message_id, "The id of a Shown")
        self.platform_message_id = str(platform_message_id)


Rendered = Answer | Shown | Snooze | Cancel | None
ALLOWED = "None, NOT_MINE, Shown(platform_message_id), Snooze(delay), Defer(delay, owner) or Cancel(reason)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """An event, and whom it is for. `headless`: nobody is connected to this turn, so render it here. `last`: no other
    process gets to try, so render it here, by whatever means do without the connection. `platform_message_id` is what an
    earlier delivery of the same turn was `Shown` as.
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
    platform_message_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedDelivery:
    """A delivery that is given up: event `seq` of the stream was not shown, or nobody can say that it was. `reason` is a
    sentence, `error` the exception of the last try. `app.retry(run_id)` has it delivered after all."""

    run_id: int
    stream: str
    seq: int
    kind: str
    platform: str
    channel_id: str | None
    user_id: str | None
    message_id: str
    deployment: str
    metadata: Mapping[str, Any]
    reason: str
    error: BaseException


class Renderer(Protocol):
    """Shows events on one platform. What its methods return says how it went.

    - None: it is shown. `Shown(id)`: so, under this id of the platform's.
    - NOT_MINE: another process holds the connection, and is to show it.
    - `Snooze(delay)`, as for a 429: not yet. `Defer(delay, owner)`: so, and then this process first.
    - `Cancel(reason)`: it is not to be shown. Its run ends `cancelled`.

    None of these is a failure. An exception is one, and is retried; anything else ends the run `failed`. The same event may
    come twice. Events of one channel come one after the other, in the order in which they were handed in.
    """

    async def handle_delta(self, delivery: Delivery, /) -> Rendered:
        """A piece of the reply (`delta`), or a `card`."""

    async def handle_status(self, delivery: Delivery, /) -> Rendered:
        """A word about how the turn goes on, and any kind that has no method of its own."""

    async def handle_error(self, delivery: Delivery, /) -> Rendered:
        """The turn failed: `body["message"]` is a sentence for the person who waits. Nothing follows."""

    async def handle_completion(self, delivery: Delivery, /) -> Rendered:
        """The reply. Nothing follows."""

    async def handle_ephemeral(self, delivery: Delivery, /) -> Rendered:
        """Something for this moment and this person only."""


HANDLERS: Mapping[str, str] = {
    "delta": "handle_delta",
    "card": "handle_delta",
    "ephemeral": "handle_ephemeral",
    "reply": "handle_completion",
    "error": "handle_error",
}
# What any other kind is: a word about how the turn goes on.
STATUS_METHOD = "handle_status"


def check_renderer(renderer: object) -> None:
    """ConfigError for an object that lacks a method."""
    methods = sorted({*HANDLERS.values(), STATUS_METHOD})
    missing = [name for name in methods if not callable(getattr(renderer, name, None))]
    if missing:
        raise ConfigError(f"{type(renderer).__name__} is no renderer: it lacks {', '.join(missing)}.")
