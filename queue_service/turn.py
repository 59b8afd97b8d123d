"""What a turn is. Whoever dispatches it says so, and the run that works on it carries it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from queue_service import codec
from queue_service.errors import QueueServiceError
from queue_service.words import check_word

# Under this name the metadata of a run has its turn.
IN_METADATA = "turn"


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One message dispatched to a deployment, owed one ending in its stream. `(deployment, message_id)` is its identity.

    `platform` is where the person waits: for `api` the event in the stream is the delivery, for any other a renderer is
    notified (`channel_id` says which connection it needs). `metadata` is the platform's own. Texts hold up to 1,024 bytes.
    """

    deployment: str
    message_id: str
    stream: str
    platform: str = "api"
    channel_id: str | None = None
    user_id: str | None = None
    organization_id: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("deployment", "message_id", "stream", "platform"):
            check_word(getattr(self, name), name)
        for name in ("channel_id", "user_id", "organization_id"):
            value = getattr(self, name)
            if value is not None:
                check_word(value, name)

    def fields(self, limit: int) -> dict[str, Any]:
        """As a JSON object for the arming statements. PayloadRefused for metadata that cannot be stored."""
        encoded = codec.dumps_object(dict(self.metadata), what="metadata", limit=limit)
        words = {name: getattr(self, name) for name in Turn.__slots__ if name != "metadata"}
        return {**words, "metadata": msgspec.Raw(encoded.encode())}


class Input(msgspec.Struct, frozen=True, kw_only=True):
    """A message that was sent to steer a turn which is being worked on: event `seq` of its stream. It is a turn of its own,
    and is answered with the other by `commit_reply` with the ids of both; if it is not, its own run is begun next."""

    message_id: str
    seq: int
    user_id: str | None
    body: Any


def of_run(metadata: Any) -> Turn | None:
    """The turn that a run works on, as its metadata says; None where it says none that can be."""
    if not isinstance(metadata, Mapping) or not isinstance(stored := metadata.get(IN_METADATA), Mapping):
        return None
    try:
        return Turn(**stored)
    except (QueueServiceError, TypeError):
        return None
