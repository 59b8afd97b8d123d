"""Messages of people: taken in once, offered to the handler at work, and taken back. What is asked of a message is asked
again when it is sent again, so that an answer which was lost costs nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Literal, get_args

import msgspec
from psycopg import errors as pg

from queue_service.app import enqueue as enqueueing
from queue_service.app.core import Core
from queue_service.db import channels
from queue_service.db.channels import Notice
from queue_service.db.query import Query
from queue_service.db.steps import MAX_TRIES
from queue_service.errors import (
    ConfigError,
    DatabaseRefused,
    DatabaseUnavailable,
    MessageConflict,
    QueueServiceError,
    StreamEnded,
    nearest,
)
from queue_service.events import queries as events
from queue_service.events.model import Event
from queue_service.runs.queries import hidden_from, take_back
from queue_service.turn import Input, Turn
from queue_service.turns import queries
from queue_service.turns.model import Receipt
from queue_service.turns.queries import Owed, Sent

Mode = Literal["queue", "steer", "interrupt"]

PAGE = 200


class Messages:
    def __init__(self, core: Core) -> None:
        self._core = core

    async def send(
        self,
        owed: Owed,
        turn: Turn,
        task: str,
        payload: Mapping[str, Any],
        metadata: Mapping[str, Any] | None,
        options: Mapping[str, Any],
        mode: Mode,
        conn: Any,
    ) -> Receipt:
        """As `Turns.send` says."""
        if mode not in get_args(Mode):
            raise ConfigError(f"mode must be one of {', '.join(get_args(Mode))}.{nearest(str(mode), get_args(Mode))}")
        if mode != "queue":
            options = {"ordering_key": turn.stream, **options}
        limit = self._core.settings.payload_limit
        run, notice = enqueueing.of_turn(self._core.tasks, limit, turn, task, payload, metadata, options)
        said = {"message_id": turn.message_id, "user_id": turn.user_id, "body": msgspec.Raw(run["payload"].encode())}
        if mode != "queue":
            said |= {"mode": mode, "deployment": turn.deployment}
        digest = hashlib.sha256(msgspec.json.encode([turn.stream, task, payload], order="sorted")).hexdigest()
        message = msgspec.json.encode(said).decode()
        if conn is not None:
            receipt = await self._sent(
                owed, turn, queries.send(owed, run, message, digest, notice, notify=True), digest, conn
            )
        else:
            receipt = await self._sent_and_noticed(owed, turn, run, message, digest, notice)
        if mode == "interrupt":
            await self._interrupt(turn, conn)
        return receipt

    async def _sent_and_noticed(
        self, owed: Owed, turn: Turn, run: dict[str, Any], message: str, digest: str, notice: Notice | None
    ) -> Receipt:
        notifier = self._core.opened.notifier
        rides = notice is not None and notifier.try_reserve(notice.channel)
        notify = notifier.try_reserve(channels.EVENTS)
        query = queries.send(owed, run, message, digest, notice if rides else None, notify=notify)
        receipt = await self._sent(owed, turn, query, digest, None)
        if receipt.new:
            notifier.send([] if notice is None or rides else [notice])
            notifier.send([] if notify else channels.appended({turn.stream: receipt.seq}))
        return receipt

    async def _sent(self, owed: Owed, turn: Turn, query: Query[Sent | None], digest: str, conn: Any) -> Receipt:
        for _ in range(MAX_TRIES):
            try:
                sent = await self._core.fetch(query, conn)
            except pg.NotNullViolation:
                # The stream was closed at this moment; the next look sees that. A caller's transaction has failed with it.
                if conn is not None:
                    raise StreamEnded(turn.stream) from None
                continue
            if sent is None:
                continue
            if sent.word == "ended":
                raise StreamEnded(turn.stream)
            if sent.seq is None or sent.digest != digest:
                raise MessageConflict(*owed.key)
            return Receipt(
                deployment=turn.deployment, message_id=turn.message_id, stream=turn.stream, seq=sent.seq,
                new=sent.word == "sent",
            )  # fmt: skip
        raise await contested(self._core, turn, conn)

    async def _interrupt(self, turn: Turn, conn: Any) -> None:
        """The handlers at work are cancelled once their turns have ended: what they still do comes too late."""
        ended = await self._core.fetch(queries.interrupt(turn.deployment, turn.message_id), conn)
        runs = [run_id for _, run_id in ended if run_id is not None]
        if runs:
            await self._core.announce([channels.about_runs(channels.CANCEL, runs)], conn)

    async def take_back(self, deployment: str, message_id: str, conn: Any) -> bool:
        """As `Turns.unsend` says."""
        run_id = await self._core.fetch(take_back(deployment, message_id), conn)
        if run_id is not None:
            await self._core.announce([channels.about_runs(channels.FINISHED, [run_id])], conn)
        return run_id is not None

    async def inputs(self, turn: Turn, *, after: int, wait: bool) -> AsyncGenerator[Input, None]:
        """As `Turns.inputs` says."""
        # What came before the message itself was not meant for its answer.
        seq = await self._core.fetch(queries.message_seq(turn.deployment, turn.message_id))
        after = max(after, seq or 0)
        stream = self._core.opened.fanout.follow(turn.stream, after) if wait else self._stored(turn.stream, after)
        async with contextlib.aclosing(stream) as found:
            async for event in found:
                given = _steering(event)
                if given is None or given.message_id == turn.message_id:
                    continue
                if await self._core.fetch(queries.waits(turn.deployment, given.message_id)):
                    yield given

    async def _stored(self, stream: str, after: int) -> AsyncGenerator[Event, None]:
        while page := await self._core.fetch(events.read(stream, after=after, limit=PAGE)):
            for event in page:
                yield event
            after = page[-1].seq


def _steering(event: Event) -> Input | None:
    """The message that an event has, if it was sent to steer. Anybody may append what looks like one."""
    body = event.body
    if event.kind != "message" or not isinstance(body, Mapping) or body.get("mode") != "steer":
        return None
    message_id, user_id = body.get("message_id"), body.get("user_id")
    if not isinstance(message_id, str):
        return None
    return Input(
        message_id=message_id,
        seq=event.seq,
        user_id=user_id if isinstance(user_id, str) else None,
        body=body.get("body"),
    )


async def contested(core: Core, turn: Turn, conn: Any) -> QueueServiceError:
    """The turn changed each time it was looked at, or there is one that is not to be seen."""
    if await core.fetch(hidden_from(), conn):
        return DatabaseRefused(
            f"Deployment {turn.deployment!r} has a turn {turn.message_id!r} already, which is another organization's and "
            "hidden from this role. Give the message an id of its own."
        )
    return DatabaseUnavailable(
        f"Turn {turn.message_id!r} was armed and forgotten {MAX_TRIES} times while we looked at it."
    )
