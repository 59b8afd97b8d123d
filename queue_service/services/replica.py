"""One replica of the gateway among the others: any of them takes a request about a connection, and the one that holds the
connection carries it out.

The request goes through the database, and a notice only says when to look; without notices the poll finds it. A replica
that does not live is not asked, and nobody waits longer than PATIENCE for one that does not answer. A request is too old
to be carried out before its asker gives up, so what was asked later is not undone by it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta

import msgspec

from queue_service.db.channels import GATEWAYS, Notice, Notify
from queue_service.db.execute import NOT_EXECUTED
from queue_service.db.listener import Listener, NoticesMissed
from queue_service.db.query import Fetch
from queue_service.exceptions import message, rendered
from queue_service.logs import get_logger
from queue_service.replicas import model, queries
from queue_service.replicas.model import Asked, Change, Done, Owner, Request
from queue_service.services.combiner import Combiner
from queue_service.services.loop import Service, Services, every

log = get_logger(__name__)

# A replica says so often that it lives, and counts as living for so long after.
BEAT = timedelta(seconds=5)
LEASE = timedelta(seconds=20)
# One that has been silent for so long is forgotten.
SILENCE = timedelta(minutes=1)
LEAVE_SECONDS = 2.0
# For so long a request may be carried out, and for so many seconds its asker waits: longer by more than a look takes.
LIFETIME = timedelta(seconds=1.5)
PATIENCE = 2.0
# Requests that wait here for another replica; one more is refused.
MAX_WAITING = 2_000
AT_ONCE = 500
# Seconds between looks where no notice comes: while nobody waits here, and while somebody does.
QUIET_POLL, WAITING_POLL = 1.0, 0.25
LOOK_PAUSE = 0.1

LEASE_SERVICE = "lease of this replica"
NOTICES_SERVICE = "notices for this replica"
REQUESTS_SERVICE = "requests to this replica"


class Replica:
    """`id` is new for each App that is opened, so a process that starts again is nobody's heir."""

    def __init__(
        self, fetch: Fetch, notify: Notify, listener: Listener, services: Services, *, poll_interval: float
    ) -> None:
        self.id = secrets.token_urlsafe(9)
        self._fetch = fetch
        self._notify = notify
        self._listener = listener
        self._services = services
        self._quiet_poll = min(poll_interval, QUIET_POLL)
        self._connections: dict[str, tuple[Owner, Callable[[Change], None]]] = {}
        self._asking: Combiner[tuple[str, Request], bool] = Combiner(
            self._ask, name="ask", weigh=lambda item: len(item[1].body)
        )
        self._numbers = itertools.count(1)
        self._waiting: dict[str, asyncio.Future[Done]] = {}
        self._wake = asyncio.Event()
        self._joined = 0

    # Life

    @asynccontextmanager
    async def joined(self) -> AsyncIterator[None]:
        """Be one of the replicas for the length of the block. Raises DatabaseUnavailable: nobody may hold a connection here
        that the others are not able to find."""
        await self._fetch(queries.beat(self.id, LEASE))
        self._joined += 1
        self._services.ensure(LEASE_SERVICE, every(BEAT, self._beat))
        self._services.ensure(NOTICES_SERVICE, self._listen)
        self._services.ensure(REQUESTS_SERVICE, self._serve)
        try:
            yield
        finally:
            self._joined -= 1
            if not self._joined:
                await self._leave()

    async def _beat(self) -> None:
        await self._fetch(queries.beat(self.id, LEASE))
        await self._fetch(queries.prune(SILENCE))

    async def _leave(self) -> None:
        beating = [each.task for each in self._services if each.name == LEASE_SERVICE and each.task is not None]
        for name in (LEASE_SERVICE, NOTICES_SERVICE, REQUESTS_SERVICE):
            self._services.stop(name)
        try:
            async with asyncio.timeout(LEAVE_SECONDS):
                # Or a beat that is under way would enter us again.
                await asyncio.gather(*beating, return_exceptions=True)
                self._wake_askers(await self._fetch(queries.leave(self.id)))
        except (TimeoutError, *NOT_EXECUTED) as lost:
            log.info("this replica could not say that it leaves; its lease will lapse", why=message(lost))

    # Connections

    def new_connection_id(self) -> str:
        """As hard to guess as a key, though it is no credential: each request is authorized by itself."""
        return model.id_of(self.id, secrets.token_urlsafe(24))

    @contextmanager
    def holding(self, connection: str, owner: Owner, change: Callable[[Change], None]) -> Iterator[None]:
        """Hold a connection for the length of the block: what its owner asks for, through any replica, is given to
        `change`."""
        self._connections[connection] = (owner, change)
        try:
            yield
        finally:
            del self._connections[connection]

    async def change(self, connection: str, owner: Owner, change: Change) -> Done:
        """Change what a connection watches, whichever replica holds it. Returns within about PATIENCE seconds. Raises
        DatabaseUnavailable."""
        asked, replica = Asked(connection, owner, change), model.replica_of(connection)
        if replica == self.id:
            return self._carry_out(asked)
        if len(self._waiting) >= MAX_WAITING:
            return Done.UNANSWERED
        request = Request(model.id_of(self.id, str(next(self._numbers))), model.encode(asked))
        answer: asyncio.Future[Done] = asyncio.get_running_loop().create_future()
        self._waiting[request.id] = answer
        try:
            if not await self._asking((replica, request)):
                return Done.GONE
            self._notify([Notice(GATEWAYS, replica)])
            async with asyncio.timeout(PATIENCE):
                return await answer
        except TimeoutError:
            log.warning("another replica did not answer in time", replica=replica, seconds=PATIENCE)
            return Done.UNANSWERED
        finally:
            del self._waiting[request.id]

    def _carry_out(self, asked: Asked) -> Done:
        owner, change = self._connections.get(asked.connection, (None, None))
        # In the same words as for one that does not exist.
        if change is None or owner != asked.owner:
            return Done.GONE
        change(asked.change)
        return Done.APPLIED

    # Requests

    async def _ask(self, items: Sequence[tuple[str, Request]]) -> Sequence[bool]:
        stored = await self._fetch(queries.ask(items, LIFETIME))
        return [request.id in stored for _, request in items]

    def _wake_askers(self, requests: Iterable[str]) -> None:
        """Those of these requests, which have an answer now."""
        self._notify([Notice(GATEWAYS, replica) for replica in dict.fromkeys(map(model.replica_of, requests))])

    async def _listen(self, service: Service) -> None:
        with self._listener.subscribed(GATEWAYS) as notices:
            async for heard in notices:
                if isinstance(heard, NoticesMissed) or heard.payload == self.id:
                    self._wake.set()
                service.well()

    async def _serve(self, service: Service) -> None:
        """Take answers and answer requests, as often as there is something to read."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WAITING_POLL if self._waiting else self._quiet_poll):
                    await self._wake.wait()
            self._wake.clear()
            try:
                await self._take_answers()
                await self._answer()
            except Exception as lost:  # noqa: BLE001 - the next look may go through
                service.failed(lost)
                self._wake.set()
                await asyncio.sleep(LOOK_PAUSE)
            else:
                service.well()

    async def _take_answers(self) -> None:
        if not self._waiting:
            return
        for request_id, done in (await self._fetch(queries.take_answers(list(self._waiting)))).items():
            answer = self._waiting.get(request_id)
            if answer is not None and not answer.done():
                answer.set_result(done)

    async def _answer(self) -> None:
        while requests := await self._fetch(queries.asked(self.id, limit=AT_ONCE)):
            answers = {request.id: self._answer_to(request) for request in requests}
            await self._fetch(queries.answer(answers))
            self._wake_askers(answers)

    def _answer_to(self, request: Request) -> Done:
        """One that cannot be carried out, or is of a later version, is so for its asker only."""
        try:
            return self._carry_out(model.decode(request.body))
        except msgspec.DecodeError as unknown:
            log.warning("another replica asks for what this one does not know", request=request.id, why=str(unknown))
        except Exception as broken:  # noqa: BLE001 - the others are answered
            log.error(
                "a connection could not be changed",
                request=request.id,
                why=message(broken),
                exception=rendered(broken),
            )
        return Done.FAILED
