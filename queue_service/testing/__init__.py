"""For the tests of those who use this library: work off runs in the test's own process, and see what was enqueued.

A pytest plugin too, with a database of its own for each test: `pytest_plugins = ["queue_service.testing"]`. The functions
need no pytest.
"""

from queue_service.testing.databases import on_database
from queue_service.testing.expecting import assert_enqueued, eventually, refute_enqueued
from queue_service.testing.working import HandlerFailed, drain, process

# Read by pytest when it loads this module as a plugin, and by nobody else.
pytest_plugins = ("queue_service.testing.fixtures",)

__all__ = ["HandlerFailed", "assert_enqueued", "drain", "eventually", "on_database", "process", "refute_enqueued"]
