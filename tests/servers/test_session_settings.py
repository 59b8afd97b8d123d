"""Whatever the server, the database or the role sets for each session: all that the product does comes out the same."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from click.testing import CliRunner
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from queue_service.cli import cli
from queue_service.db import embedded, schema
from queue_service.db.cluster import Cluster
from queue_service.errors import ConfigError, DatabaseUnavailable
from queue_service.testing import databases
from tests.servers.product import Product
from tests.servers.shadows import calls, put_shadows
from tests.unit.test_statements import STATEMENTS

Set = Callable[..., str]

PASSWORD = uuid.uuid4().hex

# What is read and written as text, and what literals mean.
FORMATS = {
    "datestyle": "SQL, DMY", "intervalstyle": "sql_standard", "timezone": "-5.504167", "extra_float_digits": "-15",
    "bytea_output": "escape", "xmlbinary": "hex", "xmloption": "document", "array_nulls": "off",
    "transform_null_equals": "on", "standard_conforming_strings": "off", "backslash_quote": "off",
    "quote_all_identifiers": "on", "client_min_messages": "debug1", "timezone_abbreviations": "Australia",
}  # fmt: skip
# How a statement is executed.
PLANS = {
    "plan_cache_mode": "force_custom_plan", "jit": "on", "jit_above_cost": "0", "jit_inline_above_cost": "0",
    "work_mem": "64kB", "constraint_exclusion": "on", "from_collapse_limit": "1", "join_collapse_limit": "1",
    "geqo_threshold": "2", "cursor_tuple_fraction": "0", "random_page_cost": "1000", "cpu_index_tuple_cost": "1000",
    "default_statistics_target": "1", "temp_buffers": "800kB", "enable_indexscan": "off", "enable_indexonlyscan": "off",
    "enable_nestloop": "off", "enable_hashjoin": "off", "enable_sort": "off", "enable_material": "off",
    "enable_tidscan": "off", "enable_partition_pruning": "off", "enable_hashagg": "off", "enable_memoize": "off",
}  # fmt: skip
# How a transaction is, and what is written about it.
TRANSACTIONS = {
    "default_transaction_isolation": "serializable", "default_transaction_deferrable": "on", "synchronous_commit": "off",
    "row_security": "off", "exit_on_error": "on", "application_name": "somebody", "log_statement": "all",
    "log_min_duration_statement": "0", "log_error_verbosity": "verbose", "check_function_bodies": "off",
    "default_toast_compression": "pglz", "stats_fetch_consistency": "snapshot", "track_activities": "off",
}  # fmt: skip
TIMES = {
    "statement_timeout": "1ms", "lock_timeout": "1ms", "idle_session_timeout": "1ms",
    "idle_in_transaction_session_timeout": "1ms",
}  # fmt: skip
# A migration sends its settings once it has connected, which may take a moment.
TIMES_OF_MIGRATIONS = {**TIMES, "idle_session_timeout": "5s", "statement_timeout": "250ms"}
ENCODINGS = ("LATIN1", "SQL_ASCII", "WIN1252", "EUC_JP")

STRAIGHT = {
    "formats": FORMATS,
    "other formats": {"datestyle": "German", "intervalstyle": "postgres_verbose", "timezone": "Pacific/Kiritimati"},
    "plans": PLANS,
    "transactions": TRANSACTIONS,
    "times": TIMES,
    "a time for transactions": {"transaction_timeout": "30ms"},
    **{encoding: {"client_encoding": encoding} for encoding in ENCODINGS},
}


def _alter(admin: psycopg.Connection, what: sql.Composed, name: str, value: str) -> None:
    # A list is one of several values: in quotes together it would be one.
    values = sql.SQL(", ").join(sql.Literal(each.strip('"')) for each in value.split(", "))
    admin.execute(sql.SQL("{} set {} = {}").format(what, sql.Identifier(name), values))


@pytest.fixture(scope="module")
def role(server: str) -> Iterator[str]:
    """The name of a role that logs in, and owns the schema of the databases here."""
    name = f"queue_service_test_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(sql.SQL("create role {} login password {}").format(sql.Identifier(name), sql.Literal(PASSWORD)))
        try:
            yield name
        finally:
            admin.execute(sql.SQL("drop role {}").format(sql.Identifier(name)))


def owned(conninfo: str, role: str) -> str:
    """The same database as this role, who may create a schema in it."""
    with psycopg.connect(conninfo, autocommit=True) as admin:
        name = sql.Identifier(str(conninfo_to_dict(conninfo)["dbname"]))
        admin.execute(sql.SQL("grant create, temporary on database {} to {}").format(name, sql.Identifier(role)))
    return make_conninfo(conninfo, user=role, password=PASSWORD)


@pytest.fixture(scope="module")
def owned_template(server: str, role: str) -> Iterator[str]:
    with databases.made(server, "template0", prefix="queue_service_template") as conninfo:
        schema.upgrade(owned(conninfo, role))
        yield str(conninfo_to_dict(conninfo)["dbname"])


@pytest.fixture
def superuser(server: str, owned_template: str) -> Iterator[str]:
    with databases.made(server, owned_template) as conninfo:
        yield conninfo


@pytest.fixture
def set_role(superuser: str, role: str) -> Set:
    """Gives the role other settings in the test's database, and returns its conninfo."""

    def given(**settings: str) -> str:
        with psycopg.connect(superuser, autocommit=True) as admin:
            database = sql.Identifier(str(conninfo_to_dict(superuser)["dbname"]))
            known = {row[0] for row in admin.execute("select lower(name) from pg_settings")}
            for name, value in settings.items():
                if name not in known:
                    pytest.skip(f"this Postgres has no {name}")
                _alter(
                    admin, sql.SQL("alter role {} in database {}").format(sql.Identifier(role), database), name, value
                )
        return make_conninfo(superuser, user=role, password=PASSWORD)

    return given


