"""Code and schema of different revisions beside each other: what works with what, and who stands against a migration."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner, Result

from queue_service import App
from queue_service.cli import cli
from queue_service.db import downgrade, phases, revision, schema
from queue_service.db.execute import Connection, fetch
from queue_service.db.phases import Caution
from queue_service.errors import ConfigError, DatabaseRefused, SchemaMismatch
from queue_service.replicas import queries as replicas
from queue_service.roster import queries as roster
from tests.support import blocked, eventually, one, rows, working

pytestmark = pytest.mark.direct("who is connected, and who waits for whom, is seen by sessions of the server")

OURS = revision.HEAD
MIGRATION = """Of a version to come.

Phase: {phase}. Lock: none.
\"\"\"

from alembic import op

revision = "{name}"
down_revision = "{below}"


def upgrade() -> None:
    op.execute("create table queue_service.new_{name} ()")


def downgrade() -> None:
    op.execute("drop table queue_service.new_{name}")
"""
PHASES = {"9001": "expand", "9002": "contract", "9003": "expand", "9004": "contract"}

Become = Callable[..., None]


@pytest.fixture
def become(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Become:
    """From now on this process is of a version to come, whose newest migration is this one; without one, of ours. What it has
    entered in the roster was built for ours, which is the version before."""
    future = tmp_path / "alembic"

    def become(head: str | None, *, oldest: str = "9001") -> None:
        monkeypatch.setattr(schema, "_REPOSITORY", ROOT / "alembic" if head is None else future)
        monkeypatch.setattr(schema, "HEAD", head or OURS)
        monkeypatch.setattr(revision, "HEAD", head or OURS)
        monkeypatch.setattr(downgrade, "HEAD", head or OURS)
        monkeypatch.setattr(revision, "OLDEST", OLDEST if head is None else oldest)
        if head is None:
            return
        shutil.rmtree(future, ignore_errors=True)
        shutil.copytree(ROOT / "alembic", future, ignore=shutil.ignore_patterns("__pycache__"))
        for below, name in pairwise([OURS, *(each for each in PHASES if each <= head)]):
            text = MIGRATION.format(phase=PHASES[name], name=name, below=below)
            (future / "versions" / f"{name}_new.py").write_text(f'"""{text}')

    return become


ROOT = Path(__file__).parents[2]
OLDEST = revision.OLDEST


async def migrate(database: str, *arguments: str) -> Result:
    return await command(database, "db", "migrate", *arguments)


async def command(database: str, *arguments: str) -> Result:
    on = {"QUEUE_SERVICE_DATABASE_URL": database}
    return await asyncio.to_thread(CliRunner().invoke, cli, arguments, env=on, prog_name="queue-service")


def upgraded(database: str, to: str | None = None, **caution: Any) -> schema.Upgraded:
    return schema.upgrade(database, to, caution=Caution(**caution))


async def at(conn: Connection) -> tuple[str, str]:
    """The revision of the database, and that of the oldest code it takes."""
    found = await revision.look(conn)
    assert found.revision is not None
    assert found.oldest_code is not None
    return found.revision, found.oldest_code


async def join(conn: Connection, name: str = "w", code: str | None = OURS) -> None:
    """A worker of this code."""
    await conn.execute(
        "insert into queue_service.workers (name, version, queues, revision) values (%s, '1', '{}', %s)", [name, code]
    )


async def silence(conn: Connection) -> None:
    """Let the workers be of code that does not say what it was built for."""
    await conn.execute("update queue_service.workers set revision = null")


# What works with what


@pytest.mark.parametrize(
    ("have", "oldest_code", "works"),
    [
        (None, None, False),
        ("0000", None, False),
        (OLDEST, "0013", True),
        (OURS, OURS, True),
        ("9999", "0013", True),
        ("9999", OURS, True),
        ("9999", "9998", False),
        # Somebody has dropped the column: nobody knows.
        ("9999", None, False),
    ],
)
def test_code_works_on_a_schema_that_is_not_too_old_and_takes_it(
    have: str | None, oldest_code: str | None, works: bool
) -> None:
    assert revision.Schema(have, oldest_code).works is works


async def test_the_oldest_revision_that_this_code_works_on_lacks_only_what_takes_something_away() -> None:
    steps = phases.steps(schema._scripts())
    assert not next(step.is_contract for step in steps if step.revision == OLDEST)
    assert all(step.is_contract for step in steps if step.revision > OLDEST)


