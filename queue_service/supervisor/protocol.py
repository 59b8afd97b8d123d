"""What a deployment's child and its supervisor say to each other: JSON, one line for each message.

The supervisor writes `{"type": "turn", …}` for each turn (see TurnGiven), `{"type": "late", "message_ids": […]}` for
answers that came after the ending of their turns, and `{"type": "stop"}`. The child writes the structs below. Any program
may speak it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, get_args

import msgspec


def _tag(name: str) -> str:
    return name.removesuffix("Line").lower()


class ChildLine(msgspec.Struct, frozen=True, tag_field="type", tag=_tag):
    """A line of the child."""


class ReadyLine(ChildLine, frozen=True): ...


class BeatLine(ChildLine, frozen=True): ...


class EventLine(ChildLine, frozen=True):
    message_id: str
    kind: str
    body: Any = None


class ReplyLine(ChildLine, frozen=True):
    message_ids: list[str]
    body: Any


class FailLine(ChildLine, frozen=True):
    message_id: str
    code: str
    message: str | None = None
    reason: str | None = None


class WithholdLine(ChildLine, frozen=True):
    code: str
    reason: str | None = None


class RestoreLine(ChildLine, frozen=True): ...


class TurnGiven(msgspec.Struct, frozen=True):
    """A turn as the child gets it."""

    message_id: str
    stream: str
    payload: Any
    platform: str = "api"
    channel_id: str | None = None
    user_id: str | None = None
    organization_id: str | None = None
    metadata: Mapping[str, Any] = {}


AnyLine = ReadyLine | BeatLine | EventLine | ReplyLine | FailLine | WithholdLine | RestoreLine

_read_line = msgspec.json.Decoder(AnyLine).decode
_read_type = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_KNOWN = {f'"{_tag(kind.__name__)}"'.encode() for kind in get_args(AnyLine)}


def decoded(line: bytes) -> ChildLine | None:
    """What a line says; None for a type that is not known here. ValueError or RecursionError for what cannot be read."""
    try:
        said: ChildLine = _read_line(line)
    except msgspec.ValidationError:
        if bytes(_read_type(line).get("type", msgspec.Raw(b""))) in _KNOWN:
            raise
        return None
    except msgspec.DecodeError:
        # NaN and lone surrogates are no JSON, but some encoders write them, and an answer is stored without them.
        said = msgspec.convert(json.loads(line.decode(errors="replace")), AnyLine)
    return said


def may_end_a_turn(line: bytes) -> bool:
    """Whether a line that cannot be read may have been meant to."""
    return b'"reply"' in line or b'"fail"' in line
