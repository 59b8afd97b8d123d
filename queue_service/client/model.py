"""What a client hands out."""

from __future__ import annotations

from typing import Literal

import msgspec

State = Literal["connecting", "open", "closed"]


class MessageReceipt(msgspec.Struct, frozen=True):
    """The message is stored, as event `seq` of the stream, and its turn is owed one ending."""

    stream: str
    client_message_id: str
    seq: int
