"""What an error of the driver means, as one of ours: what happened, why, and what to do.

It goes by the SQLSTATE. The words of a server are in its own language, and the driver's classes differ from version to
version. A pooler is told by its words, since it has no SQLSTATE of its own; they are English everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import psycopg
from psycopg import errors as pg

from queue_service.db.revision import OLDEST
from queue_service.errors import DatabaseRefused, DatabaseUnavailable, QueueServiceError, SchemaMismatch, ValueRefused

_Ours = Callable[[str], QueueServiceError | None]

QUERY_CANCELED, OUT_OF_MEMORY, TRANSACTION_TIMEOUT = "57014", "53200", "25P04"
FORBIDDEN = "42501"
_PROTOCOL_VIOLATION = "08P01"


def _unavailable(sentence: str) -> _Ours:
    return lambda said: DatabaseUnavailable(sentence.format(said))


def _refused(sentence: str) -> _Ours:
    return lambda said: DatabaseRefused(sentence.format(said))


def _passes(_said: str) -> None:
    """It stays as it is: it may be repeated, or is a conflict, of which the caller knows best."""


def _value(said: str) -> QueueServiceError:
    return ValueRefused(f"The database cannot store a value: {said}.")


_UNREACHABLE = _unavailable("The database cannot be reached: {}. Is the server up, and the database URL right?")
_IN_TROUBLE = _unavailable("The database is in trouble: {}. The server's log says more.")
_NO_ENTRY = _unavailable(
    "The database does not let us in: {}. Are user and password right, and does the server's pg_hba.conf allow it?"
)
_BEHIND_A_POOLER = _unavailable(
    "The database does not know a statement that was prepared there: {}. A pooler in transaction mode is in between. Set "
    "QUEUE_SERVICE_POOLER=transaction."
)
_DAMAGED = _refused(
    "The database finds its own data damaged: {}. Look at the server's log, and build the index anew, or restore the table "
    "from a backup."
)
_POOLER_IS_STUCK = _unavailable("The pooler has no connection to the database: {}. Is the server behind it up?")

# What a pooler says, by some of its words.
_OF_A_POOLER = {
    "query_wait_timeout": _unavailable(
        "The pooler had no free connection to the database in time: {}. Give it a larger pool, or have less done at once "
        "(QUEUE_SERVICE_POOL_SIZE)."
    ),
    "no more connections allowed": _unavailable(
        "The pooler takes no more clients: {}. Raise its max_client_conn, or start fewer processes."
    ),
    "startup parameter": _unavailable(
        "The pooler refuses what a connection begins with: {}. Say what it is: QUEUE_SERVICE_POOLER=session or transaction."
    ),
    "server login has been failing": _POOLER_IS_STUCK,
    "pgbouncer cannot connect to server": _POOLER_IS_STUCK,
}

_BY_STATE: dict[str, _Ours] = {
    QUERY_CANCELED: _unavailable(
        "The database gave up on a statement: {}. It took longer than it may, or somebody has cancelled it."
    ),
    "55P03": _unavailable("Another transaction has held what this needs for too long. Is one left open? Try again."),
    "25006": _unavailable("The database takes no writes: {}. Is it a standby, or a primary that was demoted?"),
    "25P03": _unavailable(
        "The database ended a transaction that was idle: {}. Do in it what it is for, and commit, or raise "
        "idle_in_transaction_session_timeout."
    ),
    TRANSACTION_TIMEOUT: _unavailable(
        "The database ended a transaction that took too long: {}. Does another one hold what it waits for? If not, raise "
        "transaction_timeout for this role, or take it back: alter role … reset transaction_timeout."
    ),
    "57P05": _unavailable(
        "The database closed a connection that was idle: {}. Another one is opened for the next call."
    ),
    "57P03": _unavailable(
        "The database takes no connections now: {}. It is starting, stopping or recovering; try again."
    ),
    "57P04": _unavailable("The database was dropped: {}. Is the database URL right?"),
    "53100": _unavailable("The database has no room left: {}. Free some on the disk of the server."),
    OUT_OF_MEMORY: _unavailable("The database has not enough memory: {}. Give the server more, or work_mem less."),
    "53300": _unavailable(
        "The database takes no more connections: {}. Start fewer processes, or raise max_connections, or the limit of this "
        "role or database."
    ),
    "53400": _unavailable("The database has a limit that this goes beyond: {}. Raise it for this role."),
    "3D000": _unavailable("There is no such database: {}. Create it, or correct the database URL."),
    "26000": _BEHIND_A_POOLER,
    "42P05": _BEHIND_A_POOLER,
    FORBIDDEN: _refused(
        "The database does not allow it: {}. `queue-service db grants --role KIND NAME` prints what a role needs, for the "
        "owner of the schema queue_service to execute. To migrate, connect as that owner or a member of it, or as one that "
        "may create the schema where there is none; `--role owner` is for what is in the schema and not its owner's."
    ),
    "54000": _value,
    "54001": _value,
    "XX001": _DAMAGED,
    "XX002": _DAMAGED,
}

# Whatever it was about: on a standby also what could be repeated elsewhere.
_ENDED = _unavailable("The database ended the connection: {}. Another one is opened for the next call.")

# By the SQLSTATE, and then by its class, of what has not ended the connection.
_OF_A_STATEMENT: dict[str, _Ours] = {
    "40001": _passes,
    "40P01": _passes,
    "08": _UNREACHABLE,  # connection
    "22": _value,
    "23": _passes,  # integrity
    "28": _NO_ENTRY,
    "53": _IN_TROUBLE,  # room and memory
    "57": _UNREACHABLE,  # shutdown
    "58": _IN_TROUBLE,  # the system it runs on
}

# What the driver says itself.
_BY_KIND: list[tuple[type[psycopg.Error], _Ours]] = [
    (psycopg.DataError, _value),
    (psycopg.IntegrityError, _passes),
    (psycopg.OperationalError, _UNREACHABLE),
    (psycopg.InterfaceError, _UNREACHABLE),
]

# In any language, it says from where in its code it refuses a row for the sake of a policy.
_OF_A_POLICY = "ExecWithCheckOptions"
_OF_ANOTHER = _refused(
    "Row security does not allow it: {}. A session stores and changes what is of the organization that its setting "
    "queue_service.organization_id names, and nothing else. A role that works for all of them is exempt: queue-service db "
    "rls enable --exempt ROLE."
)

# A schema, a table, a column, a function.
_MISSING = {"3F000", "42P01", "42703", "42883"}
# What somebody's trigger raises counts among the errors of programming.
OF_A_TRIGGER = (pg.RaiseException, pg.PlpgsqlError, pg.AssertFailure)


def is_about_a_row(refused: Exception) -> bool:
    """Of what was not executed: whether others may go through. What is not allowed at all, or is a mistake of ours, is that
    for each of them, and so is an outage."""
    cause = refused.__cause__ or refused
    if is_outage(refused):
        return False
    if isinstance(cause, psycopg.Error) and is_of_another(cause):
        return True
    return isinstance(cause, OF_A_TRIGGER) or not isinstance(cause, psycopg.ProgrammingError)


def is_of_another(error: psycopg.Error) -> bool:
    """Whether row security refused a row, as another organization's."""
    return error.sqlstate == "42501" and error.diag.source_function == _OF_A_POLICY


