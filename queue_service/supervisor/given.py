"""The turns that one supervisor has given to its child, and that have not ended as far as it knows.

They are what the child's end ends, and nothing else. What was only offered to the child is not among them: it has a run of
its own, and its turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

import msgspec

from queue_service.app.events import Origin
from queue_service.turn import Turn


class GivenTurn(msgspec.Struct, eq=False):
    """`after` is the head of its stream when it was given: only later events are about it."""

    turn: Turn
    after: int
    # The run whose handler gave it, and its attempt: the child's events are of that.
    by: Origin | None = None
    # The child has said how it ends, which may not be stored yet.
    is_answered: bool = False


class GivenTurns:
    """By message id. `left` is called with a stream that has none of them any more."""

    def __init__(self, left: Callable[[str], None]) -> None:
        self._left = left
        self._by_id: dict[str, GivenTurn] = {}
        self._offered: dict[str, str] = {}
        self.none_left = asyncio.Event()
        self.none_left.set()

    def __contains__(self, message_id: str) -> bool:
        return message_id in self._by_id

    @property
    def message_ids(self) -> list[str]:
        return list(self._by_id)

    def add(self, turn: Turn, after: int, by: Origin | None = None) -> GivenTurn:
        """A turn that is given again begins anew."""
        given = self._by_id[turn.message_id] = GivenTurn(turn, after, by)
        self._offered.pop(turn.message_id, None)
        self.none_left.clear()
        return given

    def get(self, message_id: str) -> GivenTurn | None:
        return self._by_id.get(message_id)

    def stream_of(self, message_id: str) -> str | None:
        """Where events go that the child says of this turn, or of what it was offered."""
        given = self._by_id.get(message_id)
        return self._offered.get(message_id) if given is None else given.turn.stream

    def began_before(self, stream: str, seq: int) -> bool:
        """Whether a turn of the stream was given before this event."""
        return any(given.turn.stream == stream and given.after < seq for given in self._by_id.values())

    def offer(self, message_id: str, stream: str) -> bool:
        """False: the child knows the message already."""
        if message_id in self._by_id or message_id in self._offered:
            return False
        self._offered[message_id] = stream
        return True

    def was_offered(self, message_id: str) -> bool:
        return message_id in self._offered

    def answered(self, message_ids: Iterable[str]) -> None:
        for message_id in message_ids:
            if (given := self._by_id.get(message_id)) is not None:
                given.is_answered = True

    def ended(self, message_ids: Iterable[str]) -> None:
        """They are the child's no more."""
        for message_id in message_ids:
            self._offered.pop(message_id, None)
            given = self._by_id.pop(message_id, None)
            if given is not None and not any(each.turn.stream == given.turn.stream for each in self._by_id.values()):
                self._offered = {each: at for each, at in self._offered.items() if at != given.turn.stream}
                self._left(given.turn.stream)
        if not self._by_id:
            self.none_left.set()
