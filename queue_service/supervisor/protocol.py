"""What a deployment's child and its supervisor say to each other: JSON, one line for each message.

docs/agents-protocol.md is this for people who write children in other languages. Who gets a line of a type that it does not
know passes it over, so that either side may be older than the other; what changes the meaning of a line is a new PROTOCOL.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, get_args

import msgspec

# A child says in its `ready` line which one it speaks. A supervisor refuses a newer one than its own.
PROTOCOL = 1


def _tag(name: str) -> str:
    return name.removesuffix("Line").lower()


# From the child


class ChildLine(msgspec.Struct, frozen=True, tag_field="type", tag=_tag):
    """A line of the child."""


class ReadyLine(ChildLine, frozen=True):
    protocol: int = 1


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


# To the child


class SupervisorLine(msgspec.Struct, frozen=True, tag_field="type", tag=_tag):
    """A line of the supervisor."""


class TurnGiven(SupervisorLine, frozen=True, tag="turn"):
    """A turn as the child gets it."""

    message_id: str
    stream: str
    payload: Any
    platform: str = "api"
    channel_id: str | None = None
    user_id: str | None = None
    organization_id: str | None = None
    metadata: Mapping[str, Any] = {}


class InputLine(SupervisorLine, frozen=True):
    """A message offered while a turn of its stream is being answered."""

    message_id: str
    stream: str
    payload: Any
    user_id: str | None = None


class CancelledLine(SupervisorLine, frozen=True):
    """A turn that the child is to stop working on. `code` is how it ended: that of its error, or `replied`; None where it
    has not ended, and was only taken back."""

    message_id: str
    code: str | None = None


class InterruptLine(SupervisorLine, frozen=True):
    """Somebody asked that this turn be interrupted, or all those of the stream."""

    stream: str
    message_id: str | None = None
    user_id: str | None = None


class PermissionLine(SupervisorLine, frozen=True):
    """Somebody answered what the child asked for."""

    stream: str
    request_id: str
    answer: Any
    user_id: str | None = None


class DecisionLine(SupervisorLine, frozen=True):
    """A gate was decided. `answer` is the body of the event, `request_id` its `request_id` or `key`."""

    stream: str
    request_id: str
    answer: Any
    user_id: str | None = None


class LateLine(SupervisorLine, frozen=True):
    """Answers that came after the endings of their turns, and were dropped."""

    message_ids: list[str]


class DrainLine(SupervisorLine, frozen=True): ...


class StopLine(SupervisorLine, frozen=True): ...


AnyLine = ReadyLine | BeatLine | EventLine | ReplyLine | FailLine | WithholdLine | RestoreLine
AnySupervisorLine = (
    TurnGiven
    | InputLine
    | CancelledLine
    | InterruptLine
    | PermissionLine
    | DecisionLine
    | LateLine
    | DrainLine
    | StopLine
)

_read_type = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_read_child_line = msgspec.json.Decoder(AnyLine).decode
_read_supervisor_line = msgspec.json.Decoder(AnySupervisorLine).decode
_OF_CHILD = {f'"{kind.__struct_config__.tag}"'.encode() for kind in get_args(AnyLine)}
_OF_SUPERVISOR = {f'"{kind.__struct_config__.tag}"'.encode() for kind in get_args(AnySupervisorLine)}


def decoded(line: bytes) -> ChildLine | None:
    """What a line of the child says; None for a type that is not known here. ValueError or RecursionError for what cannot
    be read."""
    try:
        said: ChildLine = _read_child_line(line)
    except msgspec.ValidationError:
        if _type_of(line) in _OF_CHILD:
            raise
        return None
    except msgspec.DecodeError:
        # NaN and lone surrogates are no JSON, but some encoders write them, and an answer is stored without them.
        said = msgspec.convert(json.loads(line.decode(errors="replace")), AnyLine)
    return said


def decoded_by_child(line: bytes) -> AnySupervisorLine | None:
    """What a line of the supervisor says; None for a type that is not known here. ValueError for what cannot be read."""
    try:
        return _read_supervisor_line(line)
    except msgspec.ValidationError:
        if _type_of(line) in _OF_SUPERVISOR:
            raise
        return None


def may_end_a_turn(line: bytes) -> bool:
    """Whether a line that cannot be read may have been meant to."""
    return b'"reply"' in line or b'"fail"' in line


def _type_of(line: bytes) -> bytes:
    return bytes(_read_type(line).get("type", msgspec.Raw(b"")))
