"""A Postgres cluster of our own in a directory: made, started and stopped with any set of server programs.

`PATH/data` is the cluster; `PATH/lock` is held while it is made, started or stopped, so that any number of processes may
try at once; `PATH/users` is held shared by each process that uses it. Both are `flock`s, which the kernel drops when
their holder dies, however it dies. The last user to leave stops the server, unless `PATH/keep` says that it was started
to stay. Local sockets only: no port is opened.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import pwd
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlencode

from psycopg.conninfo import make_conninfo

from queue_service.errors import EmbeddedUnavailable
from queue_service.logs import get_logger

log = get_logger(__name__)

START_TIMEOUT = 60
# Seconds in which a server writes what it holds in memory, and ends in good order.
FAST_STOP_TIMEOUT = 10
# sun_path is 108 bytes on Linux and 104 on macOS, and the server adds `/.s.PGSQL.5432.lock`.
_SOCKET_DIR_LIMIT = 80
# What neither the list of socket directories nor the command line of the server could misread.
_PLAIN = re.compile(r"[\w/. ~+@%:-]+")


class Cluster:
    """`settings` are server settings, given to the server at its start. All methods block."""

    def __init__(self, path: Path, programs: Path, settings: dict[str, str] | None = None) -> None:
        self.path = path
        self.data = path / "data"
        self._programs = programs
        self._settings = settings or {}
        self._users: IO[bytes] | None = None

    @property
    def conninfo(self) -> str:
        return make_conninfo("", host=str(self._socket_dir()), port=5432, user="postgres", dbname="postgres")

    @property
    def url(self) -> str:
        """The same as a URL, for other programs."""
        where = urlencode({"host": str(self._socket_dir()), "port": 5432, "user": "postgres"})
        return f"postgresql:///postgres?{where}"

    def use(self) -> str:
        """Start the server if it is not running, and count as a user until `leave`. Returns the connection string."""
        self.start()
        return self.conninfo

    def leave(self) -> None:
        """Stop counting as a user; the last one stops the server. Safe to call twice."""
        users, self._users = self._users, None
        if users is None:
            return
        users.close()
        with self._locked(), (self.path / "users").open("ab") as others:
            try:
                fcntl.flock(others, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            if not (self.path / "keep").exists():
                self._stop()

    def start(self, *, keep: bool = False) -> None:
        """Make the cluster if it is new and start its server; with `keep` it runs on until `stop`."""
        with self._refused_in_words():
            self._prepare_directory()
            self._start_as_user(keep=keep)

    def _start_as_user(self, *, keep: bool) -> None:
        with self._locked():
            joined = self._users is None
            if self._users is None:
                self._users = (self.path / "users").open("ab")
                fcntl.flock(self._users, fcntl.LOCK_SH)
            try:
                if keep:
                    (self.path / "keep").touch()
                if not (self.data / "PG_VERSION").exists():
                    self._initdb()
                self._check_version()
                self._forget_stale_pid()
                if not self.is_running():
                    self._start()
            except BaseException:
                if joined:
                    self._users.close()
                    self._users = None
                raise

    def stop(self) -> bool:
        """Stop the server, whoever uses it. False if it was not running."""
        if not self.path.is_dir():
            return False
        with self._locked():
            (self.path / "keep").unlink(missing_ok=True)
            running = self.is_running()
            if running:
                self._stop()
            return running

    def is_running(self) -> bool:
        return self.data.is_dir() and self._run("pg_ctl", "-D", str(self.data), "status").returncode == 0

    def has_crashed(self) -> bool:
        """Whether the server is gone without having been stopped: then it has left its process id behind. Quick."""
        try:
            os.kill(int((self.data / "postmaster.pid").read_text().split()[0]), 0)
        except ProcessLookupError:
            return True
        except (OSError, ValueError, IndexError):
            return False
        return False

    def psql(self) -> list[str]:
        """The command of an interactive session."""
        return [str(self._programs / "psql"), self.conninfo]

    def _prepare_directory(self) -> None:
        if set(str(self.path)) & set('"$`\\\n'):
            raise EmbeddedUnavailable(
                f"The server cannot be started under {str(self.path)!r}: a shell would misread it."
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as refused:
            raise EmbeddedUnavailable(
                f"The embedded cluster cannot be put at {self.path}: {refused.strerror}. Name another place with "
                "file:PATH or QUEUE_SERVICE_DATA_DIR."
            ) from None
        ours = {"data", "lock", "users", "keep"}
        strangers = {entry.name for entry in self.path.iterdir() if not entry.name.startswith("data.new")} - ours
        made = (self.data / "PG_VERSION").exists()
        strangers |= {"data"} if self.data.exists() and not made else set()
        if strangers and not made:
            raise EmbeddedUnavailable(
                f"{self.path} is not empty and holds no embedded cluster (it has {min(strangers)!r}). "
                "Name an empty or new directory."
            )

    def _initdb(self) -> None:
        for left_over in self.path.glob("data.new*"):
            shutil.rmtree(left_over, ignore_errors=True)
        # A name of its own: an initdb whose caller was killed may still be writing into the one before.
        new = Path(tempfile.mkdtemp(prefix="data.new", dir=self.path))
        if _is_root():
            user = _unprivileged()
            os.chown(new, user.pw_uid, user.pw_gid)
            _let_through([new, self._programs / "postgres"])
        made = self._run(
            "initdb", "-D", str(new), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", owner=new
        )
        if made.returncode != 0:
            raise EmbeddedUnavailable(f"The embedded Postgres could not make its cluster at {new}: {_last(made)}")
        # Renamed when complete, so that a process killed in the middle leaves nothing that looks like a cluster.
        new.rename(self.data)

    def _check_version(self) -> None:
        have = (self.data / "PG_VERSION").read_text().strip()
        shown = self._run("postgres", "--version").stdout.split()
        want = shown[2].split(".")[0] if len(shown) > 2 else "?"
        if have != want:
            raise EmbeddedUnavailable(
                f"The cluster at {self.path} was made by Postgres {have}, and the installed programs are {want}. "
                "Dump it with the old ones and load it with these, or name another directory."
            )

    def _start(self) -> None:
        sockets = self._socket_dir()
        if sockets != self.data:
            self._make_socket_dir(sockets)
        if _is_root():
            _let_through([self.data, self._programs / "postgres"])
        settings = {"listen_addresses": "", "unix_socket_directories": str(sockets), "port": "5432"} | self._settings
        options = " ".join(f"-c {key}='{value}'" for key, value in settings.items())
        server_log = self.data / "server.log"
        started = self._run(
            "pg_ctl",
            "-D",
            str(self.data),
            "-l",
            str(server_log),
            "-w",
            "-t",
            str(START_TIMEOUT),
            "-o",
            options,
            "start",
        )
        if started.returncode != 0:
            written = server_log.read_text(errors="replace").splitlines()[-5:] if server_log.exists() else []
            tail = written or [_last(started)]
            raise EmbeddedUnavailable(
                f"The embedded Postgres at {self.path} did not start. Its log ends with:\n  " + "\n  ".join(tail)
            )

    def _stop(self) -> None:
        # Postgres 18 waits for ever where it is asked to stop as it begins to recover from a crash. To end it at once loses
        # nothing: what it has acknowledged is in its log, from which it recovers when it is next started.
        for mode, seconds in (("fast", FAST_STOP_TIMEOUT), ("immediate", START_TIMEOUT)):
            if not self._run("pg_ctl", "-D", str(self.data), "-m", mode, "-w", "-t", str(seconds), "stop").returncode:
                break
        if (sockets := self._socket_dir()) != self.data:
            # Not empty where the server has not stopped: then it stays.
            with contextlib.suppress(OSError):
                sockets.rmdir()

    def _socket_dir(self) -> Path:
        if len(os.fsencode(self.data)) <= _SOCKET_DIR_LIMIT and _PLAIN.fullmatch(str(self.data)):
            return self.data
        digest = hashlib.sha256(os.fsencode(self.data)).hexdigest()[:12]
        # Not where TMPDIR says: every process has to look in the same place.
        return Path("/tmp") / f"queue_service-{digest}"  # noqa: S108 - made and checked by _make_socket_dir

    def _make_socket_dir(self, sockets: Path) -> None:
        """Ours alone: in a directory that anyone may write to, a link or a foreign directory may wait under this name."""
        owner = self.data.stat()
        with contextlib.suppress(FileExistsError):
            sockets.mkdir(mode=0o700)
            os.chown(sockets, owner.st_uid, owner.st_gid, follow_symlinks=False)
        found = sockets.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != owner.st_uid or found.st_mode & 0o077:
            raise EmbeddedUnavailable(
                f"{sockets} is not a directory of the server's own, and its socket cannot be put there. Remove it."
            )

    def _forget_stale_pid(self) -> None:
        """After a crash, the process id in postmaster.pid may by now be somebody else's; pg_ctl would take it for ours."""
        pid_file = self.data / "postmaster.pid"
        try:
            pid = abs(int(pid_file.read_text().split()[0]))
            name = Path(f"/proc/{pid}/comm").read_text()
        except (OSError, ValueError, IndexError):
            return
        if "postgres" not in name:
            pid_file.unlink()

    def _run(self, program: str, *arguments: str, owner: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run a program as the owner of the cluster, since Postgres refuses to run as root. Output goes to a file:
        the server inherits it, and a pipe would never be closed.
        """
        with tempfile.TemporaryFile("w+") as output:
            finished = subprocess.run(
                [str(self._programs / program), *arguments],
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                cwd="/", env=_environment(), check=False, **_demotion(owner or self.data),
            )  # fmt: skip
            output.seek(0)
            return subprocess.CompletedProcess(finished.args, finished.returncode, output.read())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.path / "lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _refused_in_words(self) -> Iterator[None]:
        try:
            yield
        except PermissionError as refused:
            raise EmbeddedUnavailable(
                f"The embedded cluster at {self.path} belongs to another user ({refused.strerror}). "
                "Use it as that user, or name another place with file:PATH."
            ) from None


def _is_root() -> bool:
    return os.geteuid() == 0


def _unprivileged() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise EmbeddedUnavailable(
        "Postgres refuses to run as root, and there is no user `postgres` or `nobody` to run it as. "
        "Add one, or run as an ordinary user."
    )


def _demotion(owned: Path) -> dict[str, Any]:
    """The user to run as: whoever owns the cluster, when we are root; ourselves otherwise."""
    if not _is_root():
        return {}
    if not owned.exists():
        user = _unprivileged()
        return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    owner = owned.stat()
    return {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []}


def _let_through(targets: list[Path]) -> None:
    """As root: let the server's user pass through the parents of `targets` (search only: nothing becomes readable)."""
    for target in targets:
        for parent in target.parents:
            mode = parent.stat().st_mode
            if not mode & 0o001:
                parent.chmod(mode | 0o001)
                log.warning("chmod o+x, since Postgres refuses to run as root and must pass through", path=str(parent))


def _environment() -> dict[str, str]:
    """Ours without PG*: the programs would take a stray PGDATA or PGPORT for theirs."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")}


def _last(finished: subprocess.CompletedProcess[str]) -> str:
    lines = finished.stdout.strip().splitlines()
    reasons = ("error:", "FATAL", "PANIC", "child process")
    errors = [line for line in lines if any(reason in line for reason in reasons)]
    if errors:
        return errors[0]
    return lines[-1] if lines else f"{finished.args[0]} ended with {finished.returncode}"
