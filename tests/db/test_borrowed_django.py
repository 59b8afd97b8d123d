"""Django's connection as the caller's own: what is enqueued is part of `transaction.atomic()`, and only of that."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import django  # type: ignore[import-untyped]
import psycopg
import pytest
from django.conf import settings  # type: ignore[import-untyped]
from django.db import connection, connections, transaction  # type: ignore[import-untyped]
from psycopg.conninfo import conninfo_to_dict

from queue_service import App
from queue_service.app.sync import SyncApp
from queue_service.db.borrowed import borrow
from queue_service.errors import ConfigError, DatabaseRefused, DatabaseUnavailable, PayloadRefused

PAYLOADS = [{"n": n, "text": "ünïcode\t\\"} for n in range(3)]


@pytest.fixture
def q(database: str) -> Iterator[SyncApp]:
    """An App that was not opened; Django is configured for the same database."""
    where = conninfo_to_dict(database)
    names = {"dbname": "NAME", "user": "USER", "password": "PASSWORD", "host": "HOST", "port": "PORT"}
    server = {name: str(where[key]) for key, name in names.items() if key in where}
    if not settings.configured:
        settings.configure()
        django.setup()
    connections.settings = connections.configure_settings(
        {
            "default": {"ENGINE": "django.db.backends.postgresql", **server},
            "other": {"ENGINE": "django.db.backends.postgresql", **server},
            "small": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"},
        }
    )
    yield App(database).sync
    for each in connections.all(initialized_only=True):
        each.close()
        del connections[each.alias]


@pytest.fixture
def beside(database: str) -> Iterator[psycopg.Connection[Any]]:
    """Another session."""
    with psycopg.connect(database, autocommit=True) as other:
        yield other


def stored(beside: psycopg.Connection[Any]) -> list[tuple[int, Any]]:
    """What another session sees."""
    return beside.execute("select id, payload from queue_service.runs order by id").fetchall()


@pytest.mark.parametrize("alias", ["default", "other"])
def test_a_commit_stores_what_nobody_saw_before(q: SyncApp, beside: psycopg.Connection[Any], alias: str) -> None:
    mine = connection if alias == "default" else connections[alias]
    with transaction.atomic(using=alias):
        ids = [q.enqueue("noop", {"one": 1}, conn=mine), *q.enqueue_many("noop", PAYLOADS, conn=mine)]
        assert stored(beside) == []
    assert stored(beside) == list(zip(ids, [{"one": 1}, *PAYLOADS], strict=True))


@pytest.mark.parametrize("alias", ["default", "other"])
def test_a_rollback_stores_nothing(q: SyncApp, beside: psycopg.Connection[Any], alias: str) -> None:
    mine = connection if alias == "default" else connections[alias]
    with transaction.atomic(using=alias):
        q.enqueue("noop", {}, conn=mine)
        q.enqueue_many("noop", PAYLOADS, conn=mine)
        transaction.set_rollback(True, using=alias)
    assert stored(beside) == []


def test_a_savepoint_that_is_rolled_back_takes_its_run_with_it(q: SyncApp, beside: psycopg.Connection[Any]) -> None:
    with transaction.atomic():
        kept = q.enqueue("noop", {}, conn=connection)
        with transaction.atomic():
            q.enqueue("noop", {"kept": False}, conn=connection)
            transaction.set_rollback(True)
    assert stored(beside) == [(kept, {})]


def test_outside_a_transaction_it_is_stored_at_once(q: SyncApp, beside: psycopg.Connection[Any]) -> None:
    assert connection.connection is None, "Django has connected before"
    run_id = q.enqueue("noop", {}, conn=connection)
    assert stored(beside) == [(run_id, {})]


def test_djangos_own_work_goes_on_after_ours(q: SyncApp, beside: psycopg.Connection[Any]) -> None:
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("create table orders (n int)")
        first = q.enqueue("noop", {}, singleton_key="k", conn=connection)
        assert q.enqueue("noop", {}, singleton_key="k", conn=connection) == first
        cursor.execute("insert into orders values (%s)", [1])
        cursor.execute("select n from orders")
        assert cursor.fetchone() == (1,)
    assert stored(beside) == [(first, {})]


def test_the_psycopg_connection_under_it_will_do_as_well(q: SyncApp, beside: psycopg.Connection[Any]) -> None:
    with transaction.atomic():
        run_id = q.enqueue("noop", {}, conn=connection.connection)
        assert stored(beside) == []
    assert stored(beside) == [(run_id, {})]


@pytest.mark.parametrize("raises", [False, True])
def test_a_block_that_we_begin_is_djangos_own(q: SyncApp, beside: psycopg.Connection[Any], raises: bool) -> None:
    mine = borrow(connection)
    assert not mine.is_async
    assert mine.in_transaction() is False
    with contextlib.suppress(ZeroDivisionError), mine.begin():
        assert mine.in_transaction()
        run_id = q.enqueue("noop", {}, conn=connection)
        with pytest.raises(ConfigError, match="middle of a transaction"):
            mine.begin()
        if raises:
            raise ZeroDivisionError
    assert stored(beside) == ([] if raises else [(run_id, {})])
    with mine.begin():
        transaction.set_rollback(True)
        with pytest.raises(transaction.TransactionManagementError):
            mine.in_transaction()


class TestAFailedStatement:
    """Django goes on as after an error of its own: nobody who catches ours finds a commit that has stored nothing."""

    def test_is_an_error_of_ours_and_the_block_says_that_it_is_over(
        self, q: SyncApp, beside: psycopg.Connection[Any]
    ) -> None:
        with transaction.atomic():
            connection.cursor().execute("set transaction read only")
            with pytest.raises(DatabaseRefused, match="takes no writes"):
                q.enqueue("noop", {}, conn=connection)
            with pytest.raises(transaction.TransactionManagementError):
                connection.cursor().execute("select 1")
            with pytest.raises(ConfigError, match="to be rolled back"):
                q.enqueue("noop", {}, conn=connection)
        assert q.enqueue("noop", {}, conn=connection)
        assert len(stored(beside)) == 1

    def test_in_an_inner_block_leaves_the_outer_one_whole(self, q: SyncApp, beside: psycopg.Connection[Any]) -> None:
        beside.execute(
            "create function public.no() returns trigger language plpgsql as $$ begin raise 'not today'; end $$;"
            "create trigger no before insert on queue_service.runs for each row when (new.task = 'no') "
            "execute function public.no()"
        )
        with transaction.atomic():
            kept = q.enqueue("noop", {}, conn=connection)
            with pytest.raises(DatabaseRefused, match="not today"), transaction.atomic():
                q.enqueue("no", {}, conn=connection)
        assert stored(beside) == [(kept, {})]

    def test_one_that_was_refused_before_it_was_sent_ends_nothing(
        self, q: SyncApp, beside: psycopg.Connection[Any]
    ) -> None:
        with transaction.atomic():
            kept = q.enqueue("noop", {}, conn=connection)
            with pytest.raises(PayloadRefused):
                q.enqueue("noop", {"n": float("nan")}, conn=connection)
        assert stored(beside) == [(kept, {})]

    def test_a_server_that_cannot_be_reached(self, q: SyncApp) -> None:
        connections["other"].settings_dict["PORT"] = "1"
        connections["other"].settings_dict["HOST"] = "127.0.0.1"
        with pytest.raises(DatabaseUnavailable, match="cannot be reached"):
            q.enqueue("noop", {}, conn=connections["other"])

    def test_its_cursor_is_no_connection(self, q: SyncApp) -> None:
        with connection.cursor() as cursor, pytest.raises(ConfigError, match=r"pass django\.db\.connection"):
            q.enqueue("noop", {}, conn=cursor)
        with pytest.raises(ConfigError, match="pass one of them"):
            q.enqueue("noop", {}, conn=connections)


def test_a_connection_to_another_kind_of_database_is_refused(q: SyncApp) -> None:
    with pytest.raises(ConfigError, match="'small' is one to sqlite"):
        q.enqueue("noop", {}, conn=connections["small"])


def test_what_is_no_connection_is_refused_where_django_is_loaded(q: SyncApp) -> None:
    with pytest.raises(ConfigError, match=r"django\.db\.connection"):
        q.enqueue("noop", {}, conn=object())
