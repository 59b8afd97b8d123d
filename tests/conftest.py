"""A real Postgres for every test: an embedded one by default, or as `--pg` and QUEUE_SERVICE_TEST_DATABASE_URL say.

The schema is migrated once, into a template; each test that asks for `database` gets a copy of its own.
"""

from __future__ import annotations

import gc
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import Engine, NullPool, create_engine
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from queue_service import App
from queue_service.db import embedded, schema, url
from queue_service.db.cluster import Cluster
from queue_service.db.execute import Connection
from queue_service.db.session import connect
from queue_service.testing import databases
from queue_service.testing.options import given_server
from queue_service.testing.watcher import watched
from tests.pooler import Pooler, pooling
from tests.programs import MAJORS, of_this_machine, of_version
from tests.support import quick_app

# Variables that would lead a test, or a process it starts, to a developer's own database.
for _name in ("QUEUE_SERVICE_DATABASE_URL", "DATABASE_URL", *url.PG_VARIABLES):
    os.environ.pop(_name, None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--pg",
        choices=("embedded", "local", "container", *MAJORS),
        default="embedded",
        help="the server under test: the bundled one, programs found on this machine, a container, or a version of Postgres "
        "(QUEUE_SERVICE_TEST_DATABASE_URL, when set, comes first)",
    )
    parser.addoption(
        "--pooler",
        action="store_true",
        help="put a pgbouncer in transaction mode between every test and its database",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes long comes first, or a few long files would be left for the end. What a pooler makes impossible is left
    out behind one."""
    items.sort(key=_place)
    if config.getoption("--pooler"):
        for item in items:
            if (direct := item.get_closest_marker("direct")) is not None:
                item.add_marker(pytest.mark.skip(reason=f"not through a pooler: {direct.args[0]}"))


def pytest_collection_finish() -> None:
    """What was imported and collected stays to the end: the garbage collector need not go through it all the time."""
    gc.collect()
    gc.freeze()


def _place(item: pytest.Item) -> int:
    if item.get_closest_marker("chaos") or item.get_closest_marker("slow"):
        return 0
    return 2 if item.path.parent.name in {"unit", "contract", "db", "client"} else 1


@pytest.fixture(scope="session")
def programs(request: pytest.FixtureRequest) -> Path:
    """Where the programs of the servers under test are."""
    kind = request.config.getoption("--pg")
    if kind in MAJORS:
        return of_version(kind)
    return of_this_machine() if kind == "local" else embedded.programs()


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    """The conninfo of a superuser on a server that is ours to fill with databases."""
    kind = request.config.getoption("--pg")
    given = given_server()
    if given is not None:
        yield given
    elif kind == "container":
        from testcontainers.postgres import PostgresContainer

        with PostgresContainer("postgres:18") as container:
            yield container.get_connection_url(driver=None)
    else:
        with databases.embedded_server(request.getfixturevalue("programs")) as conninfo:
            yield conninfo


@pytest.fixture(scope="session")
def in_between(request: pytest.FixtureRequest, server: str) -> Iterator[Pooler | None]:
    """The pgbouncer that `--pooler` asks for."""
    if not request.config.getoption("--pooler"):
        yield None
        return
    with pooling(server) as running:
        yield running


@pytest.fixture(scope="session", autouse=True)
def nothing_outlives_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Servers and processes that tests start in directories of their own end with this process, also when it is killed."""
    with watched(tmp_path_factory.getbasetemp()):
        yield


@pytest.fixture
def own_cluster(tmp_path: Path, programs: Path) -> Iterator[Cluster]:
    """A server of this test's own, with our schema, to be stopped and started."""
    cluster = Cluster(tmp_path / "cluster", programs, databases.FAST)
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
    with databases.template(server) as name:
        yield name


@pytest.fixture
def empty_database(server: str, in_between: Pooler | None) -> Iterator[str]:
    """The conninfo of a database of this test's own, without our schema."""
    with databases.made(server, "template0") as conninfo:
        yield in_between.before(conninfo) if in_between else conninfo


@pytest.fixture
def direct(server: str, template: str) -> Iterator[str]:
    """The conninfo of the test's `database`, past any pooler: for what a test sees, locks or listens to by itself."""
    with databases.made(server, template) as conninfo:
        yield conninfo


@pytest.fixture
def database(direct: str, in_between: Pooler | None) -> str:
    """The conninfo of a database of this test's own, with our schema at head."""
    return in_between.before(direct) if in_between else direct


@pytest.fixture
async def session(direct: str) -> AsyncIterator[Callable[[], Awaitable[Connection]]]:
    """Opens connections to the test's database, past any pooler, with our session settings, in autocommit mode. Tables that a
    test makes for itself are found there without the name of their schema."""
    opened: list[Connection] = []

    async def open_one() -> Connection:
        opened.append(await connect(direct))
        await opened[-1].execute("set search_path = public")
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
    """An open App, as `quick_app` makes it."""
    async with quick_app(database) as opened:
        yield opened


@pytest.fixture
def engine(database: str) -> Iterator[Engine]:
    """Of a user who may have a pooler, and therefore prepares nothing."""
    made = create_engine(
        "postgresql+psycopg://", creator=lambda: psycopg.connect(database, prepare_threshold=None), poolclass=NullPool
    )
    yield made
    made.dispose()


@pytest.fixture
async def async_engine(database: str) -> AsyncIterator[AsyncEngine]:
    made = create_async_engine(
        "postgresql+psycopg://",
        async_creator=lambda: psycopg.AsyncConnection.connect(database, prepare_threshold=None),
        poolclass=NullPool,
    )
    yield made
    await made.dispose()
