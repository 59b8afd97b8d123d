from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from queue_service.db import embedded
from queue_service.testing import databases
from tests.servers.pair import DATABASE, Pair, made_pair, running_pair


@pytest.fixture(scope="session")
def made_servers() -> Iterator[Path]:
    with made_pair(embedded.programs()) as made:
        yield made


@pytest.fixture
def pair(made_servers: Path) -> Iterator[Pair]:
    """A primary and its synchronous standby, of this test's own."""
    with running_pair(made_servers, embedded.programs()) as running:
        yield running


@pytest.fixture(scope="module")
def shared_pair(made_servers: Path) -> Iterator[Pair]:
    """The same, for all tests of a module, which leave it as it was."""
    with running_pair(made_servers, embedded.programs()) as running:
        yield running


@pytest.fixture
def own_database(shared_pair: Pair) -> Iterator[str]:
    """The conninfo of a database of this test's own on the primary of the shared pair. In the end the standby follows."""
    with databases.made(shared_pair.primary.admin, DATABASE) as conninfo:
        try:
            yield conninfo
        finally:
            shared_pair.resume()
