"""The rows of a result.

A value that Python cannot hold (`infinity`, an interval of a million years) leaves the others of its row alone, and the
other rows: what is nearest to it stands in its place, and the row says so.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
from psycopg.abc import Loader
from psycopg.pq import Format

from queue_service.db.query import Row, Rows
from queue_service.exceptions import message

# A day off the ends of what Python can hold, where no time zone leads beyond them.
LATEST, EARLIEST = datetime(9999, 12, 30, tzinfo=UTC), datetime(1, 1, 2, tzinfo=UTC)
_TIMESTAMP, _INTERVAL = 1184, 1186


class FlawedRow(tuple[Any, ...]):  # noqa: SLOT001 - a tuple can have none
    """A row with values that could not be read. `why` says which, and what was wrong with them."""

    why: str


class FlawedRows(list[Row]):
    """Rows, some of which are flawed."""


def flaw_of(row: Row) -> str | None:
    """What could not be read of a row; None where all of it was."""
    return row.why if isinstance(row, FlawedRow) else None


def salvaged(cursor: psycopg.Cursor[Any] | psycopg.AsyncCursor[Any]) -> Rows:
    """The rows of this result, where reading it at once has failed."""
    result = cursor.pgresult
    assert result is not None
    columns = [_Column(cursor, place) for place in range(result.nfields)]
    return FlawedRows(
        _row(columns, [result.get_value(number, each.place) for each in columns]) for number in range(result.ntuples)
    )


class _Column:
    def __init__(self, cursor: psycopg.Cursor[Any] | psycopg.AsyncCursor[Any], place: int) -> None:
        result = cursor.pgresult
        assert result is not None
        self.place = place
        self.name = (result.fname(place) or b"").decode(errors="replace")
        self.type = result.ftype(place)
        loader = cursor.adapters.get_loader(self.type, Format(result.fformat(place))) or cursor.adapters.get_loader(
            0, Format(result.fformat(place))
        )
        assert loader is not None
        self.loader: Loader = loader(self.type, cursor)

    def nearest(self, data: bytes) -> Any:
        if self.type == _TIMESTAMP:
            return EARLIEST if data[0] & 0x80 else LATEST
        if self.type == _INTERVAL:
            # Microseconds, days and months, each with a sign.
            return timedelta.min if (data[0] | data[8] | data[12]) & 0x80 else timedelta.max
        return None


def _row(columns: list[_Column], values: list[Any]) -> Row:
    read: list[Any] = []
    flaws: list[str] = []
    for column, data in zip(columns, values, strict=True):
        try:
            read.append(None if data is None else column.loader.load(data))
        except Exception as refused:  # noqa: BLE001 - each type has its own errors
            flaws.append(f"{column.name}: {message(refused)}")
            read.append(column.nearest(bytes(data)))
    if not flaws:
        return tuple(read)
    row = FlawedRow(read)
    row.why = "; ".join(flaws)
    return row
