"""An error of the database is told as what it is."""

from __future__ import annotations

import pytest
from psycopg import errors as pg

from queue_service.db.execute import fetch
from queue_service.db.pool import Connection
from queue_service.db.query import Query, nothing
from queue_service.errors import DatabaseRefused, DatabaseUnavailable, PayloadRefused, SchemaMismatch, ValueRefused


@pytest.mark.parametrize(
    ("state", "error", "text"),
    [
        ("57P01", DatabaseUnavailable, "cannot be reached"),
        ("08006", DatabaseUnavailable, "cannot be reached"),
        ("57014", DatabaseUnavailable, "gave up on a statement"),
        ("55P03", DatabaseUnavailable, "Another transaction has held"),
        ("25006", DatabaseUnavailable, "takes no writes"),
        ("53100", DatabaseUnavailable, "in trouble: on purpose"),
        ("53300", DatabaseUnavailable, "in trouble: on purpose"),
        ("58030", DatabaseUnavailable, "in trouble: on purpose"),
        ("42P01", SchemaMismatch, "migrate"),
        ("22003", ValueRefused, "cannot store a value: on purpose"),
        ("54000", ValueRefused, "cannot store a value: on purpose"),
        ("42501", DatabaseRefused, "does not allow it: on purpose"),
        ("55000", DatabaseRefused, r"refused a statement: on purpose \(SQLSTATE 55000\)"),
        ("55006", DatabaseRefused, r"refused a statement: on purpose \(SQLSTATE 55006\)"),
        ("P0001", DatabaseRefused, r"refused a statement: on purpose \(SQLSTATE P0001\)"),
        ("XX001", DatabaseRefused, r"refused a statement: on purpose \(SQLSTATE XX001\)"),
        ("0A000", DatabaseRefused, r"refused a statement: on purpose \(SQLSTATE 0A000\)"),
        # Those who know what a conflict means here look at the driver's own.
        ("23505", pg.UniqueViolation, "on purpose"),
        ("40001", pg.SerializationFailure, "on purpose"),
        ("42601", pg.SyntaxError, "on purpose"),
    ],
)
async def test_by_its_state(conn: Connection, state: str, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text) as raised:
        await fetch(conn, Query(f"do $$begin raise exception 'on purpose' using errcode = '{state}'; end$$", nothing))
    assert raised.type is error


def test_a_value_that_is_refused_is_a_payload_that_is() -> None:
    assert issubclass(ValueRefused, PayloadRefused)
