"""The process of a deployment's child: what is written to it, what is taken from it, and how it is ended.

Marks are set before what they are about is done: a child that we end is known as such, whatever comes first.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from queue_service.errors import ConfigError
from queue_service.logs import get_logger
from queue_service.piped_process import PipedProcess
from queue_service.supervisor.given import GivenTurns
from queue_service.supervisor.protocol import (
    PROTOCOL,
    BeatLine,
    ChildLine,
    DrainLine,
    FailLine,
    LateLine,
    ReadyLine,
    ReplyLine,
    RestoreLine,
    StopLine,
    SupervisorLine,
    decoded,
    may_end_a_turn,
)

log = get_logger(__name__)

# A child that was killed is gone within moments; one that the kernel holds on to, or that may not be killed, is waited for
# this long, in seconds.
EXIT_SECONDS = 5.0


class ChildProcess:
    """One that `start` has started. `store` takes what is to be stored of what it says."""

    def __init__(self, deployment: str, given: GivenTurns, store: Callable[[ChildLine], None]) -> None:
        self._deployment = deployment
        self._given = given
        self._store = store
        self._log = log.bind(deployment=deployment)
        self._pipes: PipedProcess
        self.is_ready = False
        #: It is given no more turns; it is ended by us.
        self.is_draining = self.is_stopping = False
        #: Why we ended it, where it was not asked to stop.
        self.fault: str | None = None
        #: How it ended; None while it runs.
        self.how: str | None = None
        self.gone = asyncio.Event()
        self.heard = asyncio.Event()

    async def start(
        self, command: Sequence[str], *, env: Mapping[str, str] | None, cwd: str | Path | None, limit: int
    ) -> None:
        """ConfigError where it cannot be. `limit` is that of its lines, in bytes."""
        try:
            self._pipes = await PipedProcess.spawn(
                command, env=env, cwd=cwd, limit=limit, take=self._take, overrun=self.give_up
            )
        except (OSError, ValueError) as refused:
            why = refused.strerror if isinstance(refused, OSError) and refused.strerror else str(refused)
            self._log.error("a deployment's child could not be started", why=why)
            raise ConfigError(
                f"The child of deployment {self._deployment!r} could not be started: {why}. Check that {command[0]!r} is "
                "an executable file and that its working directory exists."
            ) from refused
        self._log.info("a deployment's child was started", pid=self.pid)

    @property
    def pid(self) -> int:
        return self._pipes.pid

    @property
    def takes_turns(self) -> bool:
        is_ending = self.is_draining or self.is_stopping or self.fault is not None
        return self.how is None and not is_ending

    # Writing

    def write(self, line: SupervisorLine) -> None:
        """Never waits; what it does not take stays in memory."""
        self._pipes.write(msgspec.json.encode(line))

    async def say(self, line: SupervisorLine) -> bool:
        """Write, and wait until it takes what is written. False: it takes nothing any more."""
        self.write(line)
        return await self._pipes.written()

    def report_late(self, message_ids: list[str]) -> None:
        if not self._pipes.is_full:
            self.write(LateLine(message_ids))

    # What it says

    def resume(self) -> None:
        self._pipes.resume()

    def _take(self, line: bytes) -> None:
        """Whatever it says, it is a sign of life."""
        if self.fault is not None:
            return
        self.heard.set()
        try:
            said = decoded(line)
        except (ValueError, RecursionError) as refused:
            # The text of the error may quote the line.
            self._log.warning("a line of a child cannot be read", bytes=len(line), why=type(refused).__name__)
            if may_end_a_turn(line):
                # It would leave a turn without an ending for as long as the child gives signs of life.
                self.give_up("it wrote an answer that cannot be read")
            return
        match said:
            case None:
                self._log.warning("a child said something unknown; is it newer than this?", bytes=len(line))
                return
            case BeatLine():
                return
            case ReadyLine(protocol):
                self._greet(protocol)
                return
            case ReplyLine(message_ids):
                self._given.answered(message_ids)
            case FailLine(message_id):
                self._given.answered([message_id])
        self._store(said)

    def _greet(self, protocol: int) -> None:
        if protocol > PROTOCOL:
            self.give_up(
                f"it speaks protocol {protocol}, and its supervisor only {PROTOCOL}: update queue_service here"
            )
        elif not self.is_ready:
            self.is_ready = True
            # Whatever the child before it said of the provider, this one has not.
            self._store(RestoreLine())

    # Its end

    async def drain(self, seconds: float | None) -> None:
        """Let the turns that it has end, and give it no more."""
        if not self.is_draining:
            self.is_draining = True
            self.write(DrainLine())
        either = [asyncio.ensure_future(event.wait()) for event in (self._given.none_left, self.gone)]
        try:
            await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in either:
                each.cancel()

    async def stop(self, seconds: float) -> None:
        """End it: it has so many seconds to do so by itself."""
        if self.how is None:
            self.is_stopping = True
            self.write(StopLine())
            self._signal(signal.SIGTERM)
            if not await _within(seconds, self.gone.wait()):
                self._signal(signal.SIGKILL)

    def cut_off(self, why: str) -> None:
        """End it at once, and none of its turns. Nothing changes for one that has ended already."""
        if self.how is None:
            self.is_stopping = True
            self.fault = self.fault or why
            self._signal(signal.SIGKILL)

    def give_up(self, why: str) -> None:
        """End it for breaking the protocol; its end is then reported like any other, with this reason."""
        if self.fault is None:
            self.fault = why
            self._log.error("a deployment's child is killed", why=why)
            self._signal(signal.SIGKILL)

    async def ended(self) -> str:
        """How it ended. From here on nothing is given: a turn that comes now is not among those that fail with it."""
        self.how = await self._pipes.ended()
        self.gone.set()
        return self.how

    async def silent(self) -> None:
        """After the end: until all that it wrote was taken."""
        await self._pipes.silent()

    async def bury(self, seconds: float) -> None:
        """See to it that nothing is left of it. If it runs, it has so many seconds to end by itself."""
        ending = asyncio.ensure_future(self.ended())
        try:
            if not self.gone.is_set():
                await self.stop(seconds)
                if not await _within(EXIT_SECONDS, ending):
                    self._log.error("a deployment's child was not killed and still runs; end it by hand", pid=self.pid)
        finally:
            ending.cancel()
            self._pipes.close()

    def _signal(self, number: signal.Signals) -> None:
        try:
            self._pipes.signal(number)
        except ProcessLookupError:
            pass
        except OSError as refused:
            # An error after the spawn says nothing about the child: its end will be noticed, whenever it comes.
            self._log.error("a signal could not be sent to a child", signal=number.name, why=str(refused))


async def _within(seconds: float, awaitable: Awaitable[Any]) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await awaitable
            return True
    return False
