"""A pgbouncer between a test and the server, as people run one: `--pooler` puts it between every test and its database."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from threading import Thread
from time import monotonic, sleep

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from queue_service.testing.watcher import watched

_PORT = 6432
_START_TIMEOUT = 10


class Pooler:
    """A pgbouncer that runs, and is started again when it ends, as systemd does it: version 1.18, which is Debian's, can crash
    when a client cancels or goes away (pgbouncer#801, #822). `log` is what it has written so far."""

    def __init__(self, directory: Path, command: Callable[[], subprocess.Popen[bytes]]) -> None:
        self._directory = directory
        self._command = command
        self._process = command()
        self._is_wanted = True
        self._keeper = Thread(target=self._keep, daemon=True)
        self._keeper.start()

    def before(self, conninfo: str) -> str:
        """How to reach through the pooler what this reaches directly."""
        return make_conninfo(conninfo, host=str(self._directory), port=_PORT, hostaddr=None)

    @property
    def log(self) -> str:
        return (self._directory / "log").read_text()

    def end(self) -> None:
        self._is_wanted = False
        while self._keeper.is_alive():
            self._process.kill()  # or one that is being started at this moment
            self._keeper.join(0.1)

    def until_it_answers(self) -> None:
        until = monotonic() + _START_TIMEOUT
        while True:
            with closing(socket.socket(socket.AF_UNIX)) as line, suppress(OSError):
                line.connect(str(self._directory / f".s.PGSQL.{_PORT}"))
                return
            log = self._directory / "log"
            assert monotonic() < until, (
                f"pgbouncer did not listen in time: {log.read_text() if log.exists() else 'no log'}"
            )
            sleep(0.01)  # until it listens

    def _keep(self) -> None:
        while True:
            self._process.wait()
            if not self._is_wanted:
                return
            self._process = self._command()


@contextmanager
def pooling(server: str, *, mode: str = "transaction", size: int = 6, users: tuple[str, ...] = ()) -> Iterator[Pooler]:
    """Run one in front of this server, for every database of it, each with a pool of its own for each user. It lets in the
    server's own user and these, without a password."""
    program = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
    if program is None:
        pytest.fail("pgbouncer is not installed. Install it (Debian: apt install pgbouncer).")
    given = conninfo_to_dict(server)
    host = str(given["host"])
    directory = Path(tempfile.mkdtemp(prefix="qs-pooler-"))
    uid, gid = _user(host)
    os.chown(directory, uid, gid)
    directory.chmod(0o755)
    known = [(str(given["user"]), str(given.get("password") or "")), *((user, "") for user in users)]
    (directory / "users").write_text("".join(f"{_quoted(user)} {_quoted(password)}\n" for user, password in known))
    (directory / "ini").write_text(
        f"[databases]\n* = host={host} port={given.get('port') or 5432}\n"
        f"[pgbouncer]\nlisten_addr =\nlisten_port = {_PORT}\nunix_socket_dir = {directory}\n"
        f"auth_type = trust\nauth_file = {directory / 'users'}\nlogfile = {directory / 'log'}\n"
        f"pool_mode = {mode}\ndefault_pool_size = {size}\nmax_client_conn = 1000\n"
        # What a killed client of a test leaves in a transaction must not wait for a test's end.
        "server_login_retry = 1\n"
    )
    with watched(directory):
        running = Pooler(
            directory,
            lambda: subprocess.Popen(
                [program, "-q", str(directory / "ini")],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                user=uid if os.geteuid() == 0 else None, group=gid if os.geteuid() == 0 else None,
                extra_groups=[] if os.geteuid() == 0 else None,
            ),
        )  # fmt: skip
        try:
            running.until_it_answers()
            yield running
        finally:
            running.end()
    shutil.rmtree(directory, ignore_errors=True)


def _user(host: str) -> tuple[int, int]:
    """As whom it runs: never as root. The owner of a server's socket can pass to it, where no other user can."""
    if host.startswith("/"):
        owner = Path(host).stat()
        return owner.st_uid, owner.st_gid
    if os.geteuid() != 0:
        return os.getuid(), os.getgid()
    nobody = pwd.getpwnam("nobody")
    return nobody.pw_uid, nobody.pw_gid


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def settings_of(conn: psycopg.Connection[tuple[str, str]]) -> dict[str, str]:
    """Every setting of the session that answers, but for those that tell of a moment."""
    return dict(conn.execute("select name, setting from pg_settings where name <> 'transaction_isolation'").fetchall())
