"""Plays actors against each other, statement by statement, in every order that the database permits.

An actor is a transaction on a connection of its own: statements, then a commit or a rollback, each of them a step. A step
that waits for a lock stays pending while the others go on, and its actor goes on when it is freed. So the orders are not
listed beforehand: at each point, the actors that could take a step are the branches, and all of them are explored.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import psycopg

from queue_service.db.execute import Connection, fetch
from queue_service.db.query import Query
from queue_service.errors import QueueServiceError


class Finish(StrEnum):
    """How a transaction ends. The chained one begins at once, which takes no snapshot: it saves a round trip."""

    COMMIT = "commit and chain"
    ROLLBACK = "rollback and chain"


# A function makes a statement of what the one before it returned.
Step = Query[Any] | Finish | Callable[[Any], Query[Any]]
Path = tuple[int, ...]

# Seconds in which a statement that waits for nobody has most likely returned: until then, nobody asks whether it waits.
AT_ONCE = 0.003
BLOCKERS = "select pid, pg_blocking_pids(pid) from unnest(%s::int[]) as pid"


@dataclass(frozen=True, slots=True)
class Actor:
    """`twin` says who else is the same actor: of twins, the first begins first, since the other order is the same one."""

    name: str
    steps: Sequence[Step]
    twin: object = None


@dataclass(slots=True)
class Role:
    """An actor on the stage: how far it is, and what its last statement returned."""

    actor: Actor
    conn: Connection
    taken: int = 0
    result: Any = None
    committed: bool = False
    error: Exception | None = None
    running: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return self.actor.name

    @property
    def pid(self) -> int:
        return self.conn.info.backend_pid

    @property
    def is_pending(self) -> bool:
        return self.running is not None and not self.running.done()

    @property
    def only_has_to_finish(self) -> bool:
        return all(isinstance(step, Finish) for step in self.actor.steps[self.taken :])

    async def step(self) -> None:
        """Begin the next step. A statement may have to wait for others, a commit or a rollback has not."""
        step = self.actor.steps[self.taken]
        self.taken += 1
        self.running = asyncio.create_task(self._take(step))
        if isinstance(step, Finish):
            await self.running

    async def _take(self, step: Step) -> None:
        try:
            if isinstance(step, Finish):
                await self.conn.execute(step.value.encode())
                self.committed = step is Finish.COMMIT and self.error is None
            elif self.error is None:
                self.result = await fetch(self.conn, step if isinstance(step, Query) else step(self.result))
        except (psycopg.Error, QueueServiceError) as error:
            self.error = error


@dataclass(slots=True)
class History:
    """What happened: who took each step, of those who could have, what each actor's statements returned, and how often one waited."""

    roles: list[Role]
    path: Path = ()
    waits: int = 0
    branches: list[list[int]] = field(default_factory=list)

    def __str__(self) -> str:
        return " ".join(self.roles[place].name for place in self.path)


class Stage:
    """Connections for some actors and an onlooker, each of which belongs to this for good."""

    def __init__(self, onlooker: Connection, conns: Sequence[Connection]) -> None:
        self._onlooker = onlooker
        self._conns = conns

    @classmethod
    async def open(cls, connect: Callable[[], Awaitable[Connection]], *, actors: int) -> Stage:
        conns = [await connect() for _ in range(actors)]
        stage = cls(await connect(), conns)
        for conn in conns:
            await conn.execute("begin")
        return stage

    async def explore(self, cast: Callable[[], Awaitable[Sequence[Actor]]]) -> AsyncIterator[History]:
        """Every order of the actors' steps, each played from the start by a fresh cast."""
        seen: set[Path] = set()
        ahead: list[Path] = [()]
        while ahead:
            path = ahead.pop()
            if path in seen:
                continue
            history = await self.play(await cast(), path)
            # Asked for is seen, even if this time somebody else got the lock: nothing is tried for ever.
            seen.add(path)
            for length, branches in enumerate(history.branches):
                before = history.path[:length]
                seen.add(history.path[: length + 1])
                ahead += [(*before, place) for place in branches if (*before, place) not in seen]
            yield history

    async def play(self, actors: Sequence[Actor], path: Path = ()) -> History:
        """Follow the path as far as it goes and is possible, then on to the end of all actors."""
        history = History([Role(actor, conn) for actor, conn in zip(actors, self._conns, strict=False)])
        while branches := self._branches(history.roles):
            wanted = path[len(history.path)] if len(history.path) < len(path) else branches[0]
            place = wanted if wanted in branches else branches[0]
            history.branches.append(branches)
            history.path += (place,)
            await history.roles[place].step()
            await self._settle(history.roles)
            history.waits += history.roles[place].is_pending
        return history

    @staticmethod
    def _branches(roles: Sequence[Role]) -> list[int]:
        """Who could take the next step."""
        free = [place for place, role in enumerate(roles) if not role.is_pending and role.taken < len(role.actor.steps)]
        if len(free) > 1 and not any(role.is_pending for role in roles) and all(r.only_has_to_finish for r in roles):
            # Nobody waits, and nobody will say anything more: the order of what is left changes nothing.
            return free[:1]
        waiting = {role.actor.twin for role in roles if role.actor.twin is not None and not role.taken}
        branches = []
        for place in free:
            role = roles[place]
            if not role.taken and role.actor.twin in waiting:
                waiting.discard(role.actor.twin)
            elif not role.taken and role.actor.twin is not None:
                continue
            branches.append(place)
        return branches

    async def _settle(self, roles: Sequence[Role]) -> None:
        """Until each statement has returned, or waits for a transaction that itself is not about to do anything."""
        while pending := [role for role in roles if role.is_pending]:
            running = [role.running for role in pending if role.running is not None]
            if not (await asyncio.wait(running, timeout=AT_ONCE))[1]:
                break
            stuck = {role.pid for role in roles if not role.is_pending}
            cursor = await self._onlooker.execute(BLOCKERS, [[role.pid for role in pending]])
            blockers = {pid: set(pids) for pid, pids in await cursor.fetchall()}
            while more := {pid for pid, pids in blockers.items() if pid not in stuck and pids & stuck}:
                stuck |= more
            if all(role.pid in stuck for role in pending if role.is_pending):
                break
