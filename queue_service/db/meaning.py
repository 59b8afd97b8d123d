"""What an error of the driver means, as one of ours."""

from __future__ import annotations

import re
from collections.abc import Callable

import psycopg
from psycopg import errors as pg

from queue_service.db.revision import HEAD
from queue_service.errors import DatabaseRefused, DatabaseUnavailable, QueueServiceError, SchemaMismatch, ValueRefused

_Ours = Callable[[str], QueueServiceError]


def _unavailable(sentence: str) -> _Ours:
    return lambda said: DatabaseUnavailable(sentence.format(said))


_UNREACHABLE = _unavailable("The database cannot be reached: {}. Is the server up, and the database URL right?")
_IN_TROUBLE = _unavailable("The database is in trouble: {}.")

# The first that fits. What has no sentence passes: what may be repeated, and conflicts, of which the caller knows best.
_BY_KIND: list[tuple[tuple[type[psycopg.Error], ...], _Ours | None]] = [
    ((pg.SerializationFailure, pg.DeadlockDetected, psycopg.IntegrityError), None),
    (
        (psycopg.DataError, pg.ProgramLimitExceeded, pg.StatementTooComplex),
        lambda said: ValueRefused(f"The database cannot store a value: {said}."),
    ),
    ((pg.QueryCanceled,), _unavailable("The database gave up on a statement: {}.")),
    (
        (pg.LockNotAvailable,),
        _unavailable("Another transaction has held what this needs for too long. Is one left open? Try again."),
    ),
    (
        (pg.UndefinedTable, pg.InvalidSchemaName, pg.UndefinedColumn, pg.UndefinedFunction),
        lambda _: SchemaMismatch(None, HEAD),
    ),
    (
        (pg.ReadOnlySqlTransaction,),
        _unavailable("The database takes no writes: {}. Is it a standby, or a primary that was demoted?"),
    ),
    (
        (pg.InsufficientPrivilege,),
        lambda said: DatabaseRefused(
            f"The database does not allow it: {said}. Connect as the user that migrated it, who owns the schema "
            "queue_service; to migrate, as one that may create a schema."
        ),
    ),
    ((psycopg.InterfaceError,), _UNREACHABLE),
]

# By the class of the SQLSTATE, for errors of operation. Those of the connection itself have none.
_BY_CLASS = {
    "": _UNREACHABLE,
    "08": _UNREACHABLE,  # connection
    "28": _UNREACHABLE,  # authorization
    "3D": _UNREACHABLE,  # the database
    "57": _UNREACHABLE,  # shutdown
    "53": _IN_TROUBLE,  # room and memory, and too many connections
    "58": _IN_TROUBLE,  # the system it runs on
}

# What somebody's trigger raises counts among the errors of programming.
OF_A_TRIGGER = (pg.RaiseException, pg.PlpgsqlError, pg.AssertFailure)


def is_about_a_row(refused: Exception) -> bool:
    """Of what was refused: whether others may go through. What is not allowed at all, or is a mistake of ours, is that for
    each of them."""
    cause = refused.__cause__ or refused
    return isinstance(cause, OF_A_TRIGGER) or not isinstance(cause, psycopg.ProgrammingError)


# What servers and poolers answer who have no connection left. While one connects, libpq gives no SQLSTATE.
_FULL = re.compile(r"too many (clients|connections)|connection slots are reserved|no more connections allowed")


def is_full(lost: DatabaseUnavailable) -> bool:
    """Whether the server, or a pooler before it, is there and has no connection left: of one that speaks another language
    that is not known."""
    return _FULL.search(str(lost)) is not None


def meaning(error: psycopg.Error) -> QueueServiceError | None:
    """Our error for it, which says what the database said; None for one that passes as it is, which is also what a mistake
    of ours does."""
    lines = str(error).strip().splitlines()
    said = lines[0].rstrip(".") if lines else type(error).__name__
    for kinds, ours in _BY_KIND:
        if isinstance(error, kinds):
            return None if ours is None else ours(said)
    state = error.sqlstate or ""
    if isinstance(error, psycopg.OperationalError) and (ours := _BY_CLASS.get(state[:2])) is not None:
        return ours(said)
    if isinstance(error, psycopg.ProgrammingError) and not isinstance(error, OF_A_TRIGGER):
        return None
    return DatabaseRefused(f"The database refused a statement: {said} (SQLSTATE {state}).")
