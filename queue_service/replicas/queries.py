"""The operations on replicas and their requests, as values: one function per statement of `statements.sql`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta

import msgspec

from queue_service.db.query import Query, Rows, column, nothing
from queue_service.db.revision import HEAD
from queue_service.db.statements import Statements
from queue_service.replicas.model import Done, Request

SQL = Statements("queue_service.replicas")


def beat(replica: str, lease: timedelta) -> Query[None]:
    return SQL.query("beat", nothing, id=replica, lease=lease, revision=HEAD)


def leave(replica: str) -> Query[list[str]]:
    """The ids of the requests that have an answer now."""
    return SQL.query("leave", column, id=replica)


def prune(silence: timedelta) -> Query[None]:
    return SQL.query("prune", nothing, silence=silence)


def ask(requests: Collection[tuple[str, Request]], lifetime: timedelta) -> Query[list[str]]:
    """Each request with the replica that it is for. The ids of those whose replica lives."""
    return SQL.query(
        "ask",
        column,
        ids=[request.id for _, request in requests],
        gateways=[replica for replica, _ in requests],
        bodies=[request.body for _, request in requests],
        lifetime=lifetime,
    )


def asked(replica: str, *, limit: int) -> Query[list[Request]]:
    return SQL.query("asked", _requests, id=replica, limit=limit)


def answer(answers: Mapping[str, Done]) -> Query[None]:
    """By the ids of the requests."""
    return SQL.query("answer", nothing, ids=list(answers), answers=msgspec.json.encode(answers).decode())


def take_answers(ids: Sequence[str]) -> Query[dict[str, Done]]:
    return SQL.query("take_answers", _answers, ids=ids)


def _requests(rows: Rows) -> list[Request]:
    return [Request(*row) for row in rows]


def _answers(rows: Rows) -> dict[str, Done]:
    return {request_id: Done(answer) for request_id, answer in rows}
