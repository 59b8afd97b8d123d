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
from psycopg.adapt import AdaptersMap, Loader
from psycopg.pq import Format
from psycopg.types import TypesRegistry
from psycopg.types.array import ListBinaryDumper, register_all_arrays
from psycopg.types.datetime import TimedeltaBinaryDumper

_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)


class UtcLoader(Loader):
    format = Format.BINARY

    def load(self, data: Buffer) -> datetime:
        return _EPOCH + timedelta(microseconds=int.from_bytes(data, "big", signed=True))


def _ours() -> AdaptersMap:
    types = TypesRegistry()
    postgres.register_default_types(types)
    adapters = AdaptersMap(types=types)
    postgres.register_default_adapters(adapters)
    register_all_arrays(adapters)
    # The last one that is registered is the one that is used.
    adapters.register_dumper(list, ListBinaryDumper)
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
