"""What one organization has, another one does not see, change or take part in, by whichever call."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from queue_service import App, Turn, TurnFailure
from queue_service.app.events import Events
from queue_service.app.queues import Queues
from queue_service.app.runs import Runs
from queue_service.app.turns import Turns
from queue_service.db.execute import Connection
from queue_service.db.row_security import VISIBLE
from queue_service.db.session import connect
from queue_service.errors import ConfigError, DatabaseRefused, RunUnknown, TurnUnknown
from tests.row_security.conftest import Roles
from tests.support import eventually, one, quick_app, rows, working

FAILURE = TurnFailure("internal_error")


def turn(message_id: str, stream: str = "acme's", **fields: Any) -> Turn:
    return Turn(deployment="dep", message_id=message_id, stream=stream, **fields)


class There:
    """Something of each kind, all of acme's. The run `ended` was cancelled, the turn `owed` has a queued one."""

    queued: int
    ended: int


@pytest.fixture
async def there(acme: App) -> There:
    found = There()
    found.ended = await acme.enqueue("noop", {})
    await acme.cancel(found.ended)
    found.queued = await acme.enqueue("noop", {"secret": 1}, singleton_key="key")
    await acme.turns.send(turn("owed", platform="chat", channel_id="c"), "noop", {"text": "hi"}, queue="later")
    await acme.turns.arm(turn("answered", "answered"))
    await acme.turns.commit_reply("dep", ["answered"], {"text": "hello"})
    return found


async def _raises(error: type[Exception], call: Awaitable[Any]) -> str:
    with pytest.raises(error):
        await call
    return error.__name__


async def _followed(app: App, stream: str) -> list[Any]:
    seen = []
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.5), contextlib.aclosing(app.events.follow(stream)) as events:
            async for event in events:
                seen += [event]
    return seen


async def _inputs(app: App) -> list[Any]:
    return [each async for each in app.turns.inputs(turn("owed"), wait=False)]


Call = Callable[[App, There], Awaitable[Any]]

# Each call of the other tenant, about what is acme's, and what comes of it: as if there were nothing.
CALLS: dict[str, tuple[Call, Any]] = {
    "get": (lambda app, there: app.get(there.queued), None),
    "cancel": (lambda app, there: app.cancel(there.queued), False),
    "retry": (lambda app, there: app.retry(there.ended), False),
    "retry_many": (lambda app, _: app.retry_many(state="cancelled"), (0, 0)),
    "delete": (lambda app, there: app.delete(there.ended), False),
    "wait": (lambda app, there: _raises(RunUnknown, app.wait(there.queued, timeout=60)), "RunUnknown"),
    "wait_many": (lambda app, there: _raises(RunUnknown, app.wait_many([there.ended], timeout=60)), "RunUnknown"),
    "queues.purge": (lambda app, _: app.queues.purge("default"), 0),
    "events.read": (lambda app, _: app.events.read("acme's"), []),
    "events.head": (lambda app, _: app.events.head("acme's"), 0),
    "events.follow": (lambda app, _: _followed(app, "acme's"), []),
    "events.stream": (lambda app, _: app.events.stream("acme's"), None),
    "events.trim": (lambda app, _: app.events.trim("acme's", upto=100), 0),
    "events.append": (lambda app, _: _raises(DatabaseRefused, app.events.append("acme's", "k", 1)), "DatabaseRefused"),
    "events.append_many": (
        lambda app, _: _raises(DatabaseRefused, app.events.append_many("acme's", [("k", 1)])),
        "DatabaseRefused",
    ),
    "events.set_state": (
        lambda app, _: _raises(DatabaseRefused, app.events.set_state("acme's", "ended")),
        "DatabaseRefused",
    ),
    "turns.arm": (lambda app, _: _raises(DatabaseRefused, app.turns.arm(turn("owed"))), "DatabaseRefused"),
    "turns.arm on a stream": (lambda app, _: _raises(DatabaseRefused, app.turns.arm(turn("new"))), "DatabaseRefused"),
    "turns.dispatch": (
        lambda app, _: _raises(DatabaseRefused, app.turns.dispatch(turn("owed", "mine"), "noop", {})),
        "DatabaseRefused",
    ),
    "turns.dispatch on a stream": (
        lambda app, _: _raises(DatabaseRefused, app.turns.dispatch(turn("new"), "noop", {})),
        "DatabaseRefused",
    ),
    "turns.send": (
        lambda app, _: _raises(DatabaseRefused, app.turns.send(turn("owed", "mine"), "noop", {"text": "hi"})),
        "DatabaseRefused",
    ),
    "turns.send on a stream": (
        lambda app, _: _raises(DatabaseRefused, app.turns.send(turn("new"), "noop", {"text": "hi"})),
        "DatabaseRefused",
    ),
    "turns.unsend": (lambda app, _: app.turns.unsend("dep", "owed"), False),
    "turns.inputs": (lambda app, _: _inputs(app), []),
    "turns.extend": (lambda app, _: app.turns.extend("dep"), []),
    "turns.withhold": (lambda app, _: app.turns.withhold("dep", "internal_error"), []),
    "turns.restore": (lambda app, _: app.turns.restore("dep"), []),
    "turns.reset_admission": (lambda app, _: app.turns.reset_admission("dep", "owed"), False),
    "turns.commit_reply": (lambda app, _: app.turns.commit_reply("dep", ["owed"], {"text": "no"}), []),
    "turns.fail": (lambda app, _: app.turns.fail("dep", "owed", FAILURE), False),
    "turns.fail_deployment": (lambda app, _: app.turns.fail_deployment("dep", FAILURE), []),
    "turns.reject": (lambda app, _: _raises(TurnUnknown, app.turns.reject("dep", "owed", "no")), "TurnUnknown"),
    "turns.discharge": (lambda app, _: app.turns.discharge("dep", "owed"), False),
    "turns.sweep": (lambda app, _: app.turns.sweep(), 0),
    "turns.is_live": (lambda app, _: app.turns.is_live("dep", "owed"), False),
    "turns.outcome": (lambda app, _: app.turns.outcome("dep", "answered"), None),
    "turns.wait": (lambda app, _: _raises(TurnUnknown, app.turns.wait("dep", "answered", timeout=60)), "TurnUnknown"),
    "turns.list": (lambda app, _: app.turns.list(), []),
    "turns.tally": (lambda app, _: app.turns.tally(), (0, 0, None)),
}
# What stores something new, of which the tests below say whose it is, and `append_of`, which a run's handler calls.
STORES = {"enqueue", "enqueue_many", "events.append_of"}
# Queues are everybody's: who may pause them is a matter of grants.
SHARED = {"queues.list", "queues.pause", "queues.resume", "queues.limit"}