async def test_a_worker_of_ours_works_on_a_schema_that_was_expanded_since(
    database: str, conn: Connection, become: Become
) -> None:
    become("9001")
    upgraded(database)
    become(None)
    assert (await at(conn))[0] == "9001"
    async with App(database) as app, working(app):
        pass


async def test_our_migration_leaves_a_schema_as_it_is_that_is_newer_and_takes_us(database: str, become: Become) -> None:
    become("9001")
    upgraded(database)
    become(None)
    assert "9001 -> 9001" in (await migrate(database)).stdout
    refused = await migrate(database, "--to", OURS)
    assert (refused.exit_code, "install the version" in refused.stderr) == (4, True)


# Who stands against a contract


async def test_expansions_come_first_and_a_contract_waits_until_workers_of_older_code_are_gone(
    database: str, conn: Connection, become: Become
) -> None:
    await join(conn, "elsewhere:7")
    become("9002")
    done = await migrate(database)
    assert done.exit_code == 0
    assert f"{OURS} -> 9001" in done.stdout
    assert (
        "Revision 9002 takes away what code from before it uses, and these are at work: worker elsewhere:7"
        in done.stderr
    )
    again = await migrate(database)
    assert (again.exit_code, "9001 -> 9001" in again.stdout, "elsewhere:7" in again.stderr) == (0, True, True)
    await conn.execute("delete from queue_service.workers")
    await join(conn, "new", "9002")
    assert "9001 -> 9002" in (await migrate(database)).stdout
    assert await at(conn) == ("9002", "9002")


async def test_a_contract_that_is_asked_for_is_refused_while_older_code_lives_and_done_by_force(
    database: str, conn: Connection, become: Become
) -> None:
    await join(conn, "elsewhere:7")
    await silence(conn)
    become("9002")
    for target in ("head", "9002"):
        refused = await migrate(database, "--to", target)
        assert refused.exit_code == 2
        assert "worker elsewhere:7 (version 1, built for revision 0021 or an earlier one)" in refused.stderr
        assert "--force" in refused.stderr
        assert "Nothing was changed." in refused.stderr
        assert (await at(conn))[0] == OURS
    assert "9002" in (await migrate(database, "--force")).stdout


async def test_a_worker_that_is_not_seen_for_a_lease_and_a_gateway_that_is_over_stand_against_nothing(
    database: str, conn: Connection, become: Become
) -> None:
    await join(conn)
    await conn.execute("update queue_service.workers set seen_at = clock_timestamp() - interval '1 h'")
    await fetch(conn, replicas.beat("gone", timedelta(seconds=-1)))
    become("9002")
    said: list[str] = []
    caution = Caution(timedelta(seconds=1))
    done = await asyncio.to_thread(schema.upgrade, database, "head", caution=caution, tell=said.append)
    assert done.revision == "9002"
    assert "waits for a sign of life of worker w (version 1, built for revision" in said[0]
    assert "gateway gone (built for" in said[0]


async def test_a_worker_that_was_cut_off_for_longer_than_a_lease_is_watched_for_before_a_contract(
    database: str, conn: Connection, become: Become
) -> None:
    # As all are after an outage of the database, and as one with a longer lease than ours may be.
    await join(conn)
    await conn.execute("update queue_service.workers set seen_at = clock_timestamp() - interval '31 s'")
    become("9002")
    upgraded(database, only_expand=True)
    for to in (None, "head"):
        said: list[str] = []
        going = asyncio.create_task(asyncio.to_thread(schema.upgrade, database, to, tell=said.append))
        await eventually(lambda: said or going.done())  # noqa: B023 - of this turn
        await conn.execute("update queue_service.workers set seen_at = clock_timestamp()")
        if to is None:
            held = (await going).held
            assert held is not None
            assert "at work: worker w" in held
        else:
            with pytest.raises(ConfigError, match="at work: worker w"):
                await going
        assert (await at(conn))[0] == "9001"
        await conn.execute("update queue_service.workers set seen_at = clock_timestamp() - interval '31 s'")


async def test_a_gateway_stands_against_a_contract_as_a_worker_does(
    database: str, conn: Connection, become: Become
) -> None:
    await fetch(conn, replicas.beat("abc", timedelta(seconds=60)))
    become("9002")
    with pytest.raises(ConfigError, match=rf"gateway abc \(built for revision {OURS}\)"):
        upgraded(database, "head")
    # A new one has taken its place.
    await conn.execute("update queue_service.gateways set revision = '9002'")
    assert upgraded(database, "head").revision == "9002"


