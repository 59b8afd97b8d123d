"""The embedded cluster: made, shared, left and found again by real processes with the real server."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import psycopg
import pytest

from queue_service import App, Worker
from queue_service.db import embedded
from queue_service.db.cluster import Cluster
from queue_service.errors import DatabaseUnavailable, EmbeddedUnavailable
from queue_service.testing.databases import FAST
from tests.support import eventually, is_gone

ROOT = os.geteuid() == 0
REPOSITORY = Path(__file__).parents[2]

as_root = pytest.mark.skipif(not ROOT, reason="needs to be root")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a short path that any user may pass through."""
    made = Path(tempfile.mkdtemp(prefix="qs-"))
    made.chmod(0o711)
    yield made
    # Servers, and what outlived a process that a test killed.
    for process in psutil.process_iter(["cmdline"]):
        if any(str(made) in argument for argument in process.info["cmdline"] or ()):
            with suppress(psutil.NoSuchProcess):
                family = [process, *process.children(recursive=True)]
                for member in family:
                    with suppress(psutil.NoSuchProcess):
                        member.kill()
                psutil.wait_procs(family, timeout=0.2)
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture(scope="module")
def made() -> Iterator[Path]:
    """A cluster that was made and stopped, for copying: three times quicker than making one."""
    scratch = Path(tempfile.mkdtemp(prefix="qs-made-"))
    scratch.chmod(0o711)
    cluster = Cluster(scratch / "c", embedded.programs(), FAST)
    cluster.use()
    cluster.leave()
    yield scratch / "c"
    shutil.rmtree(scratch)


@pytest.fixture
def make(place: Path, made: Path) -> Iterator[Callable[..., Cluster]]:
    """Clusters that are stopped in the end. Unless it is to be new, or is there already, one has its data."""
    with ExitStack() as ending:

        def one(path: Path = place / "c", *, new: bool = False) -> Cluster:
            if not new and not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                subprocess.run(["cp", "-a", made, path], check=True)  # noqa: S607
            cluster = Cluster(path, embedded.programs(), FAST)
            ending.callback(cluster.leave)
            return cluster

        yield one


def ask(conninfo: str, question: str = "select 42") -> object:
    with psycopg.connect(conninfo, autocommit=True) as conn:
        row = conn.execute(question.encode()).fetchone()
        return row and row[0]


def write(conninfo: str) -> None:
    with psycopg.connect(conninfo, autocommit=True) as conn:
        conn.execute("create table kept as select 7 as n")


def server(path: Path) -> int:
    """The server's process id, as the cluster tells it."""
    return int((path / "data" / "postmaster.pid").read_text().split()[0])


def is_up(path: Path) -> bool:
    return (path / "data" / "postmaster.pid").exists()


_USER = """
import os, pwd, sys
from pathlib import Path
from queue_service.db import embedded
from queue_service.errors import QueueServiceError
import psycopg
cluster = embedded.cluster(Path(sys.argv[1]))
keep, user = sys.argv[2:]
if user:
    # Not before the imports: the interpreter may be in a home directory that only its owner can read.
    who = pwd.getpwnam(user)
    os.setgroups([])
    os.setgid(who.pw_gid)
    os.setuid(who.pw_uid)
print("ready", flush=True)
sys.stdin.readline()
try:
    if keep:
        cluster.start(keep=True)
    with psycopg.connect(cluster.use()) as conn:
        print(conn.execute("select pg_postmaster_start_time()::text").fetchone()[0], cluster.conninfo, flush=True)
except QueueServiceError as refused:
    print(type(refused).__name__, refused, flush=True)
    sys.exit(1)
sys.stdin.readline()
cluster.leave()
"""


class User:
    """Another process that uses the cluster: it starts, and leaves, on request."""

    def __init__(self, path: Path, *, keep: bool = False, user: str = "", **environ: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _USER, str(path), "keep" if keep else "", user],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, env={**os.environ, **environ},
        )  # fmt: skip
        self.hear()

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def start(self) -> str:
        """When the server that it reached was started."""
        self.go_on()
        return self.hear()

    def leave(self) -> None:
        self.go_on()
        assert self.process.wait(30) == 0
        self.close()

    def kill(self) -> None:
        self.process.kill()
        self.close()

    def close(self) -> None:
        self.process.wait(30)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


