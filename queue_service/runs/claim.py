"""The right to work on a run, and how a caller makes sure inside a transaction of its own that it still has it."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, NamedTuple

from queue_service.db.borrowed import AsyncBorrowed, borrow
from queue_service.db.query import Query, found
from queue_service.errors import ClaimLost, ConfigError
from queue_service.runs.sql import SQL


class Claim(NamedTuple):
    """The right to work on a run. Every write about a run presents one, and changes nothing once the run has been
    swept, handed on or finished: the attempt has moved, or the run is no longer running.
    """

    run_id: int
    attempt: int


def hold(claim: Claim) -> Query[bool]:
    """Lock the run until the transaction ends. The result is False if the claim is not held any more."""
    return SQL.query("hold", found, run_id=claim.run_id, attempt=claim.attempt)


def assert_held(claim: Claim, conn: Any) -> Awaitable[None] | None:
    """As `Run.assert_held`. To be awaited where the connection is asynchronous."""
    borrowed = borrow(conn)

    async def asserted(conn: AsyncBorrowed) -> None:
        _check(claim, in_transaction=await conn.in_transaction(), is_held=await conn.fetch(hold(claim)))

    if borrowed.is_async:
        return asserted(borrowed)
    _check(claim, in_transaction=borrowed.in_transaction(), is_held=borrowed.fetch(hold(claim)))
    return None


def _check(claim: Claim, *, in_transaction: bool, is_held: bool) -> None:
    if not in_transaction:
        raise ConfigError("This connection commits each statement by itself. Begin the transaction first.")
    if not is_held:
        raise ClaimLost(*claim)
