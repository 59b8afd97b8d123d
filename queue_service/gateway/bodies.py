"""What the POSTs take: each a JSON object of these fields and no others."""

from __future__ import annotations

import asyncio
import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from queue_service.gateway.refusals import Refused

B = TypeVar("B", bound="Body")
S = TypeVar("S", bound="StreamBody")

Cursor = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
# Postgres stores no NUL, and refuses to look for one.
Word = Annotated[str, msgspec.Meta(min_length=1, max_length=512, pattern=r"^[^\x00]*$")]
# More could be watched, but no page shows them.
Cursors = Annotated[dict[str, Cursor], msgspec.Meta(max_length=1_000)]

# How long, in seconds, a body may take to come.
BODY_DEADLINE = 20.0

# Where msgspec says what it refused: "... - at `$.streams[...]`", "missing required field `stream`".
_AT = re.compile(r"at `\$\.(\w+)|field `(\w+)`")


class Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The least of them: no field at all."""


class Reconnect(Body, frozen=True):
    streams: Cursors


class StreamBody(Body, frozen=True):
    stream: str


class Watch(StreamBody, frozen=True):
    cursor: Cursor = 0


class Send(StreamBody, frozen=True):
    client_message_id: Word
    body: dict[str, Any]
    mode: Literal["queue", "steer", "interrupt"] = "queue"


class Unsend(StreamBody, frozen=True):
    client_message_id: Word


class About(StreamBody, frozen=True):
    message_id: Word | None = None


class Permission(StreamBody, frozen=True):
    request_id: Word
    answer: Any


class Mode(StreamBody, frozen=True):
    mode: Word


class Login(Body, frozen=True):
    token: str


async def read(request: Request, kind: type[B], *, limit: int) -> B:
    """The body of a request. Raises Refused: 413 beyond `limit` bytes, 400 with the field that is wrong."""
    try:
        return msgspec.json.decode(await _bytes(request, limit), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as wrong:
        found = _AT.search(str(wrong))
        field = (found[1] or found[2]) if found else None
        raise Refused(400, f"The body cannot be used: {wrong}.", field=field) from None
    except RecursionError:
        raise Refused(400, "The body is nested too deeply.") from None


async def _bytes(request: Request, limit: int) -> bytes:
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_DEADLINE):
            async for chunk in request.stream():
                data += chunk
                if len(data) > limit:
                    raise Refused(413, f"The body is larger than the {limit:,} bytes that are taken. Send less.")
    except TimeoutError:
        raise Refused(408, f"The body did not come within {BODY_DEADLINE:g} s. Send it again.") from None
    except ClientDisconnect:
        # Nobody hears this; but that a client went away is no fault of ours, to be logged with a traceback.
        raise Refused(400, "The body was cut off.") from None
    return bytes(data)
