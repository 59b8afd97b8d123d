"""The Supervisors of one process: a handler takes a turn to its deployment, wherever that is.

A deployment's child is in one process at a time. A turn that is claimed in that one is given to the child there. One that
is claimed elsewhere is left to that process; where it does not come for the turn, it is asked to let the deployment go.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Self, TypedDict

from queue_service.app import App
from queue_service.errors import ConfigError, DeploymentDown, DeploymentHeld, TurnUnknown
from queue_service.logs import get_logger
from queue_service.runs.model import Run
from queue_service.supervisor.supervisor import Supervisor
from queue_service.supervisor.writer import Deliver
from queue_service.tasks import Cancel, Defer, Snooze
from queue_service.turn import Turn
from queue_service.turns.model import TurnFailure

log = get_logger(__name__)

Command = Sequence[str | Path]

# Seconds until a turn is tried again: whose child has just ended, and whose deployment is another's.
AGAIN, LATER = 0.1, 1.0
# So many times a turn is left to the process that has its deployment, before this one asks for it.
LEFT_TO_OWNER = 3


class SupervisorOptions(TypedDict):
    env: Mapping[str, str] | None
    cwd: str | Path | None
    grace: timedelta | float
    deliver: Deliver | None
    delivered: Collection[str]


class Supervisors:
    """Starts a Supervisor for each deployment that turns come for, and keeps it. `command` starts the child, or is called
    with the deployment and returns it; the rest is as of Supervisor. With the closing of the App, or `stop`, the children
    end."""

    def __init__(
        self,
        app: App,
        command: Command | Callable[[str], Command],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        grace: timedelta | float = 10.0,
        deliver: Deliver | None = None,
        delivered: Collection[str] = ("status", "card"),
    ) -> None:
        self._app = app
        self._command = command
        self._options = SupervisorOptions(env=env, cwd=cwd, grace=grace, deliver=deliver, delivered=delivered)
        self._is_stopped = False
        # The start of the one that a deployment has, or had last.
        self._starts: dict[str, asyncio.Task[Supervisor]] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def take(self, run: Run, payload: Any = None) -> Snooze | Cancel | None:
        """For the handler of a dispatched turn: `return await supervisors.take(run)`. The child gets the payload of the
        run, or this one.

        None: the turn has ended, by the child or anybody; the run goes on until then, and where it is cancelled or its
        worker stops, the turn is taken back from the child. A Snooze or Defer: it is to be tried again, or in another
        process. A Cancel: the child could not be started, and the turn ended with `worker_startup_failed`.
        """
        turn = run.turn
        if turn is None:
            raise ConfigError(f"Run {run.id} works on no turn. Enqueue it with app.turns.dispatch or send.")
        if await self._is_over(turn):
            return None
        if self._is_stopped:
            return Snooze(LATER)
        try:
            supervisor = await self._supervisor(turn.deployment, self._wait(run))
        except DeploymentHeld as held:
            return self._left_to(held.owner, run)
        except DeploymentDown:
            return Snooze(LATER)
        except ConfigError as refused:
            return await self._start_failed(turn, str(refused))
        return await self._answered(supervisor, turn, run.payload if payload is None else payload)

    async def stop(self) -> None:
        """Stop them all, as Supervisor.stop says, and start no more: turns that come are left to other processes."""
        self._is_stopped = True
        for start in self._starts.values():
            # Of those that wait for their deployment.
            start.cancel()
        started = await asyncio.gather(*self._starts.values(), return_exceptions=True)
        await asyncio.gather(*[each.stop() for each in started if isinstance(each, Supervisor)])

    def __getitem__(self, deployment: str) -> Supervisor:
        """The one that runs the deployment's child here. KeyError where none does."""
        start = self._starts.get(deployment)
        if start is None or _is_over(start) or not start.done():
            raise KeyError(deployment)
        return start.result()

    # Inside

    async def _is_over(self, turn: Turn) -> bool:
        """Whether it has ended. One that has lapsed ends now: a run that returned before would end it as one without an
        answer."""
        turns = self._app.turns
        while not await turns.is_live(turn.deployment, turn.message_id):
            try:
                await turns.wait(turn.deployment, turn.message_id, timeout=LATER)
            except TimeoutError:
                # Live again, by a sign of life that came late; or left to live a little longer, after an outage.
                continue
            except TurnUnknown:
                # It ended so long ago that it was forgotten.
                pass
            return True
        return False

    def _wait(self, run: Run) -> float:
        """How long to wait for the deployment, and ask for it. One that came back again and again was not claimed by the
        owner, who may not work on this queue, or have no free slot."""
        was_left = run.attempt - run.failures - run.losses > LEFT_TO_OWNER
        return self._app.settings.lease.total_seconds() if was_left or _runs_alone(run) else 0.0

    def _left_to(self, owner: str, run: Run) -> Snooze:
        return Snooze(LATER) if owner == self._app.identity or _runs_alone(run) else Defer(0, owner)

    async def _answered(self, supervisor: Supervisor, turn: Turn, payload: Any) -> Snooze | Cancel | None:
        try:
            await supervisor.answer(turn, payload)
        except DeploymentDown as down:
            if supervisor.start_failure is not None:
                # The next one would do the same, and each a moment later.
                return await self._start_failed(turn, supervisor.start_failure)
            log.info("a turn is to be given again", message_id=turn.message_id, why=str(down))
            return Snooze(LATER if supervisor.pid is not None else AGAIN)
        return None

    async def _start_failed(self, turn: Turn, why: str) -> Cancel:
        """The turn that was to be given ends with that; what others have is theirs."""
        await self._app.turns.fail(turn.deployment, turn.message_id, TurnFailure("worker_startup_failed", reason=why))
        return Cancel(f"The agent could not be started: {why}")

    async def _supervisor(self, deployment: str, wait: float) -> Supervisor:
        """The one that runs the deployment's child: a new one where there is none, or it has ended. However many ask, one
        is started, whoever of them is cancelled."""
        start = self._starts.get(deployment)
        if start is None or _is_over(start):
            # Not in the context of the run that happens to come first.
            start = self._starts[deployment] = asyncio.create_task(
                self._started(deployment, wait, start), context=contextvars.Context()
            )
            start.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            return await asyncio.shield(start)
        except asyncio.CancelledError:
            if not start.cancelled():
                raise
            raise DeploymentDown(f"No child of {deployment!r} is started here any more.") from None

    async def _started(self, deployment: str, wait: float, before: asyncio.Task[Supervisor] | None) -> Supervisor:
        if before is not None and _has_started(before):
            # Until it has ended the turns of its child, it holds the deployment.
            with contextlib.suppress(Exception):
                await before.result().wait()
        command = self._command(deployment) if callable(self._command) else self._command
        supervisor = Supervisor(self._app, deployment, command, **self._options)
        this = asyncio.current_task()
        try:
            await supervisor.start(wait=wait)
        except BaseException:
            self._forget(deployment, this)
            raise
        supervisor.when_over(lambda: self._forget(deployment, this))
        return supervisor

    def _forget(self, deployment: str, start: asyncio.Task[Any] | None) -> None:
        if self._starts.get(deployment) is start:
            del self._starts[deployment]


def _runs_alone(run: Run) -> bool:
    """What lost its worker, and stands in no lane, is claimed by processes of its own, and reserved for nobody."""
    return bool(run.losses) and run.ordering_key is None


def _has_started(start: asyncio.Task[Supervisor]) -> bool:
    return start.done() and not start.cancelled() and start.exception() is None


def _is_over(start: asyncio.Task[Supervisor]) -> bool:
    return start.done() and (not _has_started(start) or start.result().pid is None)