# What servers and poolers answer who have no connection left. While one connects, libpq gives no SQLSTATE.
_FULL = re.compile(r"too many (clients|connections)|connection slots are reserved|no more connections allowed")


def is_full(lost: DatabaseUnavailable) -> bool:
    """Whether the server, or a pooler before it, is there and has no connection left: of one that speaks another language
    that is not known."""
    return _FULL.search(str(lost)) is not None


def is_outage(refused: Exception) -> bool:
    """Whether nothing else would go through now, either."""
    return isinstance(refused, DatabaseUnavailable) and not took_too_much(refused)


def is_forbidden(refused: Exception) -> bool:
    """Whether the role lacks a right. To try again is no use until somebody grants it."""
    return getattr(refused.__cause__ or refused, "sqlstate", None) == FORBIDDEN


def took_too_much(refused: Exception) -> bool:
    """Whether a statement was ended for the time or the memory that it took, and has changed nothing: a smaller one may go
    through."""
    return getattr(refused.__cause__ or refused, "sqlstate", None) in {
        QUERY_CANCELED,
        TRANSACTION_TIMEOUT,
        OUT_OF_MEMORY,
    }


def meaning(error: psycopg.Error) -> QueueServiceError | None:
    """Our error for it, which says what the database said; None for one that passes as it is, which is also what a mistake
    of ours does."""
    lines = str(error).strip().splitlines()
    said = lines[0].rstrip(".") if lines else type(error).__name__
    state = error.sqlstate or ""
    if state in _MISSING:
        return _missing(error, said)
    ours = _OF_ANOTHER if is_of_another(error) else _on_the_way(error, state) or _BY_STATE.get(state)
    if ours is None and error.diag.severity_nonlocalized in {"FATAL", "PANIC"}:
        ours = _ENDED
    ours = ours or _OF_A_STATEMENT.get(state) or _OF_A_STATEMENT.get(state[:2])
    if ours is None and not state:
        ours = next((each for kind, each in _BY_KIND if isinstance(error, kind)), None)
    if ours is not None:
        return ours(said)
    if isinstance(error, psycopg.ProgrammingError) and not isinstance(error, OF_A_TRIGGER):
        return None
    return DatabaseRefused(f"The database refused a statement: {said} (SQLSTATE {state}).")


def _on_the_way(error: psycopg.Error, state: str) -> _Ours | None:
    """What a pooler says, and what comes of one that nobody has told us of."""
    if state == _PROTOCOL_VIOLATION and error.diag.source_function is not None:
        # The server itself, which says where: what is bound does not fit what somebody else has prepared under this name.
        return _BEHIND_A_POOLER
    if state not in {"", _PROTOCOL_VIOLATION}:
        return None
    text = str(error)
    return next((ours for words, ours in _OF_A_POOLER.items() if words in text), None)


def _missing(error: psycopg.Error, said: str) -> QueueServiceError:
    where = (error.diag.context or "").partition("\n")[0]
    if where and "queue_service." not in where:
        return DatabaseRefused(
            f"A trigger or function of this database does not find what it needs: {said} ({where}). Our connections have "
            "the search_path pg_catalog alone: qualify its names, or give it a search_path of its own, by "
            "alter function … set search_path = …."
        )
    return SchemaMismatch(None, OLDEST)