STATE = """
select 'run' || id, state, payload::text from queue_service.runs
 union all select 'run' || id, state, payload::text from queue_service.finished_runs
 union all select 'stream ' || stream, state, head::text from queue_service.streams where organization_id = 'acme'
 union all select 'event ' || stream || seq, kind, body::text from queue_service.events
 union all select 'marker ' || message_id, failure_code, admitted_at::text from queue_service.turn_markers
 union all select 'outcome ' || message_id, kind, ended_at::text from queue_service.turn_outcomes
 order by 1, 2
"""


def test_every_public_call_about_runs_streams_and_turns_is_here() -> None:
    faces = {"": Runs, "queues.": Queues, "events.": Events, "turns.": Turns}
    public = {f"{at}{name}" for at, face in faces.items() for name in vars(face) if not name.startswith("_")}
    assert public == {name.partition(" ")[0] for name in CALLS} | STORES | SHARED


@pytest.mark.parametrize("name", CALLS)
async def test_another_tenant_finds_nothing_and_changes_nothing(
    name: str, there: There, other: App, owner: Connection
) -> None:
    call, nothing = CALLS[name]
    before = await rows(owner, STATE)
    assert await call(other, there) == nothing
    assert await rows(owner, STATE) == before


@pytest.mark.parametrize("table", VISIBLE)
async def test_a_table_shows_each_tenant_its_own_rows_and_a_worker_all_of_them(
    table: str, there: There, secured: Roles, owner: Connection
) -> None:
    await owner.execute(
        "insert into queue_service.steps (run_id, attempt, name, result) values (%s, 1, 's', '1'), (%s, 1, 's', '1')",
        [there.queued, there.ended],
    )
    await owner.execute(
        "insert into queue_service.renderings (deployment, message_id, platform_message_id) values ('dep', 'answered', 'p')"
    )
    count = f"select count(*) from queue_service.{table}"
    column = {"steps": "created_at", "renderings": "updated_at"}.get(table, "organization_id")
    change = f"update queue_service.{table} set {column} = {column}"
    delete = f"delete from queue_service.{table}"
    every = await one(owner, count)
    assert every > 0
    seen = {}
    for role in ("acme", "other", "worker", "blind"):
        conn = await connect(getattr(secured, role))
        changed = (await conn.execute(change.encode())).rowcount
        async with conn.transaction(force_rollback=True):
            deleted = (await conn.execute(delete.encode())).rowcount
        seen[role] = [await one(conn, count), changed, deleted]
        await conn.close()
    assert seen == {"acme": [every] * 3, "other": [0] * 3, "worker": [every] * 3, "blind": [0] * 3}