@pytest.fixture
def other(place: Path) -> Iterator[Callable[..., User]]:
    users: list[User] = []

    def one(*, path: Path = place / "c", keep: bool = False, user: str = "", **environ: str) -> User:
        users.append(User(path, keep=keep, user=user, **environ))
        return users[-1]

    yield one
    for user in users:
        user.kill()


def test_a_new_directory_becomes_a_cluster_without_a_port(make: Callable[..., Cluster], place: Path) -> None:
    cluster = make(place / "new" / "c", new=True)
    conninfo = cluster.use()
    assert cluster.is_running()
    assert ask(conninfo) == 42
    assert ask(conninfo, "show listen_addresses") == ""
    assert ask(conninfo, "show server_encoding") == "UTF8"
    assert ask(conninfo, "show fsync") == "off"
    assert list(cluster.path.glob("data.new*")) == []
    assert cluster.data.stat().st_mode & 0o077 == 0


def test_what_was_written_is_there_after_a_restart(make: Callable[..., Cluster]) -> None:
    cluster = make()
    write(cluster.use())
    cluster.leave()
    assert not cluster.is_running()
    assert ask(make().use(), "select n from kept") == 7


def test_leaving_twice_or_without_having_come_is_harmless(make: Callable[..., Cluster]) -> None:
    cluster = make()
    cluster.leave()
    first = make()
    first.use()
    cluster.leave()
    assert first.is_running()
    first.leave()
    first.leave()
    assert not first.is_running()


async def test_the_last_to_leave_stops_the_server(
    make: Callable[..., Cluster], other: Callable[..., User], place: Path
) -> None:
    mine, theirs = make(), other()
    conninfo = mine.use()
    theirs.start()
    before = server(place / "c")
    mine.leave()
    assert ask(conninfo) == 42
    assert server(place / "c") == before
    theirs.leave()
    assert not mine.is_running()
    # A server that stops takes its file away, and ends a moment later.
    await eventually(lambda: is_gone(before))


def test_two_processes_starting_a_new_cluster_at_once_get_one_server(other: Callable[..., User], place: Path) -> None:
    users = [other(), other(), other()]
    for user in users:
        user.go_on()
    answers = {user.hear() for user in users}
    assert len(answers) == 1
    assert str(place) in answers.pop()
    found = [each.info for each in psutil.process_iter(["pid", "ppid", "cmdline"])]
    servers = {each["pid"]: each["ppid"] for each in found if str(place / "c" / "data") in (each["cmdline"] or [])}
    # A child of the server is called as the server is, until it has given itself a name.
    assert [pid for pid, parent in servers.items() if parent not in servers] == [server(place / "c")]
    for user in users:
        user.leave()
    assert not is_up(place / "c")


async def test_the_server_of_a_killed_process_is_used_by_the_next_and_stopped_by_it(
    make: Callable[..., Cluster], other: Callable[..., User], place: Path
) -> None:
    owner = other()
    owner.start()
    before = server(place / "c")
    owner.kill()
    assert not is_gone(before)
    heir = make()
    assert ask(heir.use()) == 42
    assert server(place / "c") == before
    heir.leave()
    await eventually(lambda: is_gone(before))


def test_a_server_that_begins_to_recover_from_a_crash_is_stopped(make: Callable[..., Cluster]) -> None:
    cluster = make()
    with psycopg.connect(cluster.use()) as conn:
        os.kill(conn.info.backend_pid, signal.SIGKILL)
        with pytest.raises(psycopg.OperationalError):
            conn.execute("select 1")
    cluster.leave()
    assert not cluster.is_running()


def test_a_server_that_was_killed_is_started_again(make: Callable[..., Cluster], place: Path) -> None:
    first = make()
    write(first.use())
    before = psutil.Process(server(place / "c"))
    family = [before, *before.children()]
    before.send_signal(signal.SIGKILL)
    psutil.wait_procs(family, timeout=10)
    assert ask(make().use(), "select n from kept") == 7
    assert server(place / "c") != before.pid


