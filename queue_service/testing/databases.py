"""Databases for tests: the schema is migrated once, into a template, and each test gets a copy that is its own."""

from __future__ import annotations

import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from queue_service.app import App
from queue_service.db import embedded, schema, url
from queue_service.db.cluster import Cluster
from queue_service.errors import ConfigError, EmbeddedUnavailable
from queue_service.testing.watcher import watched

# Tests check logic; what survives a power cut is the server's business, and its flushes would double the time.
# What processes of a server share lies in its own directory, where a server that is killed leaves nothing behind.
FAST = {
    "fsync": "off", "full_page_writes": "off", "max_connections": "200", "dynamic_shared_memory_type": "mmap",
}  # fmt: skip
# What a server logs where one of its processes died. Matched from the start of a line, with its time and process id: a
# statement of a test, logged because it failed, may contain the same words.
_DEATH = re.compile(r"\S+ \S+ \S+ \[\d+\] (PANIC:  |LOG:  [^:]*\(PID \d+\) was terminated by signal )")


@contextmanager
def embedded_server(programs: Path | None = None) -> Iterator[str]:
    """The conninfo of a superuser on a server that is gone after the block, run by the bundled programs or by these.
    When this process is killed, the server ends as well, and so does what was started with its conninfo. Raises
    EmbeddedUnavailable in the end if the server crashed meanwhile, with what its log says of that."""
    scratch = Path(tempfile.mkdtemp(prefix="queue_service-tests-"))
    # A server that may not run as root is run by another user, who has to pass through.
    scratch.chmod(0o711)
    cluster = Cluster(scratch / "cluster", programs or embedded.programs(), FAST)
    with watched(scratch):
        try:
            yield cluster.use()
        finally:
            cluster.leave()
            crash = _crash(cluster.data / "server.log")
            shutil.rmtree(scratch, ignore_errors=True)
            if crash:
                raise EmbeddedUnavailable(
                    "The server crashed while tests used it; what failed meanwhile may have failed by that. Its log says:\n"
                    + crash
                )


def _crash(server_log: Path) -> str:
    """The lines around the first death of one of its processes: what comes later follows from it. Empty: none died."""
    lines = server_log.read_text(errors="replace").splitlines() if server_log.exists() else []
    died = next((n for n, line in enumerate(lines) if _DEATH.match(line)), None)
    return "" if died is None else "\n".join(lines[max(died - 2, 0) : died + 5])


@contextmanager
def template(server: str, prepare: Callable[[str], object] | None = None) -> Iterator[str]:
    """The name of a database with our schema, for copying. `prepare` is given its conninfo, to add what is the caller's,
    and must leave no connection to it open: Postgres copies no database that is in use."""
    with made(server, "template1", prefix="queue_service_template") as conninfo:
        schema.upgrade(conninfo)
        if prepare is not None:
            prepare(conninfo)
        yield str(conninfo_to_dict(conninfo)["dbname"])


@contextmanager
def made(server: str, source: str, *, prefix: str = "queue_service_test") -> Iterator[str]:
    """The conninfo of a new database, a copy of `source`, for the length of the block."""
    # Not the process id: test runs on several machines may share a server.
    name = f"{prefix}_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(server, autocommit=True) as admin:
        # Copying files writes little into the log, where a checkpoint costs nothing: fsync is off, or the database small.
        admin.execute(
            sql.SQL("create database {} template {} strategy file_copy").format(
                sql.Identifier(name), sql.Identifier(source)
            )
        )
        try:
            yield make_conninfo(server, dbname=name)
        finally:
            admin.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


@contextmanager
def on_database(app: App, conninfo: str) -> Iterator[App]:
    """Let this App, which must not be open, use another database for the length of the block. An `app.sync` that was taken
    before keeps the one it had."""
    if app.is_open:
        raise ConfigError("This App is open, and stays with its database. Let the test open it, not the module.")
    before = app.database
    app.database = url.parse(conninfo, source="test")
    try:
        yield app
    finally:
        app.database = before
