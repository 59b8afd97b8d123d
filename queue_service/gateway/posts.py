"""What each POST does. Those that are about the connection change what it watches; the others are about a stream, and store
what was said before they answer, so that the answer holds on every replica.
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
from queue_service.gateway.connection import Connection
from queue_service.gateway.refusals import Refused
from queue_service.logs import get_logger
from queue_service.turn import Turn
from queue_service.turns.model import Marker, TurnFailure

log = get_logger(__name__)

# Turns of one stream that `stop` and `close` end at a time.
MARKERS_AT_ONCE = 100

StatusAndBody = tuple[int, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Post:
    """One request, its caller, and the connection it belongs to."""

    request: Request
    principal: Principal
    connection: Connection


class Posts:
    def __init__(
        self, app: App, access: Access, *, task: str, queue: str | None, deployment: Callable[[str], str]
    ) -> None:
        self._app = app
        self._access = access
        self._task = task
        self._queue = queue
        self._deployment = deployment
        self.by_name: Mapping[str, Callable[[Post], Awaitable[StatusAndBody]]] = {
            "reconnect": self._reconnect,
            "watch": self._watch,
            "unwatch": self._unwatch,
            "switch": self._switch,
            "send": self._send,
            "stop": self._stop,
            "interrupt": self._interrupt,
            "permission": self._permission,
            "mode": self._mode,
            "suspend": self._suspend,
            "close": self._close,
        }

    # The connection

    async def _reconnect(self, post: Post) -> StatusAndBody:
        asked = await self._read(post, bodies.Reconnect)
        for stream in asked.streams:
            await self._access.stream(post.principal, stream, "streams")
        heads = await self._app.fetch(queries.heads(list(asked.streams)))
        post.connection.watch_only(asked.streams)
        return 200, {"streams": {stream: heads[stream][0] if stream in heads else 0 for stream in asked.streams}}

    async def _watch(self, post: Post) -> StatusAndBody:
        asked = await self._about(post, bodies.Watch)
        head = await self._app.events.head(asked.stream)
        post.connection.watch(asked.stream, asked.cursor)
        return 200, {"stream": asked.stream, "head": head}

    async def _unwatch(self, post: Post) -> StatusAndBody:
        asked = await self._about(post, bodies.StreamBody)
        post.connection.unwatch(asked.stream)
        return 200, {"stream": asked.stream}

    async def _switch(self, post: Post) -> StatusAndBody:
        asked = await self._about(post, bodies.Watch)
        head = await self._app.events.head(asked.stream)
        post.connection.watch_only({asked.stream: asked.cursor})
        return 200, {"stream": asked.stream, "head": head}

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
        receipt = await self._app.turns.send(turn, self._task, asked.body, queue=self._queue)
        return 202, {
            "status": "accepted",
            "stream": receipt.stream,
            "client_message_id": receipt.message_id,
            "seq": receipt.seq,
        }

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