async def test_all_is_done_in_one_call_where_nobody_is_connected_and_only_the_expansions_where_somebody_is(
    database: str, become: Become
) -> None:
    async with App(database):
        become("9002")
        done = await asyncio.to_thread(upgraded, database)
        assert done.revision == "9001"
        assert done.held is not None
        assert "for another call" in done.held
    assert upgraded(database).revision == "9002"
    become("9004", oldest="9003")
    assert upgraded(database).revision == "9004"


async def test_only_expand_takes_nothing_away_whoever_is_gone(database: str, become: Become) -> None:
    become("9002")
    for arguments in (["--only-expand"], ["--only-expand", "--force"]):
        done = await migrate(database, *arguments)
        assert "-> 9001" in done.stdout
        assert "without --only-expand" in done.stderr
    # What this version needs comes behind it.
    become("9003", oldest="9003")
    refused = await migrate(database, "--only-expand")
    assert (refused.exit_code, "does not work on the database" in refused.stderr) == (2, True)
    assert "-> 9003" in (await migrate(database)).stdout


async def test_a_new_database_gets_everything_at_once(empty_database: str, become: Become) -> None:
    become("9004", oldest="9003")
    assert upgraded(empty_database, only_expand=True).revision == "9004"


async def test_many_workers_are_not_all_named(database: str, conn: Connection, become: Become) -> None:
    for number in range(phases.NAMED + 3):
        await join(conn, f"w{number}\x1b[2J")
    become("9002")
    said = (await migrate(database)).stderr
    assert "and 3 more." in said
    assert "\x1b" not in said


# A contract, and a worker of older code that starts at the same moment


async def test_old_code_that_enters_the_roster_while_a_contract_is_applied_is_refused_after_it(
    database: str, session: Callable[..., Any], become: Become
) -> None:
    migration, late = await session(), await session()
    become("9002")
    upgraded(database)
    async with migration.transaction():
        # As a migration does, which has looked and found nobody.
        await migration.execute("lock table queue_service.workers in access exclusive mode")
        entering = asyncio.create_task(fetch(late, roster.join("late", "1", "{}")))
        await eventually(lambda: blocked(migration, late))
        await migration.execute("update queue_service.alembic_version set version_num = '9002', oldest_code = '9002'")
    with pytest.raises(DatabaseRefused, match=rf"built for revision {OURS}.* built for 9002 or later"):
        await entering
    assert await one(migration, "select count(*) from queue_service.workers") == 0


async def test_an_old_gateway_enters_no_more_after_a_contract_and_one_that_is_there_stays(
    database: str, session: Callable[..., Any], become: Become
) -> None:
    migration, late = await session(), await session()
    become("9002")
    upgraded(database)
    await fetch(late, replicas.beat("there", timedelta(seconds=60)))
    async with migration.transaction():
        await migration.execute("lock table queue_service.gateways in access exclusive mode")
        entering = asyncio.create_task(fetch(late, replicas.beat("late", timedelta(seconds=60))))
        await eventually(lambda: blocked(migration, late))
        await migration.execute("update queue_service.alembic_version set version_num = '9002', oldest_code = '9002'")
    with pytest.raises(DatabaseRefused, match=rf"built for revision {OURS}.* built for 9002 or later.*Start a newer"):
        await entering
    # As after --force.
    await fetch(late, replicas.beat("there", timedelta(seconds=60)))
    assert await rows(migration, "select id from queue_service.gateways") == [("there",)]


async def test_a_contract_waits_for_old_code_that_is_entering_the_roster_and_is_refused_by_it(
    database: str, session: Callable[..., Any], become: Become
) -> None:
    early, look = await session(), await session()
    become("9002")
    upgraded(database, only_expand=True)
    async with early.transaction():
        await fetch(early, roster.join("early", "1", "{}"))
        going = asyncio.create_task(asyncio.to_thread(upgraded, database, "head"))
        await eventually(lambda: one(look, WAITS), within=30)
    with pytest.raises(ConfigError, match="worker early"):
        await going
    assert (await at(look))[0] == "9001"


WAITS = (
    "select count(*) > 0 from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock' "
    "and application_name = 'queue_service migrate'"
)


@pytest.mark.parametrize(
    ("code", "is_taken"), [(None, False), (OURS, False), ("9001", False), ("9002", True), ("9003", True)]
)
async def test_after_a_contract_only_newer_code_enters_the_roster(
    code: str | None, is_taken: bool, database: str, conn: Connection, become: Become
) -> None:
    become("9002")
    upgraded(database, "head")
    become(None)
    if is_taken:
        await join(conn, code=code)
        return
    with pytest.raises(psycopg.errors.RaiseException, match="Start a newer version"):
        await join(conn, code=code)
    with pytest.raises(SchemaMismatch, match=r"9002 or a later one.*install the version"):
        async with App(database):
            pass


