"""The transaction in which the schema is changed: all of it or nothing, under settings of its own, one at a time for each
database, and never in the way of those who are at work for longer than it takes.

An `alter table` waits for those who use the table, and whoever comes later waits behind it. If it has another table by
then, for which one of those waits, that is a deadlock, and the database ends one of the two, maybe somebody's transaction.
So the tables are taken first, all of them, before anything is changed. While we have none, we may wait for one: nobody
waits for us, so there is no deadlock. While we have one, we wait for the next for less time than the database takes to look
for deadlocks; then we let go of all, let the others work, and begin with the table that was not free.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import psycopg
from psycopg import errors as pg
from psycopg import sql, waiting
from psycopg.pq import TransactionStatus

from queue_service.backoff import Pauses, spread
from queue_service.db.hosts import connect_to_writable
from queue_service.db.meaning import meaning
from queue_service.db.owner import BE_OWNER
from queue_service.db.session import MEANING, PLANNER, check_encoding
from queue_service.errors import DatabaseRefused, DatabaseUnavailable
from queue_service.logs import get_logger
from queue_service.printable import printable

if TYPE_CHECKING:
    # It is imported where it is used, since most commands migrate nothing.
    import sqlalchemy

T = TypeVar("T")
Tell = Callable[[str], None]

log = get_logger(__name__)

SCHEMA = "queue_service"
# Any number; it only has to be the same for all who migrate this schema.
LOCK = 4_718_105_520_114
# For how long we try to get tables that others have, in seconds, and how often we say for whom we wait.
PATIENCE = 180.0
SAY_EVERY = 10.0
# In milliseconds. How much longer than the database's look for deadlocks we wait while we have no table: that look is also
# what makes an autovacuum give way. How late such a look may be. How long we wait for a table while we have others.
FIRST_WAIT = 1_000
LONGEST_LOOK = 5_000
NEXT_WAIT = 100

# Nothing that the server, the database or the role has set changes what a migration means, or ends it. `set local` is the
# one way that leaves nothing behind on a connection of a pooler, which would refuse `options` in the start-up packet, too.
# A client that stands still does not keep the tables for ever. The planner's switches are as Postgres has them.
_LIMITS = {"statement_timeout": "0", "lock_timeout": "10s", "idle_in_transaction_session_timeout": "60s"}
_TEXTS = {"client_encoding": "UTF8", "quote_all_identifiers": "off", "check_function_bodies": "on"}
_PLANNER = dict.fromkeys((name for name in PLANNER if name.startswith("enable_")), "on")
_SETTINGS = {**_LIMITS, **MEANING, **_TEXTS, **_PLANNER, "jit": "off", "plan_cache_mode": "auto"}
SETTINGS = (
    "".join(f"set local {name} = '{value}';\n" for name, value in _SETTINGS.items())
    + """
select set_config('transaction_timeout', '0', true) where current_setting('transaction_timeout', true) is not null;
select set_config('synchronous_commit', 'on', true) where current_setting('synchronous_commit') = 'off';
"""
)

# As one message, so that a limit of the role has no moment in which to strike. The last part has the server notice within
# two seconds that we were killed, even while it builds an index; not every platform can.
_BEGIN = f"""
begin isolation level read committed, read write, not deferrable;
{SETTINGS}
do $$
begin
    perform set_config('client_connection_check_interval', '2s', true);
exception when invalid_parameter_value then
    null;
end
$$;
"""
_LOOK = """
select current_setting('server_encoding'), to_regclass('queue_service.alembic_version') is not null,
       (select setting::integer from pg_settings where name = 'deadlock_timeout')
"""
_TABLES = """
select c.relname from pg_class as c
 where c.relnamespace = to_regnamespace('queue_service') and c.relkind in ('r', 'p') and c.relname <> 'alembic_version'
 order by c.relname
