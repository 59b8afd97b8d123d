"""`app.events`: the streams, as one process uses them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Collection, Iterable, Sequence
from typing import Any

from queue_service import codec, logs
from queue_service.app.core import Core
from queue_service.db import channels
from queue_service.errors import ConfigError, StreamEnded
from queue_service.events import queries
from queue_service.events.model import Event, Stream, StreamState, check_kind
from queue_service.events.queries import NewEvent
from queue_service.services.combiner import BUSY, Busy, Combiner
from queue_service.words import check_word

# The id of the run that appends an event, and its attempt.
Origin = tuple[int, int]

MAX_READ = 1_000
DEFAULT_READ = 200
# So many events one statement looks at, in search of a kind.
SCAN = 10_000
MAX_SEQ = 2**63 - 1
TRIM_BATCH = 5_000


class Events:
    """Durable streams of events, one for each conversation. The order of `seq` is the order of commits, without gaps."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._appending: Combiner[Sequence[NewEvent], Sequence[int | None]] = Combiner(
            self._append, name="append", weigh=lambda events: sum(len(event.body) for event in events)
        )

    async def append(self, stream: str, kind: str, body: Any = None, *, conn: Any = None) -> int:
        """Store an event at the end of a stream, which is created by its first one. Returns its seq.

        `kind` is `delta`, `status`, `card` or a word of your own; `reply` and `error` are how turns end, and not for
        appending. With `conn` the event is part of the caller's transaction, which then holds up whoever else writes to
        this stream. Raises StreamEnded, PayloadRefused, ConfigError.
        """
        seqs = await self.append_many(stream, [(kind, body)], conn=conn)
        return seqs[0]

    async def append_many(self, stream: str, events: Iterable[tuple[str, Any]], *, conn: Any = None) -> list[int]:
        """Store several events of one stream, given as (kind, body), one after the other and nothing between them. In the
        handler of a run that works on a turn of the stream, each says of which attempt it is."""
        by = running_on(stream)
        return await self.append_of(stream, [(kind, body, by) for kind, body in events], conn=conn)

    async def append_of(
        self, stream: str, events: Iterable[tuple[str, Any, Origin | None]], *, conn: Any = None
    ) -> list[int]:
        """As `append_many`, for whoever appends on behalf of runs: (kind, body, id of the run and its attempt)."""
        check_word(stream, "stream")
        new = [self._new(stream, kind, body, by) for kind, body, by in events]
        if not new:
            return []
        seqs: Sequence[int | None]
        if conn is None:
            seqs = await self._appending(new)
        else:
            seqs = await self._core.fetch(queries.append(new, notify=True), conn)
        stored = [seq for seq in seqs if seq is not None]
        if len(stored) < len(new):
            raise StreamEnded(stream)
        return stored

    async def read(
        self,
        stream: str,
        *,
        after: int = 0,
        limit: int | None = None,
        kinds: Collection[str] | None = None,
        last: int | None = None,
        conn: Any = None,
    ) -> list[Event]:
        """Return up to `limit` events after a cursor (200, if not said), or the `last` so many of the stream; of these
        `kinds`, or of all. In order, either way. A jump in `seq` is where events were trimmed, or are of other kinds.

        Kinds are in no index. To find what is rare, all events between are looked at, 10,000 with each statement, which
        takes some milliseconds. With `conn`, what the caller's transaction sees. Raises ConfigError.
        """
        if last is not None:
            if after or limit is not None:
                raise ConfigError(
                    "last= counts from the end of the stream: it goes with kinds=, not with after= or limit=."
                )
            _check_count(last, "last")
            return await self._read_last(stream, last, _kinds(kinds), conn)
        limit = DEFAULT_READ if limit is None else limit
        _check_range(after, limit)
        if kinds is None:
            return await self._core.fetch(queries.read(stream, after=after, limit=limit), conn)
        return await self._read_kinds(stream, after, limit, _kinds(kinds) or [], conn)

    async def _read_kinds(self, stream: str, after: int, limit: int, kinds: list[str], conn: Any) -> list[Event]:
        events: list[Event] = []
        looked = SCAN if kinds else 0
        while looked == SCAN and len(events) < limit:
            wanted = limit - len(events)
            found = await self._core.fetch(
                queries.read_kinds(stream, after=after, kinds=kinds, limit=wanted, scan_limit=SCAN), conn
            )
            events += found.events
            after, looked = found.place or after, found.looked
        return events

    async def _read_last(self, stream: str, count: int, kinds: list[str] | None, conn: Any) -> list[Event]:
        events: list[Event] = []
        looked, before = SCAN if kinds != [] else 0, MAX_SEQ
        scan_limit = count if kinds is None else SCAN
        while looked == SCAN and len(events) < count:
            wanted = count - len(events)
            found = await self._core.fetch(
                queries.read_last(stream, before=before, kinds=kinds, limit=wanted, scan_limit=scan_limit), conn
            )
            events = found.events + events
            before, looked = found.place or before, found.looked
        return events

    async def head(self, stream: str, *, conn: Any = None) -> int:
        """Return the seq of the latest event; 0 for a stream without any."""
        found: Stream | None = await self._core.fetch(queries.stream(stream), conn)
        return 0 if found is None else found.head

    async def follow(self, stream: str, *, after: int = 0) -> AsyncGenerator[Event, None]:
        """Iterate over every event after a cursor: first what is stored, then each as it is committed, whoever wrote it,
        on any replica.

        Nothing is left out: where events were trimmed, one of kind `gap` says which (`body["from"]` to `body["to"]`).
        Ends when the stream has ended and all of it was given. Survives outages of the database while it waits.
        """
        _check_range(after, 1)
        opened = self._core.opened
        # Who follows a conversation waits for its endings, and needs no worker to be alive for them.
        with opened.sweeping():
            async with contextlib.aclosing(opened.fanout.follow(stream, after)) as events:
                async for event in events:
                    yield event

    async def stream(self, stream: str, *, conn: Any = None) -> Stream | None:
        """Return a stream's head and state; None if it does not exist yet."""
        return await self._core.fetch(queries.stream(stream), conn)

    async def set_state(self, stream: str, state: StreamState | str, *, conn: Any = None) -> int:
        """Put a stream into a state (see StreamState), creating it where it does not exist. Returns its head.

        An `ended` stream takes no more events but the endings of turns that are still owed one, and its followers end.
        A `suspended` or `ended` one is not expected to move, and is looked at less often where a notice is lost. With
        `conn` it is part of the caller's transaction.
        """
        check_word(stream, "stream")
        try:
            known = StreamState(state)
        except ValueError:
            raise ConfigError(f"{state!r} is no state of a stream. Use one of {', '.join(StreamState)}.") from None
        return await self._core.fetch(queries.set_state(stream, known), conn)

    async def trim(self, stream: str, *, upto: int, conn: Any = None) -> int:
        """Delete the events up to a seq, except endings, which stay for as long as their turns are remembered. Returns how
        many went. A reader who comes for them later gets an event about the gap. With `conn` it is part of the caller's
        transaction."""
        count = 0
        while cut := await self._core.fetch(queries.trim(stream, upto=upto, limit=TRIM_BATCH), conn):
            count += cut
            if cut < TRIM_BATCH:
                break
        return count

    def _new(self, stream: str, kind: str, body: Any, by: Origin | None) -> NewEvent:
        check_kind(kind)
        return NewEvent(stream, kind, codec.dumps(body, what="body", limit=self._core.settings.payload_limit), by)

    async def _append(self, calls: Sequence[Sequence[NewEvent]]) -> Sequence[Sequence[int | None] | Busy]:
        flat = [event for call in calls for event in call]
        notifier = self._core.opened.notifier
        notify = notifier.try_reserve(channels.EVENTS)
        seqs = await self._core.fetch(queries.append_free(flat, notify=notify))
        if not notify:
            heads = {event.stream: seq for event, seq in zip(flat, seqs, strict=True) if seq}
            notifier.send(channels.appended(heads))
        answers: list[Sequence[int | None] | Busy] = []
        at = 0
        for call in calls:
            # The events of a call are of one stream: it is busy for all of them or for none.
            answers.append(BUSY if seqs[at] == queries.BUSY else seqs[at : at + len(call)])
            at += len(call)
        return answers


def running_on(stream: str) -> Origin | None:
    """The run whose handler this is and its attempt, if it works on a turn of the stream."""
    run = logs.running.get()
    turn = None if run is None else run.turn
    return None if run is None or turn is None or turn.stream != stream else (run.id, run.attempt)


def _check_range(after: int, limit: int) -> None:
    if isinstance(after, bool) or not isinstance(after, int) or after < 0:
        raise ConfigError(f"after is a seq, a whole number from 0, not {after!r}.")
    _check_count(limit, "limit")


def _check_count(count: int, what: str) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_READ:
        raise ConfigError(f"{what} is a whole number from 1 to {MAX_READ:,}, not {count!r}.")


def _kinds(kinds: Collection[str] | None) -> list[str] | None:
    if kinds is None:
        return None
    if isinstance(kinds, (str, bytes)) or not isinstance(kinds, Collection):
        raise ConfigError(f'kinds is a list of kinds, such as ["message", "reply"], not {kinds!r}.')
    listed = list(kinds)
    for kind in listed:
        check_word(kind, "A kind")
    return listed
