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
    """As it is stored. Its id says which replica asks. `body` is an `Asked` as JSON text."""

    id: str
    body: str


def id_of(replica: str, name: str) -> str:
    """The id of a connection that this replica holds, or of a request that it makes."""
    return f"{replica}.{name}"


def replica_of(one: str) -> str:
    """The replica that an id names. One that is no such id names a replica that does not exist."""
    return one.partition(".")[0]


def encode(asked: Asked) -> str:
    return msgspec.json.encode(asked).decode()


def decode(body: str) -> Asked:
    """Raises msgspec.DecodeError for what this version does not know."""
    return msgspec.json.decode(body, type=Asked)
