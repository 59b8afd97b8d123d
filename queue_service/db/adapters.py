"""How our statements give values to a caller's connection and read them: as psycopg does where nobody has changed it, in
binary, so that neither what the caller has registered nor a setting of the session has a part in it.

As text, what null is in an array depends on `array_nulls`, and what an interval means on `intervalstyle`. A moment comes in
the session's time zone, which Python may not know.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
from psycopg import postgres
from psycopg.abc import Buffer
from psycopg.adapt import AdaptersMap, Loader, PyFormat
from psycopg.pq import Format
from psycopg.types import TypesRegistry
from psycopg.types.array import BaseListDumper, ListBinaryDumper, register_all_arrays
from psycopg.types.datetime import TimedeltaBinaryDumper

_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)


class UtcLoader(Loader):
    format = Format.BINARY

    def load(self, data: Buffer) -> datetime:
        return _EPOCH + timedelta(microseconds=int.from_bytes(data, "big", signed=True))


class BinaryList(ListBinaryDumper):
    """Also of a list with nothing in it but nulls, which psycopg gives as text: our statements cast it."""

    def upgrade(self, obj: list[Any], format: PyFormat) -> BaseListDumper:  # noqa: A002 - psycopg's name
        dumper = super().upgrade(obj, format)
        if not isinstance(dumper, BinaryList):
            dumper = BinaryList(self.cls, self._tx)
            dumper.oid = self._tx.adapters.types["text"].array_oid
        return dumper


def _ours() -> AdaptersMap:
    types = TypesRegistry()
    postgres.register_default_types(types)
    adapters = AdaptersMap(types=types)
    postgres.register_default_adapters(adapters)
    register_all_arrays(adapters)
    # The last one that is registered is the one that is used.
    adapters.register_dumper(list, BinaryList)
    adapters.register_dumper(timedelta, TimedeltaBinaryDumper)
    adapters.register_loader("timestamptz", UtcLoader)
    return adapters


ADAPTERS = _ours()


class Cursor(psycopg.Cursor[Any]):
    @property
    def adapters(self) -> AdaptersMap:
        return ADAPTERS


class AsyncCursor(psycopg.AsyncCursor[Any]):
    @property
    def adapters(self) -> AdaptersMap:
        return ADAPTERS
