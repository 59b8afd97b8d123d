"""What a worker says of itself to those who ask: `/livez`, whether a restart would help, and `/readyz`, whether it works.

The two differ in an outage of the database, which a worker survives, and which a restart only prolongs: it is live then,
and not ready. Both are answered on the event loop. One that is blocked answers nothing, and that is an answer too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from enum import IntEnum
from http import HTTPStatus
from typing import NamedTuple

import msgspec

from queue_service.db.listener import Listener
from queue_service.db.pool import Pool
from queue_service.db.revision import HEAD, OLDEST, SCHEMA, Schema
from queue_service.errors import DatabaseUnavailable, SchemaMismatch
from queue_service.logs import get_logger
from queue_service.services.loop import Service
from queue_service.worker.claimer import Claimer
from queue_service.worker.endpoint import Endpoint, HttpAnswer

log = get_logger(__name__)

# Nothing that the claim loop waits for lasts as long, not even in an outage: 10 s to connect (to each of some hosts), 30 s
# for an answer, 1 s between two tries. To these comes the poll interval, which may be set to anything.
STUCK = 120.0
CLAIMER = "claimer"
# The claim loop of a worker that works passes this long after it was due, at the latest.
SLOW = 5.0
# How long a probe waits for the database, and how long an answer is good for others.
PROBE_SECONDS = 1.0
FRESH_SECONDS = 1.0


class Status(IntEnum):
    OK = 0
    DEGRADED = 1
    FAILING = 2


class Finding(NamedTuple):
    status: Status = Status.OK
    why: str = "ok"


class Health:
    def __init__(
        self,
        claimer: Claimer,
        listener: Listener,
        pool: Pool,
        services: Callable[[], Iterable[Service]],
        *,
        poll_interval: float,
        worker: str,
    ) -> None:
        self._claimer = claimer
        self._listener = listener
        self._pool = pool
        self._services = services
        self._poll = poll_interval
        self._worker = worker
        self._group: asyncio.TaskGroup
        self._look: asyncio.Task[Finding] | None = None
        self._looked_at = 0.0
        self._lost = False

    async def run(self, endpoint: Endpoint) -> None:
        """Answer probes until cancelled."""
        async with asyncio.TaskGroup() as self._group:
            await endpoint.run({"/livez": self.live, "/readyz": self.ready})

    async def live(self) -> HttpAnswer:
        return self._answer({"claiming": self._progress()})

    async def ready(self) -> HttpAnswer:
        return self._answer(
            {
                "claiming": self._claiming(),
                "database": await self._database(),
                "notices": self._notices(),
            },
            self._services(),
        )

    def _answer(self, findings: dict[str, Finding], services: Iterable[Service] = ()) -> HttpAnswer:
        conditions = {service.name: service.condition for service in services}
        # One that fails does not keep the others from their work.
        degraded = Status.DEGRADED if any(not each.is_well for each in conditions.values()) else Status.OK
        worst = max(degraded, *(finding.status for finding in findings.values()))
        body: dict[str, object] = {
            "status": worst.name.lower(),
            "worker": self._worker,
            "checks": {name: finding.why for name, finding in findings.items()},
        }
        if conditions:
            body["services"] = conditions
        status = HTTPStatus.SERVICE_UNAVAILABLE if worst is Status.FAILING else HTTPStatus.OK
        return HttpAnswer(status, msgspec.json.encode(body) + b"\n", "application/json")

    # What is looked at

    def _progress(self) -> Finding:
        """Whether the claim loop turns, whatever the database does; one that was asked to stop need not."""
        silence = time.monotonic() - self._claimer.last_pass
        if self._claimer.is_stopping or silence < STUCK + self._poll:
            return Finding()
        return Finding(Status.FAILING, f"the claim loop is stuck: it made no pass for {silence:.0f} s")

    def _claiming(self) -> Finding:
        if self._claimer.is_stopping:
            return Finding(Status.FAILING, "the worker is stopping, and claims nothing more")
        if (since := self._claims_lost_since()) is not None:
            lost = time.monotonic() - since
            return Finding(Status.FAILING, f"claims have not gone through for {lost:.1f} s; the log says why")
        return self._progress()

    async def _database(self) -> Finding:
        """One look at a time, however many ask; who asks waits no longer than PROBE_SECONDS, and the look goes on."""
        if self._look is None or (self._look.done() and time.monotonic() - self._looked_at > FRESH_SECONDS):
            self._look = self._group.create_task(self._ask())
        done, _ = await asyncio.wait([self._look], timeout=PROBE_SECONDS)
        if done:
            return self._look.result()
        # The pool may be busy with what handlers ask: with one connection, the command line's, for as long as they like.
        if self._claims_lost_since() is None and time.monotonic() - self._claimer.last_pass < self._poll + SLOW:
            return Finding(
                Status.DEGRADED, f"no connection of the pool was free in {PROBE_SECONDS:g} s; claims go through"
            )
        return Finding(Status.FAILING, f"the database did not answer within {PROBE_SECONDS:g} s")

    async def _ask(self) -> Finding:
        try:
            finding = _matching(await self._schema())
            self._lost = False
            return finding
        except DatabaseUnavailable as lost:
            # Its text may name hosts and users, which is for the log and not for whoever can reach this port.
            if not self._lost:
                log.warning("a probe finds no database", why=str(lost))
            self._lost = True
            return Finding(Status.FAILING, "the database cannot be reached; the log says why")
        except SchemaMismatch:
            return _matching(Schema())
        except Exception as refused:
            log.exception("the schema's revision cannot be read")
            return Finding(Status.FAILING, f"the schema's revision cannot be read: {type(refused).__name__}")
        finally:
            self._looked_at = time.monotonic()

    async def _schema(self) -> Schema:
        try:
            return await self._pool.fetch(SCHEMA, deadline=PROBE_SECONDS)
        except DatabaseUnavailable:
            # A connection that broke while nobody used it says nothing about the database: another one does.
            return await self._pool.fetch(SCHEMA, deadline=PROBE_SECONDS)

    def _claims_lost_since(self) -> float | None:
        return next((each.failing_since for each in self._services() if each.name == CLAIMER), None)

    def _notices(self) -> Finding:
        if self._listener.connected:
            return Finding()
        found = f"runs are found by polling, within {self._poll:g} s"
        if (why := self._listener.why_polling) is None:
            return Finding(Status.DEGRADED, f"not heard: {found}")
        return Finding(Status.OK if self._listener.polls_by_design else Status.DEGRADED, f"polling: {why}; {found}")


def _matching(found: Schema) -> Finding:
    """A worker goes on with a schema that is ahead of it, as it has to while a new version is rolled out, until a migration
    has taken away what it uses."""
    at = f"the schema is at revision {found.revision}"
    if not found.takes_this_code:
        oldest = found.oldest_code
        return Finding(Status.FAILING, f"{at}, which takes revision {oldest} or later, and this version's is {HEAD}")
    if not found.is_new_enough:
        return Finding(Status.FAILING, f"{at}, and this version needs {OLDEST}")
    assert found.revision is not None
    return Finding(Status.OK, f"{at}, newer than this version's {HEAD}") if found.revision > HEAD else Finding()
