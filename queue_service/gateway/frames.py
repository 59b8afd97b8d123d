"""Server-sent events as bytes (WHATWG HTML, section 9.2). Data is JSON on one line, and the names in ids hold no control
character, so nothing that a person or an agent wrote can end a frame or begin another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from queue_service.events.model import Event

_encode = msgspec.json.Encoder().encode


def event(event: Event) -> bytes:
    """An event of a stream, under the id that resumes after it. Only a gap has a type of its own: a browser hears all
    others without knowing their kinds beforehand."""
    if event.kind == "gap":
        # Beyond the head there is nothing to resume after: the database went back.
        place = min(event.body["to"], event.body["head"])
        return _frame(f"id: {event.stream}:{place}\nevent: gap\n", event.body)
    return b"id: %b:%d\ndata: %b\n\n" % (event.stream.encode(), event.seq, data(event))


def data(event: Event) -> bytes:
    """An event as JSON. It says its attempt where it has one."""
    text = _encode(event)
    return text if event.attempt is not None else text.removesuffix(b',"attempt":null}') + b"}"


def control(name: str, data: Mapping[str, Any], *, retry: float | None = None) -> bytes:
    """A frame about the connection itself. `retry`, in seconds, is how long to wait before the next one."""
    pause = "" if retry is None else f"retry: {1000 * retry:.0f}\n"
    return _frame(f"{pause}event: {name}\n", data)


def place(text: str) -> tuple[str, int]:
    """Stream and seq of an id. ValueError for a text that is none."""
    stream, colon, seq = text.rpartition(":")
    if not colon or not stream or not seq.isascii() or not seq.isdigit() or len(seq) > 18:
        raise ValueError(f"{text!r} is no place in a stream: write NAME:SEQ.")
    return stream, int(seq)


def _frame(head: str, data: Any) -> bytes:
    return head.encode() + b"data: " + _encode(data) + b"\n\n"


# Says only that the connection lives. A browser's EventSource keeps comments to itself, so a page asks for events.
HEARTBEATS = {"comment": b": beat\n\n", "event": control("heartbeat", {})}
