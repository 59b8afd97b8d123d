"""What a child hears of the streams of its turns: each has one follower, for as long as a turn of it is with the child.

A turn that ended without the child's doing is taken from it, and what people say (a permission, an interrupt, a message for
the turn that is being answered) is passed on. Only events after the turn was given count.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from queue_service.app import App
from queue_service.events.model import Event
from queue_service.logs import get_logger
from queue_service.services.loop import Service, Services
from queue_service.supervisor.given import GivenTurns
from queue_service.supervisor.protocol import (
    CancelledLine,
    DecisionLine,
    InputLine,
    InterruptLine,
    PermissionLine,
    SupervisorLine,
)

log = get_logger(__name__)


class Followers:
    """`say` writes a line to the child, and waits until the child takes what is written: one that is behind holds up the
    followers, and does not fill our memory."""

    def __init__(
        self,
        app: App,
        deployment: str,
        services: Services,
        given: GivenTurns,
        say: Callable[[SupervisorLine], Awaitable[object]],
    ) -> None:
        self._app = app
        self._deployment = deployment
        self._services = services
        self._given = given
        self._say = say
        self._cursors: dict[str, int] = {}
        self._log = log.bind(deployment=deployment)

    def follow(self, stream: str, after: int) -> None:
        """From this event on, if it is not followed already; -1: from wherever it is then."""
        self._cursors.setdefault(stream, after)
        self._services.ensure(_name(stream), functools.partial(self._follow, stream))

    def leave(self, stream: str) -> None:
        self._cursors.pop(stream, None)
        self._services.stop(_name(stream))

    async def _follow(self, stream: str, service: Service) -> None:
        if self._cursors[stream] < 0:
            self._cursors[stream] = await self._app.events.head(stream)
        async with contextlib.aclosing(self._app.events.follow(stream, after=self._cursors[stream])) as events:
            async for event in events:
                service.well()
                # First: whatever comes of this one, the next is another.
                self._cursors[stream] = event.seq
                for line in self._lines(event):
                    await self._say(line)

    def _lines(self, event: Event) -> list[SupervisorLine]:
        body = event.body
        if not isinstance(body, Mapping):
            return []
        if event.terminal:
            return self._endings(event, body)
        if not self._given.began_before(event.stream, event.seq):
            return []
        line = None
        match event.kind:
            case "permission":
                line = _permission(event, body)
            case "decision":
                line = _decision(event, body)
            case "interrupt":
                line = self._interrupt(event, body)
            case "message":
                line = self._input(event, body)
        return [] if line is None else [line]

    def _endings(self, event: Event, body: Mapping[str, Any]) -> list[SupervisorLine]:
        """Of what the child has answered, its own answer is the ending, or comes too late, which it hears."""
        if body.get("deployment") != self._deployment:
            return []
        code = _text(body, "code") or "replied"
        ended = []
        for message_id in _texts(body, "message_ids"):
            given = self._given.get(message_id)
            is_at_work = given is not None and given.after < event.seq and not given.is_answered
            if is_at_work or self._given.was_offered(message_id):
                ended.append(message_id)
        lines: list[SupervisorLine] = [CancelledLine(message_id, code) for message_id in ended]
        self._given.ended(ended)
        return lines

    def _interrupt(self, event: Event, body: Mapping[str, Any]) -> SupervisorLine | None:
        message_id = _text(body, "message_id")
        given = None if message_id is None else self._given.get(message_id)
        if message_id is not None and (given is None or given.after >= event.seq):
            return None
        return InterruptLine(event.stream, message_id, _text(body, "user_id"))

    def _input(self, event: Event, body: Mapping[str, Any]) -> SupervisorLine | None:
        message_id = _text(body, "message_id")
        is_ours = body.get("mode") == "steer" and body.get("deployment", self._deployment) == self._deployment
        if not is_ours or message_id is None or not self._given.offer(message_id, event.stream):
            return None
        return InputLine(message_id, event.stream, body.get("body"), _text(body, "user_id"))


def _permission(event: Event, body: Mapping[str, Any]) -> SupervisorLine | None:
    request_id = _text(body, "request_id")
    if request_id is None:
        return None
    return PermissionLine(event.stream, request_id, body.get("answer"), _text(body, "user_id"))


def _decision(event: Event, body: Mapping[str, Any]) -> SupervisorLine | None:
    request_id = _text(body, "request_id") or _text(body, "key")
    return None if request_id is None else DecisionLine(event.stream, request_id, body, _text(body, "user_id"))


def _text(body: Mapping[str, Any], name: str) -> str | None:
    value = body.get(name)
    return value if isinstance(value, str) and value else None


def _texts(body: Mapping[str, Any], name: str) -> list[str]:
    values = body.get(name)
    return [value for value in values if isinstance(value, str)] if isinstance(values, list) else []


def _name(stream: str) -> str:
    return f"stream {stream}"
