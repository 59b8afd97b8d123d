"""What row security costs, each thing with it and without, in turns: a scenario of our own."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from benchmarks.contests import TASTE
from benchmarks.pooler import drained
from benchmarks.scenario import scenario
from queue_service import App
from queue_service.db import row_security as policies

ROUNDS = 5
# Single enqueues of a tenant are fewer: each is a commit.
PART = 10

GRANTS = """
grant usage on schema queue_service to {role};
grant select, insert, update, delete on all tables in schema queue_service to {role};
grant usage, select on all sequences in schema queue_service to {role};
grant execute on all functions in schema queue_service to {role};
"""


@scenario
async def row_security(app: App, count: int) -> dict[str, float]:
    """How many times as long with it: a drain by an exempt worker, enqueues of a tenant, and `enqueue_many` of one."""
    ratios: dict[str, list[float]] = {"drain": [], "enqueue": [], "enqueue_many": []}
    with roles(app.conninfo) as (exempt, tenant, name):
        for _ in range(1 if count <= TASTE.drain else ROUNDS):
            plain = await taken(exempt, tenant, count)
            await asyncio.to_thread(policies.enable, app.conninfo, [name])
            secured = await taken(exempt, tenant, count)
            await asyncio.to_thread(policies.disable, app.conninfo)
            for what, times in ratios.items():
                times.append(secured[what] / plain[what])
    return {f"{what}, times as long": statistics.median(times) for what, times in ratios.items()}


async def taken(exempt: str, tenant: str, count: int) -> dict[str, float]:
    """Seconds. What the tenant has stored is deleted, so that each drain finds what is its own."""
    rate, _ = await drained(exempt, count)
    async with App(tenant) as app:
        begun = time.perf_counter()
        for _ in range(max(count // PART, 1)):
            await app.enqueue("noop", {})
        stored = time.perf_counter()
        await app.enqueue_many("noop", [{}] * count)
        ended = time.perf_counter()
        await app.queues.purge("default")
    return {"drain": count / rate, "enqueue": stored - begun, "enqueue_many": ended - stored}


@contextmanager
def roles(conninfo: str) -> Iterator[tuple[str, str, str]]:
    """The conninfos of a worker and of a tenant, and the name of the worker's role."""
    names = [f"bench_{name}_{uuid4().hex[:8]}" for name in ("worker", "tenant")]
    with psycopg.connect(conninfo, autocommit=True) as owner:
        for name in names:
            owner.execute(sql.SQL("create role {} login").format(sql.Identifier(name)))
            owner.execute(sql.SQL(GRANTS).format(role=sql.Identifier(name)))
        owner.execute(
            sql.SQL("alter role {} set queue_service.organization_id = 'acme'").format(sql.Identifier(names[1]))
        )
        try:
            worker, tenant = (make_conninfo(conninfo, user=name) for name in names)
            yield worker, tenant, names[0]
        finally:
            for name in names:
                owner.execute(sql.SQL("drop owned by {role}; drop role {role}").format(role=sql.Identifier(name)))
