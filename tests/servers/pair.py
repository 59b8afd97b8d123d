"""Two servers, of which one is the other's synchronous standby: to be stalled, killed, promoted and demoted."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import psycopg
from psycopg.conninfo import make_conninfo

from queue_service.db import schema
from queue_service.db.cluster import Cluster
from queue_service.testing.databases import FAST
from queue_service.testing.watcher import watched
from tests.support import free_port

# The database with our schema.
DATABASE = "queue"
SLOT = "other"
STANDBY = "standby"
# What the server says where a statement that waited for the standby was told to wait no more.
GAVE_UP = "canceling wait for synchronous replication"
_QUICK = FAST | {
    "wal_level": "replica", "hot_standby": "on", "max_replication_slots": "4", "wal_keep_size": "64MB",
    "wal_retrieve_retry_interval": "100ms", "recovery_min_apply_delay": "0", "hot_standby_feedback": "off",
}  # fmt: skip

_SYNCHRONOUS = b"""
do $$ begin
  while not exists (select from pg_stat_replication where sync_state = 'sync') loop
    perform pg_sleep(0.01), pg_stat_clear_snapshot();
  end loop;
end $$
"""


class Node:
    """A server at a port of this machine. `follows` is the port of the one that it is a standby of."""

    def __init__(self, path: Path, programs: Path, port: int) -> None:
        self.port = port
        self.data = path / "data"
        self._path = path
        self._programs = programs
        self._cluster: Cluster | None = None

    @property
    def conninfo(self) -> str:
        return make_conninfo("", host="127.0.0.1", port=self.port, user="postgres", dbname=DATABASE)

    @property
    def admin(self) -> str:
        """From where databases are made."""
        return make_conninfo(self.conninfo, dbname="postgres")

    @property
    def log(self) -> str:
        return (self.data / "server.log").read_text(errors="replace")

    @property
    def postmaster(self) -> int:
        return int((self.data / "postmaster.pid").read_text().split()[0])

    def start(self, *, follows: int | None = None, **settings: str) -> None:
        """As a primary, or as a standby of the server at that port."""
        standby = self.data / "standby.signal"
        own = {"listen_addresses": "127.0.0.1", "port": str(self.port)} | settings
        if follows is not None:
            # Empty, as the files of a server are its user's alone, and it may be another user than ours.
            standby.touch()
            other = f"host=127.0.0.1 port={follows} user=postgres application_name={STANDBY}"
            own |= {"primary_conninfo": other, "primary_slot_name": SLOT}
        self._cluster = Cluster(self._path, self._programs, _QUICK | own)
        self._cluster.use()

    def stop(self) -> None:
        """In order. Connections are ended."""
        if self._cluster is not None:
            self._cluster.stop()
            self._cluster.leave()
            self._cluster = None

    def kill(self) -> None:
        """As if the machine had lost its power: all of its processes at once."""
        with suppress(psutil.NoSuchProcess, FileNotFoundError):
            postmaster = psutil.Process(self.postmaster)
            family = [postmaster, *postmaster.children(recursive=True)]
            # So that it makes no new ones meanwhile.
            for each in family:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            psutil.wait_procs(family, timeout=10)
        if self._cluster is not None and self._cluster._users is not None:
            # There is nothing to be left in order.
            self._cluster._users.close()
            self._cluster = None

    def promote(self) -> None:
        """Returns when it takes writes."""
        assert self._cluster is not None
        promoted = self._cluster._run("pg_ctl", "-D", str(self.data), "-w", "promote")
        assert promoted.returncode == 0, promoted.stdout

    def ask(self, question: str) -> object:
        with psycopg.connect(self.admin, autocommit=True) as conn:
            row = conn.execute(question.encode()).fetchone()
            return row and row[0]


class Pair:
    """`primary` acknowledges a commit once `standby` has it on disk. After a failover they have changed places."""

    def __init__(self, primary: Node, standby: Node) -> None:
        self.primary = primary
        self.standby = standby
        self._receiver: int | None = None

    @property
    def conninfo(self) -> str:
        """Both of them, the first that was the primary at the start."""
        ports = f"{self._first},{self._second}"
        return make_conninfo("", host="127.0.0.1,127.0.0.1", port=ports, user="postgres", dbname=DATABASE)

    def start(self) -> None:
        self._first, self._second = self.primary.port, self.standby.port
        self.primary.start(synchronous_standby_names=STANDBY)
        self.standby.start(follows=self.primary.port)
        self.wait_until_synchronous()

    def wait_until_synchronous(self) -> None:
        with psycopg.connect(self.primary.admin, autocommit=True) as conn:
            conn.execute("set statement_timeout = '30s'")
            conn.execute(_SYNCHRONOUS)

    def stall(self) -> None:
        """The standby is there, and takes nothing any more."""
        receiver = self.standby.ask("select pid from pg_stat_wal_receiver")
        assert isinstance(receiver, int), "the standby has no WAL receiver"
        self._receiver = receiver
        os.kill(receiver, signal.SIGSTOP)

    def resume(self) -> None:
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            os.kill(receiver, signal.SIGCONT)

    def fail_over(self) -> None:
        """The primary dies, and the standby takes its place, with what it had taken."""
        self.primary.kill()
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            # It ends when it wakes, before it reads what the primary had sent it meanwhile.
            os.kill(receiver, signal.SIGTERM)
            os.kill(receiver, signal.SIGCONT)
        self.standby.promote()
        self._change_places()

    def switch_over(self) -> None:
        """The primary stops in order and becomes the standby of the one that was its standby."""
        self.primary.stop()
        self.standby.promote()
        self._change_places()
        self.primary.ask(
            f"select pg_create_physical_replication_slot('{SLOT}', true) "
            f"where not exists (select from pg_replication_slots where slot_name = '{SLOT}')"
        )
        self.standby.start(follows=self.primary.port)

    def demote(self) -> None:
        """Only this: the primary stops in order, and starts as a standby of nobody."""
        self.primary.stop()
        self.primary.start(follows=self.standby.port)

    def _change_places(self) -> None:
        self.primary, self.standby = self.standby, self.primary

    def close(self) -> None:
        self.resume()
        for node in (self.primary, self.standby):
            node.kill()


@contextmanager
def made_pair(programs: Path) -> Iterator[Path]:
    """A directory with the files of two servers that are stopped, for copying: with our schema, and a slot."""
    with _directory() as place:
        pair = Pair(*(Node(place / name, programs, free_port()) for name in ("a", "b")))
        a, b = pair.primary, pair.standby
        a.start()
        with psycopg.connect(a.admin, autocommit=True) as conn:
            conn.execute(f"create database {DATABASE}".encode())
        schema.upgrade(a.conninfo)
        a.ask(f"select pg_create_physical_replication_slot('{SLOT}', true)")
        assert a._cluster is not None
        (place / "b").mkdir()
        new = Path(tempfile.mkdtemp(prefix="new", dir=place))
        shutil.chown(new, a.data.stat().st_uid, a.data.stat().st_gid)
        copied = a._cluster._run("pg_basebackup", "-D", str(new / "data"), "-d", a.admin, "-X", "stream", "-c", "fast")
        assert copied.returncode == 0, copied.stdout
        (new / "data").rename(b.data)
        a.stop()
        yield place


@contextmanager
def running_pair(made: Path, programs: Path) -> Iterator[Pair]:
    """A copy of it, at work."""
    with _directory() as place:
        subprocess.run(["cp", "-a", made / "a", made / "b", place], check=True)  # noqa: S607
        pair = Pair(*(Node(place / name, programs, free_port()) for name in ("a", "b")))
        try:
            pair.start()
            yield pair
        finally:
            pair.close()


@contextmanager
def _directory() -> Iterator[Path]:
    """One that the servers' user may pass through. Whatever was started in it ends with this process."""
    place = Path(tempfile.mkdtemp(prefix="qs-pair-"))
    place.chmod(0o711)
    with watched(place):
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)
