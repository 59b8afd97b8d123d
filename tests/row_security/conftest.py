"""A database with row security, and roles: two tenants, one that works for all, and one that is neither."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import NamedTuple
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from queue_service import App
from queue_service.db import row_security
from queue_service.db.execute import Connection
from queue_service.db.session import connect
from tests.support import quick_app

GRANTS = """
grant usage on schema queue_service to {role};
grant select, insert, update, delete on all tables in schema queue_service to {role};
grant usage, select on all sequences in schema queue_service to {role};
grant execute on all functions in schema queue_service to {role};
"""


class Roles(NamedTuple):
    """The conninfos of the owner of the schema and of the four roles, and the names of two."""

    owner: str
    acme: str
    other: str
    worker: str
    blind: str
    worker_name: str
    blind_name: str


@pytest.fixture
def roles(server: str, direct: str) -> Iterator[Roles]:
    """The roles, with all rights there are, and without row security. A tenant's sessions begin with its organization."""
    unique = uuid4().hex[:8]
    names = [f"{name} {unique}" for name in ("acme", "other", "worker", "blind")]
    with psycopg.connect(server, autocommit=True) as admin, psycopg.connect(direct, autocommit=True) as inside:
        for name in names:
            role = sql.Identifier(name)
            admin.execute(sql.SQL("create role {} login").format(role))
            inside.execute(sql.SQL(GRANTS).format(role=role))
            if not name.startswith(("worker", "blind")):
                organization = "alter role {} set queue_service.organization_id = {}"
                admin.execute(sql.SQL(organization).format(role, sql.Literal(name.partition(" ")[0])))
        yield Roles(direct, *(make_conninfo(direct, user=name) for name in names), *names[2:])
        for name in names:
            inside.execute(sql.SQL("drop owned by {}").format(sql.Identifier(name)))
            admin.execute(sql.SQL("drop role {}").format(sql.Identifier(name)))


@pytest.fixture
def secured(roles: Roles) -> Roles:
    row_security.enable(roles.owner, [roles.worker_name])
    return roles


@pytest.fixture
async def acme(secured: Roles) -> AsyncIterator[App]:
    async with quick_app(secured.acme) as app:
        yield app


@pytest.fixture
async def other(secured: Roles) -> AsyncIterator[App]:
    async with quick_app(secured.other) as app:
        yield app


@pytest.fixture
async def exempt(secured: Roles) -> AsyncIterator[App]:
    async with quick_app(secured.worker) as app:
        yield app


@pytest.fixture
async def owner(direct: str) -> AsyncIterator[Connection]:
    """What the owner of the schema sees, which is everything."""
    conn = await connect(direct)
    yield conn
    await conn.close()