@pytest.mark.parametrize("settings", STRAIGHT.values(), ids=STRAIGHT)
async def test_what_the_role_sets_changes_nothing(set_role: Set, settings: dict[str, str]) -> None:
    await Product(set_role(**settings)).go_through()


@pytest.mark.parametrize("settings", [FORMATS, PLANS, TRANSACTIONS], ids=["formats", "plans", "transactions"])
async def test_nor_does_it_where_no_setting_of_ours_is_in_force(set_role: Set, settings: dict[str, str]) -> None:
    """As behind a pooler, whose sessions are for everybody: what a statement means is said in the statement."""
    await Product(set_role(**settings), POOLER="transaction").go_through()


@pytest.mark.parametrize(("schema_name", "search_path"), [("evil", "evil, pg_catalog"), ("public", '"$user", public')])
async def test_nothing_of_somebodys_is_called_for_something_of_the_servers_own(
    superuser: str, set_role: Set, schema_name: str, search_path: str
) -> None:
    """What is called runs with the rights of whoever sweeps, who may be a superuser."""
    with psycopg.connect(superuser, autocommit=True) as admin:
        put_shadows(admin, schema_name)
        await Product(set_role(search_path=search_path)).go_through()
        assert calls(admin, schema_name) == 0
        # They are there to be called.
        admin.execute(f"set search_path = {search_path}".encode())
        with pytest.raises(psycopg.errors.RaiseException, match="a shadow was called"):
            admin.execute("select count(queue) from queue_service.runs")


async def test_what_the_database_sets_changes_nothing(superuser: str, role: str) -> None:
    with psycopg.connect(superuser, autocommit=True) as admin:
        database = sql.Identifier(str(conninfo_to_dict(superuser)["dbname"]))
        for name, value in {**FORMATS, **TRANSACTIONS, **TIMES, "client_encoding": "LATIN1"}.items():
            _alter(admin, sql.SQL("alter database {}").format(database), name, value)
    await Product(make_conninfo(superuser, user=role, password=PASSWORD)).go_through()


async def test_what_the_server_sets_changes_nothing(tmp_path: Path) -> None:
    odd = {
        **FORMATS,
        **PLANS,
        **TRANSACTIONS,
        **TIMES,
        "client_encoding": "LATIN1",
        "search_path": "public, pg_catalog",
    }
    cluster = Cluster(tmp_path / "cluster", embedded.programs(), {**databases.FAST, **odd})
    cluster.use()
    try:
        schema.upgrade(cluster.conninfo)
        await Product(cluster.conninfo).go_through()
    finally:
        cluster.stop()
        cluster.leave()


