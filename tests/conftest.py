"""A real Postgres for every test: an embedded one by default, or as `--pg` and QUEUE_SERVICE_TEST_DATABASE_URL say.

The schema is migrated once, into a template; each test that asks for `database` gets a copy of its own.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from itertools import count
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from queue_service import App
from queue_service.db import embedded, schema, url
from queue_service.db.cluster import Cluster
from queue_service.db.pool import Connection, connect
from queue_service.settings import load
from tests.support import local_programs

# Variables that would lead a test, or a process it starts, to a developer's own database.
for _name in ("QUEUE_SERVICE_DATABASE_URL", "DATABASE_URL", *url.PG_VARIABLES):
    os.environ.pop(_name, None)

# Tests check logic; what survives a power cut is the server's business, and its flushes would double the time.
FAST = {"fsync": "off", "full_page_writes": "off", "max_connections": "200"}

_numbers = count(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--pg",
        choices=("embedded", "local", "container"),
        default="embedded",
        help="the server under test: the bundled one, programs found on this machine, or a container "
        "(QUEUE_SERVICE_TEST_DATABASE_URL, when set, comes first)",
    )


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    """The conninfo of a superuser on a server that is ours to fill with databases."""
    given = os.environ.get("QUEUE_SERVICE_TEST_DATABASE_URL")
    kind = request.config.getoption("--pg")
    if given:
        yield given
    elif kind == "container":
        from testcontainers.postgres import PostgresContainer

        with PostgresContainer("postgres:18") as container:
            yield container.get_connection_url(driver=None)
    else:
        scratch = Path(tempfile.mkdtemp(prefix="queue_service-tests-"))
        scratch.chmod(0o711)
        programs = embedded.programs() if kind == "embedded" else local_programs()
        cluster = Cluster(scratch / "cluster", programs, FAST)
        try:
            yield cluster.use()
        finally:
            cluster.leave()
            shutil.rmtree(scratch, ignore_errors=True)


@pytest.fixture
def own_cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A server of this test's own, with our schema, to be stopped and started."""
    cluster = Cluster(tmp_path / "cluster", embedded.programs(), FAST)
    cluster.use()
    try:
        schema.upgrade(cluster.conninfo)
        yield cluster
    finally:
        cluster.stop()
        cluster.leave()


@pytest.fixture(scope="session")
def template(server: str) -> Iterator[str]:
    """The name of a database with our schema, for copying."""
    name = f"queue_service_template_{os.getpid()}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"create database {name}")
        schema.upgrade(make_conninfo(server, dbname=name))
        yield name
        admin.execute(f"drop database {name} with (force)")


@pytest.fixture
def empty_database(server: str) -> Iterator[str]:
    """The conninfo of a database of this test's own, without our schema."""
    yield from _made(server, "template0")


@pytest.fixture
def database(server: str, template: str) -> Iterator[str]:
    """The conninfo of a database of this test's own, with our schema at head."""
    yield from _made(server, template)


def _made(server: str, source: str) -> Iterator[str]:
    name = f"queue_service_test_{os.getpid()}_{next(_numbers)}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"create database {name} template {source} strategy file_copy")
        yield make_conninfo(server, dbname=name)
        admin.execute(f"drop database {name} with (force)")


@pytest.fixture
async def session(database: str) -> AsyncIterator[Callable[[], Awaitable[Connection]]]:
    """Opens connections to the test's database, with our session settings, in autocommit mode."""
    opened: list[Connection] = []

    async def open_one() -> Connection:
        opened.append(await connect(database))
        return opened[-1]

    yield open_one
    for conn in opened:
        await conn.close()


@pytest.fixture
async def conn(session: Callable[[], Awaitable[Connection]]) -> Connection:
    """One such connection."""
    return await session()


@pytest.fixture
async def app(database: str) -> AsyncIterator[App]:
    """An open App, without tasks, whose clocks are quick: leases of 1 s, polls and sweeps each 100 ms."""
    quick = {"LEASE": "1s", "POLL_INTERVAL": "100ms", "SWEEP_INTERVAL": "100ms", "DRAIN_TIMEOUT": "5s"}
    settings = load({f"QUEUE_SERVICE_{name}": value for name, value in quick.items()})
    async with App(database, settings=settings) as opened:
        yield opened
