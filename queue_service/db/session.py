"""The one place that makes a connection ours, so that nothing depends on a setting of the server, the database, the role or
a pooler, and nothing that we set is left behind on a connection that others use.

Straight to a server, our settings are those that the session begins with: they are sent in the start-up packet. A pooler
refuses that, or does not pass it on. So each connection looks once whether the process that answers is the one that has
shaken hands. If it is not, a transaction pooler is in between: the next transaction may meet another session, and the next
client this one. Then nothing is set, nothing is prepared, and nothing is listened to; what speed depends on can be set on
the role. All connections are in autocommit mode, since our operations are single statements.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import select
import time
from collections.abc import Collection, Mapping
from datetime import timedelta
from typing import Any, NamedTuple

import psycopg
from psycopg import errors as pg
from psycopg.conninfo import make_conninfo
from psycopg.pq import TransactionStatus

from queue_service.db.execute import DEADLINE, Connection, translated, unanswered
from queue_service.db.hosts import connect_to_writable, each_host, given_by, options, place
from queue_service.errors import ConfigError, DatabaseUnavailable
from queue_service.settings import Pooler

# While one try to connect has not ended, another begins after so many seconds, this many go on at once, and none begins
# later than this: a try that began in an outage may still hang when others would succeed.
NEXT_TRY, MOST_TRIES, LAST_TRY = 1.0, 3, 10.0
# A connection lives for an hour at most. With jitter, so that those of many processes do not end together.
LIFE = timedelta(hours=1).total_seconds()


class Limits(NamedTuple):
    """How long the server lets a statement wait for one lock, and how long it lets it take."""

    lock: timedelta = timedelta(seconds=10)
    statement: timedelta = timedelta(seconds=30)

    def settings(self) -> dict[str, str]:
        return {"lock_timeout": _milliseconds(self.lock), "statement_timeout": _milliseconds(self.statement)}


# What a statement of ours means does not depend on these: they are for the statements that others have the server execute
# beside ours, as in a trigger, and for what is read and sent as text.
MEANING = {
    "datestyle": "ISO",
    "intervalstyle": "postgres",
    "timezone": "UTC",
    "extra_float_digits": "1",
    "bytea_output": "hex",
    "xmlbinary": "base64",
    "array_nulls": "on",
    "standard_conforming_strings": "on",
    "transform_null_equals": "off",
    # Everything of ours is qualified. What is not is the server's own: a function in `public` does not shadow it.
    "search_path": "pg_catalog",
}
# Every statement of ours is shaped for an ordered walk along one index, and the statistics of a queue's tables are always
# out of date, so the planner would now and then talk itself into reading the whole table first.
PLANNER = {
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_mergejoin": "off",
    "enable_hashjoin": "on",
    "enable_indexscan": "on",
    "enable_indexonlyscan": "on",
    "enable_material": "on",
    "enable_nestloop": "on",
    "enable_partition_pruning": "on",
    "enable_sort": "on",
    "from_collapse_limit": "8",
    "join_collapse_limit": "8",
    "constraint_exclusion": "partition",
    "jit": "off",
    "plan_cache_mode": "force_generic_plan",
}
_LIFE_OF_A_SESSION = {
    "default_transaction_isolation": "read committed",
    "default_transaction_deferrable": "off",
    "idle_in_transaction_session_timeout": "60s",
    "idle_session_timeout": "0",
    "exit_on_error": "off",
}
# Left alone: `row_security`, `role`, `default_transaction_read_only` (somebody's order to write nothing), memory and logs.
SETTINGS = {**MEANING, **PLANNER, **_LIFE_OF_A_SESSION}

# Qualified to the last operator: the search path is not ours yet where the start-up packet could not carry it.
# `transaction_timeout` is not known to Postgres 16 and older. Durability is promised, so `synchronous_commit` may be
# anything but off.
_LOOK = """
select pg_catalog.pg_backend_pid(), pg_catalog.pg_is_in_recovery(), pg_catalog.current_setting('transaction_read_only'),
       pg_catalog.current_setting('server_encoding'), pg_catalog.current_setting('session_replication_role'),
       (select pg_catalog.count(pg_catalog.set_config(wanted.name, wanted.value, false))
          from (select * from rows from (pg_catalog.unnest(%(names)s::pg_catalog.text[]),
                                         pg_catalog.unnest(%(values)s::pg_catalog.text[])) as given(name, value)
                 union all
                select 'transaction_timeout', '0'
                 union all
                select 'synchronous_commit', 'on'
                 where pg_catalog.current_setting('synchronous_commit') operator(pg_catalog.=) 'off') as wanted(name, value)
         where (%(pid)s::pg_catalog.int4 is null
                or pg_catalog.pg_backend_pid() operator(pg_catalog.=) %(pid)s::pg_catalog.int4)
           and pg_catalog.current_setting(wanted.name, true) is not null)
