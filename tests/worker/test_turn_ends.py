"""The end of a run is the end of its turn, whatever ends it, and with the reason that is true."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest

from queue_service import App, Cancel, HandedOn, Outcome, Retry, Run, RunState, Snooze, Turn, Worker
from queue_service.db.execute import Connection, fetch
from queue_service.runs import queries, settling
from queue_service.runs.model import Ending, Return
from queue_service.turns.model import SENTENCES
from tests.support import blocked, claimed, eventually, lapse, one, rows, working

ONCE = Retry(max_attempts=1)
END_ALL = "select code, count(*) from queue_service.turn_outcomes group by code order by code"


def turn(message_id: str = "m1", **fields: Any) -> Turn:
    return Turn(**{"deployment": "dep-1", "message_id": message_id, "stream": "conv-1"} | fields)


async def outcome(app: App, message_id: str = "m1") -> Outcome:
    found = await app.turns.outcome("dep-1", message_id)
    assert found is not None, "the turn has no ending"
    return found


async def work(app: App, queue: str = "default") -> None:
    await Worker(app, {queue: 10}).run(once=True)


async def told(app: App) -> tuple[str | None, str]:
    """Code and reason of the ending of m1, once an error event says the same."""
    ending = await outcome(app)
    (event,) = [each for each in await app.events.read("conv-1") if each.terminal]
    assert ending.body == event.body
    assert event.body["message"] == SENTENCES[event.body["code"]]
    assert event.body["message_ids"] == ["m1"]
    return ending.code, event.body["reason"]


class TestARunThatEndsInItsWorker:
    async def test_raising_is_an_internal_error_with_its_type(self, app: App) -> None:
        @app.task(retry=ONCE)
        async def t() -> None:
            raise ValueError("the model said no")

        await app.turns.dispatch(turn(), "t", {})
        await work(app)
        assert await told(app) == ("internal_error", "ValueError: the model said no")
        assert (await outcome(app)).body["type"] == "ValueError"  # type: ignore[index]

    async def test_out_of_time_is_a_timeout(self, app: App) -> None:
        @app.task(retry=ONCE, timeout=0.05)
        async def t() -> None:
            await asyncio.Event().wait()

        await app.turns.dispatch(turn(), "t", {})
        await work(app)
        code, reason = await told(app)
        assert code == "timeout"
        assert "ran longer than its 0.05 s" in reason

    async def test_cancelled_by_its_handler(self, app: App) -> None:
        @app.task()
        async def t() -> Cancel:
            return Cancel("nobody asked")

        await app.turns.dispatch(turn(), "t", {})
        await work(app)
        assert await told(app) == ("cancelled", "nobody asked")

    async def test_cancelled_by_somebody_while_it_ran(self, app: App) -> None:
        begun = asyncio.Event()

        @app.task()
        async def t() -> None:
            begun.set()
            await asyncio.Event().wait()

        run_id = await app.turns.dispatch(turn(), "t", {})
        async with working(app):
            await begun.wait()
            await app.cancel(run_id)
            assert (await app.turns.wait("dep-1", "m1", timeout=10)).code == "cancelled"

    async def test_returning_without_an_answer_is_no_answer(self, app: App) -> None:
        @app.task()
        async def t() -> dict[str, str]:
            return {"answer": "is not stored as a reply"}

        await app.turns.dispatch(turn(), "t", {})
        await work(app)
        assert await told(app) == ("no_answer", "Its run returned without an answer.")

    async def test_a_result_that_cannot_be_stored(self, app: App) -> None:
        @app.task()
        async def t() -> object:
            return object()

        await app.turns.dispatch(turn(), "t", {})
        await work(app)
        code, reason = await told(app)
        assert code == "internal_error"
        assert "is not JSON" in reason

    @pytest.mark.parametrize(
        ("why", "code"),
        [
            ("process_died", "worker_died"), ("interrupted", "worker_died"), ("worker_lost", "worker_died"),
            ("unreadable", "internal_error"), ("a new one", "internal_error"),
        ],
    )  # fmt: skip
    async def test_failed_for_another_reason(self, app: App, conn: Connection, why: str, code: str) -> None:
        @app.task()
        async def t() -> None: ...

        await app.turns.dispatch(turn(), "t", {})
        ((run, _),) = await claimed(conn, tasks=("t",))
        error = f'{{"reason": "{why}", "message": "So it was."}}'
        await fetch(conn, settling.finish([Ending(run.claim, RunState.FAILED, error=error)], worker_id=1))
        assert await told(app) == (code, "So it was.")

    async def test_an_answer_given_before_the_end_stands(self, app: App) -> None:
        @app.task(retry=ONCE)
        async def t(run: Run) -> None:
            assert run.turn == turn()
            await app.turns.commit_reply("dep-1", ["m1"], {"text": "hello"})
            raise ValueError("after the answer")

        await app.turns.dispatch(turn(), "t", {})
        await work(app)
        assert (await outcome(app)).kind == "reply"
        assert [each.kind for each in await app.events.read("conv-1")] == ["reply"]

    async def test_a_run_that_is_tried_again_keeps_its_turn(self, app: App) -> None:
        @app.task(retry=Retry(max_attempts=2, base=0, jitter=False))
        async def t(run: Run) -> Any:
            if run.attempt == 1:
                return Snooze(0)
            if run.failures == 0:
                raise ValueError("once")
            await app.turns.commit_reply("dep-1", ["m1"], {})
            return None

        run_id = await app.turns.dispatch(turn(), "t", {})
        async with working(app):
            await app.wait(run_id, timeout=10)
        assert (await outcome(app)).kind == "reply"

    async def test_the_providers_failure_is_the_reason_where_it_came_first(self, app: App) -> None:
        @app.task(retry=ONCE)
        async def t() -> None:
            await app.turns.withhold("dep-1", "provider_quota_exhausted", "429 of the model")
            raise ValueError("and so it failed")

        await app.turns.dispatch(turn(), "t", {})
        await work(app)
        assert await told(app) == ("provider_quota_exhausted", "429 of the model")

    async def test_by_its_own_transaction(self, app: App) -> None:
        @app.task()
        async def t(run: Run) -> None:
            async with run.transaction():
                pass

        await app.turns.dispatch(turn(), "t", {})
        await work(app)
        assert (await outcome(app)).code == "no_answer"

    async def test_by_its_own_transaction_with_the_answer_in_it(self, app: App) -> None:
        @app.task()
        async def t(run: Run) -> None:
            async with run.transaction() as conn:
                await app.turns.commit_reply("dep-1", ["m1"], {"text": "hello"}, conn=conn)

        await app.turns.dispatch(turn(), "t", {})
        await work(app)
        assert (await outcome(app)).kind == "reply"

    async def test_many_at_once_end_each_its_own(self, app: App, conn: Connection) -> None:
        @app.task(retry=ONCE)
        async def t(n: int) -> None:
            if n % 3 == 0:
                raise ValueError(n)
            if n % 3 == 1:
                await app.turns.commit_reply("dep-1", [f"m{n}"], {"n": n})

        for n in range(60):
            await app.turns.dispatch(turn(f"m{n}", stream=f"s{n % 7}"), "t", {"n": n})
        await work(app)
        assert await rows(conn, END_ALL) == [("internal_error", 20), ("no_answer", 20), (None, 20)]
        assert await one(conn, "select count(*) from queue_service.turn_markers") == 0

    async def test_whoever_waits_hears_of_it_at_once(self, app: App, conn: Connection) -> None:
        @app.task(retry=ONCE)
        async def t() -> None:
            raise ValueError

        await app.turns.dispatch(turn("m2", platform="chat", channel_id="c1"), "t", {})
        waiting = asyncio.create_task(app.turns.wait("dep-1", "m2", timeout=10))
        async with working(app):
            assert (await waiting).code == "internal_error"
        assert await rows(conn, "select queue, payload ->> 'message_id' from queue_service.runs") == [
            ("thread_response", "m2")
        ]


class TestARunThatNobodyHas:
    @pytest.fixture
    async def run_id(self, app: App) -> int:
        @app.task()
        async def t() -> None: ...

        return await app.turns.dispatch(turn(), "t", {}, expires_in=3600)

    async def test_is_cancelled(self, app: App, run_id: int) -> None:
        await app.cancel(run_id)
        assert await told(app) == ("cancelled", "It was cancelled before it started.")

    async def test_is_deleted(self, app: App, run_id: int) -> None:
        await app.delete(run_id)
        assert await told(app) == ("cancelled", "Its run was deleted.")

    async def test_is_purged(self, app: App, run_id: int) -> None:
        assert run_id
        assert await app.queues.purge("default") == 1
        assert await told(app) == ("cancelled", "Its run was deleted.")

    @pytest.mark.parametrize("singly", [False, True])
    async def test_expires(self, app: App, conn: Connection, run_id: int, singly: bool) -> None:
        await conn.execute("update queue_service.runs set expires_at = clock_timestamp() - interval '1 s'")
        assert await fetch(conn, queries.expire_one(run_id) if singly else queries.expire(limit=10)) == [run_id]
        assert await told(app) == ("timeout", "Its run was not started in time.")

    async def test_was_lost_for_the_last_time(self, app: App, conn: Connection, run_id: int) -> None:
        await claimed(conn, tasks=("t",))
        await conn.execute("update queue_service.runs set losses = 2")
        await lapse(conn)
        assert [run.run_id for run in await fetch(conn, queries.sweep(limit=10, max_losses=3))] == [run_id]
        code, reason = await told(app)
        assert code == "worker_died"
        assert "for the 3. time" in reason

    async def test_was_lost_and_is_begun_again(self, app: App, conn: Connection, run_id: int) -> None:
        await claimed(conn, tasks=("t",))
        await lapse(conn)
        assert [run.run_id for run in await fetch(conn, queries.sweep(limit=10, max_losses=3))] == [run_id]
        assert await app.turns.is_live("dep-1", "m1")

    async def test_its_worker_handed_it_back_after_it_was_asked_to_stop(self, app: App, conn: Connection) -> None:
        run_id = await app.turns.dispatch(turn("m2"), "t", {})
        ((run, _),) = [each for each in await claimed(conn, tasks=("t",)) if each[0].id == run_id]
        await app.cancel(run_id)
        await fetch(conn, settling.give_back([Return(run.claim)], worker_id=1))
        assert (await outcome(app, "m2")).code == "cancelled"

    async def test_armed_without_a_run_is_as_before(self, app: App, run_id: int) -> None:
        await app.turns.arm(turn("m9"))
        await app.cancel(run_id)
        assert await app.turns.is_live("dep-1", "m9")

    async def test_a_run_that_only_says_it_has_the_turn_does_not_end_it(self, app: App, run_id: int) -> None:
        assert run_id
        other = await app.enqueue(
            "t", {}, metadata={"turn": {"deployment": "dep-1", "message_id": "m1", "stream": "s"}}
        )
        odd: list[Any] = [None, 7, "m1", [], {"deployment": 1}]
        for run in (other, *[await app.enqueue("t", {}, metadata={"turn": each}) for each in odd]):
            await app.cancel(run)
        assert await app.turns.is_live("dep-1", "m1")


class TestHandingOn:
    async def test_to_the_deployment_leaves_the_turn_to_it(self, app: App) -> None:
        @app.task()
        async def t() -> HandedOn:
            return HandedOn("dep-1")

        run_id = await app.turns.dispatch(turn(), "t", {})
        await work(app)
        run = await app.get(run_id)
        assert run is not None
        assert (run.state, run.result) == (RunState.SUCCEEDED, {"handed_on": "dep-1"})
        (marker,) = await app.turns.list()
        assert marker.run_id is None
        assert await app.turns.commit_reply("dep-1", ["m1"], {"text": "from the child"}) == ["m1"]

    async def test_to_another_deployment_is_refused_and_ends_the_turn(self, app: App) -> None:
        @app.task(retry=ONCE)
        async def t() -> HandedOn:
            return HandedOn("dep-2")

        await app.turns.dispatch(turn(), "t", {})
        await work(app)
        code, reason = await told(app)
        assert code == "internal_error"
        assert "cannot be handed on to 'dep-2'" in reason

    async def test_to_a_run_whose_end_is_then_the_turns(self, app: App) -> None:
        @app.task()
        async def route() -> HandedOn:
            return HandedOn(await app.enqueue("answer", {}, queue="other"))

        @app.task(queue="other", retry=ONCE)
        async def answer(run: Run) -> None:
            assert run.turn == turn()
            raise LookupError("no such model")

        await app.turns.dispatch(turn(), "route", {})
        await work(app)
        assert await app.turns.is_live("dep-1", "m1")
        await work(app, "other")
        assert await told(app) == ("internal_error", "LookupError: no such model")

    @pytest.mark.parametrize("heir", [0, 10**15])
    async def test_to_a_run_that_is_no_more_ends_the_turn(self, app: App, heir: int) -> None:
        @app.task()
        async def t() -> HandedOn:
            return HandedOn(heir)

        await app.turns.dispatch(turn(), "t", {})
        await work(app)
        assert await told(app) == ("no_answer", f"It was handed on to run {heir}, which has ended or never was.")

    async def test_from_a_run_without_a_turn_is_a_success(self, app: App) -> None:
        @app.task()
        async def t() -> HandedOn:
            return HandedOn("dep-1")

        run_id = await app.enqueue("t", {})
        await work(app)
        assert (await app.wait(run_id)).state is RunState.SUCCEEDED

    async def test_in_the_transaction_of_the_handler(self, app: App) -> None:
        @app.task()
        async def t(run: Run) -> None:
            block = run.transaction()
            async with block:
                block.result = HandedOn("dep-1")

        await app.turns.dispatch(turn(), "t", {})
        await work(app)
        assert await app.turns.is_live("dep-1", "m1")

    async def test_an_heir_that_ends_meanwhile_finds_the_turn(
        self, session: Callable[[], Awaitable[Connection]], app: App, conn: Connection
    ) -> None:
        """The heir's end waits for the lock on its row, and what it sees then is the turn."""

        @app.task()
        async def t() -> None: ...

        giver_id = await app.turns.dispatch(turn(), "t", {})
        heir_id = await app.enqueue("t", {})
        held = {run.id: run for run, _ in await claimed(conn, tasks=("t",))}
        other = await session()
        handing = settling.hand_on(
            [Ending(held[giver_id].claim, RunState.SUCCEEDED, handed_on=True, heir=heir_id)], worker_id=1
        )
        async with conn.transaction():
            assert await fetch(conn, handing)
            ending = asyncio.create_task(
                fetch(other, settling.finish([Ending(held[heir_id].claim, RunState.SUCCEEDED)], worker_id=1))
            )
            watcher = await session()
            await eventually(lambda: blocked(watcher, other))
        assert await ending
        assert (await outcome(app)).code == "no_answer"