async def test_what_a_tenant_stores_is_its_own_though_it_does_not_say_so(
    acme: App, other: App, owner: Connection
) -> None:
    first = await acme.enqueue("noop", {})
    many = await acme.enqueue_many("noop", [{}] * 3)
    together = await asyncio.gather(*(acme.enqueue("noop", {}) for _ in range(20)))
    await acme.events.append("acme's", "k", 1)
    assert await rows(owner, "select distinct organization_id from queue_service.runs") == [("acme",)]
    assert {(await acme.get(each)).organization_id for each in [first, *many, *together]} == {"acme"}  # type: ignore[union-attr]
    assert [event.body for event in await acme.events.read("acme's")] == [1]
    await other.events.append("other's", "k", 2)
    owners = "select stream, organization_id from queue_service.{} order by stream"
    for table in ("streams", "events"):
        assert await rows(owner, owners.format(table)) == [("acme's", "acme"), ("other's", "other")]


@pytest.mark.parametrize("many", [False, True])
async def test_a_tenant_stores_nothing_in_another_organization_and_is_told_why(
    many: bool, acme: App, owner: Connection
) -> None:
    call = (
        acme.enqueue_many("noop", [{}], organization_id="other")
        if many
        else acme.enqueue("noop", {}, organization_id="other")
    )
    with pytest.raises(DatabaseRefused, match=r"Row security does not allow it: .* queue_service\.organization_id"):
        await call
    assert await one(owner, "select count(*) from queue_service.runs") == 0


async def test_a_session_without_an_organization_stores_nothing(secured: Roles) -> None:
    async with App(secured.blind) as blind:
        with pytest.raises(DatabaseRefused, match="organization"):
            await blind.enqueue("noop", {})
        with pytest.raises(DatabaseRefused, match="organization"):
            await blind.events.append("s", "k", 1)


async def test_one_that_is_refused_does_not_take_others_of_its_batch_along(acme: App) -> None:
    calls = [acme.enqueue("noop", {}, organization_id="other" if n == 7 else None) for n in range(20)]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert [n for n, each in enumerate(answers) if not isinstance(each, int)] == [7]
    assert isinstance(answers[7], DatabaseRefused)


async def test_a_follower_is_not_shown_what_comes_later_either(acme: App, other: App, exempt: App) -> None:
    await acme.events.append("acme's", "k", 1)
    following = asyncio.create_task(_followed(other, "acme's"))
    await exempt.events.append("acme's", "k", 2)
    assert await following == []
    assert [event.body for event in await acme.events.read("acme's")] == [1, 2]


async def test_a_turn_is_its_tenants_to_its_end_whoever_writes_that(
    acme: App, other: App, exempt: App, owner: Connection
) -> None:
    await exempt.turns.arm(
        turn("m", platform="chat", channel_id="c", organization_id="acme"), admission=timedelta(hours=1)
    )
    await owner.execute("update queue_service.turn_markers set deadline = clock_timestamp() - interval '1 minute'")
    assert await other.turns.sweep() == 0
    assert await exempt.turns.sweep() == 1
    outcome = await acme.turns.wait("dep", "m", timeout=60)
    assert outcome.kind == "error"
    assert [event.terminal for event in await acme.events.read("acme's")] == [True]
    assert await other.turns.outcome("dep", "m") is None
    whose = "select organization_id from queue_service.{}"
    for table in ("runs", "streams", "events", "turn_outcomes"):
        assert await rows(owner, whose.format(table)) == [("acme",)], table


