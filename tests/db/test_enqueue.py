from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from psycopg import errors as pg
from sqlalchemy import NullPool, create_engine
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from queue_service import App, RunState
from queue_service.db import channels
from queue_service.db.execute import Connection
from queue_service.errors import ConfigError, DuplicateRun
from queue_service.services import notifier
from tests.support import claimed, eventually, one, refusing, rows

NASTY = ["tab\t", "line\nfeed\r", "back\\slash \\N \\.", "quote ' \" }", "ünïcode \U0001f600", "", "\x7f", "\\u0000"]


async def count(conn: Connection) -> int:
    return int(await one(conn, "select count(*) from queue_service.runs"))


class TestOptions:
    async def test_each_lands_in_its_column(self, app: App, conn: Connection) -> None:
        run_id = await app.enqueue(
            "noop", {"a": 1}, queue="q", priority=-3, delay=60, expires_in=timedelta(minutes=5), singleton_key="s",
            ordering_key="o", max_attempts=7, retry_delay=2.5, timeout=90, metadata={"m": [1]}, organization_id="acme",
        )  # fmt: skip
        ((*plain, waits, expires),) = await rows(
            conn,
            "select id, task, payload, queue, priority, singleton_key, ordering_key, max_attempts, retry_delay, timeout, "
            "metadata, organization_id, state, attempt, "
            "round(extract(epoch from run_at - created_at))::int, expires_at - run_at from queue_service.runs",
        )
        assert plain == [
            run_id, "noop", {"a": 1}, "q", -3, "s", "o", 7, timedelta(seconds=2.5), timedelta(seconds=90), {"m": [1]},
            "acme", "queued", 0,
        ]  # fmt: skip
        assert (waits, expires) == (60, timedelta(minutes=5))

    async def test_run_at_is_the_moment_it_names(self, app: App) -> None:
        moment = datetime(2031, 2, 3, 4, 5, 6, 789, tzinfo=UTC)
        run = await app.get(await app.enqueue("noop", {}, run_at=moment))
        assert run is not None
        assert run.run_at == moment

    async def test_a_task_gives_its_own_queue_unless_another_is_named(self, app: App) -> None:
        @app.task(queue="mail")
        async def send(to: str) -> None: ...

        ids = [await send.enqueue(to="a"), *await app.enqueue_many("send", [{"to": "b"}])]
        other = await app.enqueue("send", {"to": "c"}, queue="else")
        found = [await app.get(run_id) for run_id in [*ids, other]]
        assert [run.queue for run in found if run] == ["mail", "mail", "else"]

    async def test_many_share_their_options(self, app: App, conn: Connection) -> None:
        await app.enqueue_many(
            "noop", [{}, {}], priority=4, delay=30, expires_in=9, retry_delay=1.5, timeout=2, metadata={"x": "\\\t"},
            max_attempts=2, organization_id="a\tb\\c", ordering_key="k",
        )  # fmt: skip
        shared = await rows(
            conn,
            "select priority, expires_at - run_at, retry_delay, timeout, metadata, max_attempts, organization_id, "
            "ordering_key from queue_service.runs",
        )
        assert shared == 2 * [
            (4, timedelta(seconds=9), timedelta(seconds=1.5), timedelta(seconds=2), {"x": "\\\t"}, 2, "a\tb\\c", "k")
        ]


