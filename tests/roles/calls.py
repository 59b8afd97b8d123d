"""Every public call of an App, and what a worker and a gateway do besides, each with the kinds of role that may.

A call makes ready what it needs as the owner, and acts as the role. The database looks at the rights on all that a statement
names, whatever it finds there; what a function of ours looks at depends on what is there, so those are reached.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from datetime import timedelta
from typing import Any, NamedTuple

from queue_service import App, Turn, TurnFailure
from queue_service.connections import queries as connections
from queue_service.connections.queries import NewDelivery
from queue_service.db import server_facts
from queue_service.db.execute import fetch
from queue_service.db.query import Query, scalar
from queue_service.deployments import queries as deployments
from queue_service.events import queries as events
from queue_service.replicas import queries as replicas
from queue_service.replicas.model import Done, Request
from queue_service.roster import queries as roster
from queue_service.runs import lanes, lost, queries, settling, walks
from queue_service.runs.claim import Claim, hold
from queue_service.runs.model import Ending, Return, RunState
from queue_service.runs.queries import Claimant, Wanted
from queue_service.schedules import queries as schedules
from queue_service.services.scheduler import firing
from queue_service.steps import queries as steps
from queue_service.steps.model import NewStep
from queue_service.turns import queries as turns
from queue_service.worker.floors import FRONT
from tests.support import quick_app

LEASE = timedelta(seconds=30)
DAY = timedelta(days=1)
FAILURE = TurnFailure("worker_died")

ENQUEUER, APP, WORKER, GATEWAY, OBSERVER = "enqueuer", "app", "worker", "gateway", "observer"
# Whoever enqueues, whoever changes what is there, and whoever only looks at it.
ENQUEUES = frozenset({ENQUEUER, APP, WORKER, GATEWAY})
CHANGES = frozenset({APP, WORKER})
CONVERSES = frozenset({APP, WORKER, GATEWAY})
LOOKS = frozenset({APP, WORKER, OBSERVER})
FOLLOWS = frozenset({APP, WORKER, GATEWAY, OBSERVER})
WORKS = frozenset({WORKER})
SERVES = frozenset({GATEWAY})


class World:
    """What a call acts on: the App of the role, how to reach the database as the role, the App of the owner, and names that
    nobody has used."""

    _numbers = itertools.count()

    def __init__(self, owner: App, app: App, conninfo: str) -> None:
        self.owner = owner
        self.app = app
        self.conninfo = conninfo

    def name(self) -> str:
        return f"n{next(self._numbers)}"

    def turn(self, **fields: Any) -> Turn:
        return Turn(**{"deployment": self.name(), "message_id": "m", "stream": self.name(), **fields})

    async def armed(self, **fields: Any) -> Turn:
        """A turn that is owed an ending, and has a run in a lane."""
        turn = self.turn(**fields)
        await self.owner.turns.dispatch(turn, "noop", {}, ordering_key=self.name())
        return turn

    async def queued(self, **options: Any) -> int:
        return await self.owner.enqueue("noop", {}, **{"queue": self.name(), **options})

    async def ended(self) -> int:
        """A run in history."""
        run_id = await self.queued()
        await self.owner.cancel(run_id)
        return run_id

    async def event(self, stream: str) -> int:
        return await self.owner.events.append(stream, "delta", {})

    async def claimed(self, *, turn: Turn | None = None, ordering_key: str | None = None) -> tuple[Claim, int]:
        """A run at work, and its lease."""
        queue = self.name()
        if turn is None:
            await self.queued(queue=queue, ordering_key=ordering_key)
        else:
            await self.owner.turns.dispatch(turn, "noop", {}, queue=queue, ordering_key=ordering_key)
        by = Claimant(["noop"], 1, LEASE)
        if ordering_key is None:
            runs = await self.owner.fetch(queries.claim([Wanted(queue, 1, {0: FRONT})], by))
        else:
            runs = (await self.owner.fetch(queries.claim_lanes([(queue, 1)], by))).runs
        (run, lease), *_ = runs
        return run.claim, lease

    async def lapsed(self, **options: Any) -> tuple[Claim, int]:
        claim, lease = await self.claimed(**options)
        async with self.owner.pool.connection() as conn:
            await conn.execute(
                "update queue_service.leases set expires_at = clock_timestamp() - interval '1 day' where id = %s",
                [lease],
            )
        return claim, lease


Act = Callable[[World], Awaitable[object]]


class Call(NamedTuple):
    #: Of the App's, the part and the method; of others, who does what.
    name: str
    kinds: frozenset[str]
    act: Act


CALLS: list[Call] = []


def call(name: str, kinds: frozenset[str]) -> Callable[[Act], Act]:
    def noted(act: Act) -> Act:
        CALLS.append(Call(name, kinds, act))
        return act

    return noted


# The App itself


@call("app.open", ENQUEUES | LOOKS)
async def _(w: World) -> None:
    async with quick_app(w.conninfo):
        pass


@call("app.enqueue", ENQUEUES)
async def _(w: World) -> None:
    await w.app.enqueue("noop", {})
    await w.app.enqueue("noop", {}, ordering_key=w.name())
    key = w.name()
    assert await w.app.enqueue("noop", {}, singleton_key=key) == await w.app.enqueue("noop", {}, singleton_key=key)
    await w.app.fetch(queries.enqueue_all([]))


@call("app.enqueue, in place of another", CONVERSES)
async def _(w: World) -> None:
    key, lane = w.name(), w.name()
    await w.owner.enqueue("noop", {}, singleton_key=key, ordering_key=w.name())
    await w.app.enqueue("noop", {}, singleton_key=key, on_conflict="replace", ordering_key=lane)


@call("app.enqueue_many", ENQUEUES)
async def _(w: World) -> None:
    await w.app.enqueue_many("noop", [{}, {}], ordering_key=w.name())


@call("app.get", FOLLOWS)
async def _(w: World) -> None:
    await w.app.get(await w.ended())
    assert await w.app.get(10**15) is None


@call("app.wait", FOLLOWS)
async def _(w: World) -> None:
    await w.app.wait(await w.ended(), timeout=10)


@call("app.wait_many", FOLLOWS)
async def _(w: World) -> None:
    await w.app.wait_many([await w.ended()], timeout=10)


@call("app.cancel", CONVERSES)
async def _(w: World) -> None:
    assert await w.app.cancel(await w.queued(ordering_key=w.name()))
    turn = await w.armed()
    (marker,) = await w.owner.turns.list(deployment=turn.deployment)
    assert marker.run_id is not None
    assert await w.app.cancel(marker.run_id)


@call("app.retry", CHANGES)
async def _(w: World) -> None:
    assert await w.app.retry(await w.ended())


@call("app.retry_many", CHANGES)
async def _(w: World) -> None:
    await w.ended()
    await w.app.retry_many(state="cancelled")


@call("app.retry_many, dry", FOLLOWS)
async def _(w: World) -> None:
    await w.ended()
    await w.app.retry_many(state="cancelled", dry_run=True)


@call("app.delete", CHANGES)
async def _(w: World) -> None:
    assert await w.app.delete(await w.queued(ordering_key=w.name()))
    assert await w.app.delete(await w.ended())


@call("app.fetch", ENQUEUES | LOOKS)
async def _(w: World) -> None:
    await w.app.fetch(schedules.clock())


# Turns


@call("turns.arm", CONVERSES)
async def _(w: World) -> None:
    assert await w.app.turns.arm(w.turn())


@call("turns.dispatch", CONVERSES)
async def _(w: World) -> None:
    await w.app.turns.dispatch(w.turn(), "noop", {}, ordering_key=w.name())


@call("turns.send", CONVERSES)
async def _(w: World) -> None:
    await w.app.turns.send(w.turn(), "noop", {}, ordering_key=w.name())


@call("turns.send, to interrupt", CONVERSES)
async def _(w: World) -> None:
    deployment, stream = w.name(), w.name()
    turn = w.turn(deployment=deployment, stream=stream)
    await w.claimed(turn=turn)
    await w.owner.turns.extend(deployment)
    await w.app.turns.send(w.turn(deployment=deployment, stream=stream, message_id="m2"), "noop", {}, mode="interrupt")


@call("turns.unsend", CONVERSES)
async def _(w: World) -> None:
    turn = w.turn()
    await w.owner.turns.send(turn, "noop", {}, ordering_key=w.name())
    assert await w.app.turns.unsend(turn.deployment, turn.message_id)


@call("turns.inputs", FOLLOWS)
async def _(w: World) -> None:
    turn = w.turn()
    await w.owner.turns.send(turn, "noop", {})
    other = w.turn(deployment=turn.deployment, stream=turn.stream, message_id="m2")
    await w.owner.turns.send(other, "noop", {}, mode="steer")
    assert [each.message_id async for each in w.app.turns.inputs(turn, wait=False)] == ["m2"]


@call("turns.extend", CONVERSES)
async def _(w: World) -> None:
    turn = await w.armed()
    assert await w.app.turns.extend(turn.deployment)


@call("turns.withhold", CONVERSES)
async def _(w: World) -> None:
    turn = await w.armed(organization_id=w.name())
    await w.app.turns.withhold(turn.deployment, "provider_overloaded")
    await w.app.turns.withhold(None, "provider_overloaded", organization_id=turn.organization_id)


@call("turns.restore", CONVERSES)
async def _(w: World) -> None:
    turn = await w.armed(organization_id=w.name())
    await w.app.turns.restore(turn.deployment)
    await w.app.turns.restore(None, organization_id=turn.organization_id)


@call("turns.reset_admission", CONVERSES)
async def _(w: World) -> None:
    turn = await w.armed()
    assert await w.app.turns.reset_admission(turn.deployment, turn.message_id)


@call("turns.commit_reply", CONVERSES)
async def _(w: World) -> None:
    deployment, stream = w.name(), w.name()
    one, other = (w.turn(deployment=deployment, stream=stream, message_id=each) for each in ("m1", "m2"))
    for turn in (one, other):
        await w.owner.turns.dispatch(turn, "noop", {}, ordering_key=w.name())
    assert len(await w.app.turns.commit_reply(deployment, ["m1", "m2"], {})) == 2
    elsewhere = await w.armed(platform="slack", channel_id="C1")
    assert await w.app.turns.commit_reply(elsewhere.deployment, ["m"], {})


@call("turns.fail", CONVERSES)
async def _(w: World) -> None:
    turn = await w.armed()
    assert await w.app.turns.fail(turn.deployment, turn.message_id, FAILURE)


@call("turns.fail_deployment", CONVERSES)
async def _(w: World) -> None:
    turn = await w.armed()
    assert await w.app.turns.fail_deployment(turn.deployment, FAILURE)


@call("turns.reject", CONVERSES)
async def _(w: World) -> None:
    turn = await w.armed()
    await w.app.turns.reject(turn.deployment, turn.message_id, "No.")


@call("turns.discharge", CONVERSES)
async def _(w: World) -> None:
    turn = await w.armed()
    assert await w.app.turns.discharge(turn.deployment, turn.message_id)


@call("turns.sweep", CONVERSES)
async def _(w: World) -> None:
    turn, queue = w.turn(), w.name()
    await w.owner.queues.pause(queue)
    await w.owner.turns.dispatch(turn, "noop", {}, queue=queue, ordering_key=w.name())
    async with w.owner.pool.connection() as conn:
        await conn.execute(
            "update queue_service.turn_markers set deadline = clock_timestamp() - interval '1 minute' "
            "where deployment = %s",
            [turn.deployment],
        )
    assert await w.app.turns.sweep()


@call("turns.is_live", FOLLOWS)
async def _(w: World) -> None:
    turn = await w.armed()
    assert await w.app.turns.is_live(turn.deployment, turn.message_id)


@call("turns.outcome", FOLLOWS)
async def _(w: World) -> None:
    turn = await w.armed()
    assert await w.app.turns.outcome(turn.deployment, turn.message_id) is None


@call("turns.wait", FOLLOWS)
async def _(w: World) -> None:
    turn = await w.armed()
    await w.owner.turns.fail(turn.deployment, turn.message_id, FAILURE)
    await w.app.turns.wait(turn.deployment, turn.message_id, timeout=10)


@call("turns.list", FOLLOWS)
async def _(w: World) -> None:
    await w.app.turns.list()


@call("turns.tally", FOLLOWS)
async def _(w: World) -> None:
    await w.app.turns.tally()


# Events


@call("events.append", CONVERSES)
async def _(w: World) -> None:
    await w.app.events.append(w.name(), "delta", {})


@call("events.append_many", CONVERSES)
async def _(w: World) -> None:
    await w.app.events.append_many(w.name(), [("delta", {})])


@call("events.append_of", CONVERSES)
async def _(w: World) -> None:
    async with w.app.pool.connection() as conn:
        await w.app.events.append_of(w.name(), [("delta", {}, None)], conn=conn)


@call("events.read", FOLLOWS)
async def _(w: World) -> None:
    stream = w.name()
    await w.event(stream)
    assert await w.app.events.read(stream)
    assert await w.app.events.read(stream, kinds=["delta"])
    assert await w.app.events.read(stream, last=1)


@call("events.head", FOLLOWS)
async def _(w: World) -> None:
    await w.app.events.head(w.name())


@call("events.follow", FOLLOWS)
async def _(w: World) -> None:
    stream = w.name()
    await w.event(stream)
    async with aclosing(w.app.events.follow(stream)) as following:
        async for event in following:
            assert event.seq == 1
            break


@call("events.stream", FOLLOWS)
async def _(w: World) -> None:
    await w.app.events.stream(w.name())


@call("events.set_state", CONVERSES)
async def _(w: World) -> None:
    await w.app.events.set_state(w.name(), "active")


@call("events.trim", CHANGES)
async def _(w: World) -> None:
    stream = w.name()
    await w.event(stream)
    await w.app.events.trim(stream, upto=1)


# Queues


@call("queues.list", FOLLOWS)
async def _(w: World) -> None:
    await w.app.queues.list()


@call("queues.pause", CHANGES)
async def _(w: World) -> None:
    await w.app.queues.pause(w.name())


@call("queues.resume", CHANGES)
async def _(w: World) -> None:
    await w.app.queues.resume(w.name())


@call("queues.purge", CONVERSES)
async def _(w: World) -> None:
    queue = w.name()
    await w.queued(queue=queue, ordering_key=w.name())
    assert await w.app.queues.purge(queue) == 1


@call("queues.limit", CHANGES)
async def _(w: World) -> None:
    queue = w.name()
    await w.queued(queue=queue, ordering_key=w.name())
    await w.app.queues.limit(queue, max_running=5, max_running_per_key=2, rate=5)


# Schedules


async def scheduled(w: World, **options: Any) -> str:
    name = w.name()
    await w.owner.schedules.put(name, "noop", {}, cron="0 0 1 1 *", **options)
    return name


@call("schedules.put", CHANGES)
async def _(w: World) -> None:
    await w.app.schedules.put(w.name(), "noop", {}, cron="0 0 1 1 *")


@call("schedules.store_declared", CHANGES)
async def _(w: World) -> None:
    name = w.name()

    @w.app.schedule(every=DAY)
    @w.app.task(name=name)
    async def nothing() -> None: ...

    await w.app.schedules.store_declared()


@call("schedules.get", LOOKS)
async def _(w: World) -> None:
    assert await w.app.schedules.get(await scheduled(w))


@call("schedules.next", LOOKS)
async def _(w: World) -> None:
    assert await w.app.schedules.next(await scheduled(w))


@call("schedules.list", LOOKS)
async def _(w: World) -> None:
    await w.app.schedules.list()


@call("schedules.run_now", CHANGES)
async def _(w: World) -> None:
    assert await w.app.schedules.run_now(await scheduled(w, turn=w.turn()))


@call("schedules.pause", CHANGES)
async def _(w: World) -> None:
    assert await w.app.schedules.pause(await scheduled(w))


@call("schedules.resume", CHANGES)
async def _(w: World) -> None:
    name = await scheduled(w)
    await w.owner.schedules.pause(name)
    assert await w.app.schedules.resume(name)


@call("schedules.delete", CHANGES)
async def _(w: World) -> None:
    assert await w.app.schedules.delete(await scheduled(w))


# What the command line reads


@call("reading: runs, their depth, steps and turns", LOOKS)
async def _(w: World) -> None:
    run_id = await w.ended()
    await w.app.fetch(walks.page(limit=1))
    await w.app.fetch(queries.depth("default"))
    await w.app.fetch(queries.endings([run_id]))
    await w.app.fetch(steps.of_run(run_id))
    await w.app.fetch(turns.of_run(run_id))


@call("reading: the roster", frozenset({WORKER, OBSERVER}))
async def _(w: World) -> None:
    await w.app.fetch(roster.listed(LEASE))


@call("reading: how many processes there are", frozenset({WORKER, OBSERVER}))
async def _(w: World) -> None:
    await w.app.fetch(server_facts.processes_at_work(LEASE))


@call("reading: how many workers a queue wants", frozenset({OBSERVER}))
async def _(w: World) -> None:
    wanted: Query[int] = Query("select queue_service.wanted_workers('default', 10)", scalar, writes=False)
    await w.app.fetch(wanted)


# What whoever waits, serves or works does for all


@call("sweeping: runs of lost workers", CONVERSES)
async def _(w: World) -> None:
    await w.lapsed(ordering_key=w.name())
    await w.lapsed(turn=w.turn())
    assert await w.app.fetch(queries.sweep(limit=5, max_losses=1))
    await w.app.fetch(queries.busy_leases(limit=1))
    await w.app.fetch(lost.lapsed(limit=1))


@call("sweeping: one lease, one run", CONVERSES)
async def _(w: World) -> None:
    await w.app.fetch(lost.sweep_lease(0, max_losses=1))
    await w.app.fetch(lost.sweep_run(0, 0, max_losses=1))


@call("sweeping: runs without a lease", CONVERSES)
async def _(w: World) -> None:
    await w.app.fetch(lost.orphans(after=0, scan_limit=10))
    await w.app.fetch(lost.sweep_orphans([0], max_losses=1))


@call("sweeping: runs that were not begun in time", CONVERSES)
async def _(w: World) -> None:
    await w.app.fetch(queries.expire(limit=1))
    await w.app.fetch(queries.late(limit=1))
    await w.app.fetch(queries.expire_one(0))


@call("sweeping: lanes that nobody told", CONVERSES)
async def _(w: World) -> None:
    queue, key, gone = w.name(), w.name(), w.name()
    await w.queued(queue=queue, ordering_key=key)
    await w.queued(queue=queue, ordering_key=gone)
    async with w.owner.pool.connection() as conn:
        await conn.execute("delete from queue_service.runs where ordering_key = %s", [gone])
        await conn.execute("update queue_service.lanes set task = 'other' where ordering_key = %s", [key])
    assert await w.app.fetch(lanes.tend_after(lanes.Lane(queue, ""), limit=10))
    await w.app.fetch(lanes.make_lanes([lanes.Lane(queue, gone)]))


@call("sweeping: turns that are overdue", CONVERSES)
async def _(w: World) -> None:
    await w.app.fetch(turns.oldest_overdue())
    await w.app.fetch(turns.overdue(limit=1))
    await w.app.fetch(turns.sweep_one(w.name(), "m"))


# A worker


@call("working: in the roster", WORKS)
async def _(w: World) -> None:
    assert await w.app.fetch(queries.hidden_from()) is None
    worker_id = await w.app.fetch(roster.join(w.name(), "1", "{}"))
    await w.app.fetch(roster.beat(worker_id))
    await w.app.fetch(roster.leave(worker_id))
    await w.app.fetch(roster.prune(DAY))


@call("working: claims", WORKS)
async def _(w: World) -> None:
    by = Claimant(["noop"], 1, LEASE)
    await w.app.fetch(queries.scan(["default"], ["noop"]))
    queue = w.name()
    await w.queued(queue=queue)
    assert await w.app.fetch(queries.claim([Wanted(queue, 1, {0: FRONT})], by))
    await w.queued(queue=queue, ordering_key=w.name())
    assert (await w.app.fetch(queries.claim_lanes([(queue, 1)], by))).runs
    await w.app.fetch(queries.claim_limited([Wanted(queue, 1, {0: FRONT})], by))
    await w.app.fetch(queries.claim_limited_lanes([(queue, 1)], by))
    await w.app.fetch(queries.suspect_is_due([queue], ["noop"]))
    await w.app.fetch(queries.claim_suspect([queue], by))
    await w.app.fetch(lanes.tend_lanes([queue], ["noop"], limit=1))
    await w.app.fetch(lost.release_unheard(0, known=[]))


@call("working: keeps leases", CONVERSES)
async def _(w: World) -> None:
    _, lease = await w.claimed()
    assert await w.app.fetch(queries.extend([lease], LEASE))
    await w.app.fetch(queries.cancel_requests([lease]))


@call("working: ends runs", CONVERSES)
async def _(w: World) -> None:
    for options in ({"ordering_key": w.name()}, {"turn": w.turn()}):
        claim, lease = await w.claimed(**options)
        ending = Ending(claim, RunState.SUCCEEDED)
        assert await w.app.fetch(settling.finish([ending], worker_id=1, freed=[lease]))
    claim, lease = await w.claimed(ordering_key=w.name())
    await w.app.fetch(settling.busy([claim]))
    await w.app.fetch(settling.hand_on([Ending(claim, RunState.SUCCEEDED, handed_on=True)], worker_id=1, freed=[lease]))
    claim, lease = await w.claimed(ordering_key=w.name())
    assert await w.app.fetch(settling.give_back([Return(claim)], worker_id=1, freed=[lease]))


@call("working: what handlers say of their runs", WORKS)
async def _(w: World) -> None:
    claim, _ = await w.claimed()
    await w.app.fetch(settling.report({claim: "1"}))
    step = NewStep(*claim, "step", "1")
    await w.app.fetch(steps.store([step]))
    await w.app.fetch(steps.is_stored(step))
    await w.app.fetch(steps.of_run(claim.run_id))
    await w.app.fetch(events.reset(w.name(), w.name(), "m", (claim.run_id, claim.attempt)))
    async with w.app.pool.connection() as conn, conn.transaction():
        assert await fetch(conn, hold(claim))
        await fetch(conn, queries.plan_as_ours())


@call("working: schedules", WORKS)
async def _(w: World) -> None:
    name = w.name()
    await w.owner.schedules.put(name, "noop", {}, every=1, turn=w.turn())
    async with w.owner.pool.connection() as conn:
        await conn.execute(
            "update queue_service.schedules set next_at = clock_timestamp() - interval '1 second' where name = %s",
            [name],
        )
    look = await w.app.fetch(schedules.due(limit=100))
    (due,) = (each for each in look.due if each.name == name)
    fired = await w.app.fetch(schedules.fire([firing(due, look)], retention=DAY))
    assert [each for each in fired if each.run_id]


@call("working: prunes", WORKS)
async def _(w: World) -> None:
    await w.app.fetch(connections.prune(DAY))
    await w.app.fetch(deployments.prune(DAY))
    await w.app.fetch(steps.prune(DAY, steps.Place(), scan_limit=1))
    await w.app.fetch(turns.prune(DAY, limit=1))
    await w.app.fetch(events.aged(DAY, after="", limit=1))


@call("working: the children of deployments", WORKS)
async def _(w: World) -> None:
    deployment = w.name()
    await w.app.fetch(deployments.hold(deployment, "me", "holding", LEASE, ask=True))
    await w.app.fetch(deployments.renew(deployment, "holding", LEASE))
    await w.app.fetch(deployments.release(deployment, "holding"))
    await w.app.fetch(turns.end([], notify=True))


@call("working: deliveries", WORKS)
async def _(w: World) -> None:
    channel = (w.name(), "C1")
    await w.app.fetch(connections.hold(channel, "me", LEASE))
    await w.app.fetch(connections.renew([channel], "me", LEASE))
    await w.app.fetch(connections.owner(channel))
    new = NewDelivery(*channel, "{}", None, 1)
    await w.app.fetch(connections.deliver(new))
    await w.app.fetch(connections.deliver_seq(new, 1))
    await w.app.fetch(connections.release([channel], "me"))
    claim, _ = await w.claimed()
    await w.app.fetch(connections.note((claim.run_id, claim.attempt), "{}"))
    await w.app.fetch(connections.shown((claim.run_id, claim.attempt), w.name(), "m", "ts"))
    await w.app.fetch(connections.platform_message_id(w.name(), "m"))


# A gateway


@call("serving: among replicas", SERVES)
async def _(w: World) -> None:
    replica = w.name()
    await w.app.fetch(replicas.beat(replica, LEASE))
    await w.app.fetch(replicas.ask([(replica, Request(f"{replica}.1", "{}"))], LEASE))
    await w.app.fetch(replicas.asked(replica, limit=1))
    await w.app.fetch(replicas.answer({f"{replica}.1": Done.APPLIED}))
    await w.app.fetch(replicas.take_answers([f"{replica}.1"]))
    await w.app.fetch(replicas.prune(DAY))
    await w.app.fetch(replicas.leave(replica))


@call("serving: streams", SERVES | FOLLOWS)
async def _(w: World) -> None:
    await w.app.fetch(events.heads([w.name()]))
    await w.app.fetch(events.tails({w.name(): 0}, limit=1))


@call("serving: streams that were suspended", CONVERSES)
async def _(w: World) -> None:
    await w.app.fetch(events.suspend(w.name()))
