"""The gateway: routes to mount, or a whole application. It keeps nothing that is not also in the database, except who is
connected here.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from datetime import UTC, datetime
from typing import Self

import msgspec
import psycopg
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from queue_service.app import App
from queue_service.errors import ConfigError, QueueServiceError
from queue_service.events import queries
from queue_service.events.model import StreamState
from queue_service.gateway import bodies, frames, page
from queue_service.gateway.access import Access, Authorize, Limits, Principal, Token
from queue_service.gateway.connection import Connection
from queue_service.gateway.posts import Post, Posts
from queue_service.gateway.refusals import Refused, refusal
from queue_service.gateway.response import EventResponse
from queue_service.gateway.run_options import Options, Ordering, RunOptions
from queue_service.gateway.signals import on_signals
from queue_service.logs import get_logger
from queue_service.services.sight import require_sight

log = get_logger(__name__)

HISTORY = 200
MAX_HISTORY = 1_000
MAX_STREAMS = 1_000
MAX_LOGIN = 4_096
HEALTH_DEADLINE = 2.0


class Gateway:
    """Conversations over HTTP, as `docs/gateway.md` says.

    `authorize` is asked who each request is from. Each message becomes a turn of the deployment that `deployment` names for
    its stream (by default the stream's own name), and a run of `task` with the message's body as payload, in `queue` or in
    the task's own. `options` are those of `app.enqueue` for these runs (and `admission`, `execution` and `total` of the
    turn), or a function that gives them for each message: `options(principal, stream, body)`, async or not. With
    `ordering="stream"` the messages of a stream are worked on one after the other: the stream is the `ordering_key` of
    their runs, unless `options` name another one. With "none" they are not.

    `origins` are those of pages served elsewhere. Durations are in seconds; `retry` is the range in which
    clients are asked to come again, each at a time of its own.

    Mount `routes()` and enter the gateway for your application's life (`lifespan=gateway.lifespan`, or in your own
    `async with gateway:`), or take `asgi()`, which does both. While it is entered, SIGTERM and SIGINT make it say goodbye
    to its clients before the server's own handler goes on: a server that waits for open responses would wait for ever.
    Call `drain` yourself where no signal comes.
    """

    def __init__(
        self,
        app: App,
        *,
        authorize: Authorize,
        task: str = "agent_turn",
        queue: str | None = None,
        deployment: Callable[[str], str] = str,
        options: Options | None = None,
        ordering: Ordering = "stream",
        limits: Limits | None = None,
        origins: Collection[str] = (),
        max_replay_gap: int = 200,
        heartbeat: float = 15.0,
        stall: float = 20.0,
        retry: tuple[float, float] = (1.0, 3.0),
    ) -> None:
        if max_replay_gap < 1 or heartbeat <= 0 or stall <= 0 or not 0 <= retry[0] <= retry[1]:
            raise ConfigError("max_replay_gap, heartbeat and stall are positive, and retry is a range of seconds.")
        self._app = app
        self._authorize = authorize
        self._origins = tuple(origins)
        self._access = Access(authorize, limits=limits or Limits(), origins=origins)
        runs = RunOptions(options, queue=queue, ordering=ordering, payload_limit=app.settings.payload_limit)
        self._posts = Posts(app, self._access, task=task, options=runs, deployment=deployment)
        self._max_gap = max_replay_gap
        self._heartbeat = heartbeat
        self._stall = stall
        self._retry = retry
        self._connections: set[Connection] = set()
        self._entered: AsyncExitStack | None = None
        self._draining = False

    # Life

    async def __aenter__(self) -> Self:
        if self._entered is not None:
            raise ConfigError("This Gateway is in use already. Enter it once.")
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._app)
            await require_sight(self._app.fetch, "gateway")
            # Before anybody is connected here: the other replicas have to find them.
            await stack.enter_async_context(self._app.opened.replica.joined())
            # Who waits for a reply gets an ending though no worker is alive.
            stack.enter_context(self._app.opened.sweeping())
            stack.enter_context(on_signals(self.drain))
            self._draining = False
            self._entered = stack.pop_all()
        return self

    @asynccontextmanager
    async def lifespan(self, _application: object = None) -> AsyncIterator[None]:
        """For `Starlette(lifespan=…)` and `FastAPI(lifespan=…)`."""
        async with self:
            yield

    async def __aexit__(self, *_: object) -> None:
        entered, self._entered = self._entered, None
        self.drain()
        if entered is not None:
            await entered.aclose()

    def drain(self) -> None:
        """Say goodbye to every client, and take no new one."""
        self._draining = True
        for connection in list(self._connections):
            connection.leave("shutdown")

    @property
    def connections(self) -> int:
        """How many clients are connected here."""
        return len(self._connections)

    # Applications

    def routes(self) -> list[BaseRoute]:
        """For `Starlette(routes=…)`, `Mount("/chat", routes=…)` or `fastapi_app.router.routes.extend(…)`."""
        answers = [
            Route("/api/chat/events", self._guarded(self._events), methods=["GET"]),
            Route("/api/chat/{name:str}", self._guarded(self._post), methods=["POST"]),
            Route("/api/sessions/{stream:path}/events", self._guarded(self._history), methods=["GET"]),
            Route("/api/sessions/{stream:path}/state", self._guarded(self._state), methods=["GET"]),
            Route("/healthz", self._guarded(self._health), methods=["GET"]),
        ]
        if isinstance(self._authorize, Token):
            answers.append(Route("/api/login", self._guarded(self._login), methods=["POST"]))
        return [*answers]

    def asgi(self, *, with_page: bool = False) -> Starlette:
        """An application of the gateway alone, and of the page that shows a conversation, if asked for."""
        routes = [*self.routes(), *(page.routes() if with_page else [])]
        return Starlette(routes=routes, middleware=self._for_other_origins(), lifespan=self.lifespan)

    # Requests

    def _guarded(self, answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """An endpoint that answers refusals, ours and the database's, as they are to be read."""

        async def endpoint(request: Request) -> Response:
            if self._entered is None:
                return Refused(503, "This gateway is not running.", retry_after=self._retry[1]).response
            try:
                return await answer(request)
            except Refused as refused:
                return refused.response
            except QueueServiceError as error:
                return refusal(error).response

        return endpoint

    async def _events(self, request: Request) -> Response:
        principal = await self._access.principal(request)
        cursors = await self._cursors(request, principal)
        beat = _beat(request)
        if self._draining:
            raise Refused(503, "This replica is stopping. Connect again.", retry_after=self._pause())
        if cursors and await self._are_over(cursors):
            return Response(status_code=204)
        if request.method == "HEAD":
            # What GET would begin with; there is nobody to be held.
            return Response(media_type="text/event-stream")
        with ExitStack() as stack:
            stack.enter_context(self._access.connected(principal))
            # Begun anew for each who comes, should it have failed since.
            stack.enter_context(self._app.opened.sweeping())
            connection = stack.enter_context(self._connected(principal, beat))
            connection.watch_only(cursors)
            return EventResponse(connection, stall=self._stall, ended=stack.pop_all().close)

    @contextmanager
    def _connected(self, principal: Principal, beat: bytes) -> Iterator[Connection]:
        replica = self._app.opened.replica
        connection = Connection(
            replica.new_connection_id(),
            self._app.opened.fanout,
            principal,
            heartbeat=self._heartbeat,
            beat=beat,
            max_gap=self._max_gap,
            retry=self._pause,
        )
        expiry = None
        if principal.expires_at is not None:
            left = (principal.expires_at - datetime.now(UTC)).total_seconds()
            expiry = asyncio.get_running_loop().call_later(max(0.0, left), connection.leave, "expired")
        self._connections.add(connection)
        try:
            with replica.holding(connection.id, principal.key, connection.change):
                yield connection
        finally:
            self._connections.discard(connection)
            if expiry is not None:
                expiry.cancel()
            connection.close()

    async def _post(self, request: Request) -> Response:
        answer = self._posts.by_name.get(request.path_params["name"])
        if answer is None:
            raise Refused(404, f"There is no such request. Those there are: {', '.join(self._posts.by_name)}.")
        status, body = await answer(Post(request, await self._access.principal(request)))
        return JSONResponse(body, status)

    async def _history(self, request: Request) -> Response:
        principal = await self._access.principal(request)
        stream = await self._access.stream(principal, request.path_params["stream"])
        after, limit = _number(request, "after", 0, 2**53), _number(request, "limit", HISTORY, MAX_HISTORY)
        events = await self._app.events.read(stream, after=after, limit=max(limit, 1))
        head = await self._app.events.head(stream)
        told = [msgspec.Raw(frames.data(event)) for event in events]
        content = msgspec.json.encode({"stream": stream, "head": head, "events": told})
        return Response(content, media_type="application/json")

    async def _state(self, request: Request) -> Response:
        principal = await self._access.principal(request)
        stream = await self._access.stream(principal, request.path_params["stream"])
        known = await self._app.events.stream(stream)
        owed = await self._app.turns.list(stream=stream, limit=MAX_HISTORY)
        head, state = (known.head, known.state) if known is not None else (0, StreamState.CREATED)
        return JSONResponse(
            {"stream": stream, "state": state, "head": head, "owed": [marker.message_id for marker in owed]}
        )

    async def _health(self, request: Request) -> Response:
        del request
        try:
            async with asyncio.timeout(HEALTH_DEADLINE):
                await self._app.fetch(queries.heads([]))
        except (QueueServiceError, psycopg.Error, TimeoutError):
            status, code = "the database does not answer", 503
        else:
            status, code = ("stopping", 503) if self._draining else ("ok", 200)
        services = {each.name: each.condition for each in self._app.opened.services}
        if code == 200 and not all(each.is_well for each in services.values()):
            status = "degraded"
        notices = f"polling: {why}" if (why := self._app.opened.listener.why_polling) else "ok"
        content = msgspec.json.encode(
            {"status": status, "connections": self.connections, "notices": notices, "services": services}
        )
        return Response(content, code, media_type="application/json")

    async def _login(self, request: Request) -> Response:
        assert isinstance(self._authorize, Token)
        asked = await bodies.read(request, bodies.Login, limit=MAX_LOGIN)
        return self._authorize.login(asked.token, secure=request.url.scheme == "https")

    # Inside

    async def _cursors(self, request: Request, principal: Principal) -> dict[str, int]:
        """The streams that a connection begins with, and the cursor of each, as query and header say."""
        streams = request.query_params.getlist("stream")
        cursors = dict.fromkeys(streams, 0)
        for text in request.query_params.getlist("cursor"):
            bare = len(streams) == 1 and text.isdigit()
            stream, seq = _place(f"{streams[0]}:{text}" if bare else text, "cursor")
            cursors[stream] = seq
        if last := request.headers.get("last-event-id"):
            # A header's bytes come as Latin-1; a browser sends the id in UTF-8, as it got it.
            stream, seq = _place(last.encode("latin-1").decode(errors="replace"), "Last-Event-ID")
            cursors[stream] = seq
        if len(cursors) > MAX_STREAMS:
            raise Refused(400, f"One connection watches at most {MAX_STREAMS:,} streams.", field="stream")
        for stream in cursors:
            await self._access.stream(principal, stream)
        return cursors

    def _for_other_origins(self) -> list[Middleware]:
        """What browsers have to know before they let a page of another origin read an answer."""
        if not self._origins:
            return []
        return [
            Middleware(
                CORSMiddleware,
                allow_origins=self._origins,
                allow_methods=["GET", "POST"],
                allow_headers=["Authorization", "Content-Type", "X-Connection-ID"],
                allow_credentials=True,
                expose_headers=["Retry-After"],
            )
        ]

    def _pause(self) -> float:
        """In seconds, and another one for each client: those who leave together must not come back together."""
        return random.uniform(*self._retry)  # noqa: S311

    async def _are_over(self, cursors: Mapping[str, int]) -> bool:
        heads = await self._app.fetch(queries.heads(list(cursors)))
        over = [
            stream for stream, (head, state) in heads.items() if state is StreamState.ENDED and cursors[stream] >= head
        ]
        return len(over) == len(cursors)


def _beat(request: Request) -> bytes:
    kind = request.query_params.get("heartbeat", "comment")
    if kind not in frames.HEARTBEATS:
        raise Refused(400, f"heartbeat is one of: {', '.join(frames.HEARTBEATS)}.", field="heartbeat")
    return frames.HEARTBEATS[kind]


def _number(request: Request, name: str, default: int, most: int) -> int:
    text = request.query_params.get(name)
    if text is None:
        return default
    if not text.isascii() or not text.isdigit() or len(text) > 16 or int(text) > most:
        raise Refused(400, f"{name} is a whole number from 0 to {most:,}.", field=name)
    return int(text)


def _place(text: str, field: str) -> tuple[str, int]:
    try:
        return frames.place(text)
    except ValueError as wrong:
        raise Refused(400, str(wrong), field=field) from None
