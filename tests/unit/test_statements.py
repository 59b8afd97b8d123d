"""The loader of `.sql` files, and rules that every statement of ours keeps."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

import queue_service
from queue_service.db.query import nothing
from queue_service.db.statements import Statements, parse

PACKAGE = Path(queue_service.__file__).parent
FILES = sorted(PACKAGE.rglob("*.sql"))

_WRITES = re.compile(
    r"\b(?:insert\s+into|update|delete\s+from|merge\s+into|truncate)\s+(?:only\s+)?queue_service\.(\w+)"
)
_SEQUENCES = re.compile(r"\bnextval\('queue_service\.(\w+)'\)")
_FUNCTIONS = re.compile(r"\bqueue_service\.(\w+)\(")
_PLACEHOLDER = re.compile(r"%%|%\((\w+)\)s")


# What follows the time zone, the DateStyle or the like of a session; in ours these are known, in those of others they are not.
_OF_THE_SESSION = re.compile(
    r"\bcurrent_(?:date|time|timestamp)\b|\blocaltime|::(?:date|time|timestamp)\b|\btimestamp '|\bage\(|\be'"
    r"|date_trunc\('\w+', [^,()]+\)|to_char\((?!pg_catalog.make_interval)(?:(?! at time zone 'UTC')[^)])+\)"
    r"|(?:_at|deadline|ends_by|_timestamp\(\)|_at\)|slot|\bnow)::text\b"
)


def of_the_session(text: str) -> list[str]:
    return _OF_THE_SESSION.findall(text)


class Found(NamedTuple):
    file: Path
    name: str
    contract: list[str]
    declared: set[str]
    text: str


ENDINGS = {"turn_outcomes", "streams", "events", "runs"}
# What is written by functions that statements call, and the functions that write nothing.
CALLED = {
    "store_endings": ENDINGS,
    "end_turns": ENDINGS | {"turn_markers"},
    "arm_slot": {"turn_outcomes", "turn_markers", "streams"},
    "tend_lanes": {"lanes"},
    "leave_lanes": {"lanes"},
}
QUIET = {"sentence_of", "why_unanswered", "turn_of_slot", "may_retire", "organization", "sees_all_runs"}


def called(text: str) -> set[str]:
    return set(_FUNCTIONS.findall(text))


def written(text: str) -> set[str]:
    """The tables a statement inserts into, updates or deletes from, itself or by a function, and the sequences it draws
    from. Its triggers are not looked at: they fire on tables that it writes itself."""
    by_functions = [CALLED.get(function, set()) for function in called(text)]
    return set(_WRITES.findall(text.lower())).union(_SEQUENCES.findall(text), *by_functions)


def everything() -> list[Found]:
    found = []
    for file in FILES:
        source = file.read_text(encoding="utf-8")
        texts = parse(*(each.read_text(encoding="utf-8") for each in file.parent.glob("*.sql")))
        for name, body in re.findall(r"^-- name: (\w+)\n((?:--.*\n)*)", source, re.MULTILINE):
            lines = [line.removeprefix("--").strip() for line in body.splitlines()]
            declared = [line.removeprefix("writes:") for line in lines if line.startswith("writes:")]
            assert len(declared) <= 1, f"{file}: {name} says twice what it writes"
            tables = {table.strip() for table in declared[0].split(",")} if declared else set()
            contract = [line for line in lines if not line.startswith("writes:")]
            found.append(Found(file, name, contract, tables, texts[name]))
    return found


class Fragment(NamedTuple):
    name: str
    lines: int
    uses: int


def fragments() -> list[Fragment]:
    found = []
    for package in {file.parent for file in FILES}:
        source = "\n".join(file.read_text(encoding="utf-8") for file in package.glob("*.sql"))
        for name, body in re.findall(r"^-- define: (\w+)\n(.*?)(?:\n\n|\Z)", source, re.MULTILINE | re.DOTALL):
            found.append(Fragment(f"{package.name}-{name}", body.count("\n") + 1, source.count("{" + name + "}")))
    return found


STATEMENTS = everything()
each_statement = pytest.mark.parametrize(
    "found", STATEMENTS, ids=[f"{s.file.parent.name}-{s.name}" for s in STATEMENTS]
)


def test_a_name_starts_a_statement_and_comments_are_left_out() -> None:
    texts = parse(
        "-- About this file.\n\n"
        "-- name: first\n-- Its contract.\nselect 1\n  -- a remark\n  from t;\n\n"
        "-- name: second\nselect '-- kept'\n"
    )
    assert texts == {"first": "select 1\n  from t", "second": "select '-- kept'"}


def test_a_define_stands_for_its_lines_in_every_statement() -> None:
    texts = parse(
        "-- define: both\na,\n    b\n\n-- define: last\nc\n\n"
        "-- name: one\nselect {both} from t where x = '{other}'\n\n-- name: two\nselect {both}, {last}\n"
    )
    assert texts == {"one": "select a,\n    b from t where x = '{other}'", "two": "select a,\n    b, c"}


def test_the_comments_of_a_define_are_left_out() -> None:
    source = "-- define: both\n-- What it is.\na,\n    -- a remark\n    b\n\n-- name: one\nselect {both}\n"
    assert parse(source) == {"one": "select a,\n    b"}


def test_a_define_at_the_end_of_the_file_is_read_too() -> None:
    assert parse("-- name: one\nselect {x}\n\n-- define: x\n1") == {"one": "select 1"}


def test_two_statements_with_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="'twice' is defined twice"):
        parse("-- name: twice\nselect 1\n\n-- name: once\nselect 2\n\n-- name: twice\nselect 3\n")


def test_a_define_of_one_file_stands_for_its_lines_in_another_and_in_another_define() -> None:
    texts = parse("-- name: one\nselect {pair}\n", "-- define: pair\n{x}, {x}\n\n-- define: x\n1\n")
    assert texts == {"one": "select 1, 1"}


def test_a_define_of_defines_of_defines_is_refused() -> None:
    deep = "-- define: a\n{b}\n\n-- define: b\n{c}\n\n-- define: c\n1\n\n-- name: one\nselect {a}\n"
    with pytest.raises(ValueError, match="fragment 'a' holds fragments that hold fragments"):
        parse(deep)
    with pytest.raises(ValueError, match="holds fragments that hold fragments"):
        parse("-- define: a\n{a}\n\n-- name: one\nselect 1\n")


def test_two_defines_with_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="'a' is defined twice"):
        parse("-- define: a\n1\n", "-- define: a\n2\n")


def test_a_statement_nobody_wrote_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="nothing_like_it"):
        Statements("queue_service.db").query("nothing_like_it", nothing)


def test_a_query_carries_its_text_and_parameters() -> None:
    query = Statements("queue_service.queues").query("resume", nothing, name="mail")
    assert query.text.startswith("with before as materialized (")
    assert query.params == {"name": "mail"}


def test_writes_are_recognised_in_every_form() -> None:
    text = """
        with a as (DELETE FROM queue_service.runs where true), b as (insert  into
            queue_service.leases (x) values (1) on conflict (x) do update set x = 2)
        update queue_service.queues set x = 1 from queue_service.workers for update of runs
    """
    assert written(text) == {"runs", "leases", "queues"}
    assert written("select 1 from queue_service.runs for update") == set()
    assert written("select pg_catalog.nextval('queue_service.runs_id_seq')") == {"runs_id_seq"}
    assert written("select queue_service.tend_lanes(array['a'], array['b'])") == {"lanes"}


def test_of_every_function_that_is_called_it_is_known_what_it_writes() -> None:
    functions = set().union(*(called(found.text) for found in STATEMENTS))
    assert functions == CALLED.keys() | QUIET


def test_every_file_of_statements_is_looked_at() -> None:
    assert {file.parent.name for file in FILES} >= {"db", "queues", "roster", "runs", "turns"}
    assert len(STATEMENTS) > 70
    for file in FILES:
        marks = re.findall(r"^[ \t]*--[ \t]*name\b.*$", file.read_text(encoding="utf-8"), re.MULTILINE | re.IGNORECASE)
        assert all(re.fullmatch(r"-- name: \w+", mark) for mark in marks), marks


def test_a_define_is_shared_by_three_places_or_saves_two_of_a_long_part() -> None:
    found = fragments()
    assert len(found) > 20
    assert [each for each in found if each.uses < (2 if each.lines >= 10 else 3)] == []


@each_statement
def test_a_statement_fits_on_a_screen(found: Found) -> None:
    source = found.file.read_text(encoding="utf-8").split(f"-- name: {found.name}\n")[1]
    assert source.split("\n-- name: ")[0].split("\n-- define: ")[0].count("\n") <= 65


@each_statement
def test_a_statement_has_a_contract(found: Found) -> None:
    assert len(" ".join(found.contract)) > 15
    assert found.contract[0][0].isupper()
    assert found.contract[-1].endswith(".")


@each_statement
def test_a_statement_says_exactly_which_tables_it_writes(found: Found) -> None:
    assert found.declared == written(found.text)


@each_statement
def test_a_statement_means_the_same_in_every_session(found: Found) -> None:
    assert not of_the_session(found.text)


def test_what_follows_the_session_is_recognised() -> None:
    for code in (
        "created_at::date", "date_trunc('day', run_at)", "current_date", "timestamp '2020-01-01'", "age(run_at)",
        "to_char(run_at, 'HH24')", "run_at::timestamp", "e'\\n'", "max(run_at)::text", "clock_timestamp()::text",
    ):  # fmt: skip
        assert of_the_session(f"select {code} from t"), code
    for code in (
        "run_at::timestamptz",
        "date_trunc('day', run_at, 'UTC')",
        "to_char(run_at at time zone 'UTC', 'HH24')",
    ):
        assert not of_the_session(f"select {code} from t"), code


@each_statement
def test_a_statement_that_takes_runs_away_tells_their_lanes(found: Found) -> None:
    if "delete from queue_service.runs" in found.text:
        assert "queue_service.leave_lanes(" in found.text
        assert "select count(*) from lanes_left" in found.text, "a select that nobody reads is not executed"


@each_statement
def test_a_statement_that_takes_runs_away_ends_their_turns(found: Found) -> None:
    if "delete from queue_service.runs" in found.text:
        assert "queue_service.end_turns(" in found.text
        assert "select count(*) from turns_ended" in found.text, "a select that nobody reads is not executed"


@each_statement
def test_a_statement_names_tables_with_their_schema(found: Found) -> None:
    tables = r"(?:runs|leases|finished_runs|queues|workers)"
    assert not re.search(rf"\b(?:into|update|from|join)\s+{tables}\b(?!\.)", found.text.lower())


@each_statement
def test_a_statement_has_every_define_filled_in_and_every_percent_doubled(found: Found) -> None:
    assert not re.search(r"\{\w+\}", found.text)
    assert "%" not in _PLACEHOLDER.sub("", found.text)


@each_statement
def test_a_statement_is_one_and_does_not_end_its_transaction(found: Found) -> None:
    bare = re.sub(r"'(?:[^']|'')*'", "''", found.text)
    assert ";" not in bare
    assert not re.search(r"\b(?:begin|commit|rollback|savepoint)\b", bare.lower())


@each_statement
def test_a_statement_is_used_beside_its_file(found: Found) -> None:
    users = "".join(file.read_text(encoding="utf-8") for file in found.file.parent.glob("*.py"))
    assert f'"{found.name}"' in users
