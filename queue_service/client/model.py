"""What a client hands out."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

import msgspec

State = Literal["connecting", "open", "closed"]


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of a stream. `seq` counts from 1 without gaps; `terminal` events end turns.

    Kind `gap` is made up by the client: events `body["from"]` to `body["to"]` are no longer stored, and `body["head"]` is
    the last one that is. Where `to` is beyond the head, the database went back, and the stream goes on after the head.
    """

    stream: str
    seq: int
    kind: str
    body: Any = None
    terminal: bool = False
    created_at: datetime | None = None


class Receipt(msgspec.Struct, frozen=True):
    """The message is stored, as event `seq` of the stream, and its turn is owed one ending."""

    stream: str
    client_message_id: str
    seq: int
