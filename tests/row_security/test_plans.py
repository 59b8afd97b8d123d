"""Row security costs a role that is exempt no other plan, and a tenant no walk through what is not its own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
from psycopg import sql

from queue_service.db import row_security
from queue_service.db.query import Query
from queue_service.events import queries as events
from queue_service.runs import queries
from queue_service.runs.model import NewRun
from queue_service.turns import queries as turns
from tests.plans.database import Sync, believed_empty
from tests.plans.test_indexes import FILL, explained, nodes
from tests.plans.test_indexes import statements as statements_of_runs
from tests.row_security.conftest import GRANTS
from tests.support import make_ours

ROWS = 50_000
KEYED = NewRun("noop", "default", "{}", singleton_key="k", organization_id="acme")
# What many organizations have, acme among them.
SINGLETONS = """
insert into queue_service.runs (queue, task, payload, singleton_key, organization_id)
select 'default', 'noop', '{}', 'k', case n when 1 then 'acme' else 'o' || n end from generate_series(1, 5000) as n
"""


@pytest.fixture(scope="module")
def database_of_plans(server: str, template: str) -> Iterator[tuple[Sync, str, str]]:
    """With the names of an exempt role and of a tenant."""
    exempt, tenant = (f"queue_service_{name}_{uuid4().hex[:8]}" for name in ("exempt", "tenant"))
    with believed_empty(server, template, f"queue_service_plans_rls_{uuid4().hex[:8]}", {"runs"}) as conn:
        for role in (exempt, tenant):
            conn.execute(sql.SQL("create role {}").format(sql.Identifier(role)))
            conn.execute(sql.SQL(GRANTS).format(role=sql.Identifier(role)))
        row_security.enable(conn.info.dsn, [exempt])
        conn.execute(FILL.encode(), [ROWS])
        conn.execute(SINGLETONS.encode())
        make_ours(conn)
        yield conn, exempt, tenant
        for role in (exempt, tenant):
            conn.execute(sql.SQL("drop owned by {role}; drop role {role}").format(role=sql.Identifier(role)))


def statements() -> dict[str, Query[Any]]:
    new = '{"stream": "s", "kind": "k", "body": 1, "run_id": 1, "attempt": 1}'
    append = events.append([], notify=False)
    return {
        **statements_of_runs(),
        "enqueue": queries.enqueue(KEYED),
        "replace": queries.replace(KEYED),
        "singleton_holder": queries.singleton_holder("default", "k", "acme"),
        "get": queries.get(1),
        "get_recent": queries.get_recent(1),
        "purge": queries.purge("default", limit=100),
        "late": queries.late(limit=100),
        "append": Query(append.text, append.decode, {**append.params, "events": f"[{new}]"}),
        "read": events.read("s", after=0, limit=100),
        "turns.sweep": turns.sweep(limit=100),
        "turns.extend": turns.extend("dep"),
        "turns.standing": turns.standing("dep", "m"),
    }


def as_role(conn: Sync, role: str, query: Query[Any], how: str = "costs off") -> dict[str, Any]:
    conn.execute(sql.SQL("set role {}").format(sql.Identifier(role)))
    try:
        return explained(conn, query, how)
    finally:
        conn.execute("reset role")


def shape(plan: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Every node, with what it reads and how. Subplans are counted, and those of a policy that does not hold, too."""
    kept = ("Node Type", "Relation Name", "Index Name", "Index Cond", "Sort Key")
    return [tuple(re.sub(r"(Plan) \d+", r"\1", str(node.get(name))) for name in kept) for node in nodes(plan)]


@pytest.mark.parametrize("name", statements())
def test_a_role_that_is_exempt_has_the_plans_of_the_owner(database_of_plans: tuple[Sync, str, str], name: str) -> None:
    conn, exempt, _ = database_of_plans
    query = statements()[name]
    assert shape(as_role(conn, exempt, query)) == shape(explained(conn, query, "costs off"))


@pytest.mark.parametrize("name", ["cancel", "get_many", "endings", "enqueue", "replace", "singleton_holder", "get"])
def test_a_tenant_reaches_runs_by_index_conditions(database_of_plans: tuple[Sync, str, str], name: str) -> None:
    conn, _, tenant = database_of_plans
    conn.execute("set queue_service.organization_id = 'acme'")
    plan = as_role(conn, tenant, statements()[name], "analyze, costs off, timing off")
    read = [node for node in nodes(plan) if "Scan" in node["Node Type"] and node["Actual Loops"]]
    reads = [node for node in read if node.get("Relation Name") == "runs"]
    assert reads or name == "enqueue"
    assert all("Index Cond" in node for node in reads)
    assert {node["Index Name"] for node in reads} <= {"runs_pkey", "runs_singleton_key_idx"}


@pytest.mark.parametrize("as_tenant", [False, True])
@pytest.mark.parametrize("organization", ["acme", "nobody", None])
def test_a_key_that_thousands_of_organizations_have_is_looked_up_in_one_of_them(
    database_of_plans: tuple[Sync, str, str], organization: str | None, as_tenant: bool
) -> None:
    conn, exempt, tenant = database_of_plans
    conn.execute("select set_config('queue_service.organization_id', %s, false)", [organization or ""])
    query = queries.singleton_holder("default", "k", organization)
    plan = as_role(conn, tenant if as_tenant else exempt, query, "analyze, timing off, buffers")
    reads = [node for node in nodes(plan) if node.get("Index Name") == "runs_singleton_key_idx"]
    assert reads
    assert sum(each["Actual Rows"] + each.get("Rows Removed by Filter", 0) for each in reads) <= 1
    assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] <= 30
