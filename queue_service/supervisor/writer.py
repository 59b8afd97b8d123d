"""Stores what a deployment's child says, in the order it was said, and until the database takes it.

Events between two answers go together, in one statement for each stream; an answer waits for the events before it. Nothing
is stored while it is not sure that the deployment is ours, and nothing more once it is another's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from typing import Any, NamedTuple, TypeVar

from queue_service.app import App
from queue_service.app.events import Origin
from queue_service.backoff import Pauses
from queue_service.db.execute import NOT_EXECUTED
from queue_service.errors import ConfigError, PayloadRefused, StreamEnded
from queue_service.events.model import Event
from queue_service.exceptions import type_name
from queue_service.logs import get_logger
from queue_service.supervisor.given import GivenTurns
from queue_service.supervisor.lease import Lease
from queue_service.supervisor.protocol import ChildLine, EventLine, FailLine, ReplyLine, RestoreLine, WithholdLine
from queue_service.turn import Turn
from queue_service.turns.model import TurnFailure, known_code

log = get_logger(__name__)

T = TypeVar("T")

# Between two tries to reach the database, in seconds.
FIRST_PAUSE, LAST_PAUSE = 0.05, 2.0
# For an event to be on its way to its platform.
DELIVER_SECONDS = 5.0
# What cannot be stored however often it is sent.
HOPELESS = (ConfigError, PayloadRefused, StreamEnded)


Deliver = Callable[[Turn, Event], Awaitable[object]]


class Said(NamedTuple):
    """An event that the child said; `turn` and `by` are None where it is about what was only offered."""

    kind: str
    body: Any
    turn: Turn | None
    by: Origin | None


class Writer:
    """`deliver` is called with the events of the kinds `delivered`, once they are stored; `late` with the ids of turns
    whose answer came after their ending; and `done` when there is room."""

    def __init__(
        self,
        app: App,
        deployment: str,
        given: GivenTurns,
        lease: Lease,
        *,
        deliver: Deliver | None,
        delivered: Collection[str],
        late: Callable[[list[str]], None],
        done: Callable[[], None],
    ) -> None:
        self._app = app
        self._deployment = deployment
        self._given = given
        self._lease = lease
        self._deliver = deliver
        self._delivered = frozenset(delivered) if deliver is not None else frozenset()
        self._late = late
        self._done = done
        self._log = log.bind(deployment=deployment)
        self._inbox: list[ChildLine] = []
        self._news = asyncio.Event()
        self._closed = False
        self._withheld: WithholdLine | None = None

    @property
    def left(self) -> int:
        return len(self._inbox)

    def turn_given(self) -> None:
        """A turn is given to the child."""
        if self._withheld is not None:
            # Armed since the provider failed, it would be extended by every beat.
            self.put(self._withheld)

    def put(self, said: ChildLine) -> None:
        self._inbox.append(said)
        self._news.set()

    def close(self) -> None:
        self._closed = True
        self._news.set()

    async def run(self) -> None:
        """Until `close` was called and all is stored."""
        while self._inbox or not self._closed:
            await self._news.wait()
            self._news.clear()
            said, self._inbox = self._inbox, []
            events: dict[str, list[Said]] = {}
            for each in said:
                if isinstance(each, EventLine):
                    self._collect(each, events)
                else:
                    await self._append(events)
                    await self._answer(each)
            await self._append(events)
            if not self._inbox:
                self._done()

    def _collect(self, event: EventLine, events: dict[str, list[Said]]) -> None:
        stream = self._given.stream_of(event.message_id)
        if stream is None:
            self._log.info("an event of no turn of this child was dropped", message_id=event.message_id)
        else:
            given = self._given.get(event.message_id)
            turn, by = (None, None) if given is None else (given.turn, given.by)
            said = Said(event.kind, event.body, turn, by)
            events.setdefault(stream, []).append(said)

    async def _append(self, events: dict[str, list[Said]]) -> None:
        async with asyncio.TaskGroup() as group:
            for stream, several in events.items():
                group.create_task(self._append_to(stream, several))
        events.clear()

    async def _append_to(self, stream: str, events: list[Said]) -> None:
        try:
            new = [(each.kind, each.body, each.by) for each in events]
            seqs = await self._persist("events", lambda: self._app.events.append_of(stream, new))
        except HOPELESS as refused:
            if len(events) > 1:
                for event in events:
                    await self._append_to(stream, [event])
            else:
                self._log.warning("an event was refused", stream=stream, why=type(refused).__name__)
        else:
            for seq, each in zip(seqs, events, strict=False):
                if each.turn is not None and each.kind in self._delivered:
                    await self._send(each.turn, Event(stream=stream, seq=seq, kind=each.kind, body=each.body))

    async def _send(self, turn: Turn, event: Event) -> None:
        """Best effort: it is in the stream."""
        assert self._deliver is not None
        try:
            async with asyncio.timeout(DELIVER_SECONDS):
                await self._deliver(turn, event)
        except Exception as failed:  # noqa: BLE001 - whatever it is, what the child says next is stored
            self._log.error("an event was not delivered", stream=turn.stream, seq=event.seq, why=type_name(failed))

    async def _answer(self, said: ChildLine) -> None:
        try:
            match said:
                case ReplyLine(message_ids, body):
                    await self._end(
                        message_ids, lambda: self._app.turns.commit_reply(self._deployment, message_ids, body)
                    )
                case FailLine(message_id, code, message, reason):
                    failure = TurnFailure(known_code(code) or code, message, reason)
                    await self._end([message_id], lambda: self._fail_one(message_id, failure))
                case WithholdLine(code, reason):
                    self._withheld = WithholdLine(known_code(code) or code, reason)
                    code = self._withheld.code
                    await self._persist("withhold", lambda: self._app.turns.withhold(self._deployment, code, reason))
                case RestoreLine():
                    self._withheld = None
                    await self._persist("restore", lambda: self._app.turns.restore(self._deployment))
        except HOPELESS as refused:
            self._log.error("what a child said was refused", what=type(said).__name__, why=type(refused).__name__)

    async def _fail_one(self, message_id: str, failure: TurnFailure) -> list[str]:
        return [message_id] if await self._app.turns.fail(self._deployment, message_id, failure) else []

    async def _end(self, message_ids: list[str], end: Callable[[], Awaitable[list[str]]]) -> None:
        ended = await self._persist("the ending of a turn", end)
        self._given.ended(message_ids)
        late = [message_id for message_id in message_ids if message_id not in ended]
        if late:
            self._log.warning("an answer came too late and was dropped", message_ids=late)
            self._late(late)

    async def fail_given(self, failure: TurnFailure) -> list[str]:
        """The crash path: what the child had of us ends now, or as soon as the database can be reached. Returns the ids of
        what this ended."""
        tries = [self._fail_given_one(message_id, failure) for message_id in self._given.message_ids]
        ended = [message_id for each in await asyncio.gather(*tries) for message_id in each]
        if ended:
            self._log.warning("turns ended with their child", code=failure.code, count=len(ended))
        return ended

    async def _fail_given_one(self, message_id: str, failure: TurnFailure) -> list[str]:
        """Whatever comes of it, the others get their endings."""
        try:
            return await self._persist("the end of a child", lambda: self._fail_one(message_id, failure))
        except HOPELESS as refused:
            self._log.error("a turn cannot be ended", message_id=message_id, why=type(refused).__name__)
            return []
        finally:
            self._given.ended([message_id])

    async def _persist(self, what: str, write: Callable[[], Awaitable[list[T]]]) -> list[T]:
        """Try until the database takes it. A write whose answer was lost may be made twice: an ending then counts once,
        and an event comes twice. Returns [] where the deployment is not ours any more."""
        pauses = Pauses(FIRST_PAUSE, LAST_PAUSE)
        while await self._lease.is_ours():
            try:
                return await write()
            except HOPELESS:
                raise
            except NOT_EXECUTED as lost:
                self._log.error("the database did not take what a child left; trying again", what=what, why=repr(lost))
            await asyncio.sleep(pauses.next())
        self._log.error("what a child said is dropped: the deployment is another's", what=what)
        return []
