"""What the database refuses, item by item: each is logged once for each reason, and tried again later."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

from queue_service.exceptions import message
from queue_service.logs import get_logger

log = get_logger(__name__)

K = TypeVar("K", bound=Hashable)


class Refusals(Generic[K]):
    """`what` they are, as in "a turn cannot be ended". Iterating gives the items that are refused."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._reasons: dict[K, str] = {}

    def __contains__(self, item: K) -> bool:
        return item in self._reasons

    def __iter__(self) -> Iterator[K]:
        return iter(list(self._reasons))

    def note(self, item: K, refused: Exception, **fields: object) -> None:
        # Without the lines that follow: they show the row, which is another one each time.
        why = message(refused).partition("\n")[0]
        if self._reasons.get(item) != why:
            log.error("the database refuses one of many; it is tried again", what=self._what, why=why, **fields)
        self._reasons[item] = why

    def forget(self, item: K) -> None:
        """It went through."""
        self._reasons.pop(item, None)
