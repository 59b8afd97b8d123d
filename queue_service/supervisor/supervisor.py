"""Runs the child process of a deployment, passes turns to it, and sees to it that they end when it does.

What the child says goes through one inbox in the order it was said, and reaches the database in that order; the child's
end comes last, so that an answer which lies in the pipe wins over the crash behind it. A child that ends by itself ends the
turns it was given, at once, and no others; one that we end (it is stopped, or the deployment is another's) ends none,
whatever goes wrong on the way: the mark is set first, and stays.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, Self

from queue_service.app import App
from queue_service.app.events import running_on
from queue_service.db.execute import NOT_EXECUTED
from queue_service.errors import ConfigError, DeploymentDown
from queue_service.logs import get_logger
from queue_service.services.loop import Service, Services
from queue_service.supervisor.followers import Followers
from queue_service.supervisor.given import GivenTurn, GivenTurns
from queue_service.supervisor.lease import Lease
from queue_service.supervisor.process import EXIT_SECONDS, ChildProcess
from queue_service.supervisor.protocol import CancelledLine, ChildLine, TurnGiven
from queue_service.supervisor.writer import Deliver, Writer
from queue_service.tasks import duration
from queue_service.turn import Turn
from queue_service.turns.model import Outcome, TurnFailure
from queue_service.words import check_word

log = get_logger(__name__)

# Signs of life reach the database this far apart, in seconds, however many are given.
PULSE = 0.25
# What a child gets to end, in seconds, when its turns had the whole grace, or this process ends.
LAST_SECONDS = 1.0
# The head of a stream is looked up before its turn is given. Without the database, the turn is given all the same.
HEAD_SECONDS = 1.0


class ChildEnd(NamedTuple):
    """How a child ended: `killed by SIGKILL` or `exit code 3`, whether it was stopped, and the turns that failed by it."""

    reason: str
    deliberate: bool
    message_ids: list[str]


class Supervisor:
    """One child of one deployment, from `start` to its end; for the next child, make another Supervisor, once `wait` or
    `stop` has returned: until then this one holds the deployment, as no other can at the same time, in any process.

    `command` is run without a shell, in a session of its own; its standard error is ours. `grace` is how long its turns may
    take when it is stopped, and the child after them, in seconds or as timedelta. Events of the kinds `delivered` are also
    given to `deliver`, such as `Deliveries.send`, with their turn.
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
        deliver: Deliver | None = None,
        delivered: Collection[str] = ("status", "card"),
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
        self._deliver, self._delivered = deliver, _kinds(delivered)
        self._log = log.bind(deployment=deployment)
        self._child: ChildProcess | None = None
        self._life: asyncio.Task[ChildEnd] | None = None
        self._is_starting = False
        self._over = asyncio.Event()
        self._services = Services()
        self._given = GivenTurns(self._leave)
        self._lease: Lease
        self._writer: Writer
        self._followers: Followers

    # For whoever has turns

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def pid(self) -> int | None:
        """The child's process id; None while none runs."""
        return self._child.pid if self._child is not None and self._child.how is None else None

    @property
    def start_failure(self) -> str | None:
        """Why the child ended by itself before it was ready; None where it did not."""
        child = self._child
        if child is None or child.is_ready or child.is_stopping:
            return None
        return child.fault or child.how

    async def start(self, *, wait: timedelta | float | None = 0.0) -> None:
        """Take the deployment, and start its child.

        Where another Supervisor has the deployment, here or in another process, none is started: it is waited for, for so
        long (None: without an end), and with any wait the other one is asked to let go once its turns have ended; then
        DeploymentHeld says who has it. ConfigError says why a child could not be started. No turn is ended by either:
        whoever has one to give decides about it.
        """
        if self._life is not None or self._is_starting:
            raise ConfigError(f"The child of {self.deployment!r} was started before. Make another Supervisor for it.")
        seconds = None if wait is None else duration(wait, "wait").total_seconds()
        self._is_starting = True
        try:
            await self._start(seconds)
        finally:
            self._is_starting = False

    async def _start(self, seconds: float | None) -> None:
        opened, settings = self._app.opened, self._app.settings
        child = ChildProcess(self.deployment, self._given, self._store)
        self._lease = Lease(
            opened.fetch,
            self.deployment,
            self._app.identity,
            settings.lease,
            lapsed=child.cut_off,
            wanted=self._hand_over,
        )
        self._writer = Writer(
            self._app, self.deployment, self._given, self._lease,
            deliver=self._deliver, delivered=self._delivered, late=child.report_late, done=child.resume,
        )  # fmt: skip
        self._followers = Followers(self._app, self.deployment, self._services, self._given, child.say)
        # A reply may exceed the limit for what is stored: its turn then ends with an error that says so.
        limit = 8 * settings.payload_limit + 65_536
        await self._lease.take(seconds)
        try:
            await child.start(self._command, env=self._env, cwd=self._cwd, limit=limit)
        except BaseException:
            await self._lease.release()
            raise
        self._child = child
        self._life = asyncio.create_task(self._live(child), name=f"supervisor of {self.deployment}")
        self._life.add_done_callback(self._report)
        self._services.ensure("lease", self._lease.keep)
        # When the App is closed, the child goes first, while there are connections to let the deployment go.
        opened.services.ensure(f"child {child.pid} of {self.deployment}", self._end_with_app)

    async def send(self, turn: Turn, payload: Any) -> None:
        """Pass a turn, armed before, to the child. Returns when it is on its way, which with a child that takes nothing
        may be late; raises DeploymentDown where there is none, or it ends meanwhile.

        What becomes of the turn if the child is stopped is for the caller: it stays owed until its deadline. `answer` waits
        for its ending."""
        await self._give(turn, payload)

    async def answer(self, turn: Turn, payload: Any) -> Outcome:
        """Pass a turn, armed before, to the child, and wait until it has ended, by the child or anybody. Where this is
        cancelled, the turn is taken back from the child. Raises DeploymentDown where the child was stopped, or the
        deployment lost, before: the turn is still owed its ending, and is to be given again."""
        ending = asyncio.ensure_future(self._app.turns.wait(turn.deployment, turn.message_id))
        over = asyncio.ensure_future(self._over.wait())
        given = None
        try:
            given = await self._give(turn, payload)
            await asyncio.wait([ending, over], return_when=asyncio.FIRST_COMPLETED)
            outcome = ending.result() if ending.done() else await self._ended_with_child(turn)
            self._take_back(given, outcome.code or "replied")
            return outcome
        except BaseException:
            if given is not None:
                self._take_back(given, None)
            raise
        finally:
            for waiting in (ending, over):
                waiting.cancel()
            await asyncio.gather(ending, over, return_exceptions=True)

    async def wait(self) -> ChildEnd:
        """Wait until the child and its turns have ended, and return how the child ended. Cancelling this leaves the child
        alone."""
        if self._life is None:
            raise ConfigError(f"The child of {self.deployment!r} was not started.")
        return await asyncio.shield(self._life)

    async def stop(self) -> None:
        """Let the turns that the child has come to their end, within `grace`, and end the child and none of them: say
        `drain`, then `stop` and SIGTERM, and at last SIGKILL. What it said before is stored; if the database does not take
        that within another `grace`, it is given up and logged."""
        if self._life is None or self._child is None:
            return
        if self._child.how is None and not self._life.done():
            began = time.monotonic()
            await self._child.drain(self._grace)
            await self._child.stop(max(self._grace - (time.monotonic() - began), min(self._grace, LAST_SECONDS)))
        await asyncio.wait([self._life], timeout=max(self._grace, 1.0))
        if not self._life.done():
            self._log.error(
                "gave up what a child left to be stored; the deadline ends its turns", lines=self._writer.left
            )
            self._life.cancel()
            await asyncio.wait([self._life])

    def when_over(self, call: Callable[[], object]) -> None:
        """Have this called once the child that was started, and its turns, have ended."""
        assert self._life is not None
        self._life.add_done_callback(lambda _: call())

    # Giving turns

    async def _give(self, turn: Turn, payload: Any) -> GivenTurn:
        if turn.deployment != self.deployment:
            raise ConfigError(
                f"Turn {turn.message_id!r} is of deployment {turn.deployment!r}, not {self.deployment!r}."
            )
        fields = {name: getattr(turn, name) for name in type(turn).__slots__ if name != "deployment"}
        line = TurnGiven(**fields, payload=payload)
        self._running_child(turn)
        after = await self._head(turn.stream)
        child = self._running_child(turn)
        given = self._given.add(turn, after, running_on(turn.stream))
        self._writer.turn_given()
        self._followers.follow(turn.stream, after)
        try:
            if not await child.say(line):
                raise self._down(turn)
        except asyncio.CancelledError:
            self._take_back(given, None)
            raise
        return given

    def _running_child(self, turn: Turn) -> ChildProcess:
        if self._child is None or not self._child.takes_turns:
            raise self._down(turn)
        return self._child

    async def _head(self, stream: str) -> int:
        """-1: it is not known now."""
        try:
            async with asyncio.timeout(HEAD_SECONDS):
                return await self._app.events.head(stream)
        except (TimeoutError, *NOT_EXECUTED) as lost:
            self._log.warning("a turn is given without a look at its stream", why=repr(lost))
            return -1

    async def _ended_with_child(self, turn: Turn) -> Outcome:
        outcome = await self._app.turns.outcome(turn.deployment, turn.message_id)
        if outcome is None:
            raise self._down(turn)
        return outcome

    def _take_back(self, given: GivenTurn, code: str | None) -> None:
        """The child is not to work on it any more; what it has answered already is on its way."""
        if self._given.get(given.turn.message_id) is given and not given.is_answered:
            if self._child is not None:
                self._child.write(CancelledLine(given.turn.message_id, code))
            self._given.ended([given.turn.message_id])

    def _leave(self, stream: str) -> None:
        self._followers.leave(stream)

    def _store(self, said: ChildLine) -> None:
        self._writer.put(said)

    # Whoever else ends the child

    def _hand_over(self) -> None:
        self._services.ensure("handing over", self._let_go)

    async def _let_go(self, _service: Service) -> None:
        if self._child is not None and not self._child.is_draining:
            self._log.info("another process asks for the deployment; its child ends when its turns have")
            await self._child.drain(None)
            await self._child.stop(self._grace)

    async def _end_with_app(self, _service: Service) -> None:
        assert self._life is not None
        assert self._child is not None
        try:
            await self._over.wait()
        finally:
            if not self._life.done() and not self._life.cancelling():
                await self._child.stop(LAST_SECONDS)
                await asyncio.wait([self._life], timeout=EXIT_SECONDS)
                self._life.cancel()
            await asyncio.wait([self._life])

    # The child's life

    async def _live(self, child: ChildProcess) -> ChildEnd:
        try:
            return await self._lived(child)
        finally:
            try:
                await child.bury(LAST_SECONDS)
            finally:
                try:
                    await self._services.close()
                    await self._lease.release()
                finally:
                    self._over.set()

    async def _lived(self, child: ChildProcess) -> ChildEnd:
        try:
            await self._until_stored(child)
        except ExceptionGroup as broken:
            # A mistake of ours. Nobody would hear the child any more: it must not go on, nor may its turns.
            child.give_up("its supervisor failed")
            child.how = child.how or "given up"
            failure = TurnFailure("internal_error", reason=f"supervisor: {type(broken.exceptions[0]).__name__}")
            await self._writer.fail_given(failure)
            raise broken.exceptions[0] from None
        reason = child.fault or child.how or ""
        if child.is_stopping or (child.is_draining and not self._given.message_ids):
            self._log.info("a deployment's child was stopped", how=reason)
            return ChildEnd(reason, deliberate=True, message_ids=[])
        code = "worker_died" if child.is_ready else "worker_startup_failed"
        self._log.error("a deployment's child ended by itself", reason=reason)
        ended = await self._writer.fail_given(TurnFailure(code, reason=reason))
        return ChildEnd(reason, deliberate=False, message_ids=ended)

    async def _until_stored(self, child: ChildProcess) -> None:
        """Until the child has ended and all that it said before is stored."""
        async with asyncio.TaskGroup() as group:
            pulse = group.create_task(self._pulse(child))
            storing = group.create_task(self._writer.run())
            await child.ended()
            pulse.cancel()
            await child.silent()
            self._writer.close()
            await storing

    async def _pulse(self, child: ChildProcess) -> None:
        """Best effort: what fails here is made good by the next sign of life."""
        failing = False
        while True:
            await child.heard.wait()
            child.heard.clear()
            try:
                if self._lease.is_sure and self._app.is_open:
                    await self._app.turns.extend(self.deployment)
                failing = False
            except Exception as lost:  # noqa: BLE001 - whatever it is, it must not end the child
                if not failing:
                    self._log.error("a sign of life could not be stored", why=repr(lost))
                failing = True
            await asyncio.sleep(PULSE)

    def _down(self, turn: Turn) -> DeploymentDown:
        child = self._child
        why = "it was not started" if child is None else child.fault or child.how or "it is being stopped"
        return DeploymentDown(
            f"Deployment {self.deployment!r} has no running child ({why}), and turn {turn.message_id!r} was not answered. "
            "Start another Supervisor for it, and give it the turn again if it is still live."
        )

    def _report(self, life: asyncio.Task[ChildEnd]) -> None:
        if not life.cancelled() and life.exception() is not None:
            self._log.error("a supervisor has failed", why=repr(life.exception()))


def _kinds(delivered: Collection[str]) -> Collection[str]:
    if isinstance(delivered, str):
        raise ConfigError(f"delivered is a list of kinds, not the one text {delivered!r}.")
    return delivered
