from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from queue_service.db import session
from queue_service.db.hosts import each_host
from queue_service.db.session import Address, Limits, connect, with_settings
from queue_service.errors import ConfigError, DatabaseUnavailable
from queue_service.settings import Pooler
from tests.support import eventually, free_port, one

pytestmark = pytest.mark.direct("a session has no settings of ours there")


@contextmanager
def set_on_database(database: str, setting: str) -> Iterator[None]:
    with psycopg.connect(database, autocommit=True) as admin:
        name = admin.info.dbname
        admin.execute(f"alter database {name} set {setting}".encode())
        yield
        admin.execute(f"alter database {name} reset {setting.split(maxsplit=1)[0]}".encode())


@asynccontextmanager
async def opened(where: str | Address, **given: object) -> AsyncIterator[session.Session]:
    conn = await connect(where, **given)  # type: ignore[arg-type]
    try:
        yield conn
    finally:
        await conn.close()


class TestSettings:
    async def test_a_session_begins_with_ours_and_comes_back_to_them(self, database: str) -> None:
        async with opened(database, limits=Limits()) as conn:
            for name, value in session.SETTINGS.items():
                await conn.execute(f"reset {name}".encode())
                assert (name, await one(conn, f"show {name}")) in {
                    (name, value),
                    (name, value + ", MDY"),
                    (name, "1min"),
                }

    @pytest.mark.parametrize("pooler", ["auto", "none", "session"])
    async def test_they_are_in_force_whatever_the_way(self, database: str, pooler: Pooler) -> None:
        with set_on_database(database, "search_path = 'evil'"), set_on_database(database, "synchronous_commit = off"):
            async with opened(Address(database, pooler=pooler)) as conn:
                assert not conn.is_pooled
                shown = [await one(conn, f"show {name}") for name in ("search_path", "synchronous_commit", "jit")]
                assert shown == ["pg_catalog", "on", "off"]

    async def test_behind_a_pooler_of_transactions_nothing_is_set(self, database: str) -> None:
        async with opened(Address(database, pooler="transaction")) as conn:
            assert conn.is_pooled
            assert conn.prepare_threshold is None
            changed = await one(
                conn, "select array_agg(name order by name) from pg_settings where source in ('session', 'client')"
            )
            assert changed == ["application_name", "client_encoding"]

    async def test_what_the_address_sets_itself_is_kept_but_for_ours(self, database: str) -> None:
        given = psycopg.conninfo.make_conninfo(database, options=r"-c work_mem=77MB -c jit=on -c mine.note=a\ b")
        async with opened(given) as conn:
            shown = [await one(conn, f"show {name}") for name in ("work_mem", "jit", "mine.note")]
        assert shown == ["77MB", "off", "a b"]

    async def test_so_is_what_the_environment_sets(self, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PGOPTIONS", "-c work_mem=66MB")
        async with opened(database) as conn:
            assert await one(conn, "show work_mem") == "66MB"

    def test_spaces_and_backslashes_do_not_end_a_setting(self) -> None:
        made = conninfo_to_dict(with_settings("", {"a.b": r"x y\z", "c": "1"}))["options"]
        assert made == r"-c a.b=x\ y\\z -c c=1"

    async def test_limits_are_those_that_are_asked_for(self, database: str) -> None:
        from datetime import timedelta

        async with opened(database, limits=Limits(timedelta(seconds=1), timedelta(seconds=2))) as conn:
            assert [await one(conn, f"show {name}") for name in ("lock_timeout", "statement_timeout")] == ["1s", "2s"]
            await conn.limit(Limits())
            assert [await one(conn, f"show {name}") for name in ("lock_timeout", "statement_timeout")] == ["10s", "30s"]

    async def test_triggers_fire_although_the_role_would_not_have_them(self, database: str) -> None:
        with set_on_database(database, "session_replication_role = replica"):
            async with opened(database) as conn:
                assert await one(conn, "show session_replication_role") == "origin"
            with pytest.raises(ConfigError, match="triggers that keep our tables do not fire"):
                await connect(Address(database, pooler="transaction"))


class TestRefused:
    async def test_a_database_of_another_encoding(self, server: str) -> None:
        with psycopg.connect(server, autocommit=True) as admin:
            admin.execute("create database latin encoding 'LATIN1' locale 'C' template template0")
        try:
            with pytest.raises(ConfigError, match="encoding of this database is LATIN1"):
                await connect(psycopg.conninfo.make_conninfo(server, dbname="latin"))
        finally:
            with psycopg.connect(server, autocommit=True) as admin:
                admin.execute("drop database latin with (force)")

    async def test_one_that_takes_no_writes_unless_only_reads_are_wanted(self, database: str) -> None:
        with set_on_database(database, "default_transaction_read_only = on"):
            with pytest.raises(DatabaseUnavailable, match="takes no writes"):
                await connect(database)
            async with opened(database, writable=False) as conn:
                assert await one(conn, "select 1") == 1


class TestHosts:
    @pytest.mark.parametrize("given", ["host=a,b,c port=1,2,3", "host=a,b,c port=5", "hostaddr=a,b,c port=1,2,3"])
    def test_of_several_hosts_each_is_an_address_and_each_try_begins_with_another(self, given: str) -> None:
        name = given.partition("=")[0]
        for number, expected in enumerate(["abc", "bca", "cab", "abc"]):
            each = [conninfo_to_dict(host) for host in each_host(given, first=number)]
            assert [host[name] for host in each] == list(expected)
            ports = {"a": "1", "b": "2", "c": "3"} if "1,2,3" in given else dict.fromkeys("abc", "5")
            assert all(host["port"] == ports[str(host[name])] for host in each)

    @pytest.mark.parametrize("wanted", ["", "target_session_attrs=primary", "target_session_attrs=read-write"])
    def test_what_a_host_says_of_itself_is_not_believed(self, wanted: str) -> None:
        """It is asked."""
        assert {conninfo_to_dict(each)["target_session_attrs"] for each in each_host(f"host=a,b {wanted}")} == {"any"}

    def test_one_host_or_a_standby_is_left_to_libpq(self) -> None:
        for given in ("host=a", "host=a target_session_attrs=primary", "host=a,b target_session_attrs=prefer-standby"):
            (only,) = map(conninfo_to_dict, each_host(given))
            assert {name: only.get(name) for name in conninfo_to_dict(given)} == conninfo_to_dict(given)

    async def test_where_none_takes_writes_each_is_named(self, database: str) -> None:
        given = conninfo_to_dict(database)
        where = psycopg.conninfo.make_conninfo(
            database, host=f"127.0.0.1,{given['host']}", port=f"{free_port()},{given['port']}"
        )
        with set_on_database(database, "default_transaction_read_only = on"):
            with pytest.raises(
                DatabaseUnavailable, match=r"127\.0\.0\.1:\d+: .*cannot be reached.*: .*takes no writes"
            ):
                await connect(where)

    async def test_one_that_swallows_everything_does_not_keep_us_from_the_next(self, database: str) -> None:
        given = conninfo_to_dict(database)
        async with swallowing() as port:
            where = psycopg.conninfo.make_conninfo(
                database, host=f"127.0.0.1,{given['host']}", port=f"{port},{given['port']}"
            )
            begun = time.monotonic()
            async with opened(where) as conn:
                assert await one(conn, "select 1") == 1
            assert time.monotonic() - begun < session.NEXT_TRY + 2

    @pytest.mark.filterwarnings("error::ResourceWarning")
    @pytest.mark.parametrize("turns", range(5))
    async def test_whoever_is_cancelled_as_one_is_found_leaves_none_open(
        self, database: str, monkeypatch: pytest.MonkeyPatch, turns: int
    ) -> None:
        monkeypatch.setattr(session, "NEXT_TRY", 0.1)
        given = conninfo_to_dict(database)
        async with swallowing() as port:
            where = psycopg.conninfo.make_conninfo(
                database, host=f"127.0.0.1,{given['host']}", port=f"{port},{given['port']}"
            )
            connecting = asyncio.create_task(connect(where, application="cancelled"))
            await eventually(lambda: len(tries()) == 2)
            while len(tries()) == 2:  # noqa: ASYNC110 - the very turn of the loop in which one has ended
                await asyncio.sleep(0)
            for _ in range(turns):
                await asyncio.sleep(0)
            connecting.cancel()
            with suppress(asyncio.CancelledError):
                (await connecting).pgconn.finish()
            del connecting
            gc.collect()


def tries() -> list[asyncio.Task[object]]:
    return [task for task in asyncio.all_tasks() if task.get_name() == "connecting"]


@asynccontextmanager
async def swallowing() -> AsyncIterator[int]:
    """A server that accepts and never answers."""
    port = free_port()
    held: list[asyncio.StreamWriter] = []

    def accept(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held.append(writer)

    listening = await asyncio.start_server(accept, "127.0.0.1", port)
    try:
        yield port
    finally:
        listening.close()
        for writer in held:
            writer.close()
