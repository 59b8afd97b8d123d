"""The hosts that an address names, each as an address of its own.

libpq would look for the one that takes writes by itself (`target_session_attrs`). But it believes what it is told as the
connection begins, and a pooler repeats what it was told once (pgbouncer#859): in front of a standby that has been promoted
it goes on saying that this is a standby, and the primary is never found. So each host is tried here, and whoever connects
asks the server itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import Conninfo

C = TypeVar("C", bound=psycopg.Connection[Any])

# A half-open connection is noticed within about 25 s idle, 15 s with data in flight.
_TCP: Mapping[str, Any] = {
    "connect_timeout": 10,
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}
# Where the address wants one of these, the server that takes writes is meant. The others are libpq's to find.
_WRITABLE = {"any", "read-write", "primary"}
_TAKES_NONE = "select pg_catalog.pg_is_in_recovery() or pg_catalog.current_setting('transaction_read_only') = 'on'"


def options(conninfo: str, application: str = "queue_service") -> str:
    """The same address, for connections that notice when the other side is gone."""
    return make_conninfo(conninfo, **_TCP, application_name=application, client_encoding="UTF8")


def each_host(conninfo: str, application: str = "queue_service", *, first: int = 0) -> list[str]:
    """As `options`, once for each host, beginning with the one of this number; all in one where there is one host, or the
    address asks for a standby."""
    given = given_by(conninfo)
    lists = {name: given[name].split(",") for name in ("host", "hostaddr", "port") if "," in given.get(name, "")}
    count = max(map(len, lists.values()), default=1)
    if count == 1 or given.get("target_session_attrs", "any") not in _WRITABLE:
        return [options(conninfo, application)]
    alone = [{name: entries[number % len(entries)] for name, entries in lists.items()} for number in range(count)]
    first %= count
    return [
        make_conninfo(options(conninfo, application), **host, target_session_attrs="any")
        for host in alone[first:] + alone[:first]
    ]


def place(conninfo: str) -> str:
    """Where it leads, for people."""
    given = given_by(conninfo)
    return f"{given.get('host') or given.get('hostaddr', '')}:{given.get('port', '')}"


def connect_to_writable(conninfo: str, application: str, connect: Callable[[str], C]) -> C:
    """By this function, to the first of the hosts that takes writes. Raises the driver's error of the last one; where that
    is a standby, the connection is returned, and who writes on it hears what it is."""
    *others, last = each_host(conninfo, application)
    for each in others:
        try:
            conn = connect(each)
        except psycopg.OperationalError:
            continue
        if _takes_writes(conn):
            return conn
        conn.close()
    return connect(last)


def _takes_writes(conn: psycopg.Connection[Any]) -> bool:
    try:
        row = conn.execute(_TAKES_NONE.encode()).fetchone()
    except psycopg.OperationalError:
        return False
    return row is not None and not row[0]


def given_by(conninfo: str) -> dict[str, str]:
    """What the address says, and the environment where it says nothing."""
    defaults = {each.keyword.decode(): each.val.decode() for each in Conninfo.get_defaults() if each.val}
    return {**defaults, **{name: str(value) for name, value in conninfo_to_dict(conninfo).items() if value is not None}}
