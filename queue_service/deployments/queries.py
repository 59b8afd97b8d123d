"""The operations on deployments, as values: one function per statement of `statements.sql`."""

from __future__ import annotations

from datetime import timedelta
from typing import NamedTuple

from queue_service.db.query import Query, Rows, found, nothing, scalar
from queue_service.db.statements import Statements

SQL = Statements("queue_service.deployments")


class Holder(NamedTuple):
    """Who holds a deployment; `seconds_left` until it lapses unless it is renewed."""

    owner: str
    is_ours: bool
    seconds_left: float


def hold(deployment: str, owner: str, holding: str, lease: timedelta, *, ask: bool) -> Query[Holder | None]:
    """Take it where it is free. With `ask`, who holds it hears that another wants it. None: ask again."""

    def decode(rows: Rows) -> Holder | None:
        return Holder(*rows[0]) if rows else None

    return SQL.query("hold", decode, deployment=deployment, owner=owner, holding=holding, lease=lease, ask=ask)


def renew(deployment: str, holding: str, lease: timedelta) -> Query[bool | None]:
    """Whether another wants it; None: it is another's."""
    return SQL.query("renew", scalar, deployment=deployment, holding=holding, lease=lease)


def release(deployment: str, holding: str) -> Query[bool]:
    return SQL.query("release", found, deployment=deployment, holding=holding)


def prune(age: timedelta) -> Query[None]:
    return SQL.query("prune", nothing, age=age)