async def test_a_server_that_was_killed_is_started_again_by_an_app_that_holds_it(
    make: Callable[..., Cluster], place: Path
) -> None:
    make().leave()
    async with App(f"file:{place / 'c'}") as app:

        @app.task
        async def double(n: int) -> int:
            return 2 * n

        working = asyncio.create_task(Worker(app).run())
        try:
            assert (await app.wait(await app.enqueue("double", {"n": 2}), timeout=30)).result == 4
            before = psutil.Process(server(place / "c"))
            family = [before, *before.children()]
            before.send_signal(signal.SIGKILL)
            await asyncio.to_thread(psutil.wait_procs, family, timeout=10)

            async def enqueued() -> int | None:
                try:
                    return await app.enqueue("double", {"n": 3})
                except DatabaseUnavailable:
                    return None

            run_id = await eventually(enqueued, within=60)
            assert (await app.wait(run_id, timeout=60)).result == 6
            assert server(place / "c") != before.pid
        finally:
            working.cancel()
            await asyncio.wait([working])


async def test_a_server_that_somebody_has_stopped_is_left_so_by_who_holds_it(
    make: Callable[..., Cluster], place: Path
) -> None:
    cluster = make()
    cluster.use()
    assert not cluster.has_crashed()
    make().stop()
    assert not cluster.has_crashed()


@pytest.mark.parametrize("stage", ["base", "global/pg_control"])
async def test_a_process_killed_while_it_makes_the_cluster_leaves_nothing_in_the_way(
    make: Callable[..., Cluster], other: Callable[..., User], place: Path, stage: str
) -> None:
    owner = other()
    owner.go_on()
    await eventually(lambda: any((place / "c").glob(f"data.new*/{stage}")))
    owner.kill()
    assert not (place / "c" / "data").exists()
    assert ask(make().use()) == 42


def test_a_half_made_cluster_is_made_anew(make: Callable[..., Cluster], place: Path) -> None:
    left = place / "c" / "data.new" / "base"
    left.mkdir(parents=True)
    (left.parent / "PG_VERSION").write_text("18\n")
    (left / "1").touch()
    cluster = make()
    assert ask(cluster.use()) == 42
    assert list((place / "c").glob("data.new*")) == []


def test_a_kept_server_survives_its_users_and_is_stopped_on_request(
    make: Callable[..., Cluster], other: Callable[..., User], place: Path
) -> None:
    keeper = other(keep=True)
    keeper.start()
    before = server(place / "c")
    keeper.leave()
    guest = make()
    assert ask(guest.use()) == 42
    guest.leave()
    assert server(place / "c") == before
    assert guest.is_running()
    assert guest.stop() is True
    assert not guest.is_running()
    assert guest.stop() is False
    assert ask(make().use()) == 42


def test_a_server_stopped_by_hand_is_no_longer_kept(make: Callable[..., Cluster]) -> None:
    cluster = make()
    cluster.start(keep=True)
    cluster.stop()
    cluster.leave()
    again = make()
    again.use()
    again.leave()
    assert not again.is_running()


def test_stopping_what_was_never_made_makes_nothing(make: Callable[..., Cluster], place: Path) -> None:
    assert make(new=True).stop() is False
    assert not (place / "c").exists()


def long(place: Path) -> Path:
    return place / ("d" * 60) / ("e" * 60) / "c"


def test_a_path_longer_than_a_socket_may_have_is_usable(
    make: Callable[..., Cluster], other: Callable[..., User], place: Path
) -> None:
    cluster = make(long(place))
    assert len(str(cluster.data)) > 108
    assert ask(cluster.use()) == 42
    sockets = Path(str(ask(cluster.conninfo, "show unix_socket_directories")))
    try:
        assert len(str(sockets)) < 80
        assert sockets.stat().st_mode & 0o077 == 0
        guest = other(path=long(place))
        assert str(sockets) in guest.start()
        guest.leave()
    finally:
        cluster.leave()
    assert not sockets.exists()


