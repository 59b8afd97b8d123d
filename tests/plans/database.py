"""Databases whose statistics stay as they were when every table was empty, until somebody says otherwise."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg.conninfo import make_conninfo

Sync = psycopg.Connection[Any]


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