"""
# Of those who have the table, the one whose transaction is the oldest; of those who have our lock, there is one.
_HOLDER_OF_TABLE = """
select a.pid, a.application_name, a.state, extract(epoch from clock_timestamp() - a.xact_start), a.query
  from pg_locks as l join pg_stat_activity as a on a.pid = l.pid
 where l.granted and a.pid <> pg_backend_pid() and l.locktype = 'relation'
   and l.database = (select oid from pg_database where datname = current_database())
   and l.relation = to_regclass(%(table)s)
 order by a.xact_start nulls last limit 1
"""
_HOLDER_OF_LOCK = """
select a.pid, a.application_name, a.state, extract(epoch from clock_timestamp() - a.xact_start), a.query
  from pg_locks as l join pg_stat_activity as a on a.pid = l.pid
 where l.granted and l.locktype = 'advisory' and l.objsubid = 1
   and l.database = (select oid from pg_database where datname = current_database())
   and l.classid::bigint << 32 | l.objid::bigint = %(lock)s
 limit 1
"""


class Holder(NamedTuple):
    """A session that has what a migration waits for."""

    pid: int
    application: str
    state: str | None
    seconds: float | None
    query: str

    def __str__(self) -> str:
        doing = [self.application, self.state or ""]
        if self.seconds is not None:
            doing.append(f"its transaction is {self.seconds:.0f} s old")
        # Without a state, it is another user's, and not for us to see.
        if self.state is not None and (first := _without_values(self.query)):
            doing.append(f"its last statement: {first}")
        return printable(f"process {self.pid} ({', '.join(filter(None, doing))})")


class NotFree(Exception):
    """Somebody has what we need, and this says what and who. `ends` is whether we give up on it some day, `seconds` how
    long others may have waited behind us while we waited."""

    def __init__(self, what: str, seconds: float = 0.0, *, ends: bool = True) -> None:
        self.ends = ends
        self.seconds = seconds
        super().__init__(what)


class _Connection(psycopg.Connection[Any]):
    """Never has a commit cancelled: one that waits for a synchronous standby would then stand without it."""

    is_committing = False

    def begin(self) -> None:
        try:
            self.execute(_BEGIN.encode())
        except pg.FeatureNotSupported as refused:
            raise DatabaseUnavailable(
                f"The database takes no writes: {_said(refused)}. A standby is migrated by its primary: name that one."
            ) from None

    def commit(self) -> None:
        self.is_committing = True
        super().commit()
        self.is_committing = False

    def wait(self, gen: Any, *args: Any, **options: Any) -> Any:
        if self.is_committing:
            return waiting.wait(gen, self.pgconn.socket, 0.1)
        return super().wait(gen, *args, **options)


class Migration:
    """One connection, on which a change is tried in one transaction after the other until nobody is in its way."""

    def __init__(self, connection: sqlalchemy.Connection, driver: _Connection) -> None:
        #: For alembic, and for whatever else the change executes.
        self.connection = connection
        self._driver = driver
        #: (monotonic) Since when it could have seen a sign of life.
        self.began_at = time.monotonic()
        self._has_version = False
        self._deadlock_timeout = 0
        #: Those that were not free when we had others, the last one first: before them all, the one that most use. So it
        #: comes to the order in which most statements take them, if they have one.
        self._first = ["runs"]

    def begin(self) -> None:
        """In the name of the schema's owner, where we may. Raises ConfigError where the database cannot hold what we store,
        and DatabaseUnavailable on a standby."""
        self.connection.begin()
        self._driver.begin()
        self._rows(BE_OWNER)
        (encoding, self._has_version, self._deadlock_timeout), *_ = self._rows(_LOOK)
        check_encoding(encoding)

    def revision(self) -> str | None:
        """The one that the schema has; None where there is none yet."""
        if not self._has_version:
            # Somebody may have made it since this transaction began.
            self._has_version = self._rows(_LOOK)[0][1]
        found = self._rows("select version_num from queue_service.alembic_version") if self._has_version else []
        return found[0][0] if found else None

    def exclude_others(self) -> None:
        """One migration at a time, until the end of the transaction. Raises NotFree; whoever waits long lets go of its
        connection of a pooler now and then."""
        self._driver.execute("savepoint no_lock")
        try:
            self._driver.execute(f"set local lock_timeout = {FIRST_WAIT}".encode())
            self._driver.execute("select pg_advisory_xact_lock(%s)", [LOCK])
        except pg.LockNotAvailable:
            self._driver.execute("rollback to savepoint no_lock")
            holder = self._holder(_HOLDER_OF_LOCK, lock=LOCK)
            raise NotFree(f"another migration of this database: {holder}", ends=False) from None

    def take_tables(self) -> None:
        """All tables that are there, until the end of the transaction. Raises NotFree."""
        names = [name for (name,) in self._rows(_TABLES)]
        tables = [
            *(name for name in self._first if name in names),
            *(name for name in names if name not in self._first),
        ]
        self._driver.execute("savepoint no_table")
        begun = time.monotonic()
        wait, until = min(self._deadlock_timeout, LONGEST_LOOK) + FIRST_WAIT, None
        for table in tables:
            # Whatever somebody has called a table of their own in there.
            name = sql.Identifier(SCHEMA, table).as_string(None)
            take = f"set local lock_timeout = {wait}; lock table only {name} in access exclusive mode"
            try:
                self._driver.execute(take.encode())
            except (pg.LockNotAvailable, pg.DeadlockDetected):
                self._driver.execute("rollback to savepoint no_table")
                self._first = [table, *(name for name in self._first if name != table)]
                seconds = time.monotonic() - begun
                raise NotFree(f"table {table}, held by {self._holder(_HOLDER_OF_TABLE, table=name)}", seconds) from None
            # Who waits for the first one looks for a deadlock after so long, and shall find us waiting for nobody.
            until = until or time.monotonic() + self._deadlock_timeout / 2000
            wait = max(1, min(NEXT_WAIT, int((until - time.monotonic()) * 1000)))

    def make_schema(self) -> None:
        """If it is not there. One that is may belong to somebody who may make no schema."""
        if not self._rows("select to_regnamespace(%(name)s) is not null", name=SCHEMA)[0][0]:
            self._driver.execute(f"create schema {SCHEMA}".encode())

    def as_interrupted(self) -> str:
        """What has become of the schema, for whoever has interrupted us."""
        if self._driver.is_committing:
            return "It is done, or will be: it waits for the end of its commit. `queue-service db current` says so."
        return "The migration was stopped, and nothing was changed."

    def _holder(self, query: str, **params: object) -> str:
        found = self._rows(query, **params)
        return str(Holder(*found[0])) if found else "another session"

    def _rows(self, query: str, **params: object) -> list[tuple[Any, ...]]:
        return self._driver.execute(query.encode(), params or None).fetchall()


def changed(conninfo: str, change: Callable[[Migration], T], *, tell: Tell | None = None, commit: bool = True) -> T:
    """Make this change in one transaction, which begins again while others are in its way. With `commit=False` it is rolled
    back in the end. `tell` is given a sentence, now and then, about whom it waits for.

    Raises DatabaseUnavailable where somebody has had a table for longer than PATIENCE, or where the connection is lost;
    DatabaseRefused; ConfigError for a database that cannot be ours. Nothing is changed then.
    """
    tell = tell or _log
    waits = _Waits(tell)
    with connected(conninfo) as migration:
        try:
            while True:
                try:
                    return _tried(migration, change, commit=commit)
                except Exception as failed:  # noqa: BLE001 - what is none of a database is raised again
                    why = _why_again(failed)
                migration.connection.rollback()
                waits.pause(why)
        except KeyboardInterrupt:
            tell(migration.as_interrupted())
            raise


def _tried(migration: Migration, change: Callable[[Migration], T], *, commit: bool) -> T:
    migration.begin()
    result = change(migration)
    if commit:
        migration.connection.commit()
    else:
        migration.connection.rollback()
    return result


def _log(sentence: str) -> None:
    log.warning("a migration is held up", why=sentence)


class _Waits:
    """The pauses between tries, and what is said meanwhile."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._pauses = Pauses(0.05, 1.0)
        #: (monotonic) Since when there is no other migration, and yet a table that is not free.
        self._since: float | None = None
        self._said_at = float("-inf")

    def pause(self, why: NotFree) -> None:
        now = time.monotonic()
        self._since = (now if self._since is None else self._since) if why.ends else None
        if self._since is not None and now - self._since >= PATIENCE:
            raise DatabaseUnavailable(
                f"The migration has waited for {why}. It gives up after {PATIENCE:g} s, and nothing was changed. End that "
                "transaction, or wait until it has ended, and migrate again."
            )
        if now - self._said_at >= SAY_EVERY:
            self._said_at = now
            self._tell(f"The migration waits for {why}. It tries again.")
        # Who had to wait behind us shall have three times as long.
        time.sleep(max(self._pauses.next(), 3 * why.seconds) * spread())