def test_a_long_path_is_found_by_a_process_with_another_temporary_directory(
    make: Callable[..., Cluster], other: Callable[..., User], place: Path
) -> None:
    cluster = make(long(place))
    cluster.use()
    elsewhere = place / "tmp"
    elsewhere.mkdir(mode=0o777)
    sockets = Path(str(ask(cluster.conninfo, "show unix_socket_directories")))
    guest = other(path=long(place), TMPDIR=str(elsewhere))
    try:
        assert str(sockets) in guest.start()
    finally:
        guest.kill()
        cluster.leave()
    assert not sockets.exists()


@as_root
def test_a_stranger_s_link_in_the_place_of_the_sockets_is_not_followed(
    make: Callable[..., Cluster], place: Path
) -> None:
    cluster = make(long(place))
    sockets = cluster._socket_dir()
    victim = place / "victim"
    victim.mkdir(mode=0o755)
    sockets.symlink_to(victim)
    try:
        with suppress(EmbeddedUnavailable):
            cluster.use()
        assert victim.stat().st_uid == 0
        assert list(victim.iterdir()) == []
    finally:
        cluster.leave()
        sockets.unlink()


@pytest.mark.parametrize("name", ["with space", "it's", "ünï", "a,b", "100%"])
def test_a_path_may_hold_any_character(make: Callable[..., Cluster], place: Path, name: str) -> None:
    cluster = make(place / name / "c", new=True)
    assert ask(cluster.use()) == 42
    cluster.leave()
    assert not cluster.is_running()


@pytest.mark.parametrize("name", ["$HOME", 'say "x"', "a`b`", "back\\slash"])
def test_a_path_that_a_shell_would_misread_is_refused_in_words(
    make: Callable[..., Cluster], place: Path, name: str
) -> None:
    with pytest.raises(EmbeddedUnavailable, match="shell"):
        make(place / name / "c", new=True).use()
    assert not (place / name).exists()


@as_root
def test_under_root_the_server_belongs_to_another_user(make: Callable[..., Cluster], place: Path) -> None:
    make(new=True).use()
    owner = psutil.Process(server(place / "c")).uids().real
    assert owner != 0
    assert owner == (place / "c" / "data").stat().st_uid
    assert (place / "c").stat().st_uid == 0


@as_root
def test_under_root_parents_are_opened_for_passing_through_only(make: Callable[..., Cluster], place: Path) -> None:
    place.chmod(0o700)
    assert ask(make(new=True).use()) == 42
    assert place.stat().st_mode & 0o777 == 0o701


def owned_by_nobody(path: Path) -> Path:
    path.mkdir()
    who = pwd.getpwnam("nobody")
    os.chown(path, who.pw_uid, who.pw_gid)
    return path


@pytest.fixture
def nobody() -> str:
    if not ROOT:
        pytest.skip("needs to be root, to become another")
    if any(not parent.stat().st_mode & 0o001 for parent in embedded.programs().parents):
        pytest.skip("the server programs are not for every user of this machine")
    return "nobody"


def test_an_ordinary_user_runs_the_server_as_itself(nobody: str, other: Callable[..., User], place: Path) -> None:
    user = other(path=owned_by_nobody(place / "home") / "c", user=nobody)
    assert str(place) in user.start()
    running = psutil.Process(server(place / "home" / "c"))
    assert running.uids().real == pwd.getpwnam(nobody).pw_uid
    user.leave()
    assert is_gone(running.pid)


def test_root_may_use_the_cluster_of_an_ordinary_user(
    nobody: str, make: Callable[..., Cluster], other: Callable[..., User], place: Path
) -> None:
    path = owned_by_nobody(place / "home") / "c"
    first = other(path=path, user=nobody)
    first.start()
    first.leave()
    cluster = make(path)
    assert ask(cluster.use()) == 42
    assert psutil.Process(server(path)).uids().real == pwd.getpwnam(nobody).pw_uid


def test_a_directory_of_somebody_else_is_refused_in_words(
    nobody: str, make: Callable[..., Cluster], other: Callable[..., User], place: Path
) -> None:
    mine = make()
    mine.use()
    assert other(user=nobody).start().startswith("EmbeddedUnavailable")