class TestMany:
    async def test_ids_come_in_the_order_of_the_payloads(self, app: App, conn: Connection) -> None:
        ids = await app.enqueue_many("noop", ({"n": n} for n in range(1_000)))
        assert ids == sorted(set(ids))
        assert await rows(conn, "select id, (payload ->> 'n')::int from queue_service.runs order by id") == list(
            zip(ids, range(1_000), strict=True)
        )

    @pytest.mark.parametrize("text", NASTY)
    async def test_every_character_arrives_as_it_was(self, app: App, text: str) -> None:
        (many,) = await app.enqueue_many("noop", [{"text": text, text or "k": [text]}], queue=f"q{text}"[:20])
        single = await app.enqueue("noop", {"text": text, text or "k": [text]}, queue=f"q{text}"[:20])
        found = [await app.get(many), await app.get(single)]
        assert [(run.payload, run.queue) for run in found if run] == 2 * [
            ({"text": text, text or "k": [text]}, f"q{text}"[:20])
        ]

    async def test_no_payloads_make_no_runs(self, app: App, conn: Connection) -> None:
        assert await app.enqueue_many("noop", []) == []
        assert await count(conn) == 0

    async def test_one_bad_payload_stores_none(self, app: App, conn: Connection) -> None:
        with pytest.raises(ValueError, match="NUL"):
            await app.enqueue_many("noop", [{"n": 1}, {"n": "\x00"}, {"n": 3}])
        assert await count(conn) == 0

    async def test_singleton_keys_are_for_single_runs(self, app: App) -> None:
        with pytest.raises(ConfigError, match="one by one"):
            await app.enqueue_many("noop", [{}], singleton_key="k")


OPTIONS: list[dict[str, Any]] = [
    {},
    {"queue": "q", "priority": -3, "organization_id": "acme", "ordering_key": "o"},
    {"delay": 60, "expires_in": timedelta(minutes=5), "metadata": {"m": [1, None, "\u20ac"]}},
    {"run_at": datetime(2031, 2, 3, 4, 5, 6, 789, tzinfo=UTC), "max_attempts": 7, "retry_delay": 2.5, "timeout": 0.25},
]
# All but what no two runs have in common.
COLUMNS = (
    "select queue, task, payload - 'n', priority, singleton_key, ordering_key, max_attempts, retry_delay, timeout, metadata, "
    "organization_id, state, attempt, round(extract(epoch from run_at - created_at) / 60 / 60)::int, expires_at - run_at "
    "from queue_service.runs where id = any(%s) order by array_position(%s, id)"
)


class TestTogether:
    async def test_callers_that_share_a_statement_store_what_each_would_have_stored_alone(
        self, app: App, conn: Connection
    ) -> None:
        alone = [await app.enqueue("noop", {"n": 0, "text": NASTY[3]}, **options) for options in OPTIONS]
        calls = [app.enqueue("noop", {"n": n, "text": NASTY[3]}, **OPTIONS[n % len(OPTIONS)]) for n in range(40)]
        ids = await asyncio.gather(*calls)
        assert [payload["n"] for (payload,) in await rows(
            conn, "select payload from queue_service.runs where id = any(%s) order by array_position(%s, id)", ids, ids
        )] == list(range(40))  # fmt: skip
        assert await rows(conn, COLUMNS, ids, ids) == 10 * await rows(conn, COLUMNS, alone, alone)
        statements = await one(
            conn, "select count(distinct xmin::text) from queue_service.runs where id = any(%s)", ids
        )
        assert statements < 10

    async def test_one_that_is_refused_is_alone_in_it(self, app: App, conn: Connection) -> None:
        async with refusing(conn, "runs", "payload ->> 'n' = '7'"):
            answers = await asyncio.gather(*(app.enqueue("noop", {"n": n}) for n in range(20)), return_exceptions=True)
        assert [n for n, answer in enumerate(answers) if not isinstance(answer, int)] == [7]
        assert isinstance(answers[7], pg.CheckViolation)
        assert await count(conn) == 19

    async def test_workers_hear_of_each_queue(self, app: App, conn: Connection) -> None:
        heard: set[str] = set()
        await conn.execute(f"listen {channels.RUNS}".encode())
        conn.add_notify_handler(lambda notice: heard.add(notice.payload))
        await asyncio.gather(*(app.enqueue("noop", {}, queue=f"q{n % 4}") for n in range(40)))

        async def all_told() -> bool:
            await conn.execute("select 1")
            return {payload.split()[-1] for payload in heard} == {"q0", "q1", "q2", "q3"}

        await eventually(all_told)


