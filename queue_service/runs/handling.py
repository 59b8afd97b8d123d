"""What a handler may ask about the run it was given.

A Run knows nobody: a reference to its worker would cost every run that is claimed. So those who execute handlers in this
process are known here, and are asked for the run. That costs whoever asks, and nobody else.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from queue_service import codec
from queue_service.errors import ClaimLost, ConfigError

if TYPE_CHECKING:
    from queue_service.runs.model import Claim, Run
    from queue_service.worker.handlers.transaction import Transaction

MAX_NOTE = 500


class Handling(Protocol):
    """The execution of one run's handler, for which whoever executes it answers in any thread."""

    def transaction(self, conn: Any) -> Transaction[Any, Any]: ...

    def report(self, progress: str) -> bool:
        """`progress` is a JSON object of value and note."""


Find = Callable[["Run"], "Handling | None"]

_executing: list[Find] = []


@contextmanager
def found_by(find: Find) -> Iterator[None]:
    """For the length of the block, `find` is asked for runs whose handlers are executed in this process."""
    _executing.append(find)
    try:
        yield
    finally:
        _executing.remove(find)


def of(run: Run) -> Handling:
    """The execution of the handler that was given this very run. Raises ClaimLost, and ConfigError."""
    for find in _executing:
        if (found := find(run)) is not None:
            return found
    if run.cancelled:
        raise ClaimLost(*run.claim)
    raise ConfigError(
        f"Run {run.id} is not executed here. Only the run that a handler was given can do this, while the handler runs."
    )


def report(run: Run, value: float, note: str | None) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ConfigError(f"Progress is a number from 0 to 1, not {value!r}.")
    if not (note is None or isinstance(note, str)):
        raise ConfigError(f"The note on a progress is text, not {type(note).__name__}.")
    try:
        handling = of(run)
    except ClaimLost:
        return False
    said = {"value": value, "note": note and codec.sanitised(note[:MAX_NOTE])}
    return handling.report(msgspec.json.encode(said).decode())


def assert_held(claim: Claim, conn: Any) -> Awaitable[None] | None:
    from queue_service.db.borrowed import AsyncBorrowed, borrow
    from queue_service.runs import queries

    borrowed, held = borrow(conn), queries.hold(claim)

    async def asserted(conn: AsyncBorrowed) -> None:
        _check(claim, in_transaction=await conn.in_transaction(), is_held=await conn.fetch(held))

    if borrowed.is_async:
        return asserted(borrowed)
    _check(claim, in_transaction=borrowed.in_transaction(), is_held=borrowed.fetch(held))
    return None


def _check(claim: Claim, *, in_transaction: bool, is_held: bool) -> None:
    if not in_transaction:
        raise ConfigError("This connection commits each statement by itself. Begin the transaction first.")
    if not is_held:
        raise ClaimLost(*claim)
