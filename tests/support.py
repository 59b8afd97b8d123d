"""What tests share: waiting for a condition, rows as they would be, and two sessions that collide on purpose."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import psycopg

from queue_service import App, Run, Worker
from queue_service.db import session
from queue_service.db.execute import Connection, fetch
from queue_service.db.query import Query
from queue_service.runs import queries
from queue_service.runs.model import NewRun
from queue_service.runs.queries import Claimant, Wanted
from queue_service.services.loop import Service, Services
from queue_service.settings import load
from queue_service.testing import eventually as eventually  # noqa: PLC0414 - most tests have it from here
from queue_service.worker.floors import FRONT

LEASE = timedelta(seconds=30)


def make_ours(conn: psycopg.Connection[Any]) -> None:
    """Give the session the settings that ours have."""
    wanted = {**session.SETTINGS, **session.Limits().settings()}
    conn.execute(session.SET, {"names": list(wanted), "values": list(wanted.values()), "local": False})


def quick_app(database: str) -> App:
    """Without tasks, and with quick clocks: leases of 3 s, polls and sweeps each 100 ms."""
    quick = {"LEASE": "3s", "POLL_INTERVAL": "100ms", "SWEEP_INTERVAL": "100ms", "DRAIN_TIMEOUT": "5s"}
    return App(database, settings=load({f"QUEUE_SERVICE_{name}": value for name, value in quick.items()}))


def service(services: Services, name: str) -> Service:
    """The one of this name that runs."""
    return next(each for each in services if each.name == name)


async def one(conn: Connection, sql: str, *params: object) -> Any:
    """The first column of the first row."""
    cursor = await conn.execute(sql.encode(), params or None)
    row = await cursor.fetchone()
    return None if row is None else row[0]


async def rows(conn: Connection, sql: str, *params: object) -> list[tuple[Any, ...]]:
    cursor = await conn.execute(sql.encode(), params or None)
    return await cursor.fetchall()


async def enqueued(conn: Connection, task: str = "noop", **fields: Any) -> int:
    """The id of a new run."""
    new = NewRun(**{"task": task, "queue": "default", "payload": "{}"} | fields)
    run_id = await fetch(conn, queries.enqueue(new))
    assert run_id is not None
    return run_id


def claim(
    queue: str = "default", *, tasks: tuple[str, ...] = ("noop",), limit: int = 10, worker_id: int = 1,
    lease: timedelta = LEASE, priorities: tuple[int, ...] = (0,), laned: bool = False, final_tasks: tuple[str, ...] = (),
    owner: str | None = None,
) -> Query[list[tuple[Run, int]]]:  # fmt: skip
    """A claim from the front, or of the heads of lanes."""
    by = Claimant(tasks, worker_id, lease, owner, final_tasks)
    if laned:
        lanes = queries.claim_lanes([(queue, limit)], by)
        return Query(lanes.text, lambda rows: lanes.decode(rows).runs, lanes.params)
    return queries.claim([Wanted(queue, limit, dict.fromkeys(priorities, FRONT))], by)


async def claimed(conn: Connection, **options: Any) -> list[tuple[Run, int]]:
    return await fetch(conn, claim(**options))


async def lapse(conn: Connection) -> None:
    """Let every lease have expired a minute ago."""
    await conn.execute("update queue_service.leases set expires_at = clock_timestamp() - interval '1 minute'")


async def blocked(conn: Connection, waiting: Connection) -> bool:
    """Whether the other session waits for a lock at this moment."""
    return bool(await one(conn, "select cardinality(pg_blocking_pids(%s)) > 0", waiting.info.backend_pid))


@asynccontextmanager
async def working(app: App, queues: dict[str, int] | None = None, **options: Any) -> AsyncIterator[Worker]:
    """A worker that runs for the length of the block, in this process."""
    worker = Worker(app, queues, **options)
    running = asyncio.create_task(worker.run())
    await eventually(lambda: worker.id is not None or running.done())
    try:
        yield worker
    finally:
        worker.stop()
        await running


async def listening(conn: Connection) -> None:
    """The worker hears of notices from here on."""
    await eventually(
        lambda: one(
            conn,
            "select count(*) > 0 from pg_stat_activity where datname = current_database() and state = 'idle' "
            "and application_name = 'queue_service listener' and query ilike 'listen%%cancel%%'",
        )
    )


async def resting(conn: Connection) -> None:
    """A patient worker is through with its first looks, and only a notice makes it look again."""
    await eventually(
        lambda: one(
            conn,
            "select exists (select from pg_stat_activity where datname = current_database() and state = 'idle' "
            "and application_name = 'queue_service listener' and query ilike 'listen%%cancel%%') and not exists ("
            "select from pg_stat_activity where datname = current_database() and application_name = 'queue_service' "
            "and pid <> pg_backend_pid() and state_change > clock_timestamp() - interval '500 ms')",
        )
    )


def is_heard(app: App, channel: str) -> bool:
    """Whether notices of this channel are heard in this process, or can never be."""
    return app.opened.listener.hears(channel) or app.opened.listener.polls_by_design


@asynccontextmanager
async def refusing(conn: Connection, table: str, what: str) -> AsyncIterator[None]:
    """While this lasts, the database stores no row of the table for which `what` is true."""
    constraint = f"alter table queue_service.{table} add constraint refused check (({what}) is not true) not valid"
    await conn.execute(constraint.encode())
    try:
        yield
    finally:
        await conn.execute(f"alter table queue_service.{table} drop constraint refused".encode())


def free_port() -> int:
    """For a server that is to be found where it was when it is started again. Not one of those that the system gives to
    connections and servers which name none: it would be somebody else's by then."""
    while True:
        port = random.randrange(10_000, 30_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def own_basetemp(directory: Path) -> str:
    """The option that gives a pytest started by a test a directory of its own. Without it, that pytest closes the directory
    of all this user's runs to other users. Where we are root, our servers run as another user, and die of it."""
    return f"--basetemp={directory / 'inner'}"


def is_gone(pid: int) -> bool:
    """Whether the process has ended, and at most waits for a parent to hear of it."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
