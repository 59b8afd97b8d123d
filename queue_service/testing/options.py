"""What the environment says about a test run."""

from __future__ import annotations

import os


def given_server() -> str | None:
    """The server to make test databases on; None: an embedded one."""
    return os.environ.get("QUEUE_SERVICE_TEST_DATABASE_URL") or None
