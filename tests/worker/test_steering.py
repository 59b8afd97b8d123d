"""A message to a busy agent: it waits, is offered to the handler at work, or interrupts it; and it can be taken back."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Literal

import pytest

from queue_service import App, Cancel, Retry, Run, RunState, Turn, Worker
from queue_service.db.execute import Connection, fetch
from queue_service.errors import ConfigError
from queue_service.runs import settling
from queue_service.runs.model import Ending
from tests.support import claimed, eventually, one, rows, working

Mode = Literal["queue", "steer", "interrupt"]


def turn(message_id: str, **fields: Any) -> Turn:
    return Turn(**{"deployment": "dep-1", "message_id": message_id, "stream": "conv-1", "user_id": "ada"} | fields)


async def send(app: App, message_id: str, mode: Mode = "queue", **fields: Any) -> int:
    receipt = await app.turns.send(
        turn(message_id, **fields), "t", {"text": message_id}, mode=mode, ordering_key="conv-1"
    )
    return receipt.seq


async def ended(app: App, *message_ids: str) -> list[str | None]:
    outcomes = [await app.turns.wait("dep-1", each, timeout=10) for each in message_ids]
    return [each.code or each.kind for each in outcomes]


class TestSteering:
    async def test_offers_a_message_to_the_handler_at_work_whose_answer_ends_both(
        self, app: App, conn: Connection
    ) -> None:
        taken: list[Any] = []
        begun = asyncio.Event()

        @app.task()
        async def t(run: Run, text: str) -> None:
            begun.set()
            async with contextlib.aclosing(run.inputs()) as inputs:
                async for message in inputs:
                    taken.append((message.message_id, message.user_id, message.body, message.seq))
                    break
            await app.turns.commit_reply("dep-1", [text, taken[0][0]], {"text": "both"})

        async with working(app):
            await send(app, "m1")
            await begun.wait()
            seq = await send(app, "m2", "steer")
            assert await ended(app, "m1", "m2") == ["reply", "reply"]
        assert taken == [("m2", "ada", {"text": "m2"}, seq)]
        # Its run was never begun.
        states = await rows(
            conn, "select state, attempt, error ->> 'message' from queue_service.finished_runs order by id"
        )
        assert states == [("succeeded", 1, None), ("cancelled", 0, "Its turn was answered before it was begun.")]
        replies = [each for each in await app.events.read("conv-1") if each.terminal]
        assert [(each.body["message_ids"], each.body["together"]) for each in replies] == [
            (["m1"], ["m1", "m2"]), (["m2"], ["m1", "m2"])
        ]  # fmt: skip
        assert await one(conn, "select count(*) from queue_service.lanes") == 0

    async def test_what_was_not_consumed_runs_next(self, app: App) -> None:
        order: list[str] = []
        sent = asyncio.Event()

        @app.task()
        async def t(run: Run, text: str) -> None:
            if text == "m1":
                await sent.wait()
            order.append(text)
            await app.turns.commit_reply("dep-1", [text], {"text": text})

        async with working(app):
            await send(app, "m1")
            await send(app, "m2", "steer")
            sent.set()
            assert await ended(app, "m1", "m2") == ["reply", "reply"]
        assert order == ["m1", "m2"]

    async def test_each_message_is_offered_once_for_each_attempt(self, app: App) -> None:
        seen: list[tuple[int, list[str]]] = []

        @app.task(retry=Retry(max_attempts=2, base=0, jitter=False))
        async def t(run: Run, text: str) -> None:
            if text != "m1":
                return
            given = [each.message_id async for each in run.inputs(wait=False)]
            given += [each.message_id async for each in run.inputs(wait=False)]
            seen.append((run.attempt, given))
            if run.attempt == 1:
                raise ValueError
            await app.turns.commit_reply("dep-1", [text, *given], {})

        await send(app, "m1")
        await send(app, "m2", "steer")
        await send(app, "m3")
        await send(app, "m4", "steer")
        await app.turns.unsend("dep-1", "m4")
        async with working(app):
            assert await ended(app, "m1", "m2", "m3") == ["reply", "reply", "no_answer"]
        assert seen == [(1, ["m2"]), (2, ["m2"])]

    async def test_is_a_turn_like_any_other_where_nobody_is_at_work(self, app: App) -> None:
        @app.task()
        async def t(run: Run, text: str) -> None:
            assert [each async for each in run.inputs(wait=False)] == []
            await app.turns.commit_reply("dep-1", [text], {})

        await send(app, "m1", "steer")
        await Worker(app, {"default": 2}).run(once=True)
        assert await ended(app, "m1") == ["reply"]

    async def test_what_only_looks_like_a_message_is_not_offered(self, app: App) -> None:
        @app.task()
        async def t(run: Run, text: str) -> None:
            for body in ({"mode": "steer", "message_id": "nobody"}, {"mode": "steer", "message_id": 7}, "steer", None):
                await app.events.append("conv-1", "message", body)
            assert [each async for each in run.inputs(wait=False)] == []
            await app.turns.commit_reply("dep-1", [text], {})

        await send(app, "m1")
        await Worker(app, {"default": 2}).run(once=True)
        assert await ended(app, "m1") == ["reply"]

    async def test_a_run_that_is_begun_is_not_retired(self, app: App, conn: Connection) -> None:
        """Its lane is wide: another worker has it already when the answer to both comes."""

        @app.task()
        async def t(text: str) -> None: ...

        await app.queues.limit("default", max_running_per_key=2)
        await send(app, "m1")
        await send(app, "m2", "steer")
        held = [run for run, _ in await claimed(conn, tasks=("t",), laned=True)]
        assert len(held) == 2
        assert await app.turns.commit_reply("dep-1", ["m1", "m2"], {}) == ["m1", "m2"]
        assert await fetch(
            conn, settling.finish([Ending(run.claim, RunState.SUCCEEDED) for run in held], worker_id=1)
        ) == {run.claim for run in held}

    async def test_outside_of_a_turn_there_is_nothing_to_steer(self, app: App) -> None:
        @app.task(retry=Retry(max_attempts=1))
        async def t(run: Run) -> None:
            run.inputs()

        run_id = await app.enqueue("t", {})
        await Worker(app, {"default": 1}).run(once=True)
        run = await app.wait(run_id)
        assert run.error is not None
        assert "works on no turn" in run.error["message"]

    async def test_a_mode_is_one_of_three(self, app: App) -> None:
        with pytest.raises(ConfigError, match=r"mode must be one of queue, steer, interrupt\. Did you mean 'steer'"):
            await app.turns.send(turn("m1"), "t", {}, mode="stear")  # type: ignore[arg-type]


class TestInterrupting:
    async def test_ends_what_is_being_worked_on_and_goes_on_with_the_message(self, app: App) -> None:
        begun = asyncio.Event()
        stopped: list[str] = []

        @app.task()
        async def t(text: str) -> None:
            if text == "m1":
                begun.set()
                try:
                    await asyncio.Event().wait()
                finally:
                    stopped.append(text)
            await app.turns.commit_reply("dep-1", [text], {"text": text})

        async with working(app):
            await send(app, "m1")
            await begun.wait()
            await send(app, "m2", "interrupt")
            assert await ended(app, "m1", "m2") == ["cancelled", "reply"]
        assert stopped == ["m1"]
        (first, _) = [each for each in await app.events.read("conv-1") if each.terminal]
        assert first.body["reason"] == "Another message interrupted it."

    async def test_leaves_what_waits_and_other_streams_alone(self, app: App, conn: Connection) -> None:
        @app.task()
        async def t(text: str) -> None: ...

        await send(app, "m1")
        await claimed(conn, tasks=("t",), laned=True)
        # Handed on, so that somebody is at it.
        await app.turns.arm(turn("elsewhere", stream="conv-2"))
        await send(app, "m2")
        await send(app, "m3", "interrupt")
        assert await ended(app, "m1") == ["cancelled"]
        assert sorted(each.message_id for each in await app.turns.list()) == ["elsewhere", "m2", "m3"]
        assert await rows(conn, "select cancel_requested from queue_service.runs order by id") == [
            (True,), (False,), (False,)
        ]  # fmt: skip

    async def test_leaves_what_came_after_it_alone_when_it_is_sent_again(self, app: App) -> None:
        await send(app, "m1", "interrupt")
        await app.turns.arm(turn("m2"))
        await send(app, "m1", "interrupt")
        assert await app.turns.is_live("dep-1", "m2")

    async def test_ends_a_turn_that_was_handed_on_to_its_deployment(self, app: App) -> None:
        await app.turns.arm(turn("m1"))
        await send(app, "m2", "interrupt")
        assert await ended(app, "m1") == ["cancelled"]

    async def test_is_done_again_when_the_message_is_sent_again(self, app: App, conn: Connection) -> None:
        """The process that took it in died before it interrupted."""

        @app.task()
        async def t(text: str) -> None: ...

        await send(app, "m1")
        await claimed(conn, tasks=("t",), laned=True)
        await send(app, "m2")
        assert await app.turns.is_live("dep-1", "m1")
        await send(app, "m2", "interrupt")
        assert await ended(app, "m1") == ["cancelled"]


class TestQueuedMessages:
    async def test_show_how_many_are_before_them(self, app: App, conn: Connection) -> None:
        @app.task()
        async def t(text: str) -> None: ...

        for message_id in ("m1", "m2", "m3"):
            await send(app, message_id)
        assert await send(app, "m3") == 4
        told = [
            (each.kind, each.body["message_id"], each.body.get("ahead")) for each in await app.events.read("conv-1")
        ]
        assert told == [
            ("message", "m1", None), ("message", "m2", None), ("queued", "m2", 1), ("message", "m3", None),
            ("queued", "m3", 2),
        ]  # fmt: skip
        assert await one(conn, "select head from queue_service.streams") == 5

    async def test_without_a_lane_wait_for_nobody(self, app: App) -> None:
        for message_id in ("m1", "m2"):
            await app.turns.send(turn(message_id), "t", {})
        assert [each.kind for each in await app.events.read("conv-1")] == ["message", "message"]

    async def test_can_be_taken_back_until_they_are_begun(self, app: App) -> None:
        begun, going_on = asyncio.Event(), asyncio.Event()

        @app.task()
        async def t(text: str) -> None:
            begun.set()
            await going_on.wait()
            await app.turns.commit_reply("dep-1", [text], {})

        async with working(app):
            await send(app, "m1")
            await begun.wait()
            await send(app, "m2")
            await send(app, "m3")
            assert await app.turns.unsend("dep-1", "m2")
            assert not await app.turns.unsend("dep-1", "m2")
            assert not await app.turns.unsend("dep-1", "m1")
            assert not await app.turns.unsend("dep-1", "unknown")
            going_on.set()
            assert await ended(app, "m1", "m2", "m3") == ["reply", "cancelled", "reply"]

    async def test_that_wait_to_be_tried_again_were_begun(self, app: App, conn: Connection) -> None:
        @app.task(retry=Retry(max_attempts=2, backoff="fixed", base=3600, jitter=False))
        async def t(text: str) -> Cancel:
            raise ValueError

        await send(app, "m1")
        async with working(app):
            await eventually(lambda: one(conn, "select failures = 1 from queue_service.runs"))
        assert not await app.turns.unsend("dep-1", "m1")
