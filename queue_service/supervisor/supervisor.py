"""Runs the child process of a deployment, passes turns to it, and sees to it that they end when it does.

What the child says goes through one inbox in the order it was said, and reaches the database in that order; the child's
end comes last, so that an answer which lies in the pipe wins over the crash behind it. A child that ends by itself ends
its turns at once; one that is stopped ends none, whatever goes wrong on the way: the mark is set first, and stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, Self

import msgspec

from queue_service.app import App
from queue_service.errors import (
    ConfigError,
    DeploymentDown,
)
from queue_service.logs import get_logger
from queue_service.piped_process import PipedProcess
from queue_service.supervisor.protocol import BeatLine, ReadyLine, decoded, may_end_a_turn
from queue_service.supervisor.writer import Writer
from queue_service.tasks import duration
from queue_service.turn import Turn
from queue_service.turns.model import TurnFailure
from queue_service.words import check_word

log = get_logger(__name__)

# Signs of life reach the database this far apart, in seconds, however many are given.
PULSE = 0.25
# A child that was killed is gone within moments; one that the kernel holds on to, or that may not be killed, is waited for
# this long, in seconds.
EXIT_SECONDS = 5.0


class ChildEnd(NamedTuple):
    """How a child ended: `killed by SIGKILL` or `exit code 3`, whether it was stopped, and the turns that failed by it."""

    reason: str
    deliberate: bool
    message_ids: list[str]


class Supervisor:
    """One child of one deployment, from `start` to its end; for the next child, make another Supervisor, once `wait` or
    `stop` has returned: until then this one may still be ending the deployment's turns.

    `command` is run without a shell, in a session of its own; its standard error is ours. `grace` is how long a
    child may take to stop, in seconds or as timedelta.
    """

    def __init__(
        self,
        app: App,
        deployment: str,
        command: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        grace: timedelta | float = 10.0,
    ) -> None:
        check_word(deployment, "deployment")
        if isinstance(command, str) or not command:
            raise ConfigError(f"command is a list such as ['python', 'agent.py'], not {command!r}.")
        self.deployment = deployment
        self._app = app
        self._command = [str(part) for part in command]
        self._env = env
        self._cwd = cwd
        self._grace = duration(grace, "grace").total_seconds()
        self._log = log.bind(deployment=deployment)
        self._child: PipedProcess | None = None
        self._life: asyncio.Task[ChildEnd] | None = None
        self._ready = self._stopping = False
        # Why we ended the child ourselves, where it broke the protocol.
        self._fault: str | None = None
        self._how: str | None = None
        self._gone = asyncio.Event()
        self._heard = asyncio.Event()
        self._writer = Writer(app, deployment, late=self._report_late, done=self._resume)

    # For whoever has turns

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def pid(self) -> int | None:
        """The child's process id; None while none runs."""
        return self._child.pid if self._child is not None and self._how is None else None

    async def start(self) -> None:
        """Start the child. If that cannot be done, the turns of the deployment end with `worker_startup_failed`, and
        ConfigError says why. `wait` says what a child does after that."""
        if self._life is not None:
            raise ConfigError(f"The child of {self.deployment!r} was started before. Make another Supervisor for it.")
        try:
            # A reply may exceed the limit for what is stored: its turn then ends with an error that says so.
            limit = 8 * self._app.settings.payload_limit + 65_536
            self._child = await PipedProcess.spawn(
                self._command, env=self._env, cwd=self._cwd, limit=limit, take=self._take, overrun=self._give_up
            )
        except (OSError, ValueError) as refused:
            why = refused.strerror if isinstance(refused, OSError) and refused.strerror else str(refused)
            self._log.error("a deployment's child could not be started", why=why)
            await self._writer.fail_all(TurnFailure("worker_startup_failed", reason=f"could not be started: {why}"))
            raise ConfigError(
                f"The child of deployment {self.deployment!r} could not be started: {why}. Its turns were ended. Check "
                f"that {self._command[0]!r} is an executable file and that its working directory exists."
            ) from refused
        self._log.info("a deployment's child was started", pid=self._child.pid)
        self._life = asyncio.create_task(self._live(self._child), name=f"supervisor of {self.deployment}")
        self._life.add_done_callback(self._report)

    async def send(self, turn: Turn, payload: Any) -> None:
        """Pass a turn, armed before, to the child. Returns when it is on its way, which with a child that takes nothing
        may be late; raises DeploymentDown where there is none, or it ends meanwhile."""
        if turn.deployment != self.deployment:
            raise ConfigError(
                f"Turn {turn.message_id!r} is of deployment {turn.deployment!r}, not {self.deployment!r}."
            )
        fields = {name: getattr(turn, name) for name in type(turn).__slots__ if name != "deployment"}
        line = msgspec.json.encode({"type": "turn", **fields, "payload": payload})
        if self._child is None or self._how is not None or self._stopping or self._fault is not None:
            raise self._down(turn)
        self._writer.expect(turn.message_id, turn.stream)
        self._child.write(line)
        if not await self._child.written():
            raise self._down(turn)

    async def wait(self) -> ChildEnd:
        """Wait until the child and its turns have ended, and return how the child ended. Cancelling this leaves the child
        alone."""
        if self._life is None:
            raise ConfigError(f"The child of {self.deployment!r} was not started.")
        return await asyncio.shield(self._life)

    async def stop(self) -> None:
        """End the child and none of its turns: say `stop`, SIGTERM, and after `grace` SIGKILL. What it said before is
        stored; if the database does not take that within another `grace`, it is given up and logged."""
        if self._life is None or self._child is None:
            return
        if self._how is None and not self._life.done():
            self._stopping = True
            self._child.write(msgspec.json.encode({"type": "stop"}))
            self._signal(signal.SIGTERM)
            if not await _within(self._grace, self._gone.wait()):
                self._signal(signal.SIGKILL)
        await asyncio.wait([self._life], timeout=max(self._grace, 1.0))
        if not self._life.done():
            self._log.error(
                "gave up what a child left to be stored; the deadline ends its turns", lines=self._writer.left
            )
            self._life.cancel()
            await asyncio.wait([self._life])

    # The child's life

    async def _live(self, child: PipedProcess) -> ChildEnd:
        try:
            try:
                await self._until_stored(child)
            except ExceptionGroup as broken:
                # A mistake of ours. Nobody would hear the child any more: it must not go on, nor may its turns.
                self._give_up("its supervisor failed")
                self._how = self._how or "given up"
                failure = TurnFailure("internal_error", reason=f"supervisor: {type(broken.exceptions[0]).__name__}")
                await self._writer.fail_all(failure)
                raise broken.exceptions[0] from None
            reason = self._fault or self._how or ""
            if self._stopping:
                self._log.info("a deployment's child was stopped", how=self._how)
                return ChildEnd(reason, deliberate=True, message_ids=[])
            code = "worker_died" if self._ready else "worker_startup_failed"
            self._log.error("a deployment's child ended by itself", reason=reason)
            return ChildEnd(
                reason, deliberate=False, message_ids=await self._writer.fail_all(TurnFailure(code, reason=reason))
            )
        finally:
            if self._how is None:
                # Cancelled from outside: the process is ending, deliberately.
                self._stopping = True
            try:
                if not self._gone.is_set():
                    self._signal(signal.SIGKILL)
                    if not await _within(EXIT_SECONDS, child.ended()):
                        self._log.error(
                            "a deployment's child was not killed and still runs; end it by hand", pid=child.pid
                        )
            finally:
                child.close()

    async def _until_stored(self, child: PipedProcess) -> None:
        """Until the child has ended and all that it said before is stored."""
        async with asyncio.TaskGroup() as group:
            pulse = group.create_task(self._pulse())
            storing = group.create_task(self._writer.run())
            how = await child.ended()
            # From here on nothing is sent: a turn that comes now is not among those that fail with this child.
            self._how = how
            self._gone.set()
            pulse.cancel()
            await child.silent()
            self._writer.close()
            await storing

    def _take(self, line: bytes) -> None:
        """A line of the child. Whatever it says, it is a sign of life."""
        if self._fault is not None:
            return
        self._heard.set()
        try:
            said = decoded(line)
        except (ValueError, RecursionError) as refused:
            # The text of the error may quote the line.
            self._log.warning("a line of a child cannot be read", bytes=len(line), why=type(refused).__name__)
            if may_end_a_turn(line):
                # It would leave a turn without an ending for as long as the child gives signs of life.
                self._give_up("it wrote an answer that cannot be read")
            return
        if isinstance(said, ReadyLine):
            self._ready = True
        elif said is None:
            self._log.warning("a child said something unknown; is it newer than this?", bytes=len(line))
        elif not isinstance(said, BeatLine):
            self._writer.put(said)

    def _resume(self) -> None:
        if self._child is not None:
            self._child.resume()

    def _report_late(self, message_ids: list[str]) -> None:
        if self._child is not None and not self._child.is_full:
            self._child.write(msgspec.json.encode({"type": "late", "message_ids": message_ids}))

    def _give_up(self, why: str) -> None:
        """End the child for breaking the protocol; its end is then reported like any other, with this reason."""
        if self._fault is None:
            self._fault = why
            self._log.error("a deployment's child is killed", why=why)
            self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        assert self._child is not None
        try:
            self._child.signal(number)
        except ProcessLookupError:
            pass
        except OSError as refused:
            # An error after the spawn says nothing about the child: its end will be noticed, whenever it comes.
            self._log.error("a signal could not be sent to a child", signal=number.name, why=str(refused))

    async def _pulse(self) -> None:
        """Best effort: what fails here is made good by the next sign of life."""
        failing = False
        while True:
            await self._heard.wait()
            self._heard.clear()
            try:
                await self._app.turns.extend(self.deployment)
                failing = False
            except Exception as lost:  # noqa: BLE001 - whatever it is, it must not end the child
                if not failing:
                    self._log.error("a sign of life could not be stored", why=repr(lost))
                failing = True
            await asyncio.sleep(PULSE)

    def _down(self, turn: Turn) -> DeploymentDown:
        why = self._fault or self._how or ("it is being stopped" if self._stopping else "it was not started")
        return DeploymentDown(
            f"Deployment {self.deployment!r} has no running child ({why}), and turn {turn.message_id!r} was not taken. "
            "Start another Supervisor for it, and send the turn again if it is still live."
        )

    def _report(self, life: asyncio.Task[ChildEnd]) -> None:
        if not life.cancelled() and life.exception() is not None:
            self._log.error("a supervisor has failed", why=repr(life.exception()))


async def _within(seconds: float, awaitable: Awaitable[Any]) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await awaitable
            return True
    return False
