"""What all tests of the command line share."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import structlog

from queue_service import logs


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """The command line sends the log where its standard error is, which is gone when the test is over."""
    root = logging.getLogger()
    handlers, level, of_alembic = root.handlers[:], root.level, logging.getLogger("alembic").level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("alembic").setLevel(of_alembic)
    structlog.reset_defaults()
    logs.configured = None
