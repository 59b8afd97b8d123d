"""Who may do what. Nothing is allowed that was not decided here: a caller nobody knows is 401, a page of another origin
403, and a stream that is not the caller's is 404, as if it did not exist.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from inspect import isawaitable
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response

from queue_service.errors import ConfigError, PayloadRefused
from queue_service.gateway.refusals import Refused
from queue_service.logs import get_logger
from queue_service.replicas.model import Owner
from queue_service.words import check_word

log = get_logger(__name__)

COOKIE = "queue_service_token"
# Principals whose pace is remembered; the one that was quiet for longest is forgotten first.
REMEMBERED = 10_000
# How long, in seconds, `authorize` and `owns` may take.
HOOK_DEADLINE = 10.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls: this id in this organization, which goes with their turns. `owns` says whether a stream is theirs, and is
    asked each time. At `expires_at` their connections are ended, and have to be authorized anew.
    """

    id: str
    owns: Callable[[str], bool | Awaitable[bool]]
    organization_id: str | None = None
    expires_at: datetime | None = None

    @property
    def key(self) -> Owner:
        """What tells principals apart: one id in two organizations is two persons."""
        return self.organization_id, self.id


# Called with each request: who it is from, or None. What it raises refuses the request.
Authorize = Callable[[Request], Principal | Awaitable[Principal | None] | None]


@dataclass(frozen=True, slots=True)
class Limits:
    """For each principal and replica: connections at a time, and messages a second, of which twice as many may come at
    once, or one where that is less."""

    connections: int = 100
    messages: float = 50.0

    def __post_init__(self) -> None:
        if self.connections < 1 or self.messages <= 0:
            raise ConfigError("The limits of a gateway are positive: connections from 1, messages a second above 0.")


def everything(stream: str) -> bool:
    """Owns every stream: for a gateway whose callers are all one."""
    del stream
    return True


def loopback(request: Request) -> Principal | None:
    """Whoever is on this machine may do everything, under the name `local`. The address that was asked for must be a local
    one too: otherwise any web page could point its own name at this machine."""
    host = re.sub(r":\d+$", "", request.headers.get("host", "")).strip("[]")
    client = request.client.host if request.client else ""
    return Principal("local", everything) if _is_local(host) and _is_local(client) else None


class Token:
    """Whoever knows the token may do everything: in `Authorization: Bearer`, or in the cookie that `login` sets, since a
    browser's EventSource sends no header of its own."""

    def __init__(self, token: str) -> None:
        # What is no ASCII, or a space at an end, does not come back from headers and cookies as it was.
        if len(token) < 16 or not token.isascii() or not token.isprintable() or token != token.strip():
            raise ConfigError(
                "A token of the gateway has at least 16 characters, all of them ASCII, and no space at its ends. Make "
                "one: `openssl rand -hex 24`."
            )
        self._token = token.encode()

    def __call__(self, request: Request) -> Principal | None:
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        given = bearer.strip() if scheme.lower() == "bearer" else request.cookies.get(COOKIE, "")
        return Principal("token", everything) if self._is(given) else None

    def login(self, token: str, *, secure: bool) -> Response:
        """204 with the cookie. Raises Refused (401)."""
        if not self._is(token):
            raise Refused(401, "That is not the token.", field="token")
        answer = Response(status_code=204)
        answer.set_cookie(COOKIE, token, httponly=True, samesite="strict", secure=secure, max_age=30 * 86_400)
        return answer

    def _is(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self._token)


class Access:
    """The checks in front of every request."""

    def __init__(self, authorize: Authorize, *, limits: Limits, origins: Collection[str]) -> None:
        self._authorize = authorize
        self._limits = limits
        self._origins = frozenset(origins)
        self._connections: Counter[Owner] = Counter()
        # By principal: how many messages may come at once now, and when that was so.
        self._paces: OrderedDict[Owner, tuple[float, float]] = OrderedDict()

    async def principal(self, request: Request) -> Principal:
        """Who this is from. Raises Refused: 403 for a page of another origin, 401 for a caller nobody knows."""
        origin = request.headers.get("origin")
        if origin is not None and origin not in self._origins and _host(origin) != request.headers.get("host"):
            raise Refused(403, "Pages of another origin may not use this gateway. Name it in `origins` if it should.")
        principal = await answered(self._authorize(request))
        if principal is None:
            raise Refused(401, "Nobody is signed in. Sign in, or send your token, and try again.")
        return principal

    async def stream(self, principal: Principal, stream: str, field: str = "stream") -> str:
        """The name of a stream, if it is theirs. Raises Refused: 400 for what names nothing, 404."""
        try:
            check_word(stream, field)
        except (ConfigError, PayloadRefused) as refused:
            raise Refused(400, str(refused), field=field) from None
        if not stream.isprintable():
            raise Refused(400, f"{field} holds a character that cannot be printed.", field=field)
        if not await answered(principal.owns(stream)):
            raise Refused(404, f"You have no stream {stream!r}.", field=field)
        return stream

    @contextmanager
    def connected(self, principal: Principal) -> Iterator[None]:
        """One more connection for the length of the block. Raises Refused (429)."""
        if self._connections[principal.key] >= self._limits.connections:
            raise Refused(429, f"You have {self._limits.connections} connections already. Close one.", retry_after=5)
        self._connections[principal.key] += 1
        try:
            yield
        finally:
            self._connections[principal.key] -= 1
            if not self._connections[principal.key]:
                del self._connections[principal.key]

    def pace(self, principal: Principal) -> None:
        """One more message. Raises Refused (429) where they come too fast: a token bucket."""
        rate, now = self._limits.messages, time.monotonic()
        # A bucket that cannot hold one message would refuse every one.
        most = max(2 * rate, 1.0)
        left, then = self._paces.pop(principal.key, (most, now))
        left = min(most, left + (now - then) * rate)
        self._paces[principal.key] = (max(left - 1, 0.0) if left >= 1 else left, now)
        if len(self._paces) > REMEMBERED:
            self._paces.popitem(last=False)
        if left < 1:
            raise Refused(429, "Messages come too fast. Wait for a moment, and go on.", retry_after=(1 - left) / rate)


async def answered(answer: T | Awaitable[T]) -> T:
    """What a hook says, which may have to ask elsewhere. Raises Refused (503) where that takes too long."""
    try:
        async with asyncio.timeout(HOOK_DEADLINE):
            return await answer if isawaitable(answer) else answer
    except TimeoutError:
        log.error("a hook of the gateway did not answer in time", seconds=HOOK_DEADLINE)
        raise Refused(503, "It could not be found out in time what you may do. Try again.", retry_after=2) from None


def _host(origin: str) -> str | None:
    scheme, _, host = origin.partition("://")
    return host if scheme in {"http", "https"} else None


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
