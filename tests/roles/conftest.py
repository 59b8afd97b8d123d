"""Roles of each kind, with what `db grants` prints for them and nothing else; and a database whose owner is no superuser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from uuid import uuid4

import psycopg
import pytest
from click.testing import CliRunner, Result
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from queue_service.cli import cli
from queue_service.db import schema
from queue_service.testing import databases

Make = Callable[..., str]
Do = Callable[..., None]


def call(conninfo: str, *arguments: str) -> Result:
    return CliRunner().invoke(cli, [*arguments, "--database-url", conninfo], prog_name="queue-service")


def execute(conninfo: str, statements: str, *names: str) -> None:
    """Statements with names for `{}`."""
    with psycopg.connect(conninfo, autocommit=True) as conn:
        if names:
            statements = sql.SQL(statements).format(*map(sql.Identifier, names)).as_string(None)
        conn.execute(statements.encode())


def asked(conninfo: str, query: str, *params: object) -> list[tuple[object, ...]]:
    with psycopg.connect(conninfo, autocommit=True) as conn:
        return conn.execute(query.encode(), params or None).fetchall()


def grant(owner: str, role: str, *kinds: str) -> None:
    """Execute what is printed, as the owner; but for what is about poolers, which only a superuser may set."""
    printed = call(owner, "db", "grants", *(word for kind in kinds for word in ("--role", kind)), role)
    assert printed.exit_code == 0, printed.output
    rights, _, _ = printed.stdout.partition("-- Only behind a pooler")
    execute(owner, rights)


@contextmanager
def roles(server: str) -> Iterator[Make]:
    """Makes roles that may log in, and no more, until the end of the block."""
    made: list[str] = []

    def make(kind: str = "role") -> str:
        made.append(f"{kind} {uuid4().hex[:8]}")
        execute(server, "create role {} login", made[-1])
        return made[-1]

    yield make
    with psycopg.connect(server, autocommit=True) as admin:
        found = admin.execute("select datname from pg_database where datname like 'queue_service_%'").fetchall()
    for name in reversed(made):
        # It may have rights in databases that are still there.
        for (database,) in found:
            try:
                execute(make_conninfo(server, dbname=database), "drop owned by {} cascade", name)
            except psycopg.OperationalError:
                continue
        execute(server, "drop role {}", name)


@pytest.fixture
def role(server: str) -> Iterator[Make]:
    with roles(server) as make:
        yield make


@pytest.fixture(scope="session")
def owner_role(server: str) -> Iterator[str]:
    with roles(server) as make:
        yield make("owner")


@pytest.fixture(scope="session")
def owned_template(server: str, owner_role: str) -> Iterator[str]:
    """The name of a database with our schema, which a role made that is no superuser."""
    with databases.made(server, "template0", prefix="queue_service_template") as conninfo:
        name = str(conninfo_to_dict(conninfo)["dbname"])
        execute(conninfo, "grant create on database {} to {}", name, owner_role)
        schema.upgrade(make_conninfo(conninfo, user=owner_role))
        yield name


@pytest.fixture
def owned(server: str, owned_template: str, owner_role: str) -> Iterator[str]:
    """The conninfo of a database of this test's own, as the owner of its schema, who is no superuser."""
    with databases.made(server, owned_template) as conninfo:
        name = str(conninfo_to_dict(conninfo)["dbname"])
        execute(conninfo, "grant create on database {} to {}", name, owner_role)
        yield make_conninfo(conninfo, user=owner_role)


@pytest.fixture
def admin(server: str, owned: str) -> str:
    """The same database, as a superuser."""
    return make_conninfo(server, dbname=str(conninfo_to_dict(owned)["dbname"]))
