"""One database, on which one contender after another is measured, each from a fresh start."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from benchmarks.peers import Program, cpu_seconds, family

DATABASE = "queue_service_bench"


class Arena:
    """`data` is the directory of the server's cluster, where it is ours: then its CPU time can be told."""

    def __init__(self, conninfo: str, commands: dict[str, list[str]], data: Path | None = None) -> None:
        self._conninfo = conninfo
        self._commands = commands
        self._data = data

    @property
    def names(self) -> list[str]:
        return list(self._commands)

    @contextlib.contextmanager
    def programs(self, name: str, count: int = 1) -> Iterator[list[Program]]:
        """A contender, in so many processes, on a database that has nothing in it but its empty tables."""
        url = as_url(self.emptied())
        running: list[Program] = []
        try:
            for _ in range(count):
                running.append(Program(name, self._commands[name], url))
                # The first one makes the tables before the second looks for them.
                running[-1].ask("clear")
            yield running
        finally:
            for program in running:
                program.close()

    def emptied(self) -> str:
        """The conninfo of a new database in the place of the one before."""
        with psycopg.connect(self._conninfo, autocommit=True) as conn:
            conn.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(DATABASE)))
            conn.execute(sql.SQL("create database {}").format(sql.Identifier(DATABASE)))
            conn.execute("checkpoint")
        return make_conninfo(self._conninfo, dbname=DATABASE)

    def drop(self) -> None:
        with psycopg.connect(self._conninfo, autocommit=True) as conn:
            conn.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(DATABASE)))

    @contextlib.contextmanager
    def connection(self) -> Iterator[psycopg.Connection[Any]]:
        with psycopg.connect(self._conninfo, dbname=DATABASE, autocommit=True) as conn:
            yield conn

    def usage(self, program: Program) -> Usage:
        """What the contender and the server have used so far."""
        with self.connection() as conn:
            row = conn.execute(
                "select pg_current_wal_insert_lsn() - '0/0', pg_stat_clear_snapshot(), xact_commit + xact_rollback"
                "  from pg_stat_database where datname = current_database()"
            ).fetchone()
        assert row is not None
        server = cpu_seconds(family(self._postmaster())) if self._data else float("nan")
        return Usage(float(row[0]), float(row[2]), cpu_seconds(family(program.pid)), server)

    def _postmaster(self) -> int:
        assert self._data
        return int((self._data / "postmaster.pid").read_text().splitlines()[0])


@dataclass(frozen=True, slots=True)
class Usage:
    wal: float
    transactions: float
    program: float
    server: float

    def since(self, before: Usage, count: int) -> dict[str, float]:
        """For each job, and CPU for a thousand."""
        return {
            "WAL bytes a job": (self.wal - before.wal) / count,
            "transactions a job": (self.transactions - before.transactions) / count,
            "CPU ms a job": 1_000 * (self.program + self.server - before.program - before.server) / count,
        }


@dataclass(slots=True)
class Figures:
    """What was measured: by scenario, contender and name, a value for each round."""

    rounds: dict[str, dict[str, dict[str, list[float]]]] = field(default_factory=dict)

    def add(self, scenario: str, contender: str, figures: dict[str, float]) -> None:
        into = self.rounds.setdefault(scenario, {}).setdefault(contender, {})
        for name, value in figures.items():
            into.setdefault(name, []).append(value)

    def median(self, scenario: str, contender: str, name: str) -> float | None:
        values = self.rounds.get(scenario, {}).get(contender, {}).get(name)
        return statistics.median(values) if values else None


def as_url(conninfo: str) -> str:
    """For programs that do not know the other form."""
    parts = conninfo_to_dict(conninfo)
    password = f":{quote(str(parts['password']), safe='')}" if parts.get("password") else ""
    host, port = parts.get("host", "localhost"), parts.get("port", 5432)
    return f"postgresql://{parts.get('user', 'postgres')}{password}@/{parts['dbname']}?host={host}&port={port}"