class TestSingletonKey:
    async def test_return_gives_the_live_run_and_changes_nothing(self, app: App, conn: Connection) -> None:
        first = await app.enqueue("noop", {"v": 1}, singleton_key="k")
        assert await app.enqueue("noop", {"v": 2}, singleton_key="k") == first
        assert await app.enqueue("noop", {"v": 3}, singleton_key="k", queue="other") != first
        assert await one(conn, "select payload from queue_service.runs where id = %s", first) == {"v": 1}

    async def test_replace_puts_the_new_run_in_the_place_of_the_queued_one(self, app: App) -> None:
        first = await app.enqueue("noop", {"v": 1}, singleton_key="k", priority=1)
        again = await app.enqueue("other", {"v": 2}, singleton_key="k", on_conflict="replace", priority=2, timeout=5)
        run = await app.get(first)
        assert again == first
        assert run is not None
        assert (run.task, run.payload, run.priority, run.timeout) == ("other", {"v": 2}, 2, timedelta(seconds=5))

    async def test_replace_of_a_running_run_is_said_and_loses_nothing(self, app: App, conn: Connection) -> None:
        first = await app.enqueue("noop", {"v": 1}, singleton_key="k")
        await claimed(conn)
        with pytest.raises(DuplicateRun, match="running") as said:
            await app.enqueue("noop", {"v": 2}, singleton_key="k", on_conflict="replace")
        assert said.value.run_id == first
        assert await one(conn, "select payload from queue_service.runs") == {"v": 1}

    async def test_raise_tells_which_run_holds_the_key(self, app: App) -> None:
        first = await app.enqueue("noop", {}, singleton_key="k")
        with pytest.raises(DuplicateRun) as said:
            await app.enqueue("noop", {}, singleton_key="k", on_conflict="raise")
        assert (said.value.run_id, said.value.singleton_key) == (first, "k")

    async def test_the_key_is_free_once_the_run_has_ended(self, app: App) -> None:
        first = await app.enqueue("noop", {}, singleton_key="k")
        assert await app.cancel(first)
        assert await app.enqueue("noop", {}, singleton_key="k", on_conflict="raise") != first

    @pytest.mark.parametrize("policy", ["return", "replace", "raise"])
    async def test_a_duplicate_never_aborts_the_transaction_it_is_in(
        self, app: App, conn: Connection, session: Callable[[], Awaitable[Connection]], policy: Any
    ) -> None:
        await app.enqueue("noop", {}, singleton_key="k")
        await claimed(conn)
        mine = await session()
        async with mine.transaction():
            try:
                await app.enqueue("noop", {}, singleton_key="k", on_conflict=policy, conn=mine)
            except DuplicateRun:
                assert policy != "return"
            await app.enqueue("noop", {"kept": True}, conn=mine)
        assert await one(conn, "select count(*) from queue_service.runs where payload ? 'kept'") == 1


