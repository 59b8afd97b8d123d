"""The fixtures. A test run makes one server and one template; a test that asks for a database gets a copy of its own.

Loaded by `pytest_plugins = ["queue_service.testing"]`. Override `queue_service_app` to return your App.
"""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack

import pytest

from queue_service.app import App
from queue_service.errors import EmbeddedUnavailable
from queue_service.testing import databases
from queue_service.testing.options import given_server

if importlib.util.find_spec("pytest_asyncio"):
    # In its strict mode, it leaves fixtures alone that are not its own.
    from pytest_asyncio import fixture as async_fixture
else:
    async_fixture = pytest.fixture  # type: ignore[assignment]


@pytest.fixture(scope="session")
def queue_service_server() -> Iterator[str]:
    """A server to fill with databases: QUEUE_SERVICE_TEST_DATABASE_URL, whose user may create them, or an embedded one."""
    given = given_server()
    if given is not None:
        yield given
    else:
        with ExitStack() as serving:
            try:
                conninfo = serving.enter_context(databases.embedded_server())
            except EmbeddedUnavailable as missing:
                raise EmbeddedUnavailable(f"{missing} Tests look for it in QUEUE_SERVICE_TEST_DATABASE_URL.") from None
            yield conninfo


@pytest.fixture(scope="session")
def queue_service_prepare() -> Callable[[str], object] | None:
    """Override this to add your own tables: a function that is given the conninfo of the template, once."""
    return None


@pytest.fixture(scope="session")
def queue_service_template(
    queue_service_server: str, queue_service_prepare: Callable[[str], object] | None
) -> Iterator[str]:
    """The name of the database that each test gets a copy of."""
    with databases.template(queue_service_server, queue_service_prepare) as name:
        yield name


@pytest.fixture
def queue_service_database(queue_service_server: str, queue_service_template: str) -> Iterator[str]:
    """The conninfo of a database of this test's own, with our schema at head."""
    with databases.made(queue_service_server, queue_service_template) as conninfo:
        yield conninfo


@pytest.fixture
def queue_service_app() -> App:
    """Override this to return your App."""
    return App()


@pytest.fixture
def tested_app(queue_service_app: App, queue_service_database: str) -> Iterator[App]:
    """Your App on a database of this test's own, for tests and code that open it themselves, as `app.sync` does."""
    with databases.on_database(queue_service_app, queue_service_database) as app:
        yield app


@async_fixture
async def opened_app(tested_app: App) -> AsyncIterator[App]:
    """The same, open on the test's event loop."""
    async with tested_app:
        yield tested_app