def test_a_directory_that_cannot_be_made_is_refused(make: Callable[..., Cluster], place: Path) -> None:
    (place / "file").touch()
    with pytest.raises(EmbeddedUnavailable, match=r"cannot be put at .*file:PATH or QUEUE_SERVICE_DATA_DIR"):
        make(place / "file" / "c", new=True).use()


def test_a_file_in_the_place_of_the_cluster_is_refused(make: Callable[..., Cluster], place: Path) -> None:
    (place / "c").write_text("mine")
    with pytest.raises(EmbeddedUnavailable, match="cannot be put at"):
        make().use()
    assert (place / "c").read_text() == "mine"


@pytest.mark.parametrize("entries", [["notes.txt"], ["data/rows.csv"], ["data/rows.csv", "notes.txt"]], ids=str)
def test_a_directory_with_other_things_in_it_is_refused_and_left_as_it_was(
    make: Callable[..., Cluster], place: Path, entries: list[str]
) -> None:
    for entry in entries:
        (place / "c" / entry).parent.mkdir(parents=True, exist_ok=True)
        (place / "c" / entry).write_text("mine")
    with pytest.raises(EmbeddedUnavailable, match="holds no embedded cluster"):
        make().use()
    assert sorted(str(f.relative_to(place / "c")) for f in (place / "c").rglob("*") if f.is_file()) == sorted(entries)


@pytest.mark.parametrize("version", ["12", "19"])
def test_a_cluster_of_another_major_version_is_refused_with_both(
    make: Callable[..., Cluster], place: Path, version: str
) -> None:
    first = make()
    first.use()
    first.leave()
    (place / "c" / "data" / "PG_VERSION").write_text(f"{version}\n")
    with pytest.raises(
        EmbeddedUnavailable, match=rf"made by Postgres {version}, and the installed programs are \d\d\."
    ):
        make().use()
    assert not is_up(place / "c")


def test_a_start_that_failed_is_no_use(make: Callable[..., Cluster], place: Path) -> None:
    first = make()
    first.use()
    first.leave()
    version = (place / "c" / "data" / "PG_VERSION").read_text()
    (place / "c" / "data" / "PG_VERSION").write_text("12\n")
    failed = make()
    with pytest.raises(EmbeddedUnavailable):
        failed.use()
    (place / "c" / "data" / "PG_VERSION").write_text(version)
    first.use()
    first.leave()
    assert not first.is_running()


def test_a_server_that_does_not_start_shows_the_end_of_its_log(place: Path) -> None:
    cluster = Cluster(place / "c", embedded.programs(), {"shared_buffers": "nonsense"})
    try:
        with pytest.raises(EmbeddedUnavailable, match=r"did not start(?s:.*)shared_buffers"):
            cluster.use()
    finally:
        cluster.leave()


def test_variables_of_postgres_do_not_lead_astray(
    make: Callable[..., Cluster], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "PGDATA": "/nowhere",
        "PGPORT": "1",
        "PGHOST": "nowhere",
        "PGUSER": "nobody",
        "PGDATABASE": "nothing",
    }.items():
        monkeypatch.setenv(name, value)
    cluster = make()
    assert ask(cluster.use(), "select current_user") == "postgres"


def test_a_process_id_that_now_belongs_to_another_does_not_pass_for_the_server(
    make: Callable[..., Cluster], place: Path
) -> None:
    first = make()
    first.use()
    running = psutil.Process(server(place / "c"))
    family = [running, *running.children()]
    running.send_signal(signal.SIGKILL)
    psutil.wait_procs(family, timeout=10)
    owner = first.data.stat()
    as_owner = {"user": owner.st_uid, "group": owner.st_gid} if ROOT else {}
    with subprocess.Popen(["sleep", "60"], **as_owner) as stranger:  # type: ignore[call-overload]  # noqa: S607
        try:
            pidfile = first.data / "postmaster.pid"
            rest = pidfile.read_text().split("\n", 1)[1]
            pidfile.write_text(f"{stranger.pid}\n{rest}")
            assert ask(make().use()) == 42
            assert stranger.poll() is None
        finally:
            stranger.kill()