@contextmanager
def connected(conninfo: str) -> Iterator[Migration]:
    """A connection for migrations, which is closed in the end. Errors of the driver are given as ours."""
    import sqlalchemy

    driver: _Connection | None = None

    def connect() -> _Connection:
        nonlocal driver
        driver = connect_to_writable(
            conninfo,
            "queue_service migrate",
            lambda host: _Connection.connect(host, autocommit=True, prepare_threshold=None),
        )
        # What SQLAlchemy asks to begin with is asked under our settings; then it rolls this back.
        driver.begin()
        return driver

    engine = sqlalchemy.create_engine(
        "postgresql+psycopg://",
        creator=connect,
        poolclass=sqlalchemy.NullPool,
        pool_reset_on_return=None,
        use_native_hstore=False,
    )
    try:
        with _translated(lambda: driver):
            connection = engine.connect()
            assert driver is not None
            yield Migration(connection, driver)
    finally:
        if driver is not None:
            # What is not committed goes with it.
            driver.close()


@contextmanager
def _translated(driver: Callable[[], _Connection | None]) -> Iterator[None]:
    """What comes of our statements and of alembic's, as one of ours that says what has become of the schema."""
    try:
        yield
    except Exception as failed:
        error = _cause(failed)
        if not isinstance(error, psycopg.Error):
            raise
        conn = driver()
        if conn is None or isinstance(error, pg.InsufficientPrivilege):
            raise (meaning(error) or error) from None
        if conn.closed or conn.info.transaction_status == TransactionStatus.UNKNOWN:
            raise DatabaseUnavailable(
                f"The migration lost its connection: {_said(error)}. It is one transaction, so all of it was done or "
                "nothing. Run it again: it begins where the schema is."
            ) from error
        raise DatabaseRefused(
            f"The migration was refused: {_said(error)} (SQLSTATE {error.sqlstate}). Nothing was changed."
        ) from error


def _cause(error: BaseException) -> BaseException:
    """The driver's error, where SQLAlchemy has wrapped it."""
    import sqlalchemy

    return error.orig if isinstance(error, sqlalchemy.exc.DBAPIError) and error.orig is not None else error


def _why_again(failed: Exception) -> NotFree:
    """Who was in the way of this transaction, so that another one is to be tried. Raises what it is where nobody was."""
    error = _cause(failed)
    # Of two that change one entry of the catalogue, as `grant` does, the second is told this.
    is_overtaken = isinstance(error, pg.InternalError_) and "tuple concurrently" in str(error)
    if is_overtaken or isinstance(error, (pg.LockNotAvailable, pg.DeadlockDetected, pg.SerializationFailure)):
        return NotFree(f"another transaction: {_said(error)}")
    if isinstance(error, NotFree):
        return error
    raise failed


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _without_values(query: str) -> str:
    """How a statement begins, on one line, and without what stands in quotes: it is shown to others."""
    unquoted = re.sub(r"'(?:[^']|'')*(?:'|$)|\$(\w*)\$.*?(?:\$\1\$|$)", "'…'", query, flags=re.DOTALL)
    line = " ".join(unquoted.split())
    return line if len(line) <= 80 else line[:79] + "…"
