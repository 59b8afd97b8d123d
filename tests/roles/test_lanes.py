"""Lanes are kept by triggers, for whoever writes runs: nobody needs a right on lanes for it, and nobody gets one by it."""

from __future__ import annotations

from uuid import uuid4

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from queue_service import Worker
from queue_service.db import schema
from queue_service.errors import DatabaseRefused
from tests.roles.conftest import Make, asked, execute, grant
from tests.support import quick_app

# What a stranger would have to have for the functions of our triggers to be of use.
LIKE_RUNS = """
create table {0}.mine (queue text, ordering_key text, run_at timestamptz, task text, attempt int, reserved_for text, state text)
"""


@pytest.fixture
def enqueuer(owned: str, role: Make) -> str:
    """The database as a role that only enqueues."""
    made = role("enqueuer")
    grant(owned, made, "enqueuer")
    return make_conninfo(owned, user=made)


async def test_an_enqueuer_stores_runs_of_lanes_without_a_right_on_lanes(owned: str, enqueuer: str) -> None:
    done: list[int] = []
    async with quick_app(enqueuer) as app:
        ids = [await app.enqueue("note", {"n": n}, ordering_key="k") for n in range(3)]
        ids += await app.enqueue_many("note", [{"n": n} for n in (3, 4)], ordering_key="k")
        async with app.pool.connection() as conn:
            for refused in (
                "select from queue_service.lanes",
                "delete from queue_service.lanes",
                "select payload from queue_service.runs",
            ):
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    await conn.execute(refused.encode())
    async with quick_app(owned) as app:

        @app.task
        async def note(n: int) -> None:
            done.append(n)

        await Worker(app).run(once=True)
        await app.wait_many(ids, timeout=30)
    assert done == [0, 1, 2, 3, 4]


async def test_what_an_enqueuer_may_not_hurts_that_call_alone(enqueuer: str) -> None:
    async with quick_app(enqueuer) as app:
        run_id = await app.enqueue("noop", {})
        with pytest.raises(DatabaseRefused, match="permission denied for table"):
            await app.wait(run_id, timeout=30)
        with pytest.raises(DatabaseRefused, match="permission denied for table"):
            await app.cancel(run_id)
        await app.enqueue("noop", {})


@pytest.mark.parametrize("function", ["join_lane", "move_lane"])
def test_nobody_makes_a_trigger_of_the_functions_that_act_as_the_owner(
    admin: str, owned: str, function: str, role: Make
) -> None:
    """It would write to our lanes in the owner's name."""
    stranger = role("stranger")
    grant(owned, stranger, "worker")
    as_stranger = make_conninfo(owned, user=stranger)
    execute(admin, "create schema {0} authorization {0}", stranger)
    execute(as_stranger, LIKE_RUNS, stranger)
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match=function):
        execute(
            as_stranger, f"create trigger mine after insert on {{}}.mine for each row execute function queue_service.{function}()",
            stranger,
        )  # fmt: skip
    execute(admin, "drop schema {} cascade", stranger)


def test_functions_that_act_as_the_owner_are_the_owners_and_find_no_names_of_others(
    admin: str, owner_role: str
) -> None:
    found = asked(
        admin,
        "select proname, pg_get_userbyid(proowner)::text, proconfig[1], proacl::text from pg_proc "
        "where prosecdef and pronamespace = 'queue_service'::regnamespace order by 1",
    )
    assert [row[:3] for row in found] == [
        (function, owner_role, "search_path=pg_catalog, pg_temp")
        for function in ("join_lane", "leave_lanes", "move_lane", "tend_lanes", "wanted_workers")
    ]
    # Nobody but the owner may execute one, before somebody grants it.
    assert {row[3] for row in found} == {f'{{"\\"{owner_role}\\"=X/\\"{owner_role}\\""}}'}


def test_who_was_once_granted_all_functions_loses_those(owned: str, role: Make) -> None:
    schema.downgrade(owned, "0022")
    before = role("before")
    execute(
        owned,
        "grant usage on schema queue_service to {0}; grant execute on all functions in schema queue_service to {0}",
        before,
    )
    schema.upgrade(owned)
    may = "select has_function_privilege(%s, 'queue_service.join_lane()', 'execute')"
    assert asked(owned, may, before) == [(False,)]


@pytest.mark.parametrize(("rights", "may_call"), [("select, insert, update", True), ("select", False)])
def test_who_may_change_lanes_by_hand_may_go_on_to_have_them_kept_and_nobody_else_may(
    owned: str, role: Make, rights: str, may_call: bool
) -> None:
    schema.downgrade(owned, "0024")
    before = role("before")
    execute(
        owned,
        "grant usage on schema queue_service to {0}; grant execute on all functions in schema queue_service to {0}; "
        f"grant {rights} on queue_service.lanes to {{0}}",
        before,
    )
    schema.upgrade(owned)
    for function in ("tend_lanes(text[], text[])", "leave_lanes(text[], text[], integer[])"):
        may = f"select has_function_privilege(%s, 'queue_service.{function}', 'execute')"
        assert asked(owned, may, before) == [(may_call,)]


def test_tables_whose_owner_was_changed_by_hand_keep_their_lanes(admin: str, owned: str, role: Make) -> None:
    """The functions follow the table that they write to."""
    schema.downgrade(owned, "0022")
    other = role("other")
    execute(
        admin, "grant usage, create on schema queue_service to {0}; alter table queue_service.lanes owner to {0}", other
    )
    execute(admin, "grant all on queue_service.runs, queue_service.queues to {0}", other)
    schema.upgrade(admin)
    owners = "select distinct pg_get_userbyid(proowner)::text from pg_proc where proname in ('join_lane', 'move_lane')"
    assert asked(admin, owners) == [(other,)]
    key = uuid4().hex
    execute(
        admin, f"insert into queue_service.runs (queue, task, payload, ordering_key) values ('q', 't', '{{}}', '{key}')"
    )
    assert asked(admin, "select count(*) from queue_service.lanes where ordering_key = %s", key) == [(1,)]


def test_roles_at_work_go_on_through_a_migration_where_nobody_may_execute_new_functions(
    admin: str, owned: str, owner_role: str, role: Make
) -> None:
    """Rights are granted again only afterwards; until then the new columns have their default all the same."""
    schema.downgrade(owned, "0024")
    before = role("before")
    execute(
        owned,
        "grant usage on schema queue_service to {0}; grant select, insert on queue_service.streams to {0}",
        before,
    )
    execute(admin, "alter default privileges for role {} revoke execute on functions from public", owner_role)
    schema.upgrade(owned)
    execute(make_conninfo(owned, user=before), "insert into queue_service.streams (stream) values ('s')")
    assert asked(admin, "select stream, organization_id from queue_service.streams") == [("s", None)]
