"""What a stream and its events are."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any

import msgspec

from queue_service.errors import ConfigError

# Only the election of an ending writes the first two; the third says what a reader missed, and is never stored.
RESERVED = frozenset({"reply", "error", "gap"})
MAX_KIND = 64


class Event(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One entry of a stream. `seq` counts from 1 without gaps, in the order of commits. `terminal` events end a turn.

    `attempt` is that of the run which appended it while it worked on a turn of the stream; None where none did. Kind
    `reset` says that a new attempt at message `body["message_id"]` begins: forget what was shown of its answer.

    Kind `gap` is made up by whoever reads: events `body["from"]` to `body["to"]` are no longer stored, and `body["head"]`
    is the last one that is. Where `to` is beyond the head, the database went back, and the stream goes on after the head.
    Where something of an event cannot be read as it is stored, `body["unreadable"]` says what; None stands in its place.
    """

    stream: str
    seq: int
    kind: str
    body: Any
    terminal: bool = False
    created_at: datetime | None = None
    attempt: int | None = None


class StreamState(StrEnum):
    CREATED = "created"
    STARTING = "starting"
    ACTIVE = "active"
    DETACHED = "detached"
    SUSPENDED = "suspended"
    CLOSING = "closing"
    ENDED = "ended"

    @property
    def catches_up(self) -> bool:
        """Whether events may come at any time, so that a watched stream is looked at on every poll."""
        return self not in {StreamState.SUSPENDED, StreamState.ENDED}


class Stream(msgspec.Struct, frozen=True, kw_only=True):
    stream: str
    head: int
    state: StreamState
    created_at: datetime


def gap(stream: str, first: int, last: int, head: int) -> Event:
    """The event that stands for others, which are missing."""
    return Event(stream=stream, seq=last, kind="gap", body={"stream": stream, "from": first, "to": last, "head": head})


def check_kind(kind: object) -> None:
    """ConfigError for what is no kind of an event, and for those that only the ending of a turn stores."""
    if not isinstance(kind, str) or not kind or len(kind) > MAX_KIND or not kind.isprintable():
        raise ConfigError(f"The kind of an event is a word of up to {MAX_KIND} characters, not {kind!r}.")
    if kind in RESERVED:
        raise ConfigError(f"Events of kind {kind!r} are not for appending: they are how turns end. See `app.turns`.")