async def test_going_back_before_a_contract_takes_older_code_again(
    database: str, conn: Connection, become: Become
) -> None:
    before = await at(conn)
    become("9004")
    upgraded(database, "9004")
    assert await at(conn) == ("9004", "9004")
    for to, oldest in (("9003", "9002"), ("9002", "9002"), ("9001", before[1]), (OURS, before[1])):
        assert (await migrate(database, "--to", to, "--yes")).exit_code == 0
        assert await at(conn) == (to, oldest)
    await join(conn)


async def test_the_printed_statements_say_as_well_which_code_is_taken(
    empty_database: str, session: Callable[..., Any], become: Become, capsys: pytest.CaptureFixture[str]
) -> None:
    become("9002")
    schema.sql()
    with psycopg.connect(empty_database, autocommit=True) as conn:
        conn.execute(capsys.readouterr().out.encode())
        found = conn.execute("select version_num, oldest_code from queue_service.alembic_version").fetchall()
    assert found == [("9002", "9002")]


# `db current`


async def test_current_exits_with_four_only_where_this_version_does_not_work(
    database: str, conn: Connection, become: Become
) -> None:
    become("9002")
    behind = await command(database, "db", "current")
    assert (behind.exit_code, f"{OURS} (this version needs 9001 or later, up to 9002)" in behind.stdout) == (4, True)
    upgraded(database, only_expand=True)
    works = await command(database, "db", "current")
    assert (works.exit_code, "9001 (this version works on it, which was built for 9002" in works.stdout) == (0, True)
    upgraded(database, "head")
    become(None)
    taken = await command(database, "db", "current")
    assert taken.exit_code == 4
    assert f"9002 (it takes versions built for 9002 or later, and this one was built for {OURS})" in taken.stdout


async def test_current_waits_for_the_job_that_migrates(empty_database: str) -> None:
    waiting = asyncio.create_task(command(empty_database, "db", "current", "--wait", "2m"))
    with psycopg.connect(empty_database, autocommit=True) as conn:
        seen = (
            "select count(*) > 0 from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
        )

        async def is_seen() -> bool:
            return bool(conn.execute(seen.encode()).fetchall()[0][0])

        await eventually(is_seen, within=60)
    await asyncio.to_thread(schema.upgrade, empty_database)
    done = await waiting
    assert done.exit_code == 0
    assert "not there yet" in done.stderr


async def test_current_waits_no_longer_than_it_was_asked(empty_database: str) -> None:
    assert (await command(empty_database, "db", "current", "--wait", "10ms")).exit_code == 4
    nowhere = await command("postgresql://127.0.0.1:1/nowhere", "db", "current", "--wait", "10ms")
    assert nowhere.exit_code == 3


# `db check`


async def test_check_looks_at_the_server_while_older_code_is_being_replaced_and_compares_no_tables(
    database: str, become: Become
) -> None:
    accepted = ["--accept", "fsync", "--accept", "full-page-writes"]
    become("9002")
    assert (await command(database, "db", "check", *accepted)).exit_code == 4
    upgraded(database, only_expand=True)
    checked = await command(database, "db", "check", *accepted)
    assert checked.exit_code == 0, checked.output
    assert "9001. This version works on it, but was built for 9002: the tables were not compared." in checked.stderr
    assert "`queue-service db migrate` does the rest" in checked.stderr
    as_json = await command(database, "db", "check", "--json")
    told = json.loads(as_json.stdout)
    assert (as_json.exit_code, told["difference"]) == (1, None)
    levels = {each["name"]: each["level"] for each in told["findings"]}
    assert (levels["revision"], levels["fsync"]) == ("note", "failure")
    become(None)
    ahead = await command(database, "db", "check", *accepted)
    assert (ahead.exit_code, "The version that was built for it compares them." in ahead.stderr) == (0, True)


# The migrations themselves


def test_a_migration_that_does_not_say_its_phase_is_not_run() -> None:
    with pytest.raises(ValueError, match="migration 0001 has to say once"):
        phases.is_contract("0001", "It does something.")
    with pytest.raises(ValueError, match="has to say once"):
        phases.is_contract("0001", "Phase: expand.\nPhase: contract.")


