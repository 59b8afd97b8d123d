"""The child's side of the supervisor's protocol, for a child in Python: `serve`.

A child ends when its standard input does: its supervisor is gone then, and nobody reads what it writes any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, NamedTuple

import msgspec

from queue_service.logs import get_logger
from queue_service.piped_process import die_with_parent, taken_pipes
from queue_service.supervisor.conversation import Conversation
from queue_service.supervisor.protocol import (
    BeatLine,
    CancelledLine,
    ChildLine,
    DecisionLine,
    DrainLine,
    FailLine,
    InputLine,
    InterruptLine,
    LateLine,
    PermissionLine,
    ReadyLine,
    ReplyLine,
    StopLine,
    SupervisorLine,
    TurnGiven,
    decoded_by_child,
)
from queue_service.turns.model import TurnFailure

__all__ = ["Conversation", "Handler", "serve"]

log = get_logger(__name__)

MAX_LINE = 64 * 1024 * 1024

Handler = Callable[[Conversation], Awaitable[Mapping[str, Any] | TurnFailure]]


async def serve(handler: Handler, *, beat: float = 1.0) -> None:
    """Answer turns until asked to stop, or until the supervisor is gone. `handler` returns the reply, or a TurnFailure;
    what it raises ends its turn with `internal_error`. Turns are handled at the same time.

    Signs of life are given every `beat` seconds while there is a turn, from the event loop: a handler that blocks the
    loop gives none. `drain`, `stop` and SIGTERM let handlers end; the supervisor's grace bounds them.
    """
    child = _Child(handler, beat)
    await child.run()


class _AtWork(NamedTuple):
    task: asyncio.Task[None]
    conversation: Conversation


class _Child:
    def __init__(self, handler: Handler, beat: float) -> None:
        self._handler = handler
        self._beat = beat
        # By message id, in the order in which they came.
        self._working: dict[str, _AtWork] = {}
        # Also those that were cancelled and have not ended yet.
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = asyncio.Event()

    async def run(self) -> None:
        """Until the parent closes our stdin, or SIGTERM came and the turns at work have ended, or nothing can be said."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stopped.set)
        die_with_parent()
        try:
            await self._serve()
        finally:
            # A supervisor says `stop` and sends SIGTERM. Who has ended by the one is not to be killed by the other, in the
            # midst of what the program does at its end: without a loop, a signal would be met by its default.
            loop.remove_signal_handler(signal.SIGTERM)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    async def _serve(self) -> None:
        async with _pipes() as (lines, self._out):
            await self._say(ReadyLine())
            beating = asyncio.create_task(self._beats())
            reading = asyncio.create_task(self._read(lines))
            stopping = asyncio.create_task(self._stopped.wait())
            try:
                await asyncio.wait([reading, stopping, beating], return_when=asyncio.FIRST_COMPLETED)
                if stopping.done() and self._tasks:
                    idle = asyncio.create_task(asyncio.wait(self._tasks))
                    await asyncio.wait([reading, idle], return_when=asyncio.FIRST_COMPLETED)
            finally:
                everything = [beating, reading, stopping, *self._tasks]
                for task in everything:
                    task.cancel()
                await asyncio.gather(*everything, return_exceptions=True)

    async def _read(self, lines: asyncio.StreamReader) -> None:
        """Until standard input ends."""
        while line := await lines.readline():
            try:
                said = decoded_by_child(line)
            except ValueError as refused:
                log.warning("a line of the supervisor cannot be read", bytes=len(line), why=type(refused).__name__)
            else:
                if said is not None:
                    self._hear(said)

    def _hear(self, said: SupervisorLine) -> None:
        match said:
            case TurnGiven():
                self._begin(said)
            case CancelledLine(message_id):
                self._cancel(message_id)
            case LateLine(message_ids):
                log.warning("an answer came too late and was dropped", message_ids=message_ids)
            case DrainLine() | StopLine():
                self._stopped.set()
            case _:
                for conversation in self._concerned(said):
                    conversation.hear(said)

    def _concerned(self, said: SupervisorLine) -> list[Conversation]:
        match said:
            case InputLine(stream=stream):
                # The turn that has been at work longest is what the message was written to.
                return self._of_stream(stream)[:1]
            case InterruptLine(stream, message_id):
                named = {message_id} if message_id is not None else self._working.keys()
                return [each for each in self._of_stream(stream) if each.turn.message_id in named]
            case PermissionLine(stream) | DecisionLine(stream):
                return self._of_stream(stream)
            case _:
                return []

    def _of_stream(self, stream: str) -> list[Conversation]:
        return [each.conversation for each in self._working.values() if each.conversation.turn.stream == stream]

    def _begin(self, turn: TurnGiven) -> None:
        if self._stopped.is_set():
            return
        # One that is given again begins anew.
        self._cancel(turn.message_id)
        conversation = Conversation(turn, self._say)
        task = asyncio.create_task(self._handle(conversation))
        self._working[turn.message_id] = _AtWork(task, conversation)
        self._tasks.add(task)
        task.add_done_callback(functools.partial(self._ended, turn.message_id))

    def _ended(self, message_id: str, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if (at_work := self._working.get(message_id)) is not None and at_work.task is task:
            del self._working[message_id]

    def _cancel(self, message_id: str) -> None:
        at_work = self._working.pop(message_id, None)
        if at_work is not None:
            at_work.task.cancel()
        for each in self._working.values():
            each.conversation.forget_input(message_id)

    async def _handle(self, conversation: Conversation) -> None:
        message_id = conversation.turn.message_id
        try:
            answer = await self._handler(conversation)
        except Exception as error:
            log.exception("a turn's handler failed", message_id=message_id)
            answer = TurnFailure("internal_error", reason=type(error).__name__)
        at_work = self._working.get(message_id)
        if at_work is None or at_work.conversation is not conversation:
            # It was cancelled, and went on.
            return
        if isinstance(answer, TurnFailure):
            await self._say(FailLine(message_id, answer.code, answer.message, answer.reason))
        else:
            await self._say(ReplyLine([message_id, *conversation.consumed], answer))

    async def _beats(self) -> None:
        while True:
            await asyncio.sleep(self._beat)
            if self._working:
                await self._say(BeatLine())

    async def _say(self, said: ChildLine) -> None:
        # A supervisor that is gone is noticed at the end of standard input.
        with contextlib.suppress(ConnectionError):
            self._out.write(msgspec.json.encode(said) + b"\n")
            await self._out.drain()


@contextlib.asynccontextmanager
async def _pipes() -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    loop = asyncio.get_running_loop()
    incoming, outgoing = taken_pipes()
    lines = asyncio.StreamReader(MAX_LINE)
    reading, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), incoming)
    writing, flow = await loop.connect_write_pipe(
        lambda: asyncio.StreamReaderProtocol(asyncio.StreamReader()), outgoing
    )
    out = asyncio.StreamWriter(writing, flow, None, loop)
    try:
        yield lines, out
    finally:
        # What was said last is still on its way, and goes first.
        out.close()
        reading.close()
        with contextlib.suppress(ConnectionError):
            await out.wait_closed()
