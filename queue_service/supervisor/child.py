"""The child's side of the supervisor's protocol, for a child in Python: `serve`.

A child ends when its standard input does: its supervisor is gone then, and nobody reads what it writes any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import msgspec

from queue_service.logs import get_logger
from queue_service.piped_process import die_with_parent, taken_pipes
from queue_service.supervisor.protocol import (
    BeatLine,
    ChildLine,
    EventLine,
    FailLine,
    ReadyLine,
    ReplyLine,
    RestoreLine,
    TurnGiven,
    WithholdLine,
)
from queue_service.turns.model import TurnFailure

log = get_logger(__name__)

MAX_LINE = 64 * 1024 * 1024


class Conversation:
    """What a handler works with: the turn it was given, and what it may say before it answers."""

    def __init__(self, turn: TurnGiven, say: Callable[[ChildLine], Awaitable[None]]) -> None:
        self.turn = turn
        self._say = say

    async def event(self, kind: str, body: Any = None) -> None:
        """Append an event to the stream of the turn."""
        await self._say(EventLine(self.turn.message_id, kind, body))

    async def withhold(self, code: str, reason: str | None = None) -> None:
        """The provider failed: unless it recovers, the turns of this deployment end with this code."""
        await self._say(WithholdLine(code, reason))

    async def restore(self) -> None:
        """The provider recovered."""
        await self._say(RestoreLine())


Handler = Callable[[Conversation], Awaitable[Mapping[str, Any] | TurnFailure]]


async def serve(handler: Handler, *, beat: float = 1.0) -> None:
    """Answer turns until asked to stop, or until the supervisor is gone. `handler` returns the reply, or a TurnFailure;
    what it raises ends its turn with `internal_error`. Turns are handled at the same time.

    Signs of life are given every `beat` seconds while there is a turn, from the event loop: a handler that blocks the
    loop gives none. `stop` and SIGTERM let handlers end; the supervisor's grace bounds them.
    """
    child = _Child(handler, beat)
    await child.run()


class _Child:
    def __init__(self, handler: Handler, beat: float) -> None:
        self._handler = handler
        self._beat = beat
        self._working: set[asyncio.Task[None]] = set()
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
                if stopping.done() and self._working:
                    idle = asyncio.create_task(asyncio.wait(self._working))
                    await asyncio.wait([reading, idle], return_when=asyncio.FIRST_COMPLETED)
            finally:
                everything = [beating, reading, stopping, *self._working]
                for task in everything:
                    task.cancel()
                await asyncio.gather(*everything, return_exceptions=True)

    async def _read(self, lines: asyncio.StreamReader) -> None:
        """Until standard input ends."""
        while line := await lines.readline():
            message = msgspec.json.decode(line)
            if message["type"] == "stop":
                self._stopped.set()
            elif message["type"] == "turn" and not self._stopped.is_set():
                task = asyncio.create_task(self._handle(msgspec.convert(message, TurnGiven)))
                self._working.add(task)
                task.add_done_callback(self._working.discard)
            elif message["type"] == "late":
                log.warning("an answer came too late and was dropped", message_ids=message["message_ids"])

    async def _handle(self, turn: TurnGiven) -> None:
        try:
            answer = await self._handler(Conversation(turn, self._say))
        except Exception as error:
            log.exception("a turn's handler failed", message_id=turn.message_id)
            answer = TurnFailure("internal_error", reason=type(error).__name__)
        if isinstance(answer, TurnFailure):
            await self._say(FailLine(turn.message_id, answer.code, answer.message, answer.reason))
        else:
            await self._say(ReplyLine([turn.message_id], answer))

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
