"""The operations on streams and events, as values: one function per statement of `statements.sql`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import NamedTuple

from queue_service.codec import read_body
from queue_service.db.query import Query, Rows, found, json_literal, scalar
from queue_service.db.rows import flaw_of
from queue_service.db.statements import Statements
from queue_service.events.model import Event, Stream, StreamState

SQL = Statements("queue_service.events")


BUSY = 0


class NewEvent(NamedTuple):
    """`body` is JSON text; `by` the run that appends it and its attempt, where it works on a turn of the stream."""

    stream: str
    kind: str
    body: str
    by: tuple[int, int] | None = None


def append(events: Sequence[NewEvent], *, notify: bool) -> Query[list[int | None]]:
    """The seq of each event, in the order given; None for one whose stream has ended. With `notify`, notices go out with
    the commit."""
    return _append("append", events, notify)


def append_free(events: Sequence[NewEvent], *, notify: bool) -> Query[list[int | None]]:
    """As `append`, waiting for nobody: BUSY for an event whose stream another session is writing to."""
    return _append("append_free", events, notify)


def _append(statement: str, events: Sequence[NewEvent], notify: bool) -> Query[list[int | None]]:
    texts = [
        f'{{"stream":{json_literal(each.stream)},"kind":{json_literal(each.kind)},"body":{each.body}{_origin(each)}}}'
        for each in events
    ]

    def decode(rows: Rows) -> list[int | None]:
        seqs: list[int | None] = [None] * len(events)
        for place, seq, _ in rows:
            seqs[place - 1] = seq
        return seqs

    return SQL.query(statement, decode, events="[" + ",".join(texts) + "]", notify=notify)


def reset(stream: str, deployment: str, message_id: str, by: tuple[int, int]) -> Query[bool]:
    """Whether there was something to forget of the attempts before this one. Followers are notified with the commit."""
    return SQL.query(
        "reset", found, stream=stream, deployment=deployment, message_id=message_id, run_id=by[0], attempt=by[1]
    )


def read(stream: str, *, after: int, limit: int) -> Query[list[Event]]:
    return SQL.query("read", _events, stream=stream, after=after, limit=limit)


class Found(NamedTuple):
    """What a bounded walk found, in order; where the next one begins; and how many events it looked at."""

    events: list[Event]
    place: int | None
    looked: int


def read_kinds(stream: str, *, after: int, kinds: Sequence[str], limit: int, scan_limit: int) -> Query[Found]:
    """Of the next `scan_limit` events after a cursor, those of these kinds."""
    return SQL.query(
        "read_kinds", _found, stream=stream, after=after, kinds=list(kinds), limit=limit, scan_limit=scan_limit
    )


def read_last(stream: str, *, before: int, kinds: Sequence[str] | None, limit: int, scan_limit: int) -> Query[Found]:
    """Of the `scan_limit` events before a cursor, the last of these kinds; of all where there are none."""
    named = None if kinds is None else list(kinds)
    return SQL.query("read_last", _found, stream=stream, before=before, kinds=named, limit=limit, scan_limit=scan_limit)


def stream(name: str) -> Query[Stream | None]:
    def decode(rows: Rows) -> Stream | None:
        if not rows:
            return None
        head, state, created_at = rows[0]
        return Stream(stream=name, head=head, state=StreamState(state), created_at=created_at)

    return SQL.query("stream", decode, stream=name)


def heads(streams: Sequence[str]) -> Query[dict[str, tuple[int, StreamState]]]:
    def decode(rows: Rows) -> dict[str, tuple[int, StreamState]]:
        return {name: (head, StreamState(state)) for name, head, state in rows}

    return SQL.query("heads", decode, streams=list(streams))


def tails(cursors: Mapping[str, int], *, limit: int) -> Query[list[Event]]:
    """What came after the cursor of each stream, at most `limit` events of each."""
    return SQL.query("tails", _events, streams=list(cursors), cursors=list(cursors.values()), limit=limit)


def set_state(name: str, state: StreamState) -> Query[int]:
    """The head of the stream. Followers are notified with the commit."""
    return SQL.query("set_state", scalar, stream=name, state=state.value)


def suspend(name: str) -> Query[bool]:
    """False: the stream is closing or has ended, and stays so. Followers are notified with the commit."""
    return SQL.query("suspend", found, stream=name)


def trim(name: str, *, upto: int, limit: int) -> Query[int]:
    return SQL.query("trim", scalar, stream=name, upto=upto, limit=limit)


def aged(age: timedelta, *, after: str, limit: int) -> Query[list[tuple[str, int | None]]]:
    """The next streams after a name, and the seq up to which the events of each are older than this; None where there
    is none to delete."""
    return SQL.query("aged", lambda rows: [(row[0], row[1]) for row in rows], age=age, after=after, limit=limit)


def _found(rows: Rows) -> Found:
    return Found(_events([row for row in rows if row[1] is not None]), rows[0][7], rows[0][8])


def _events(rows: Rows) -> list[Event]:
    return [
        Event(
            stream=row[0],
            seq=row[1],
            kind=row[2],
            terminal=row[3],
            created_at=row[4],
            body=read_body(row[5], flaw_of(row)),
            attempt=row[6],
        )
        for row in rows
    ]


def _origin(event: NewEvent) -> str:
    return "" if event.by is None else f',"run_id":{event.by[0]},"attempt":{event.by[1]}'
