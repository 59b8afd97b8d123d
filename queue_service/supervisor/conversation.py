"""What a handler in a Python child works with: its turn, what it may say of it, and what people say meanwhile."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from queue_service.supervisor.protocol import (
    ChildLine,
    DecisionLine,
    EventLine,
    InputLine,
    InterruptLine,
    PermissionLine,
    RestoreLine,
    SupervisorLine,
    TurnGiven,
    WithholdLine,
)

Decision = PermissionLine | DecisionLine


class Conversation:
    """The turn that a handler answers. When the turn is cancelled, or taken back, the handler's task is cancelled, and what
    it still returns is not said."""

    def __init__(self, turn: TurnGiven, say: Callable[[ChildLine], Awaitable[None]]) -> None:
        self.turn = turn
        #: Set once somebody has asked that this turn be interrupted. What to do about it is for the handler.
        self.interrupted = asyncio.Event()
        #: The ids of the messages that `inputs` has given: the reply ends them, too.
        self.consumed: list[str] = []
        self._say = say
        self._offered: deque[InputLine] = deque()
        self._decisions: dict[str, Decision] = {}
        self._news = asyncio.Event()

    async def event(self, kind: str, body: Any = None) -> None:
        """Append an event to the stream of the turn."""
        await self._say(EventLine(self.turn.message_id, kind, body))

    async def withhold(self, code: str, reason: str | None = None) -> None:
        """The provider failed: unless it recovers, the turns of this deployment end with this code."""
        await self._say(WithholdLine(code, reason))

    async def restore(self) -> None:
        """The provider recovered."""
        await self._say(RestoreLine())

    async def inputs(self, *, wait: bool = True) -> AsyncGenerator[InputLine, None]:
        """Iterate over the messages that were sent to steer this turn, as they come, or without `wait` over those that are
        there. What was given is part of the reply, which ends it, too; what was not has its own turn later."""
        while True:
            while self._offered:
                offered = self._offered.popleft()
                self.consumed.append(offered.message_id)
                yield offered
            if not wait:
                return
            await self._next()

    async def decision(self, request_id: str) -> Decision:
        """Wait for the answer to what was asked for under this id, as by an event of a kind of your own. The first that
        came counts: its `answer`, and the `user_id` of who gave it."""
        while request_id not in self._decisions:
            await self._next()
        return self._decisions[request_id]

    # For whoever reads the lines

    def hear(self, line: SupervisorLine) -> None:
        """A line about this turn, or its stream."""
        match line:
            case InputLine():
                self._offered.append(line)
            case InterruptLine():
                self.interrupted.set()
            case PermissionLine() | DecisionLine():
                self._decisions.setdefault(line.request_id, line)
        news, self._news = self._news, asyncio.Event()
        news.set()

    def forget_input(self, message_id: str) -> None:
        """It has ended by other means."""
        self._offered = deque(each for each in self._offered if each.message_id != message_id)
        if message_id in self.consumed:
            self.consumed.remove(message_id)

    async def _next(self) -> None:
        await self._news.wait()
