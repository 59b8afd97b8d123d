"""What `db grants` prints is executed, and is then enough for all that a worker, a gateway and the command line do; `db check`
says what of it a role lacks behind a pooler."""

from __future__ import annotations

import asyncio
import json
import shlex
from collections.abc import Callable, Iterator
from uuid import uuid4

import psycopg
import pytest
from click.testing import CliRunner, Result
from psycopg import sql
from psycopg.conninfo import make_conninfo

from queue_service.cli import cli
from tests.every_part import use_all
from tests.pooler import Pooler, pooling

Invoke = Callable[..., Result]


def call(conninfo: str, *arguments: str) -> Result:
    return CliRunner().invoke(cli, [*arguments, "--database-url", conninfo], prog_name="queue-service")


def printed(conninfo: str, *arguments: str) -> str:
    result = call(conninfo, "db", "grants", *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def execute(conninfo: str, statements: str) -> None:
    with psycopg.connect(conninfo, autocommit=True) as owner:
        owner.execute(statements.encode())


@pytest.fixture(params=["plain", 'Ops "1"; drop schema', "Überwachung's"])
def role(request: pytest.FixtureRequest, server: str, direct: str) -> Iterator[str]:
    """A role that may log in, and no more."""
    name = f"{request.param} {uuid4().hex[:8]}"
    with psycopg.connect(server, autocommit=True) as admin, psycopg.connect(direct, autocommit=True) as inside:
        admin.execute(sql.SQL("create role {} login").format(sql.Identifier(name)))
        yield name
        inside.execute(sql.SQL("drop owned by {}").format(sql.Identifier(name)))
        admin.execute(sql.SQL("drop role {}").format(sql.Identifier(name)))


@pytest.fixture
def as_role(direct: str, role: str) -> str:
    return make_conninfo(direct, user=role)


def test_a_role_works_serves_and_reads_with_what_is_printed_and_not_without_it(
    direct: str, as_role: str, role: str
) -> None:
    refused = call(as_role, "runs", "list")
    assert refused.exit_code == 1
    assert "permission denied" in refused.output
    execute(direct, printed(direct, role))
    used = asyncio.run(use_all(as_role))
    assert used == {"states": {"succeeded"}, "outcome": "reply", "event": "delta"}
    for words in (["runs", "list"], ["workers", "list"], ["markers", "list"], ["queues", "list"], ["db", "current"]):
        assert call(as_role, *words).exit_code == 0, words
    assert call(as_role, "markers", "sweep").exit_code == 0
    # Nothing of it lets the role change what the owner has made.
    with psycopg.connect(as_role) as conn, pytest.raises(psycopg.errors.InsufficientPrivilege):
        conn.execute("create table queue_service.mine ()")
    with psycopg.connect(as_role) as conn, pytest.raises(psycopg.errors.InsufficientPrivilege):
        conn.execute("update queue_service.alembic_version set version_num = '0001'")


@pytest.mark.parametrize("role", ["plain"], indirect=True)
def test_what_later_migrations_add_is_not_the_roles_before_it_is_granted(direct: str, as_role: str, role: str) -> None:
    """Before, it was, whatever the role was for."""
    name = sql.Identifier(role).as_string(None)
    execute(direct, f"alter default privileges in schema queue_service grant all on tables to {name}")
    execute(direct, printed(direct, role))
    execute(direct, "create table queue_service.later (id bigint)")
    with psycopg.connect(as_role) as later, pytest.raises(psycopg.errors.InsufficientPrivilege):
        later.execute("table queue_service.later")


@pytest.mark.parametrize("role", ["plain"], indirect=True)
def test_the_owner_needs_no_rights(direct: str, as_role: str, role: str) -> None:
    execute(direct, printed(direct, "--role", "owner", role))
    rights, _, settings = printed(as_role, "--role", "worker").partition("-- Only behind a pooler")
    assert [line for line in rights.splitlines() if not line.startswith("--")] == []
    assert "alter role" in settings


def test_the_owner_is_no_kind_among_others(direct: str) -> None:
    result = call(direct, "db", "grants", "--role", "owner", "--role", "app", "x")
    assert result.exit_code == 2
    assert "say --role owner alone" in result.output


def test_without_a_role_it_is_the_one_that_asks(as_role: str, direct: str, role: str) -> None:
    execute(direct, printed(direct, role))
    assert printed(as_role) == printed(direct, role)


@pytest.mark.parametrize("role", ["plain"], indirect=True)
def test_a_name_that_no_terminal_shows_is_refused(direct: str, role: str) -> None:
    result = call(direct, "db", "grants", f"{role}\nend")
    assert result.exit_code == 2
    assert "Grant it by hand" in result.output


def test_a_database_without_a_schema_has_nothing_to_grant(empty_database: str) -> None:
    assert call(empty_database, "db", "grants", "x").exit_code == 4


@pytest.fixture
def pooled_role(server: str, role: str) -> Iterator[Pooler]:
    with pooling(server, users=(role,)) as running:
        yield running


def test_behind_a_pooler_check_says_what_the_role_lacks_until_it_has_it(
    direct: str, server: str, as_role: str, role: str, pooled_role: Pooler
) -> None:
    through = pooled_role.before(as_role)
    sets = "\nalter role "
    granted, settings = printed(direct, role).split(sets, 1)
    execute(direct, granted)
    execute(
        direct, sql.SQL("alter role {} set synchronous_commit = 'off'").format(sql.Identifier(role)).as_string(None)
    )
    check = ("db", "check", "--accept", "fsync", "--accept", "full-page-writes")
    lacks = call(through, *check)
    assert lacks.exit_code == 1, lacks.output
    assert "with enable_seqscan = 'on', and not with 'off'" in lacks.output
    assert "begin with synchronous_commit = 'off', and not with 'on'" in lacks.output
    assert f"db grants {shlex.quote(role)}" in lacks.output
    told = json.loads(call(through, *check, "--json").stdout)
    assert told["difference"] is None
    assert {"name": "jit", "have": "on", "want": "off"} in told["lacking"]
    assert {"search_path", "statement_timeout", "plan_cache_mode"} <= {each["name"] for each in told["lacking"]}
    failed = {each["name"] for each in told["findings"] if each["level"] == "failure"}
    assert failed == {"role-settings", "synchronous-commit"}
    # Straight to the server a session brings its own.
    assert call(as_role, *check).exit_code == 0
    execute(direct, sets + settings)
    execute(direct, sql.SQL("alter role {} reset synchronous_commit").format(sql.Identifier(role)).as_string(None))
    with pooling(server, users=(role,)) as fresh:
        agrees = call(fresh.before(as_role), *check, "--json")
    told = json.loads(agrees.stdout)
    assert (told["difference"], told["lacking"]) == (None, [])
    assert {each["level"] for each in told["findings"]} == {"note"}
    assert agrees.exit_code == 0


@pytest.mark.parametrize("role", ["plain"], indirect=True)
def test_a_role_that_has_them_has_them_behind_a_pooler(direct: str, server: str, as_role: str, role: str) -> None:
    execute(direct, printed(direct, role))
    with pooling(server, users=(role,)) as running:
        used = asyncio.run(use_all(running.before(as_role)))
        with psycopg.connect(running.before(as_role), autocommit=True) as pooled:
            assert pooled.execute("show enable_seqscan").fetchone() == ("off",)
            assert pooled.execute("show search_path").fetchone() == ("pg_catalog",)
    assert used == {"states": {"succeeded"}, "outcome": "reply", "event": "delta"}