def test_every_migration_says_its_phase() -> None:
    assert {step.revision for step in phases.steps(schema._scripts()) if step.is_contract} >= {"0009", "0013"}


TABLES = "c.relnamespace = to_regnamespace('queue_service') and not c.relispartition and c.relname <> 'alembic_version'"
USABLE = {
    # What a statement may name, with what it takes it for.
    "tables": f"select relname from pg_class as c where {TABLES} and relkind in ('r', 'p', 'v', 'S')",
    "columns": "select relname, attname, format_type(atttypid, atttypmod) from pg_class as c join pg_attribute as a "
    f"on attrelid = c.oid where {TABLES} and relkind in ('r', 'p') and attnum > 0 and not attisdropped",
    "functions": "select oid::regprocedure::text, pg_get_function_result(oid) from pg_proc "
    "where pronamespace = to_regnamespace('queue_service')",
    "types": "select t.oid::regtype::text, a.attname, format_type(atttypid, atttypmod) from pg_type as t "
    "join pg_class as c on c.oid = t.typrelid and c.relkind = 'c' join pg_attribute as a on a.attrelid = c.oid "
    "where typnamespace = to_regnamespace('queue_service')",
    # `on conflict` needs one.
    "unique indexes": "select relname, regexp_replace(pg_get_indexdef(indexrelid), 'INDEX \\S+ ON', 'INDEX ON') "
    f"from pg_class as c join pg_index on indrelid = c.oid where {TABLES} and indisunique",
    # What a statement may leave out.
    "optional columns": "select relname, attname from pg_class as c join pg_attribute as a on attrelid = c.oid "
    f"where {TABLES} and relkind in ('r', 'p') and attnum > 0 and not attisdropped "
    "and (not attnotnull or atthasdef or attidentity <> '')",
}
# What may refuse a row that code from before writes.
REFUSING = (
    "select relname, pg_get_constraintdef(r.oid), array(select attname from pg_attribute where attrelid = c.oid "
    "and attnum = any(conkey) order by 1)::text[] from pg_class as c join pg_constraint as r on conrelid = c.oid "
    f"where {TABLES} and contype in ('c', 'f') union all "
    "select relname, pg_get_indexdef(indexrelid), array(select attname from pg_attribute where attrelid = c.oid "
    f"and attnum = any(indkey) order by 1)::text[] from pg_class as c join pg_index on indrelid = c.oid where {TABLES} and indisunique"
)


# A unique index that refuses nothing which another one, of fewer of its columns, does not refuse while that is there.
IMPLIED = {("runs_singleton_key_idx", "runs_singleton_idx")}


def usable(conn: psycopg.Connection[Any]) -> dict[str, set[Any]]:
    return {what: set(conn.execute(sql.encode()).fetchall()) for what, sql in USABLE.items()}


def refusing(conn: psycopg.Connection[Any]) -> set[Any]:
    return {(table, rule, tuple(columns)) for table, rule, columns in conn.execute(REFUSING.encode())}


def required(found: dict[str, set[Any]]) -> set[tuple[str, str]]:
    """Columns that a statement has to give."""
    return {(table, column) for table, column, _ in found["columns"]} - found["optional columns"]


def against_older_code(database: str, migrate: Callable[[], object]) -> list[str]:
    """What a migration takes away from code that knows only what was there before, or asks of it."""
    with psycopg.connect(database, autocommit=True) as conn:
        before, rules = usable(conn), refusing(conn)
        migrate()
        after, more = usable(conn), refusing(conn) - rules
    gone = [f"{what}: {each}" for what in USABLE for each in sorted(before[what] - after[what])]
    known = {(table, column) for table, column, _ in before["columns"]}
    tables = {table for table, _ in known}
    asked = [f"has to be given: {each}" for each in sorted(required(after) - required(before)) if each[0] in tables]
    ruled = [
        f"is refused: {table} {rule}"
        for table, rule, columns in sorted(more)
        if table in tables
        and all((table, column) in known for column in columns)
        and not any(
            f" {index} " in rule and any(f" {wider} " in each for _, each, _ in rules) for index, wider in IMPLIED
        )
    ]
    return gone + asked + ruled


def test_no_migration_that_expands_takes_anything_from_code_before_it(empty_database: str) -> None:
    steps = phases.steps(schema._scripts())
    found = {
        step.revision: against for step in steps
        if (against := against_older_code(empty_database, lambda: schema.upgrade(empty_database, step.revision)))  # noqa: B023
        and not step.is_contract
    }  # fmt: skip
    assert found == {}