class TestNotices:
    async def heard(self, listener: Connection, *, count: int = 1, within: float = 10.0) -> list[str]:
        """At least so many, if they come in time."""
        return [notice.payload async for notice in listener.notifies(timeout=within, stop_after=count)]

    async def test_a_listener_hears_of_a_run_with_its_commit(self, app: App, conn: Connection) -> None:
        await conn.execute(f"listen {channels.RUNS}")
        await app.enqueue("noop", {}, queue="q", priority=7)
        assert await self.heard(conn) == ["7 q"]

    async def test_a_burst_is_announced_by_few_notices(
        self, app: App, conn: Connection, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # It has to be one on any machine: a run comes within each moment.
        monkeypatch.setattr(notifier, "SHORTEST", 0.5)
        monkeypatch.setattr(notifier, "LONGEST", 0.5)
        await conn.execute(f"listen {channels.RUNS}")
        for _ in range(100):
            await app.enqueue("noop", {})
        await eventually(lambda: one(conn, "select count(*) = 100 from queue_service.runs"))
        heard = [notice.payload async for notice in conn.notifies(timeout=1)]
        assert 1 <= len(heard) <= 60

    async def test_inside_a_transaction_it_is_heard_when_that_commits(
        self, app: App, conn: Connection, session: Callable[[], Awaitable[Connection]]
    ) -> None:
        await conn.execute(f"listen {channels.RUNS}")
        mine = await session()
        async with mine.transaction():
            await app.enqueue("noop", {}, conn=mine)
            await app.enqueue_many("noop", [{}], queue="many", conn=mine)
            assert await self.heard(conn, within=0.3) == []
        assert sorted(await self.heard(conn, count=2)) == ["0 default", "0 many"]


def enqueue_both(enqueue: Any, enqueue_many: Any, conn: Any) -> Any:
    return enqueue("noop", {"by": "one"}, conn=conn), enqueue_many("noop", [{"by": "many"}], conn=conn)


@pytest.mark.parametrize("commit", [True, False], ids=["commit", "rollback"])
class TestInTheCallersTransaction:
    async def test_of_an_async_psycopg_connection(
        self, app: App, database: str, conn: Connection, commit: bool
    ) -> None:
        async with await psycopg.AsyncConnection.connect(database) as mine:
            for call in enqueue_both(app.enqueue, app.enqueue_many, mine):
                await call
            await (mine.commit() if commit else mine.rollback())
        assert await count(conn) == (2 if commit else 0)

    async def test_of_a_psycopg_connection(self, app: App, database: str, conn: Connection, commit: bool) -> None:
        with psycopg.connect(database) as mine, app.sync as q:
            enqueue_both(q.enqueue, q.enqueue_many, mine)
            mine.commit() if commit else mine.rollback()
        assert await count(conn) == (2 if commit else 0)

    async def test_of_a_sqlalchemy_connection(self, app: App, database: str, conn: Connection, commit: bool) -> None:
        engine = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(database), poolclass=NullPool)
        with engine.connect() as mine, app.sync as q:
            enqueue_both(q.enqueue, q.enqueue_many, mine)
            mine.commit() if commit else mine.rollback()
        assert await count(conn) == (2 if commit else 0)

    async def test_of_a_sqlalchemy_session(self, app: App, database: str, conn: Connection, commit: bool) -> None:
        engine = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(database), poolclass=NullPool)
        with Session(engine) as mine, app.sync as q:
            q.enqueue_many("noop", [{"by": "many"}], conn=mine)
            q.enqueue("noop", {"by": "one"}, conn=mine)
            mine.commit() if commit else mine.rollback()
        assert await count(conn) == (2 if commit else 0)

    async def test_of_an_async_sqlalchemy_connection_and_session(
        self, app: App, database: str, conn: Connection, commit: bool
    ) -> None:
        engine = create_async_engine(
            "postgresql+psycopg://",
            async_creator=lambda: psycopg.AsyncConnection.connect(database),
            poolclass=NullPool,
        )
        async with engine.connect() as mine:
            await app.enqueue_many("noop", [{}], conn=mine)
            await app.enqueue("noop", {}, conn=mine)
            await (mine.commit() if commit else mine.rollback())
        async with AsyncSession(engine) as theirs:
            await app.enqueue("noop", {}, conn=theirs)
            await app.enqueue_many("noop", [{}], conn=theirs)
            await (theirs.commit() if commit else theirs.rollback())
        await engine.dispose()
        assert await count(conn) == (4 if commit else 0)


async def test_what_is_no_connection_is_refused(app: App, conn: Connection) -> None:
    with pytest.raises(ConfigError, match="psycopg Connection"):
        await app.enqueue("noop", {}, conn=object())
    with app.sync as q, pytest.raises(ConfigError, match="asynchronous"):
        q.enqueue("noop", {}, conn=conn)


async def test_the_blocking_methods_do_what_the_others_do(app: App) -> None:
    with app.sync as q:
        run_id = q.enqueue("noop", {"n": 1})
        (other,) = q.enqueue_many("noop", [{"n": 2}])
        assert (q.cancel(run_id), q.cancel(run_id)) == (True, False)
        done = q.wait(run_id, timeout=10)
        assert done.state is RunState.CANCELLED
        assert (q.retry(run_id), q.retry(run_id), q.delete(other), q.get(other)) == (True, False, True, None)
        assert (q.queues.pause("default"), q.queues.pause("default"), q.queues.resume("default")) == (True, False, True)
    with pytest.raises(ConfigError, match="not connected"):
        q.get(run_id)
