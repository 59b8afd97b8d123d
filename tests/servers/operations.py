"""Everything of the public surface that writes, each as one call that acknowledges, and how to see that it is stored."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from queue_service import App, StreamState, Turn, TurnFailure

# Of an App, or of its blocking face: then it returns what it would be awaited for.
Call = Callable[[Any], Any]


class Operation(NamedTuple):
    """`stored` is a question to the database that is answered by true where the call has left what it says. One that
    `steps_over` what is locked says how much it has done itself, and may say nothing."""

    call: Call
    stored: str
    prepare: Call | None = None
    steps_over: bool = False


def turn(name: str) -> Turn:
    return Turn(deployment=name, message_id="m", stream=f"stream of {name}")


def armed(name: str) -> Call:
    return lambda app: app.turns.arm(turn(name))


def enqueued(name: str, **options: Any) -> Call:
    return lambda app: app.enqueue("noop", {}, queue=name, **options)


def the_run(name: str) -> Callable[[App], Awaitable[int]]:
    """The id of the one run of the queue that is named as the operation is."""

    async def find(app: App) -> int:
        async with app.pool.connection() as conn:
            cursor = await conn.execute(
                "select id from queue_service.runs where queue = %(queue)s "
                "union all select id from queue_service.finished_runs where queue = %(queue)s",
                {"queue": name},
            )
            row = await cursor.fetchone()
        assert row is not None
        return int(row[0])

    return find


IDS: dict[str, int] = {}


def known(name: str, *before: Call) -> Call:
    """Carry these out, and remember the run that there is then."""

    async def prepare(app: App) -> None:
        for each in before:
            await each(app)
        IDS[name] = await the_run(name)(app)

    return prepare


async def cancelled(app: App, name: str) -> None:
    await enqueued(name)(app)
    assert await app.cancel(await the_run(name)(app))


def run_in(queue: str, *, table: str = "runs", count: int = 1, what: str = "true") -> str:
    return f"select count(*) = {count} from queue_service.{table} where queue = '{queue}' and {what}"


def event_of(name: str, kind: str, stream: str | None = None) -> str:
    where = stream or f"stream of {name}"
    return f"select count(*) > 0 from queue_service.events where stream = '{where}' and kind = '{kind}'"


def marker_of(name: str, what: str = "true", *, count: int = 1) -> str:
    return f"select count(*) = {count} from queue_service.turn_markers where deployment = '{name}' and {what}"


FAILURE = TurnFailure("worker_died")

OPERATIONS: dict[str, Operation] = {
    "enqueue": Operation(enqueued("enqueue"), run_in("enqueue", count=1).replace("= 1", ">= 1")),
    "enqueue_once": Operation(enqueued("enqueue_once", singleton_key="k"), run_in("enqueue_once")),
    "enqueue_replacing": Operation(
        lambda app: app.enqueue("noop", {"n": 2}, queue="enqueue_replacing", singleton_key="k", on_conflict="replace"),
        run_in("enqueue_replacing", what="payload = '{\"n\": 2}'"),
        enqueued("enqueue_replacing", singleton_key="k"),
    ),
    "enqueue_in_a_lane": Operation(
        enqueued("enqueue_in_a_lane", ordering_key="k"), run_in("enqueue_in_a_lane").replace("= 1", ">= 1")
    ),
    "enqueue_many": Operation(
        lambda app: app.enqueue_many("noop", [{}, {}, {}], queue="enqueue_many"),
        run_in("enqueue_many", count=3).replace("= 3", ">= 3"),
    ),
    "cancel": Operation(
        lambda app: app.cancel(IDS["cancel"]),
        run_in("cancel", table="finished_runs", what="state = 'cancelled'"),
        known("cancel", enqueued("cancel")),
    ),
    "retry": Operation(
        lambda app: app.retry(IDS["retry"]), run_in("retry"), known("retry", lambda app: cancelled(app, "retry"))
    ),
    "retry_many": Operation(
        lambda app: app.retry_many(queue="retry_many", state="cancelled"),
        run_in("retry_many"),
        lambda app: cancelled(app, "retry_many"),
        steps_over=True,
    ),
    "delete": Operation(
        lambda app: app.delete(IDS["delete"]), run_in("delete", count=0), known("delete", enqueued("delete"))
    ),
    "delete_finished": Operation(
        lambda app: app.delete(IDS["delete_finished"]),
        run_in("delete_finished", table="finished_runs", count=0),
        known("delete_finished", lambda app: cancelled(app, "delete_finished")),
    ),
    "arm": Operation(armed("arm"), marker_of("arm")),
    "dispatch": Operation(
        lambda app: app.turns.dispatch(turn("dispatch"), "noop", {}, queue="dispatch"), run_in("dispatch")
    ),
    "send": Operation(lambda app: app.turns.send(turn("send"), "noop", {}, queue="send"), event_of("send", "message")),
    "unsend": Operation(
        lambda app: app.turns.unsend("unsend", "m"),
        marker_of("unsend", count=0),
        lambda app: app.turns.send(turn("unsend"), "noop", {}, queue="unsend"),
    ),
    "extend": Operation(
        lambda app: app.turns.extend("extend"), marker_of("extend", "admitted_at is not null"), armed("extend")
    ),
    "withhold": Operation(
        lambda app: app.turns.withhold("withhold", "provider_overloaded"),
        marker_of("withhold", "failure_code is not null"),
        armed("withhold"),
    ),
    "commit_reply": Operation(
        lambda app: app.turns.commit_reply("commit_reply", ["m"], {"text": "Hello."}),
        event_of("commit_reply", "reply"),
        armed("commit_reply"),
    ),
    "fail": Operation(lambda app: app.turns.fail("fail", "m", FAILURE), event_of("fail", "error"), armed("fail")),
    "fail_deployment": Operation(
        lambda app: app.turns.fail_deployment("fail_deployment", FAILURE),
        event_of("fail_deployment", "error"),
        armed("fail_deployment"),
    ),
    "reject": Operation(
        lambda app: app.turns.reject("reject", "m", "No."), event_of("reject", "error"), armed("reject")
    ),
    "discharge": Operation(
        lambda app: app.turns.discharge("discharge", "m"), marker_of("discharge", count=0), armed("discharge")
    ),
    "append": Operation(
        lambda app: app.events.append("append", "delta", {"n": 1}), event_of("append", "delta", "append")
    ),
    "append_many": Operation(
        lambda app: app.events.append_many("append_many", [("delta", 1), ("delta", 2)]),
        event_of("append_many", "delta", "append_many"),
    ),
    "set_state": Operation(
        lambda app: app.events.set_state("set_state", StreamState.CLOSING),
        "select count(*) = 1 from queue_service.streams where stream = 'set_state' and state = 'closing'",
        lambda app: app.events.append("set_state", "delta", 1),
    ),
    "trim": Operation(
        lambda app: app.events.trim("trim", upto=1),
        "select count(*) = 1 from queue_service.events where stream = 'trim'",
        lambda app: app.events.append_many("trim", [("delta", 1), ("delta", 2)]),
    ),
    "pause_queue": Operation(
        lambda app: app.queues.pause("pause_queue"),
        "select count(*) = 1 from queue_service.queues where name = 'pause_queue' and paused_at is not null",
    ),
    "limit_queue": Operation(
        lambda app: app.queues.limit("limit_queue", max_running=3),
        "select count(*) = 1 from queue_service.queues where name = 'limit_queue' and max_running = 3",
    ),
    "purge": Operation(
        lambda app: app.queues.purge("purge"), run_in("purge", count=0), enqueued("purge"), steps_over=True
    ),
    "put_schedule": Operation(
        lambda app: app.schedules.put("put_schedule", "noop", every=3600),
        "select count(*) = 1 from queue_service.schedules where name = 'put_schedule'",
    ),
    "pause_schedule": Operation(
        lambda app: app.schedules.pause("pause_schedule"),
        "select count(*) = 1 from queue_service.schedules where name = 'pause_schedule' and paused_at is not null",
        lambda app: app.schedules.put("pause_schedule", "noop", every=3600),
    ),
    "delete_schedule": Operation(
        lambda app: app.schedules.delete("delete_schedule"),
        "select count(*) = 0 from queue_service.schedules where name = 'delete_schedule'",
        lambda app: app.schedules.put("delete_schedule", "noop", every=3600),
    ),
    "run_schedule": Operation(
        lambda app: app.schedules.run_now("run_schedule"),
        run_in("run_schedule").replace("= 1", ">= 1"),
        lambda app: app.schedules.put("run_schedule", "noop", every=3600, queue="run_schedule"),
    ),
}
