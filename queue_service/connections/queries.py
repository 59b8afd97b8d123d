"""The operations on connections, as values: one function per statement of `statements.sql`."""

from __future__ import annotations

from collections.abc import Collection
from datetime import timedelta

from queue_service.db.query import Query, Rows, found, nothing, scalar
from queue_service.db.statements import Statements

SQL = Statements("queue_service.connections")

# A connection as (platform, channel_id).
Channel = tuple[str, str]


def hold(channel: Channel, owner: str, lease: timedelta) -> Query[bool]:
    """False: another process holds it."""
    platform, channel_id = channel
    return SQL.query("hold", found, platform=platform, channel_id=channel_id, owner=owner, lease=lease)


def renew(channels: Collection[Channel], owner: str, lease: timedelta) -> Query[set[Channel]]:
    """Those that were still held. A missing one went to another process."""
    return SQL.query("renew", _channels, **_split(channels), owner=owner, lease=lease)


def release(channels: Collection[Channel], owner: str) -> Query[set[Channel]]:
    return SQL.query("release", _channels, **_split(channels), owner=owner)


def owner(channel: Channel) -> Query[str | None]:
    platform, channel_id = channel
    return SQL.query("owner", scalar, platform=platform, channel_id=channel_id)


def deliver(platform: str, channel_id: str | None, payload: str, organization_id: str | None) -> Query[int]:
    """The id of the run. `payload` is JSON text: what the statements that end turns give to their deliveries."""
    return SQL.query(
        "deliver", scalar, platform=platform, channel_id=channel_id, payload=payload, organization_id=organization_id
    )


def prune(age: timedelta) -> Query[None]:
    return SQL.query("prune", nothing, age=age)


def _split(channels: Collection[Channel]) -> dict[str, list[str]]:
    return {"platforms": [each[0] for each in channels], "channel_ids": [each[1] for each in channels]}


def _channels(rows: Rows) -> set[Channel]:
    return {(platform, channel_id) for platform, channel_id in rows}