class TestASessionInWhichNoTriggersFire:
    """There the lanes of runs are kept by nobody."""

    async def test_is_refused_in_a_sentence(self, set_role: Set) -> None:
        conninfo = set_role(session_replication_role="replica")
        with pytest.raises(ConfigError, match="reset session_replication_role"):
            await Product(conninfo).go_through()
        environment = {"QUEUE_SERVICE_DATABASE_URL": conninfo}
        called = await asyncio.to_thread(CliRunner().invoke, cli, ["runs", "list"], env=environment)
        assert called.exit_code == ConfigError.exit_code
        assert "reset session_replication_role" in called.output

    async def test_is_made_one_of_ours_by_whoever_may(self, superuser: str) -> None:
        with psycopg.connect(superuser, autocommit=True) as admin:
            database = sql.Identifier(str(conninfo_to_dict(superuser)["dbname"]))
            _alter(admin, sql.SQL("alter database {}").format(database), "session_replication_role", "replica")
        await Product(superuser).go_through()


async def test_an_order_to_write_nothing_is_an_outage_until_it_is_taken_back(
    superuser: str, set_role: Set, role: str
) -> None:
    conninfo = set_role(default_transaction_read_only="on")
    with pytest.raises(DatabaseUnavailable, match=r"takes no writes\. default_transaction_read_only is on"):
        await Product(conninfo).go_through()
    with psycopg.connect(superuser, autocommit=True) as admin:
        database = sql.Identifier(str(conninfo_to_dict(superuser)["dbname"]))
        admin.execute(sql.SQL("alter role {} in database {} reset all").format(sql.Identifier(role), database))
    await Product(conninfo).go_through()


@pytest.mark.parametrize(
    "settings",
    [FORMATS, TRANSACTIONS, TIMES_OF_MIGRATIONS, {"client_encoding": "LATIN1"}, {"search_path": "evil, pg_catalog"}],
    ids=["formats", "transactions", "times", "LATIN1", "search_path"],
)
async def test_the_database_is_migrated_whatever_the_role_sets(
    empty_database: str, role: str, settings: dict[str, str]
) -> None:
    conninfo = owned(empty_database, role)
    with psycopg.connect(empty_database, autocommit=True) as admin:
        if "search_path" in settings:
            put_shadows(admin, "evil")
        database = sql.Identifier(str(conninfo_to_dict(empty_database)["dbname"]))
        for name, value in settings.items():
            _alter(admin, sql.SQL("alter role {} in database {}").format(sql.Identifier(role), database), name, value)
        await asyncio.to_thread(schema.upgrade, conninfo)
        await asyncio.to_thread(schema.check, conninfo)
        await asyncio.to_thread(schema.downgrade, conninfo, "base")
        assert "search_path" not in settings or calls(admin, "evil") == 0


async def test_behind_a_pooler_nothing_of_somebodys_is_called_either(superuser: str, set_role: Set) -> None:
    """There the search path is that of the role, and what stands in `public` may fit better than what is the server's."""
    with psycopg.connect(superuser, autocommit=True) as admin:
        put_shadows(admin, "public")
        await Product(set_role(), POOLER="transaction").go_through()
        assert calls(admin, "public") == 0


def test_no_statement_would_call_what_fits_better_in_public(superuser: str, role: str) -> None:
    """Nobody may execute what stands there: a plan that would is refused, even if it is only to be shown."""
    with psycopg.connect(superuser, autocommit=True) as admin:
        if admin.info.server_version < 160000:
            pytest.skip("Postgres 16 shows plans of statements without their parameters")
        put_shadows(admin, "public")
        admin.execute("revoke execute on all functions in schema public from public")
    refused = {}
    with psycopg.connect(make_conninfo(superuser, user=role, password=PASSWORD), autocommit=True) as conn:
        for statement in STATEMENTS:
            if statement.text.startswith("lock table"):
                continue
            names = list(dict.fromkeys(re.findall(r"%\((\w+)\)s", statement.text)))
            text = re.sub(r"%\((\w+)\)s", lambda found: f"${names.index(found[1]) + 1}", statement.text)  # noqa: B023
            try:
                conn.execute(f"explain (generic_plan) {text.replace('%%', '%')}".encode())
            except psycopg.Error as error:
                refused[f"{statement.file.parent.name} {statement.name}"] = str(error).splitlines()[0]
    assert not refused, "\n".join(f"{name}: {why}" for name, why in refused.items())
