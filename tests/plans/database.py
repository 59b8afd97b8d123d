"""Databases whose statistics stay as they were when every table was empty, until somebody says otherwise."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from queue_service.db.query import Query

Sync = psycopg.Connection[Any]

# Where Postgres cannot tell from the statement.
TYPES = {
    "priority": "smallint",
    "max_attempts": "integer",
    "notify": "boolean",
    "limit": "bigint",
    "scan_limit": "bigint",
}


@contextmanager
def believed_empty(server: str, template: str, name: str, tables: Collection[str]) -> Iterator[Sync]:
    """A connection to a new database with our schema, in which nothing vacuums or analyses these tables."""
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"create database {name} template {template} strategy file_copy")
        with psycopg.connect(make_conninfo(server, dbname=name), autocommit=True) as conn:
            for table in sorted(tables):
                conn.execute(f"alter table queue_service.{table} set (autovacuum_enabled = off)".encode())
                conn.execute(f"vacuum analyze queue_service.{table}".encode())
            yield conn
        admin.execute(f"drop database {name} with (force)")


def prepare(conn: Sync, name: str, query: Query[Any]) -> None:
    """Prepare the statement, and have it planned at once."""
    names = list(dict.fromkeys(re.findall(r"%\((\w+)\)s", query.text)))
    text = re.sub(r"%\((\w+)\)s", lambda found: f"${names.index(found[1]) + 1}", query.text).replace("%%", "%")
    types = ", ".join(TYPES.get(each, "unknown") for each in names)
    conn.execute(f"prepare {name} ({types}) as {text}".encode())
    conn.execute(sql.SQL("explain ") + execution(name, query))


def execution(name: str, query: Query[Any]) -> sql.Composed:
    names = list(dict.fromkeys(re.findall(r"%\((\w+)\)s", query.text)))
    values = sql.SQL(", ").join(sql.Literal(query.params[each]) for each in names)
    return sql.SQL("execute {} ({})").format(sql.Identifier(name), values)


class Look(NamedTuple):
    """What a statement read of some tables: how many rows it looked at, how many a join then dropped, and by what means.
    `shown` is for whoever has to see why."""

    visited: int
    discarded: int
    kinds: set[tuple[str, str]]
    shown: str


def looked(conn: Sync, query: Query[Any], tables: Collection[str], *, prepared: str | None = None) -> Look:
    """Execute a statement, or the one that was `prepared` under this name, and see what it read."""
    explain = "explain (analyze, timing off, format json) "
    if prepared is None:
        row = conn.execute(f"{explain}{query.text}".encode(), query.params).fetchone()
    else:
        row = conn.execute(sql.SQL(explain) + execution(prepared, query)).fetchone()
    assert row is not None
    nodes = list(flattened(row[0][0]["Plan"]))
    reads = [node for node in nodes if "Scan" in node["Node Type"] and node.get("Relation Name") in tables]
    names = ("Node Type", "Index Name", "Actual Rows", "Actual Loops")
    return Look(
        visited=sum(n["Actual Loops"] * (n["Actual Rows"] + n.get("Rows Removed by Filter", 0)) for n in reads),
        discarded=sum(n["Actual Loops"] * n.get("Rows Removed by Join Filter", 0) for n in nodes),
        kinds={(node["Relation Name"], node["Node Type"]) for node in reads if node["Actual Loops"]},
        shown="\n".join(str(tuple(node.get(name) for name in names)) for node in reads),
    )


def flattened(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", []):
        yield from flattened(child)
