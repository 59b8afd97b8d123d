"""The operations on replicas and their requests, as values: one function per statement of `statements.sql`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta

from queue_service.db.query import Query, Rows, column, nothing
from queue_service.db.statements import Statements
from queue_service.replicas.model import Done, Request

SQL = Statements("queue_service.replicas")


def beat(replica: str, lease: timedelta) -> Query[None]:
    return SQL.query("beat", nothing, id=replica, lease=lease)


def leave(replica: str) -> Query[list[str]]:
    """The replicas that had asked this one, and have an answer now."""
    return SQL.query("leave", column, id=replica)


def prune(silence: timedelta) -> Query[None]:
    return SQL.query("prune", nothing, silence=silence)


def ask(asker: str, requests: Collection[tuple[str, Request]], lifetime: timedelta) -> Query[set[int]]:
    """Each request with the replica that it is for. The numbers of those whose replica lives."""
    return SQL.query(
        "ask",
        _numbers,
        asker=asker,
        numbers=[request.number for _, request in requests],
        gateways=[replica for replica, _ in requests],
        bodies=[request.body for _, request in requests],
        lifetime=lifetime,
    )


def asked(replica: str, *, limit: int) -> Query[list[Request]]:
    return SQL.query("asked", _requests, id=replica, limit=limit)


def answer(answers: Mapping[Request, Done]) -> Query[None]:
    return SQL.query(
        "answer",
        nothing,
        askers=[request.asker for request in answers],
        numbers=[request.number for request in answers],
        answers=[done.value for done in answers.values()],
    )


def take_answers(asker: str, numbers: Sequence[int]) -> Query[dict[int, Done]]:
    return SQL.query("take_answers", _answers, asker=asker, numbers=numbers)


def _numbers(rows: Rows) -> set[int]:
    return {number for (number,) in rows}


def _requests(rows: Rows) -> list[Request]:
    return [Request(*row) for row in rows]


def _answers(rows: Rows) -> dict[int, Done]:
    return {number: Done(answer) for number, answer in rows}
