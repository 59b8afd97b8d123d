"""`db check` on servers that are really set so: what breaks a promise is said, and what is well is not."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner, Result
from psycopg.conninfo import make_conninfo

from queue_service.cli import cli
from queue_service.db import schema, server_findings
from queue_service.db.cluster import Cluster
from queue_service.db.revision import HEAD
from tests.pooler import pooling
from tests.servers.pair import STANDBY, Pair
from tests.support import eventually

pytestmark = pytest.mark.direct("what it looks at are servers of its own")

# The servers of pairs forget what they wrote when the machine crashes, which is all right for them.
OF_TESTS = ("--accept", "fsync", "--accept", "full-page-writes")


def call(conninfo: str, *arguments: str, **environment: str) -> Result:
    arguments = ("db", "check", *arguments, "--database-url", conninfo)
    return CliRunner().invoke(cli, arguments, prog_name="queue-service", env=environment)


def found(conninfo: str, *arguments: str) -> dict[str, tuple[str, str]]:
    """Levels and sentences by name, and that the exit code agrees."""
    result = call(conninfo, "--json", *arguments)
    told = json.loads(result.stdout)
    assert told["difference"] is None
    by_name = {each["name"]: (each["level"], each["sentence"]) for each in told["findings"]}
    assert by_name.keys() <= set(server_findings.NAMES)
    failed = any(level == "failure" for level, _ in by_name.values())
    assert result.exit_code == int(failed), result.output
    return by_name


def failures(conninfo: str, *arguments: str) -> dict[str, str]:
    return {name: sentence for name, (level, sentence) in found(conninfo, *arguments).items() if level == "failure"}


@contextmanager
def serving(path: Path, programs: Path, **settings: str) -> Iterator[str]:
    """A server as Postgres sets itself up, but for these, with our schema. Its conninfo."""
    cluster = Cluster(path / "cluster", programs, settings)
    conninfo = cluster.use()
    try:
        schema.upgrade(conninfo)
        yield conninfo
    finally:
        cluster.stop()
        cluster.leave()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, programs: Path) -> Iterator[str]:
    path = tmp_path_factory.mktemp("plain")
    path.chmod(0o711)
    with serving(path, programs) as conninfo:
        yield conninfo


def execute(conninfo: str, *statements: str) -> None:
    with psycopg.connect(conninfo, autocommit=True) as conn:
        for statement in statements:
            conn.execute(statement.encode())


def value(conninfo: str, question: str) -> Any:
    with psycopg.connect(conninfo, autocommit=True) as conn:
        row = conn.execute(question.encode()).fetchone()
        return row and row[0]


@contextmanager
def set_to(conninfo: str, **settings: str) -> Iterator[None]:
    """The server is told so, and new sessions begin with it."""
    try:
        for name, wanted in settings.items():
            execute(conninfo, f"alter system set {name} = {wanted}")
        execute(conninfo, "select pg_reload_conf()")
        _wait_for(conninfo, lambda name: f"current_setting('{name}') = $${settings[name].strip(chr(39))}$$", settings)
        yield
    finally:
        execute(conninfo, "alter system reset all", "select pg_reload_conf()")
        _wait_for(conninfo, lambda _: "source <> 'configuration file' or reset_val = boot_val", settings)


def _wait_for(conninfo: str, condition: Callable[[str], str], settings: dict[str, str]) -> None:
    import asyncio

    for name in settings:
        question = f"select {condition(name)} from pg_settings where name = '{name}'"
        asyncio.run(_until(conninfo, question))


async def _until(conninfo: str, question: str) -> None:
    async def is_so() -> bool:
        return bool(value(conninfo, question))

    await eventually(is_so)


@pytest.fixture
def role(plain: str) -> Iterator[str]:
    """One that works on the plain server, by name."""
    grants = CliRunner().invoke(cli, ["db", "grants", "operated", "--database-url", plain])
    execute(plain, "create role operated login", grants.stdout.split("\nalter role", 1)[0])
    yield "operated"
    execute(plain, "drop owned by operated", "drop role operated")


@pytest.fixture
def as_role(plain: str, role: str) -> str:
    return make_conninfo(plain, user=role)


def test_a_server_as_it_comes_is_well(plain: str, as_role: str) -> None:
    for who in (plain, as_role):
        assert failures(who) == {}
        assert call(who).exit_code == 0
        assert call(who).stdout == ""


@pytest.mark.parametrize(
    ("setting", "off", "name", "says"),
    [
        ("fsync", "off", "fsync", "loses what was acknowledged"),
        ("full_page_writes", "off", "full-page-writes", "half a page"),
        ("autovacuum", "off", "autovacuum", "never cleaned up"),
        ("track_counts", "off", "track-counts", "does not see"),
        ("default_transaction_read_only", "on", "read-only", "nothing is enqueued"),
    ],
)
def test_a_setting_that_breaks_a_promise_is_a_failure_until_it_is_accepted(
    plain: str, setting: str, off: str, name: str, says: str
) -> None:
    with set_to(plain, **{setting: off}):
        told = failures(plain)
        assert list(told) == [name]
        assert says in told[name]
        said = call(plain)
        assert said.exit_code == 1
        assert f"[{name}]" in said.stderr
        assert "--accept NAME" in said.stderr
        assert found(plain, "--accept", name)[name][0] == "note"
        accepted = call(plain, QUEUE_SERVICE_DB_CHECK_ACCEPT=f"standby {name}")
        assert accepted.exit_code == 0
        assert f"note: {told[name]} [{name}]" in accepted.stderr


def test_another_name_accepts_nothing_and_one_that_is_not_there_is_refused(plain: str) -> None:
    with set_to(plain, fsync="off"):
        assert list(failures(plain, "--accept", "autovacuum")) == ["fsync"]
    refused = call(plain, "--accept", "fsnyc")
    assert refused.exit_code == 2
    assert "'fsnyc' is not one of" in refused.stderr


def test_autovacuum_that_keeps_away_from_a_table_of_ours_is_named(plain: str) -> None:
    options = ("autovacuum_enabled = off", "toast.autovacuum_enabled = no", "autovacuum_enabled = 0")
    tables = ("runs", "events", "finished_runs_default")
    for table, option in zip(tables, options, strict=True):
        execute(plain, f"alter table queue_service.{table} set ({option})")
    execute(plain, "create table public.elsewhere () with (autovacuum_enabled = off)")
    try:
        sentence = failures(plain)["autovacuum-tables"]
        assert "keeps away from events, finished_runs_default, runs:" in sentence
    finally:
        for table in tables:
            reset = f"alter table queue_service.{table} reset (autovacuum_enabled, toast.autovacuum_enabled)"
            execute(plain, reset.replace(", toast.autovacuum_enabled", "") if table.startswith("finished") else reset)
        execute(plain, "drop table public.elsewhere")
    assert failures(plain) == {}


def test_commits_that_do_not_wait_for_the_disk_are_ours_to_set_right_but_behind_a_pooler(plain: str) -> None:
    with set_to(plain, synchronous_commit="off"):
        level, sentence = found(plain)["synchronous-commit"]
        assert level == "note"
        assert "conn=" in sentence
        with pooling(plain) as pooler:
            told = failures(pooler.before(plain))
        assert set(told) == {"synchronous-commit", "role-settings"}
        assert "begin with synchronous_commit = 'off'" in told["synchronous-commit"]
        assert "db grants postgres" in told["synchronous-commit"]
    with set_to(plain, synchronous_commit="local"):
        # There is no standby to wait for.
        assert "synchronous-commit" not in found(plain)


def test_where_no_standby_is_there_to_be_waited_for_nothing_is_acknowledged(plain: str) -> None:
    for names, wanted in (("b", "1 standby"), ("FIRST 2 (a, b)", "2 standbys"), ("*", "1 standby")):
        with set_to(plain, synchronous_standby_names=f"'{names}'"):
            sentence = failures(plain)["synchronous-standbys"]
            assert f"{names!r}, and of {wanted}" in sentence
            assert "no commit is acknowledged" in sentence


def test_a_place_that_is_kept_for_a_standby_says_that_there_is_one(plain: str) -> None:
    execute(plain, "select pg_create_physical_replication_slot('away')")
    try:
        assert "slot away" in failures(plain)["synchronous-standbys"]
        assert failures(plain, "--accept", "synchronous-standbys") == {}
    finally:
        execute(plain, "select pg_drop_replication_slot('away')")


def test_an_archive_is_no_standby(plain: str, programs: Path, tmp_path: Path) -> None:
    command = [str(programs / "pg_receivewal"), "-D", str(tmp_path), "-d", plain, "--no-password"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as receiving:
        try:
            _wait_for(plain, lambda _: "exists (select from pg_stat_replication)", {"fsync": ""})
            assert failures(plain) == {}
        finally:
            receiving.kill()


def test_a_subscriber_is_no_standby(tmp_path: Path, programs: Path) -> None:
    with serving(tmp_path / "server", programs, wal_level="logical") as conninfo:
        execute(conninfo, "create role watcher login", "grant usage on schema queue_service to watcher")
        execute(conninfo, "grant select on all tables in schema queue_service to watcher")
        execute(conninfo, "select pg_create_logical_replication_slot('subscriber', 'pgoutput')")
        options = ["-o", "proto_version=1", "-o", "publication_names=none", "-f", str(tmp_path / "received"), "--start"]
        command = [str(programs / "pg_recvlogical"), "-d", conninfo, "--slot", "subscriber", *options]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as receiving:
            try:
                _wait_for(conninfo, lambda _: "exists (select from pg_stat_replication)", {"fsync": ""})
                assert failures(conninfo) == {}
                assert failures(make_conninfo(conninfo, user="watcher")) == {}
            finally:
                receiving.kill()


def test_a_server_of_patroni_without_standbys_to_wait_for_is_noticed(tmp_path: Path, programs: Path) -> None:
    of_patroni = {
        "cluster_name": "batman", "wal_level": "replica", "hot_standby": "on", "max_connections": "100",
        "max_wal_senders": "10", "max_prepared_transactions": "0", "max_locks_per_transaction": "64",
        "track_commit_timestamp": "off", "max_worker_processes": "8", "wal_log_hints": "on",
    }  # fmt: skip
    with serving(tmp_path, programs, **of_patroni) as conninfo:
        sentence = failures(conninfo)["synchronous-standbys"]
        assert "Patroni runs this server" in sentence
        assert "synchronous_mode_strict" in sentence
        with set_to(conninfo, synchronous_standby_names="'*'"):
            assert "synchronous-mode-strict" not in found(conninfo)
        with set_to(conninfo, synchronous_standby_names="'other'"):
            level, sentence = found(conninfo)["synchronous-mode-strict"]
            assert (level, "show-config" in sentence) == ("note", True)


def test_a_synchronous_standby_is_well_until_it_goes(pair: Pair) -> None:
    primary = pair.primary.conninfo
    execute(primary, "create role watcher login", "grant usage on schema queue_service to watcher")
    execute(primary, "grant select on queue_service.alembic_version to watcher")
    watcher = make_conninfo(primary, user="watcher")
    assert failures(primary, *OF_TESTS) == {}
    unseen = failures(watcher, *OF_TESTS)
    assert set(unseen) == {"synchronous-standbys", "max-connections"}
    assert "Grant it pg_monitor" in unseen["synchronous-standbys"]
    assert "may not read who is at work" in unseen["max-connections"]
    execute(primary, "grant pg_monitor to watcher", "grant select on queue_service.workers to watcher")
    execute(primary, "grant select on queue_service.gateways to watcher")
    assert failures(watcher, *OF_TESTS) == {}
    for value_, level in (("local", "failure"), ("remote_write", "note")):
        execute(primary, f"alter role watcher set synchronous_commit = {value_}")
        assert found(watcher, *OF_TESTS)["synchronous-commit"][0] == level
    execute(primary, "alter role watcher reset synchronous_commit")
    pair.standby.stop()
    _wait_for(primary, lambda _: "not exists (select from pg_stat_replication)", {"fsync": ""})
    assert "Start the standby" in failures(primary, *OF_TESTS)["synchronous-standbys"]
    # Who may not see who follows sees that nobody does.
    assert "Start the standby" in failures(watcher, *OF_TESTS)["synchronous-standbys"]


def test_an_asynchronous_standby_is_a_failure_and_one_of_some_a_note(pair: Pair) -> None:
    primary = pair.primary
    execute(primary.conninfo, "create role watcher login", "grant usage on schema queue_service to watcher")
    execute(primary.conninfo, "grant select on all tables in schema queue_service to watcher")
    primary.stop()
    primary.start()
    _wait_for(primary.admin, lambda _: "exists (select from pg_stat_replication)", {"fsync": ""})
    assert f"this server has standbys ({STANDBY})" in failures(primary.conninfo, *OF_TESTS)["synchronous-standbys"]
    watcher = make_conninfo(primary.conninfo, user="watcher")
    assert "this server has standbys" in failures(watcher, *OF_TESTS)["synchronous-standbys"]
    primary.stop()
    primary.start(synchronous_standby_names=f"ANY 1 ({STANDBY}, other)")
    _wait_for(
        primary.admin, lambda _: "exists (select from pg_stat_replication where sync_state = 'quorum')", {"fsync": ""}
    )
    told = found(primary.conninfo, *OF_TESTS)
    assert "synchronous-standbys" not in told
    assert told["synchronous-quorum"][0] == "note"
    primary.stop()
    primary.start(synchronous_standby_names=f"FIRST 2 ({STANDBY}, other)")
    _wait_for(
        primary.admin, lambda _: "exists (select from pg_stat_replication where sync_state = 'sync')", {"fsync": ""}
    )
    assert (
        "of 2 standbys that commits wait for, 1 is there"
        in failures(primary.conninfo, *OF_TESTS)["synchronous-standbys"]
    )


def test_of_several_servers_the_one_that_takes_writes_is_looked_at(shared_pair: Pair) -> None:
    standby = failures(shared_pair.standby.conninfo, *OF_TESTS)
    assert list(standby) == ["standby"]
    assert "Ask the primary" in standby["standby"]
    ports = f"{shared_pair.standby.port},{shared_pair.primary.port}"
    both = make_conninfo("", host="127.0.0.1,127.0.0.1", port=ports, user="postgres", dbname="queue")
    assert failures(both, *OF_TESTS) == {}


def enrolled(conninfo: str, workers: int) -> None:
    execute(
        conninfo,
        "delete from queue_service.workers",
        "insert into queue_service.workers (name, version, queues, revision) "
        f"select 'w' || n, '1', '{{}}', '{HEAD}' from generate_series(1, {workers}) as n",
    )


def test_workers_for_whom_there_are_not_connections_enough_are_counted(tmp_path: Path, programs: Path) -> None:
    with serving(tmp_path, programs, max_connections="23", superuser_reserved_connections="3") as conninfo:
        execute(conninfo, "create role watcher login", "grant usage on schema queue_service to watcher")
        execute(conninfo, "grant select on all tables in schema queue_service to watcher")
        watcher = make_conninfo(conninfo, user="watcher")
        enrolled(conninfo, 2)
        assert "max-connections" not in found(watcher)
        enrolled(conninfo, 3)
        level, sentence = found(watcher)["max-connections"]
        assert level == "note"
        assert "3 workers and 0 gateways hold 9 connections at rest and up to 24" in sentence
        enrolled(conninfo, 7)
        assert "hold 21 connections at rest, and max_connections = 23 leaves 20" in failures(watcher)["max-connections"]
        # A superuser may use what is kept back, and has no limit of its own.
        execute(conninfo, "alter role postgres connection limit 1")
        assert failures(conninfo) == {}
        execute(
            conninfo,
            "insert into queue_service.gateways (id, expires_at, revision) "
            "values ('g', clock_timestamp() + interval '1 min', '9999')",
        )
        assert "7 workers and 1 gateway hold 23" in failures(watcher)["max-connections"]
        # Those that are gone hold nothing.
        execute(
            conninfo,
            "update queue_service.workers set seen_at = clock_timestamp() - interval '1 hour'",
            "delete from queue_service.gateways",
        )
        assert "max-connections" not in found(watcher)
        enrolled(conninfo, 2)
        execute(conninfo, "alter role watcher connection limit 5")
        assert "limit of the role watcher leaves 5" in failures(watcher)["max-connections"]
        # What works is of another role, to which that limit does not apply.
        with psycopg.connect(conninfo, application_name="queue_service keeper"):
            assert "max-connections" not in failures(watcher)
            with psycopg.connect(watcher, application_name="queue_service listener"):
                assert "limit of the role watcher leaves 5" in failures(watcher)["max-connections"]
        execute(conninfo, "alter role watcher connection limit -1", "alter database postgres connection limit 4")
        assert "limit of the database postgres leaves 4" in failures(watcher)["max-connections"]
        with pooling(conninfo, users=("watcher",)) as pooler:
            assert "max-connections" not in found(pooler.before(watcher))


def test_thirteen_workers_of_a_default_server_are_a_note(plain: str, as_role: str) -> None:
    try:
        enrolled(plain, 13)
        assert found(as_role)["max-connections"][0] == "note"
        enrolled(plain, 33)
        assert found(as_role)["max-connections"][0] == "failure"
    finally:
        execute(plain, "delete from queue_service.workers")


def test_every_name_that_may_be_found_can_be_accepted() -> None:
    source = Path(server_findings.__file__).read_text()
    named = set(re.findall(r'_(?:failure|note)\(\s*"([a-z-]+)"', source))
    assert named == set(server_findings.NAMES)
    page = (Path(__file__).parents[2] / "docs" / "database.md").read_text()
    assert [name for name in server_findings.NAMES if f"`{name}`" not in page] == []