@pytest.mark.parametrize("how", ["dispatch", "send"])
async def test_a_turn_is_of_the_organization_of_its_run_so_that_who_ends_the_one_ends_the_other(
    how: str, acme: App, exempt: App, owner: Connection
) -> None:
    call = getattr(exempt.turns, how)
    await call(turn("m", "acme's"), "noop", {"text": "hi"}, organization_id="acme")
    whose = "select organization_id, metadata -> 'turn' ->> 'organization_id' from queue_service.runs"
    assert await rows(owner, whose) == [("acme", "acme")]
    assert await acme.cancel(await one(owner, "select id from queue_service.runs"))
    outcome = await acme.turns.outcome("dep", "m")
    assert outcome is not None
    assert (outcome.kind, outcome.code) == ("error", "cancelled")
    with pytest.raises(ConfigError, match=r"which is 'acme', and not of 'other'.*Turn\(organization_id"):
        await call(turn("n", "acme's", organization_id="acme"), "noop", {"text": "hi"}, organization_id="other")


async def test_an_old_stream_is_a_tenants_once_the_owner_has_said_so_as_documented(
    acme: App, exempt: App, owner: Connection
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "row-security.md").read_text()
    (given,) = re.findall(r"```sql\n(  update.*?)```", page, re.DOTALL)
    await exempt.turns.send(turn("old", "conv-1"), "noop", {"text": "hi"})
    await exempt.turns.commit_reply("dep", ["old"], {"text": "hello"})
    calls = (
        lambda: acme.events.append("conv-1", "k", 1),
        lambda: acme.turns.send(turn("new", "conv-1"), "noop", {"text": "and"}),
        lambda: acme.turns.send(turn("old", "conv-1"), "noop", {"text": "hi"}),
    )
    for call in calls:
        with pytest.raises(DatabaseRefused):
            await call()
    await owner.execute(given.encode())
    assert [event.kind for event in await acme.events.read("conv-1")] == ["message", "reply"]
    assert [getattr(await call(), "new", None) for call in calls] == [None, True, False]
    outcome = await acme.turns.outcome("dep", "old")
    assert outcome is not None


async def test_the_lane_of_two_tenants_stays_when_one_of_them_leaves_it(
    acme: App, other: App, secured: Roles, owner: Connection
) -> None:
    mine = await acme.enqueue("noop", {}, ordering_key="lane")
    theirs = await other.enqueue("noop", {}, ordering_key="lane")
    await acme.cancel(mine)
    assert await one(owner, "select count(*) from queue_service.lanes") == 1
    worker = quick_app(secured.worker)

    @worker.task
    async def noop() -> None: ...

    async with worker, working(worker):
        assert (await other.wait(theirs, timeout=60)).state == "succeeded"


async def test_a_tenant_makes_no_lane_of_which_it_does_not_see_the_running_runs(
    acme: App, exempt: App, owner: Connection
) -> None:
    # As after a restore of data alone.
    await owner.execute("set session_replication_role = replica")
    await owner.execute(
        "insert into queue_service.runs (queue, task, payload, ordering_key, organization_id, state, lease_id, claimed_at)"
        " values ('q', 't', '{}', 'lane', 'other', 'running', 1, now()), ('q', 't', '{}', 'lane', 'acme', 'queued', null, null)"
    )
    await owner.execute("set session_replication_role = origin")
    lane = "select ordering_key, running from queue_service.lanes"
    await acme.opened._sweeper.once()
    assert await rows(owner, lane) == []
    await exempt.opened._sweeper.once()
    assert await rows(owner, lane) == [("lane", 1)]


async def test_a_wait_of_a_tenant_takes_no_lost_run_of_another_and_ends_when_a_worker_did(
    acme: App, other: App, owner: Connection, exempt: App
) -> None:
    mine = await acme.enqueue("noop", {})
    await owner.execute(
        "with lease as (insert into queue_service.leases (worker_id, expires_at, run_ids) "
        "values (1, clock_timestamp() - interval '1 hour', array[%s::bigint]) returning id) "
        "update queue_service.runs set state = 'running', attempt = 1, claimed_at = clock_timestamp(), "
        "lease_id = (select id from lease)",
        [mine],
    )
    theirs = await other.enqueue("noop", {})
    waiting = asyncio.create_task(other.wait(theirs, timeout=60))
    swept = other.opened.services
    await eventually(lambda: any(each.name == "sweeper" for each in swept))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(waiting), 0.5)
    assert await one(owner, "select count(*) from queue_service.leases") == 1
    assert (await exempt.opened._sweeper.once()).requeued == 1
    assert (await acme.get(mine)).state == "queued"  # type: ignore[union-attr]
    await other.cancel(theirs)
    assert (await waiting).state == "cancelled"
