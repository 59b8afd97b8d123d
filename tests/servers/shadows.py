"""Functions, operators, types and tables of somebody's, by the names of the server's own that our statements use."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import psycopg
from psycopg import errors, sql

import queue_service

_SOURCES = [
    *Path(queue_service.__file__).parent.rglob("*.sql"),
    *Path(queue_service.__file__).parent.rglob("*.py"),
    *(Path(__file__).parents[2] / "alembic").rglob("*.py"),
]
_CALLED = re.compile(r"\b([a-z_]+)\s*\(")

# Everything here raises when it is called, and remembers it, whatever becomes of the transaction.
_CALLS = """
create schema if not exists {schema};
grant usage on schema {schema} to public;
create sequence {schema}.calls;
grant all on sequence {schema}.calls to public;
"""

# As the server's own, and for what takes anything in the server's own, with types that fit better.
_FUNCTIONS = """
select distinct p.proname, pg_catalog.pg_get_function_identity_arguments(p.oid),
       pg_catalog.pg_get_function_result(p.oid)
  from pg_catalog.pg_proc as p
 where p.pronamespace = 'pg_catalog'::pg_catalog.regnamespace and p.prokind = 'f' and p.proname = any(%s)
   and pg_catalog.pg_get_function_result(p.oid) !~ 'any|internal|cstring|TABLE|trigger'
   and pg_catalog.pg_get_function_identity_arguments(p.oid) !~ 'any|internal|cstring|OUT|VARIADIC'
"""
_ELEMENTS = ["text", "bigint", "integer", "smallint", "jsonb", "timestamptz", "boolean", "tid"]
_ARRAYS = [f"{each}[]" for each in _ELEMENTS]
_BETTER = {
    **{name: [*_ELEMENTS, *_ARRAYS] for name in ("count", "max", "min", "array_agg", "to_jsonb", "jsonb_agg")},
    **dict.fromkeys(("unnest", "cardinality"), _ARRAYS),
    "array_to_string": [f"{each}, text" for each in _ARRAYS],
    "format": [*(f"text, {each}" for each in _ELEMENTS), "text, interval", "text, text, text"],
    "jsonb_build_object": [
        *(f"text, {each}" for each in _ELEMENTS),
        *(f"text, text, text, {each}" for each in _ELEMENTS),
    ],
    "jsonb_object_agg": [f"text, {each}" for each in _ELEMENTS],
    "width_bucket": ["bigint, bigint[]", "integer, integer[]"],
    "concat_ws": ["text, text, text", "text, text"],
    "num_nulls": ["bigint, bigint"],
    "nextval": ["text"],
    "generate_series": ["integer, smallint", "integer, bigint", "integer, integer"],
    "make_interval": ["secs float8"],
    "jsonb_strip_nulls": ["jsonb"],
}
_OPERATORS = """
select name, a.type, b.type, coalesce(o.oprresult::pg_catalog.regtype::pg_catalog.text, 'boolean')
  from pg_catalog.unnest(%(names)s::text[]) as name cross join pg_catalog.unnest(%(types)s::text[]) as a (type)
  cross join pg_catalog.unnest(%(types)s::text[]) as b (type)
  left join pg_catalog.pg_operator as o on o.oprnamespace = 'pg_catalog'::pg_catalog.regnamespace and o.oprname = name
       and o.oprleft = a.type::pg_catalog.regtype and o.oprright = b.type::pg_catalog.regtype
"""
_COMPARED = [
    "text",
    "bigint",
    "integer",
    "smallint",
    "jsonb",
    "timestamptz",
    "interval",
    "boolean",
    "float8",
    "numeric",
    "text[]",
    "bigint[]",
    "tid",
]
_USED = ["=", "<>", "<", ">", "<=", ">=", "+", "-", "*", "/", "||", "->", "->>", "?", "#>>"]
_TYPES = ["text", "jsonb", "timestamptz", "float8", "regclass", "tid"]
_TABLES = ["pg_class", "pg_inherits", "pg_namespace"]


def put_shadows(admin: psycopg.Connection, schema: str) -> None:
    """Into this schema, for every role to find."""
    names = sorted({name for source in _SOURCES for name in _CALLED.findall(source.read_text())})
    where = sql.Identifier(schema)
    admin.execute(sql.SQL(_CALLS).format(schema=where))
    for name, arguments, result in admin.execute(_FUNCTIONS, [names]).fetchall():
        _put_function(admin, where, name, arguments, result)
    for name, signatures in _BETTER.items():
        for arguments in signatures:
            with contextlib.suppress(errors.DuplicateFunction):
                _put_function(admin, where, name, arguments, "bigint")
    operators = admin.execute(_OPERATORS, {"names": _USED, "types": _COMPARED}).fetchall()
    for number, (name, left, right, result) in enumerate(operators):
        function = f"operator_{number}"
        _put_function(admin, where, function, f"{left}, {right}", result)
        body = "create operator {}.{} (function = {}.{}, leftarg = {}, rightarg = {})"
        admin.execute(
            sql.SQL(body).format(where, sql.SQL(name), where, sql.Identifier(function), sql.SQL(left), sql.SQL(right))
        )
    for name in _TABLES:
        admin.execute(
            sql.SQL("create view {}.{} as select * from pg_catalog.{} where false").format(*_thrice(where, name))
        )
    for name in _TYPES:
        create = "create domain {}.{} as pg_catalog.{} constraint refused check (false)"
        admin.execute(sql.SQL(create).format(*_thrice(where, name)))


def calls(admin: psycopg.Connection, schema: str) -> int:
    """How often any of it was called."""
    row = admin.execute(
        sql.SQL("select case when is_called then last_value else 0 end from {}.calls").format(sql.Identifier(schema))
    ).fetchone()
    assert row is not None
    return int(row[0])


def _put_function(admin: psycopg.Connection, where: sql.Identifier, name: str, arguments: str, result: str) -> None:
    body = (
        "create function {}.{}({}) returns {} language plpgsql as $shadow$ begin "
        "perform pg_catalog.nextval({}::pg_catalog.regclass); raise exception 'a shadow was called'; end $shadow$"
    )
    calls = sql.Literal(f"{where.as_string(admin)}.calls")
    admin.execute(sql.SQL(body).format(where, sql.Identifier(name), sql.SQL(arguments), sql.SQL(result), calls))


def _thrice(where: sql.Identifier, name: str) -> tuple[sql.Identifier, sql.Identifier, sql.Identifier]:
    return where, sql.Identifier(name), sql.Identifier(name)
