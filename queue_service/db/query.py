"""A statement with its parameters and the way to read its rows: an operation as a value.

Whoever holds a connection runs it: async or sync, alone or in a transaction, on our connection or on the caller's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Generic, TypeVar

import msgspec

T_co = TypeVar("T_co", covariant=True)
Row = tuple[Any, ...]
Rows = Sequence[Row]


@dataclass(frozen=True, slots=True)
class Query(Generic[T_co]):
    text: str
    decode: Callable[[Rows], T_co]
    params: Mapping[str, Any] = field(default_factory=dict)
    # A statement that writes is never cancelled on the server: it may be committing. See `db/execute.py`.
    writes: bool = True


Fetch = Callable[[Query[Any]], Awaitable[Any]]


def nothing(_rows: Rows) -> None:
    return None


def found(rows: Rows) -> bool:
    return bool(rows)


def scalar(rows: Rows) -> Any:
    """The first column of the first row, or None."""
    return rows[0][0] if rows else None


def column(rows: Rows) -> list[Any]:
    return [row[0] for row in rows]


def array_literal(values: Sequence[object]) -> str:
    """A Postgres array of numbers or of words that need no quoting, as text. Ten times quicker than adapting a list."""
    return "{" + ",".join(map(str, values)) + "}"


def interval_literal(value: timedelta) -> str:
    """A Postgres interval, as text."""
    return f"{value.total_seconds():.6f} s"


def json_literal(value: str | None) -> str:
    """A JSON string, or null, as text: for values that are put together from JSON text which is there already."""
    return msgspec.json.encode(value).decode()
