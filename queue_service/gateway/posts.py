"""What each POST does, on whichever replica it comes to. Those about a connection change what it watches, and are passed on
to the replica that holds it; the others are about a stream, need no connection, and store what was said before they answer.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from queue_service.app import App
from queue_service.events import queries
from queue_service.events.model import StreamState
from queue_service.gateway import bodies
from queue_service.gateway.access import Access, Principal
from queue_service.gateway.refusals import Refused
from queue_service.gateway.run_options import RunOptions
from queue_service.replicas.model import Change, Done
from queue_service.turn import Turn
from queue_service.turns.model import Marker, TurnFailure

# Turns of one stream that `stop` and `close` end at a time.
MARKERS_AT_ONCE = 100

CONNECTION = "X-Connection-ID"

StatusAndBody = tuple[int, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Post:
    """One request and its caller."""

    request: Request
    principal: Principal

    @property
    def connection_id(self) -> str:
        """The connection that this is about. Raises Refused (400) where it names none."""
        connection_id = self.request.headers.get(CONNECTION)
        if connection_id is None:
            raise Refused(400, f"The header {CONNECTION} is missing: the id in `welcome`.", field=CONNECTION)
        return connection_id


class Posts:
    def __init__(
        self, app: App, access: Access, *, task: str, options: RunOptions, deployment: Callable[[str], str]
    ) -> None:
        self._app = app
        self._access = access
        self._task = task
        self._options = options
        self._deployment = deployment
        self.by_name: Mapping[str, Callable[[Post], Awaitable[StatusAndBody]]] = {
            "reconnect": self._reconnect,
            "watch": self._watch,
            "unwatch": self._unwatch,
            "switch": self._switch,
            "send": self._send,
            "unsend": self._unsend,
            "stop": self._stop,
            "interrupt": self._interrupt,
            "permission": self._permission,
            "mode": self._mode,
            "suspend": self._suspend,
            "close": self._close,
        }

    # The connection

    async def _reconnect(self, post: Post) -> StatusAndBody:
        connection_id, asked = post.connection_id, await self._read(post, bodies.Reconnect)
        for stream in asked.streams:
            await self._access.stream(post.principal, stream, "streams")
        heads = await self._app.fetch(queries.heads(list(asked.streams)))
        await self._change(post, connection_id, Change("only", asked.streams))
        return 200, {"streams": {stream: heads[stream][0] if stream in heads else 0 for stream in asked.streams}}

    async def _watch(self, post: Post) -> StatusAndBody:
        connection_id, asked = post.connection_id, await self._about(post, bodies.Watch)
        head = await self._app.events.head(asked.stream)
        await self._change(post, connection_id, Change("watch", {asked.stream: asked.cursor}))
        return 200, {"stream": asked.stream, "head": head}

    async def _unwatch(self, post: Post) -> StatusAndBody:
        connection_id, asked = post.connection_id, await self._about(post, bodies.StreamBody)
        await self._change(post, connection_id, Change("unwatch", {asked.stream: 0}))
        return 200, {"stream": asked.stream}

    async def _switch(self, post: Post) -> StatusAndBody:
        connection_id, asked = post.connection_id, await self._about(post, bodies.Watch)
        head = await self._app.events.head(asked.stream)
        await self._change(post, connection_id, Change("only", {asked.stream: asked.cursor}))
        return 200, {"stream": asked.stream, "head": head}

    async def _change(self, post: Post, connection_id: str, change: Change) -> None:
        done = await self._app.opened.replica.change(connection_id, post.principal.key, change)
        if done is Done.GONE:
            raise Refused(404, "You have no such connection (any more). Connect again.", field=CONNECTION)
        if done is not Done.APPLIED:
            raise Refused(503, "The replica with this connection did not answer. Try again.", retry_after=1)

    # Its streams

    async def _send(self, post: Post) -> StatusAndBody:
        self._access.pace(post.principal)
        asked = await self._about(post, bodies.Send)
        turn = Turn(
            deployment=self._deployment(asked.stream),
            message_id=asked.client_message_id,
            stream=asked.stream,
            user_id=post.principal.id,
            organization_id=post.principal.organization_id,
        )
        options = await self._options.of(post.principal, asked.stream, asked.body)
        receipt = await self._app.turns.send(turn, self._task, asked.body, mode=asked.mode, **options)
        return 202, {
            "status": "accepted",
            "stream": receipt.stream,
            "client_message_id": receipt.message_id,
            "seq": receipt.seq,
        }

    async def _unsend(self, post: Post) -> StatusAndBody:
        asked = await self._about(post, bodies.Unsend)
        taken_back = await self._app.turns.unsend(self._deployment(asked.stream), asked.client_message_id)
        return 200, {"stream": asked.stream, "client_message_id": asked.client_message_id, "taken_back": taken_back}

    async def _stop(self, post: Post) -> StatusAndBody:
        asked = await self._about(post, bodies.About)
        return 200, {"stopped": await self._cancel_turns(asked.stream, asked.message_id)}

    async def _interrupt(self, post: Post) -> StatusAndBody:
        asked = await self._about(post, bodies.About)
        return await self._say(post, asked.stream, "interrupt", {"message_id": asked.message_id})

    async def _permission(self, post: Post) -> StatusAndBody:
        asked = await self._about(post, bodies.Permission)
        return await self._say(
            post, asked.stream, "permission", {"request_id": asked.request_id, "answer": asked.answer}
        )

    async def _mode(self, post: Post) -> StatusAndBody:
        asked = await self._about(post, bodies.Mode)
        return await self._say(post, asked.stream, "mode", {"mode": asked.mode})

    async def _suspend(self, post: Post) -> StatusAndBody:
        asked = await self._about(post, bodies.StreamBody)
        if not await self._app.fetch(queries.suspend(asked.stream)):
            # Or a page that is left would take back what another one closed.
            raise Refused(409, "A stream that is closing or has ended cannot be suspended.", field="stream")
        return 200, {"stream": asked.stream, "state": StreamState.SUSPENDED.value}

    async def _close(self, post: Post) -> StatusAndBody:
        asked = await self._about(post, bodies.StreamBody)
        # From here on no message is taken in; what was taken in before gets its ending, and then there is nothing to come.
        await self._app.events.set_state(asked.stream, StreamState.CLOSING)
        await self._cancel_turns(asked.stream, None)
        await self._app.events.set_state(asked.stream, StreamState.ENDED)
        return 200, {"stream": asked.stream, "state": StreamState.ENDED.value}

    # Inside

    async def _read(self, post: Post, kind: type[bodies.B]) -> bodies.B:
        return await bodies.read(post.request, kind, limit=self._app.settings.payload_limit)

    async def _about(self, post: Post, kind: type[bodies.S]) -> bodies.S:
        """A body that names a stream, which is theirs."""
        asked = await bodies.read(post.request, kind, limit=self._app.settings.payload_limit)
        await self._access.stream(post.principal, asked.stream)
        return asked

    async def _say(self, post: Post, stream: str, kind: str, body: Mapping[str, Any]) -> StatusAndBody:
        return 200, {"seq": await self._app.events.append(stream, kind, {**body, "user_id": post.principal.id})}

    async def _cancel_turns(self, stream: str, message_id: str | None) -> list[str]:
        """End the turns of a stream that are owed their ending, or one of them. Returns the ids of those this ended."""
        stopped: list[str] = []
        while owed := await self._app.turns.list(stream=stream, message_id=message_id, limit=MARKERS_AT_ONCE):
            stopped += [marker.message_id for marker in owed if await self._cancel_turn(marker)]
            if len(owed) < MARKERS_AT_ONCE:
                break
        return stopped

    async def _cancel_turn(self, marker: Marker) -> bool:
        ended = await self._app.turns.fail(marker.deployment, marker.message_id, TurnFailure("cancelled"))
        if marker.run_id is not None:
            await self._app.cancel(marker.run_id)
        return ended