class TestTheWholeTurn:
    async def test_ends_at_its_total_though_there_are_signs_of_life(self, app: App, conn: Connection) -> None:
        await app.turns.arm(turn(), total=600)
        await conn.execute(
            "update queue_service.turn_markers set ends_by = clock_timestamp() + interval '0.2 s', "
            "armed_at = clock_timestamp() - interval '10 minutes'"
        )
        assert await app.turns.extend("dep-1") == ["m1"]
        assert (await app.turns.wait("dep-1", "m1", timeout=10)).code == "timeout"
        assert "as a whole" in (await told(app))[1]

    @pytest.mark.parametrize("step", ["arm", "extend", "restore", "reset_admission"])
    async def test_no_deadline_is_beyond_it(self, app: App, step: str) -> None:
        await app.turns.arm(turn(), admission=600, execution=600, total=5)
        if step == "extend":
            await app.turns.extend("dep-1")
        elif step == "restore":
            await app.turns.withhold("dep-1", "provider_overloaded")
            await app.turns.restore("dep-1")
        elif step == "reset_admission":
            await app.turns.reset_admission("dep-1", "m1")
        (marker,) = await app.turns.list()
        assert marker.deadline == marker.ends_by
        assert marker.deadline - marker.armed_at <= timedelta(seconds=5.1)

    async def test_may_take_as_long_as_its_longest_deadline(self, app: App) -> None:
        await app.turns.arm(turn(), admission=timedelta(days=30))
        (marker,) = await app.turns.list()
        assert marker.deadline - marker.armed_at > timedelta(days=29)


