"""What a replica asks of another one: to change what a connection watches, as only the process that holds it can."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal, NamedTuple

import msgspec

# Whose a connection is: organization and id. One id in two organizations is two persons.
Owner = tuple[str | None, str]


class Change(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`watch` these streams after these cursors, `unwatch` them, or watch them and no others (`only`)."""

    kind: Literal["watch", "unwatch", "only"]
    cursors: dict[str, int]


class Asked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A change to a connection, asked for by its owner."""

    connection: str
    owner: Owner
    change: Change


class Done(StrEnum):
    """What became of a change. `GONE`: no replica holds this connection for this owner. `FAILED`: its replica could not
    make the change. `UNANSWERED`: its replica said nothing in time; the change may have been made or not."""

    APPLIED = "applied"
    GONE = "gone"
    FAILED = "failed"
    UNANSWERED = "unanswered"


class Request(NamedTuple):
    """As it is stored: `number` is the asker's own. `body` is an `Asked` as JSON text."""

    asker: str
    number: int
    body: str


def connection_id(replica: str, secret: str) -> str:
    return f"{replica}.{secret}"


def replica_of(connection: str) -> str:
    """The replica that holds a connection of this id. A text that is no such id names a replica that does not exist."""
    return connection.partition(".")[0]


def encode(asked: Asked) -> str:
    return msgspec.json.encode(asked).decode()


def decode(body: str) -> Asked:
    """Raises msgspec.DecodeError for what this version does not know."""
    return msgspec.json.decode(body, type=Asked)
