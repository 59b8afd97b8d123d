"""`app.turns`: arming turns, ending them, and waiting for their endings, as one process does it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from datetime import timedelta
from typing import Any

from queue_service.app import enqueue as enqueueing
from queue_service.app.core import Core
from queue_service.app.messages import Messages, Mode, contested
from queue_service.db import channels
from queue_service.db.steps import MAX_TRIES
from queue_service.errors import ConfigError, DatabaseUnavailable, TurnEnded, TurnUnknown, ValueRefused
from queue_service.logs import get_logger
from queue_service.services.combiner import BUSY, Busy, Combiner
from queue_service.services.sweeper import about_turns
from queue_service.tasks import duration
from queue_service.turn import Input, Turn
from queue_service.turns import queries
from queue_service.turns.model import (
    EndedTurn,
    Marker,
    Outcome,
    Receipt,
    Standing,
    TurnEnding,
    TurnFailure,
    failed,
    key_of,
    may_name,
    replied,
)
from queue_service.turns.queries import Key, Owed, TurnCounts
from queue_service.words import check_word

log = get_logger(__name__)


class Turns:
    """Turns are owed exactly one ending each. Arming makes the promise; `commit_reply`, `fail`, `fail_deployment`,
    `reject` and the sweep compete to keep it, and the database lets one of them win, whatever crashes.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self._messages = Messages(core)
        self._arming: Combiner[Owed, bool | None] = Combiner(
            self._arm, name="arm", weigh=lambda owed: len(str(owed.fields["metadata"]))
        )
        self._ending: Combiner[Sequence[TurnEnding], Sequence[EndedTurn]] = Combiner(
            self._end, name="end", weigh=lambda endings: sum(len(ending.body) for ending in endings)
        )

    # The promise

    async def arm(
        self,
        turn: Turn,
        *,
        admission: timedelta | float | None = None,
        execution: timedelta | float | None = None,
        total: timedelta | float | None = None,
        conn: Any = None,
    ) -> bool:
        """Owe this turn an ending. Do this before any worker can see its message, and if it raises, do not go on.

        `admission` is how long it may wait for a worker's first sign of life, `execution` how long for each one after
        that, and `total` bounds the whole of it, however many signs of life there are (seconds or timedelta; by default the
        settings of those names). Returns True if it is armed now; False if it was armed before, and nothing changed. Raises
        TurnEnded, with the outcome, for one that has had its ending.
        """
        owed = self._owed(turn, admission, execution, total)
        for _ in range(MAX_TRIES):
            if conn is None:
                armed = await self._arming(owed)
            else:
                armed = (await self._core.fetch(queries.arm([owed]), conn)).get(owed.key)
            if armed:
                return True
            if armed is False and await self._stands(owed.key, conn):
                return False
        raise await contested(self._core, turn, conn)

    async def dispatch(
        self,
        turn: Turn,
        task: str,
        payload: Mapping[str, Any],
        /,
        *,
        admission: timedelta | float | None = None,
        execution: timedelta | float | None = None,
        total: timedelta | float | None = None,
        metadata: Mapping[str, Any] | None = None,
        conn: Any = None,
        **options: Any,
    ) -> int:
        """Arm a turn and enqueue the run that works on it, both or neither. Returns the id of the run.

        Takes the options of `enqueue`, except `singleton_key` and `on_conflict`: a turn has one run, and dispatching it
        again returns that one's id. The run's metadata says under `turn` which turn it is, and it is of the turn's
        organization. A turn that was only armed gets its run, and a fresh admission. Raises TurnEnded.
        """
        owed = self._owed(enqueueing.of_one_organization(turn, options), admission, execution, total)
        limit = self._core.settings.payload_limit
        run, notice = enqueueing.of_turn(self._core.tasks, limit, turn, task, payload, metadata, options)
        notifier = None if conn is not None else self._core.opened.notifier
        rides = notice is not None and (notifier is None or notifier.try_reserve(notice.channel))
        query = queries.dispatch(owed, run, notice if rides else None)
        for _ in range(MAX_TRIES):
            found = await self._core.fetch(query, conn)
            if found is None:
                continue
            if found.run_id is not None:
                if notice is not None and notifier is not None and not rides:
                    notifier.send([notice])
                return int(found.run_id)
            if found.kind is not None:
                await self._stands(owed.key, conn)
        raise await contested(self._core, turn, conn)

    async def send(
        self,
        turn: Turn,
        task: str,
        payload: Mapping[str, Any],
        /,
        *,
        admission: timedelta | float | None = None,
        execution: timedelta | float | None = None,
        total: timedelta | float | None = None,
        metadata: Mapping[str, Any] | None = None,
        mode: Mode = "queue",
        conn: Any = None,
        **options: Any,
    ) -> Receipt:
        """Take in a person's message: store it as an event of kind `message` in the turn's stream, and dispatch the turn,
        both or neither, and once. Sending it again, however often and from wherever, returns the same receipt.

        The event's body is `{"message_id", "user_id", "body": payload}`; the rest is as in `dispatch`. Where runs of its
        lane (`ordering_key`) are before it, an event of kind `queued` says how many: `{"message_id", "ahead"}`.

        `mode` says what a message does that comes while another one is answered. `queue`: it waits. `steer`: it is also
        offered to the handler at work (`Run.inputs`). `interrupt`: the turns of its stream that are being worked on end
        `cancelled`. The last two have the stream as their `ordering_key` unless they are given another, and their event
        says the mode. With `conn` all of it is part of the caller's transaction, which has the stream until it ends.
        Raises MessageConflict for another payload under a message id that was used, StreamEnded for a stream that is
        closing too.
        """
        owed = self._owed(enqueueing.of_one_organization(turn, options), admission, execution, total)
        return await self._messages.send(owed, turn, task, payload, metadata, options, mode, conn)

    async def unsend(self, deployment: str, message_id: str, *, conn: Any = None) -> bool:
        """Take a message back: its turn ends `cancelled` and its run is not begun. Returns False if it was begun, or has
        ended: then nothing has changed. With `conn` it is part of the caller's transaction."""
        return await self._messages.take_back(*key_of(deployment, message_id), conn)

    def inputs(self, turn: Turn, *, after: int = 0, wait: bool = True) -> AsyncGenerator[Input, None]:
        """Iterate over the messages that were sent to steer this turn, after a cursor, as `Run.inputs` does: each that was
        neither begun nor answered by then. Without `wait` it ends with those that are there."""
        return self._messages.inputs(turn, after=after, wait=wait)

    # Signs of life

    async def extend(self, deployment: str, *, conn: Any = None) -> list[str]:
        """Report a sign of life of a deployment: each of its turns has its whole `execution` before it again, except those
        withheld. Returns their message ids. With `conn` it is part of the caller's transaction, and nobody can end them
        before that does."""
        check_word(deployment, "deployment")
        return await self._core.fetch(queries.extend(deployment), conn)

    async def withhold(
        self,
        deployment: str | None,
        code: str,
        reason: str | None = None,
        *,
        organization_id: str | None = None,
        provider: str | None = None,
        conn: Any = None,
    ) -> list[str]:
        """Report that the deployment lives, but its provider failed: its turns are no longer extended, and if they lapse,
        they end with this code. Returns their message ids. `restore` takes it back.

        With None for the deployment, the turns of all of them, those of an organization, or those whose metadata names this
        `provider`: one outage, told by one call. It is about the turns that are owed their ending now.
        """
        failure = TurnFailure(code, reason=reason)
        outage = queries.outage(deployment, organization_id, provider)
        if outage is not None:
            return await self._core.fetch(queries.withhold_all(outage, failure.code, failure.reason), conn)
        return await self._core.fetch(queries.withhold(str(deployment), failure.code, failure.reason), conn)

    async def restore(
        self,
        deployment: str | None,
        *,
        organization_id: str | None = None,
        provider: str | None = None,
        conn: Any = None,
    ) -> list[str]:
        """Report that the provider recovered: a sign of life for the turns withheld. Returns their message ids. Which turns
        is said as in `withhold`."""
        outage = queries.outage(deployment, organization_id, provider)
        return await self._core.fetch(
            queries.restore(str(deployment)) if outage is None else queries.restore_all(outage), conn
        )

    async def reset_admission(self, deployment: str, message_id: str, *, conn: Any = None) -> bool:
        """Let the turn wait to be taken up again, as when it was released from behind another: it has its whole `admission`
        before it. Returns False if it is owed no ending."""
        return await self._core.fetch(queries.reset_admission(*key_of(deployment, message_id)), conn)

    # Endings

    async def commit_reply(
        self, deployment: str, message_ids: Collection[str], body: Mapping[str, Any], *, conn: Any = None
    ) -> list[str]:
        """End turns with a reply: one `reply` event for each, stored together with its end, which names all of several
        under `together`. Returns the ids this call ended; [] means that the reply came too late, and nothing was stored. Of
        several, a run that is still queued ends with its turn.

        A reply that cannot be stored is cleaned, and where that does not help, the turn ends with an error that says so.
        With `conn` the endings are part of the caller's transaction.
        """
        if isinstance(message_ids, str):
            raise ConfigError(f"message_ids is a list of ids, not the one text {message_ids!r}.")
        check_word(deployment, "deployment")
        limit = self._core.settings.payload_limit
        ids = [each for each in dict.fromkeys(message_ids) if may_name(each)]
        endings = [replied(deployment, each, body, limit, ids) for each in ids]
        for refused in (ending for ending in endings if ending.kind == "error"):
            log.error("a reply cannot be stored", deployment=deployment, message_id=refused.message_id)
        return [ended.message_id for ended in await self._decide(endings, conn)]

    async def fail(self, deployment: str, message_id: str, failure: TurnFailure, *, conn: Any = None) -> bool:
        """End a turn with an error. Returns False if it was not owed an ending any more (or never): nothing was stored."""
        return bool(await self._decide([failed(*key_of(deployment, message_id), failure)], conn))

    async def fail_deployment(self, deployment: str, failure: TurnFailure, *, conn: Any = None) -> list[str]:
        """End every turn of a deployment with an error, as when its process died. Returns their message ids. With `conn`
        the endings are part of the caller's transaction."""
        check_word(deployment, "deployment")
        notify = self._core.rides_along(channels.EVENTS, conn)
        ended = await self._core.fetch(queries.fail_deployment(deployment, failure, notify=notify), conn)
        self._notify_followers(ended, notify=notify)
        return [each.message_id for each in ended]

    async def reject(self, deployment: str, message_id: str, reason: str, *, conn: Any = None) -> Outcome:
        """A guardrail refuses the message: its turn ends with code `rejected` and the reason as its sentence. Returns the
        outcome that stands, which is another one where the turn had ended before. Either way the message must not be
        passed on; so must it not if this raises: TurnUnknown for a turn never armed, DatabaseUnavailable. `conn` as `fail`.
        """
        await self.fail(deployment, message_id, TurnFailure("rejected", reason), conn=conn)
        standing = await self._standing(key_of(deployment, message_id), conn)
        if standing.outcome is None:
            raise DatabaseUnavailable(f"Turn {message_id!r} was armed anew while it was rejected. Reject it again.")
        return standing.outcome

    async def discharge(self, deployment: str, message_id: str, *, conn: Any = None) -> bool:
        """Forget what is owed to a turn, without an event: for an operator who has answered by other means. Its outcome is
        `discharged`. Returns False if nothing was owed."""
        return await self._core.fetch(queries.discharge(*key_of(deployment, message_id)), conn)

    async def sweep(self) -> int:
        """End the turns whose deadline has passed, with the code they were withheld with, or else `worker_unresponsive`.
        Returns how many. Raises DatabaseRefused where one cannot be ended, after the others. Workers do this always."""
        return await self._core.opened.sweep_turns()

    # How turns stand

    async def is_live(self, deployment: str, message_id: str, *, conn: Any = None) -> bool:
        """Return True while this very turn is owed an ending and its deadline has not passed. What the turn needs to go
        on, such as a fresh credential, is given only then."""
        return await self._core.fetch(queries.is_live(*key_of(deployment, message_id)), conn)

    async def outcome(self, deployment: str, message_id: str, *, conn: Any = None) -> Outcome | None:
        """Return how the turn ended; None if it has not, or was never armed."""
        standing: Standing | None = await self._core.fetch(queries.standing(*key_of(deployment, message_id)), conn)
        return None if standing is None else standing.outcome

    async def wait(self, deployment: str, message_id: str, *, timeout: timedelta | float | None = None) -> Outcome:
        """Wait until the turn has ended, and return its outcome. This needs no worker to be alive: when the deadline
        passes, whoever waits ends the turn. Survives outages of the database. Raises TimeoutError after `timeout`,
        TurnUnknown for a turn never armed."""
        seconds = None if timeout is None else duration(timeout, "timeout").total_seconds()
        key = key_of(deployment, message_id)
        opened = self._core.opened
        try:
            async with asyncio.timeout(seconds):
                with opened.sweeping():
                    return await opened.outcomes.wait(key)
        except TimeoutError:
            raise TimeoutError(
                f"Turn {message_id!r} did not end within {seconds:g} s. It goes on; wait again."
            ) from None

    async def list(
        self,
        *,
        deployment: str | None = None,
        message_id: str | None = None,
        stream: str | None = None,
        platform: str | None = None,
        organization_id: str | None = None,
        overdue: bool = False,
        limit: int = 50,
        conn: Any = None,
    ) -> list[Marker]:
        """Return the turns that are owed an ending, in the order of their deadlines."""
        return await self._core.fetch(
            queries.page(
                deployment=deployment, message_id=message_id, stream=stream, platform=platform,
                organization_id=organization_id, overdue=overdue, limit=limit,
            ),
            conn,
        )  # fmt: skip

    async def tally(self, *, conn: Any = None) -> TurnCounts:
        """Return how many turns are owed an ending, how many are overdue, and for how long the oldest of them has been."""
        return await self._core.fetch(queries.tally(), conn)

    # Inside

    def _owed(
        self,
        turn: Turn,
        admission: timedelta | float | None,
        execution: timedelta | float | None,
        total: timedelta | float | None,
    ) -> Owed:
        settings = self._core.settings
        waits = settings.admission if admission is None else duration(admission, "admission", positive=True)
        works = settings.execution if execution is None else duration(execution, "execution", positive=True)
        # Who asks for a longer deadline than the setting allows as a whole is not to be cut short by it.
        whole = max(settings.total, waits, works) if total is None else duration(total, "total", positive=True)
        return Owed(turn.fields(settings.payload_limit), waits, works, whole)

    async def _arm(self, turns: Sequence[Owed]) -> Sequence[bool | None]:
        armed = await self._core.fetch(queries.arm(turns))
        answers = []
        for turn in turns:
            answers.append(armed.get(turn.key))
            # Of two calls for one turn the first armed it, and the second found it armed.
            if armed.get(turn.key):
                armed[turn.key] = False
        return answers

    async def _end(self, calls: Sequence[Sequence[TurnEnding]]) -> Sequence[Sequence[EndedTurn] | Busy]:
        """One statement for the endings of several calls. Of two calls for one turn, the first wins."""
        notify = self._core.opened.notifier.try_reserve(channels.EVENTS)
        ended, busy = await self._core.fetch(queries.end_free(calls, notify=notify))
        self._notify_followers(ended, notify=notify)
        unclaimed = {(each.deployment, each.message_id): each for each in ended}
        answers: list[Sequence[EndedTurn] | Busy] = []
        for call in calls:
            if busy and any((ending.deployment, ending.message_id) in busy for ending in call):
                answers.append(BUSY)
                continue
            mine = (unclaimed.pop((ending.deployment, ending.message_id), None) for ending in call)
            answers.append([each for each in mine if each is not None])
        return answers

    async def _decide(self, endings: Sequence[TurnEnding], conn: Any) -> Sequence[EndedTurn]:
        if not endings:
            return []
        if conn is not None:
            return await self._core.fetch(queries.end(endings, notify=True), conn)
        try:
            return await self._ending(endings)
        except ValueRefused as refused:
            # What our own look at it let pass, the database did not. The turn is owed an ending all the same.
            log.error("the database refused a reply", deployment=endings[0].deployment, why=type(refused).__name__)
            why = TurnFailure("reply_refused", reason=f"The database could not store the reply: {refused}")
            return await self._ending([failed(each.deployment, each.message_id, why) for each in endings])

    def _notify_followers(self, ended: Collection[EndedTurn], *, notify: bool) -> None:
        if ended and not notify:
            self._core.opened.notifier.send(about_turns(ended))

    async def _standing(self, key: Key, conn: Any) -> Standing:
        standing: Standing | None = await self._core.fetch(queries.standing(*key), conn)
        if standing is None:
            raise TurnUnknown(*key)
        return standing

    async def _stands(self, key: Key, conn: Any) -> bool:
        """True for a turn that is owed its ending; False for one that was forgotten at this moment, or whose marker was
        deleted by hand."""
        standing: Standing | None = await self._core.fetch(queries.standing(*key), conn)
        if standing is not None and standing.outcome is not None:
            raise TurnEnded(*key, standing.outcome)
        return standing is not None and standing.seconds_left is not None
