"""The operations on connections, as values: one function per statement of the `.sql` files."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta
from typing import NamedTuple

from queue_service.db.query import Query, Rows, found, nothing, scalar
from queue_service.db.statements import Statements

SQL = Statements("queue_service.connections")

# A connection as (platform, channel_id).
Channel = tuple[str, str]
# The claim on a run that is a delivery, as (run id, attempt).
Claim = tuple[int, int]


def hold(channel: Channel, owner: str, lease: timedelta) -> Query[bool]:
    """False: another process holds it."""
    platform, channel_id = channel
    return SQL.query("hold", found, platform=platform, channel_id=channel_id, owner=owner, lease=lease)


def renew(channels: Collection[Channel], owner: str, lease: timedelta) -> Query[set[Channel]]:
    """Those that were still held. A missing one went to another process."""
    return SQL.query("renew", _channels, **_split(channels), owner=owner, lease=lease)


def release(channels: Collection[Channel], owner: str) -> Query[set[Channel]]:
    return SQL.query("release", _channels, **_split(channels), owner=owner)


def owner(channel: Channel) -> Query[tuple[str | None, datetime]]:
    """Who holds the connection, and the time by the database's clock."""
    platform, channel_id = channel
    return SQL.query("owner", lambda rows: (rows[0][0], rows[0][1]), platform=platform, channel_id=channel_id)


class NewDelivery(NamedTuple):
    """`payload` is JSON text: what the statements that end turns give to their deliveries."""

    platform: str
    channel_id: str | None
    payload: str
    organization_id: str | None
    max_attempts: int


def deliver(new: NewDelivery) -> Query[int]:
    """The id of the run."""
    return SQL.query("deliver", scalar, **new._asdict())


def deliver_seq(new: NewDelivery, seq: int) -> Query[tuple[str, int | None] | None]:
    """The kind of the event, and the id of the run: None for platform `api`, and for an ending, which is not for sending.
    The payload lacks seq and kind, and says which stream it is. None: there is no such event."""
    return SQL.query("deliver_seq", lambda rows: (rows[0][0], rows[0][1]) if rows else None, **new._asdict(), seq=seq)


def note(claim: Claim, metadata: str) -> Query[bool]:
    """Replace the metadata of a claimed run by this JSON text. False: the claim was lost."""
    return SQL.query("note", found, run_id=claim[0], attempt=claim[1], metadata=metadata)


def shown(claim: Claim, deployment: str, message_id: str, platform_message_id: str) -> Query[bool]:
    """Remember the id under which the platform shows a turn. False: the claim was lost, or the turn is not remembered."""
    return SQL.query(
        "shown", found, run_id=claim[0], attempt=claim[1], deployment=deployment, message_id=message_id,
        platform_message_id=platform_message_id,
    )  # fmt: skip


def platform_message_id(deployment: str, message_id: str) -> Query[str | None]:
    return SQL.query("platform_message_id", scalar, deployment=deployment, message_id=message_id)


def prune(age: timedelta) -> Query[None]:
    return SQL.query("prune", nothing, age=age)


def _split(channels: Collection[Channel]) -> dict[str, list[str]]:
    return {"platforms": [each[0] for each in channels], "channel_ids": [each[1] for each in channels]}


def _channels(rows: Rows) -> set[Channel]:
    return {(platform, channel_id) for platform, channel_id in rows}