"""

SET = """
select pg_catalog.set_config(name, value, %(local)s)
  from rows from (pg_catalog.unnest(%(names)s::pg_catalog.text[]), pg_catalog.unnest(%(values)s::pg_catalog.text[]))
       as given(name, value)
"""


class Address:
    """Where a database is, and what is between it and us. `listen_url` is where notices are heard, if not here."""

    def __init__(self, conninfo: str, *, pooler: Pooler = "auto", listen_url: str | None = None) -> None:
        self.conninfo = conninfo
        self.pooler: Pooler = pooler
        self.listen_url = listen_url
        # Until something on the way refuses it, which all connections of this address then know.
        self.takes_options = pooler in {"auto", "none"}

    @classmethod
    def of(cls, where: str | Address) -> Address:
        return where if isinstance(where, Address) else cls(where)

    def __str__(self) -> str:
        return self.conninfo


class Session(Connection):
    """`limits` are those in force. `is_pooled`: behind a transaction pooler."""

    is_pooled = False
    limits = Limits()
    #: (monotonic) When it is to be replaced, when it was last seen to take writes, and since when nobody uses it.
    ends_at = 0.0
    known_at = 0.0
    idle_since = 0.0
    _poll: select.poll | None = None

    @property
    def is_usable(self) -> bool:
        """Whether it is open, between two transactions, and not too old. Costs nothing."""
        return (
            not self.closed
            and self.pgconn.transaction_status == TransactionStatus.IDLE
            and time.monotonic() < self.ends_at
        )

    @property
    def is_quiet(self) -> bool:
        """Whether nothing has come that nobody asked for, such as the end of the connection. Costs no round trip."""
        if self._poll is None:
            self._poll = select.poll()
            self._poll.register(self.pgconn.socket, select.POLLIN)
        return not self._poll.poll(0)

    async def is_writable(self) -> bool:
        """Ask the server: False where it is gone, or takes no writes any more."""
        self.only_reads = True
        try:
            async with asyncio.timeout(NEXT_TRY):
                cursor = await self.execute("select pg_catalog.current_setting('transaction_read_only')")
                row = await cursor.fetchone()
        except (psycopg.Error, TimeoutError):
            return False
        finally:
            self.only_reads = False
        self.known_at = time.monotonic()
        return row is not None and row[0] == "off"

    async def limit(self, limits: Limits) -> None:
        """Put these in force; behind a pooler for the transaction that is under way."""
        names, values = zip(*limits.settings().items(), strict=True)
        await self.execute(SET, {"names": list(names), "values": list(values), "local": self.is_pooled})
        if not self.is_pooled:
            self.limits = limits


async def connect(
    where: str | Address,
    *,
    application: str = "queue_service",
    limits: Limits = Limits(),  # noqa: B008 - immutable
    writable: bool = True,
) -> Session:
    """A fresh connection of ours. Of several hosts, one that takes writes. Raises DatabaseUnavailable (also where it takes
    no writes, unless `writable` is False), and ConfigError for a database that we cannot work in."""
    address = Address.of(where)
    tries: list[asyncio.Task[Session]] = []
    found: Session | None = None
    begun, until = 0, time.monotonic() + LAST_TRY
    why: BaseException | None = None
    try:
        while tries or why is None:
            if len(tries) == MOST_TRIES:
                # The first ones may only be slow.
                tries.pop().cancel()
            if time.monotonic() < until:
                opening = _open(address, application, limits, writable=writable, first_host=begun)
                tries.append(asyncio.create_task(opening, name="connecting"))
                begun += 1
            done, _ = await asyncio.wait(tries, timeout=NEXT_TRY, return_when=asyncio.FIRST_COMPLETED)
            for each in done:
                tries.remove(each)
                why = each.exception()
                if why is None:
                    found = each.result()
                    return found
        raise why
    finally:
        await _abandon(tries, found)


async def _abandon(tries: Collection[asyncio.Task[Session]], found: Session | None) -> None:
    """End the tries that are not needed. Whoever is cancelled meanwhile does not get the one that was found, either."""
    for each in tries:
        each.add_done_callback(_close_late)
        each.cancel()
    try:
        if tries:
            # They end at once, and before a loop that is about to end: but one may be late, see `cancellable`.
            await asyncio.wait(tries, timeout=NEXT_TRY)
    except asyncio.CancelledError:
        if found is not None:
            found.pgconn.finish()
        raise


def _close_late(late: asyncio.Task[Session]) -> None:
    if not late.cancelled() and late.exception() is None:
        late.result().pgconn.finish()


async def _open(address: Address, application: str, limits: Limits, *, writable: bool, first_host: int) -> Session:
    if not writable:
        return await _open_one(address, options(address.conninfo, application), limits, writable=False)
    refused: dict[str, DatabaseUnavailable] = {}
    for conninfo in each_host(address.conninfo, application, first=first_host):
        try:
            return await _open_one(address, conninfo, limits, writable=True)
        except DatabaseUnavailable as lost:
            refused[place(conninfo)] = lost
    *_, last = refused.values()
    if len(refused) == 1:
        raise last
    said = " ".join(f"{host}: {lost}" for host, lost in refused.items())
    raise DatabaseUnavailable(
        f"None of the {len(refused)} hosts of the database takes writes. {said}"
    ) from last.__cause__


async def _open_one(address: Address, conninfo: str, limits: Limits, *, writable: bool) -> Session:
    with translated():
        conn = await _shake_hands(address, conninfo, limits)
        try:
            # `connect_timeout` ends with the handshake; a server that stops right after it would be waited for for ever.
            async with asyncio.timeout(DEADLINE):
                await _make_ours(conn, address, limits, writable=writable)
        except TimeoutError:
            conn.pgconn.finish()
            raise unanswered(DEADLINE) from None
        except BaseException:
            conn.pgconn.finish()
            raise
    conn.known_at = time.monotonic()
    conn.ends_at = conn.known_at + LIFE * (1 - 0.2 * random.random())  # noqa: S311
    return conn


async def _shake_hands(address: Address, conninfo: str, limits: Limits) -> Session:
    if address.takes_options:
        try:
            return await Session.connect(with_settings(conninfo, {**SETTINGS, **limits.settings()}), autocommit=True)
        except psycopg.OperationalError as refused:
            # What pgbouncer says, in these words in every language.
            if "startup parameter" not in str(refused):
                raise
            address.takes_options = False
    return await Session.connect(conninfo, autocommit=True)


async def _make_ours(conn: Session, address: Address, limits: Limits, *, writable: bool) -> None:
    pid = {"auto": conn.info.backend_pid, "transaction": 0}.get(address.pooler)
    wanted = {**SETTINGS, **limits.settings()}
    cursor = await conn.execute(_LOOK, {"names": list(wanted), "values": list(wanted.values()), "pid": pid})
    (backend, in_recovery, read_only, encoding, replication_role, _), *_ = await cursor.fetchall()
    conn.is_pooled = pid is not None and backend != pid
    if not conn.is_pooled:
        conn.limits = limits
    else:
        # It may answer with what somebody else has prepared under the same name.
        conn.prepare_threshold = None
    check_encoding(encoding)
    if replication_role != "origin":
        await _be_origin(conn)
    if writable and (in_recovery or read_only == "on"):
        kind = "It is a standby" if in_recovery else "default_transaction_read_only is on"
        raise DatabaseUnavailable(f"The database takes no writes. {kind}: this goes on once it takes them again.")


def check_encoding(encoding: str) -> None:
    """Raise ConfigError unless a database of this encoding can hold what we store."""
    if encoding != "UTF8":
        raise ConfigError(
            f"The encoding of this database is {encoding}, which cannot hold every text that a run may carry. Make another "
            "one: create database … encoding 'UTF8' template template0."
        )


async def _be_origin(conn: Session) -> None:
    if not conn.is_pooled:
        # A superuser may.
        with contextlib.suppress(pg.InsufficientPrivilege):
            await conn.execute("select pg_catalog.set_config('session_replication_role', 'origin', false)")
            return
    raise ConfigError(
        "session_replication_role is not `origin` for this role, so the triggers that keep our tables do not fire. Take "
        "the setting back: alter role … reset session_replication_role."
    )


def connect_blocking(where: str | Address, *, application: str) -> psycopg.Connection[Any]:
    """As `connect`, for a thread without a loop; one try of each host."""
    address = Address.of(where)
    settings = {**SETTINGS, **Limits().settings()} if address.takes_options else {}

    def open_one(conninfo: str) -> psycopg.Connection[Any]:
        given = with_settings(conninfo, settings) if settings else conninfo
        return psycopg.connect(given, autocommit=True, prepare_threshold=None)

    return connect_to_writable(address.conninfo, application, open_one)


def with_settings(conninfo: str, settings: Mapping[str, str]) -> str:
    """The same, in a session that begins with these settings. Those that the address gives itself come before ours."""
    ours = [f"-c {name}={_escaped(value)}" for name, value in settings.items()]
    return make_conninfo(conninfo, options=" ".join([given_by(conninfo).get("options", ""), *ours]).strip())


def _escaped(value: str) -> str:
    """For the start-up packet, in which spaces end a setting."""
    return value.replace("\\", "\\\\").replace(" ", "\\ ")


def _milliseconds(duration: timedelta) -> str:
    return f"{duration / timedelta(milliseconds=1):.0f}"