class TestWhyATurnLapsed:
    async def lapsed(self, app: App, conn: Connection) -> str:
        await conn.execute(
            "update queue_service.turn_markers set deadline = clock_timestamp() - interval '1 s' where message_id = 'm1'"
        )
        assert await app.turns.sweep() == 1
        code, reason = await told(app)
        assert code == "worker_unresponsive"
        return reason

    @pytest.fixture(autouse=True)
    def task(self, app: App) -> None:
        @app.task()
        async def t() -> None: ...

    async def test_nobody_took_it_up(self, app: App, conn: Connection) -> None:
        await app.turns.dispatch(turn(), "t", {}, admission=600)
        assert await self.lapsed(app, conn) == "No worker took it up within 00:10:00."

    async def test_a_worker_has_it(self, app: App, conn: Connection) -> None:
        await app.turns.dispatch(turn(), "t", {})
        worker_id = await one(
            conn,
            "insert into queue_service.workers (name, version, revision, queues) values ('w-7', '1', '9999', '[]') returning id",
        )
        await claimed(conn, tasks=("t",), worker_id=worker_id)
        assert (await self.lapsed(app, conn)).startswith("Worker w-7 took it up at 20")

    async def test_it_waits_behind_another(self, app: App, conn: Connection) -> None:
        first = await app.turns.dispatch(turn("m0"), "t", {}, ordering_key="conv-1")
        await app.turns.dispatch(turn(), "t", {}, ordering_key="conv-1")
        await claimed(conn, tasks=("t",), laned=True)
        assert await self.lapsed(app, conn) == (
            f"It waits behind run {first}, which is running. That one answers message m0."
        )

    async def test_it_is_to_be_tried_again(self, app: App, conn: Connection) -> None:
        @app.task(retry=Retry(max_attempts=3, backoff="fixed", base=3600, jitter=False))
        async def fails() -> None:
            raise ValueError("no luck")

        await app.turns.dispatch(turn(), "fails", {})
        await work(app)
        assert (await self.lapsed(app, conn)).startswith(
            "Its last attempt failed (ValueError: no luck), and it is to be"
        )

    async def test_its_queue_is_paused(self, app: App, conn: Connection) -> None:
        await app.turns.dispatch(turn(), "t", {})
        await app.queues.pause("default")
        assert await self.lapsed(app, conn) == "Its queue default is paused."

    async def test_it_was_to_begin_later(self, app: App, conn: Connection) -> None:
        await app.turns.dispatch(turn(), "t", {}, delay=3600)
        assert (await self.lapsed(app, conn)).startswith("It is to begin at 20")


async def test_the_database_knows_the_sentences_of_the_catalogue(conn: Connection) -> None:
    for code, sentence in SENTENCES.items():
        assert await one(conn, "select queue_service.sentence_of(%s)", code) == sentence
    assert await one(conn, "select queue_service.sentence_of('no_such_code')") is None
