"""One delivery: the event is read, shown by the renderer of its platform, and what that answers is carried out.

Whatever it is, it ends: a renderer has a time, its failures and its tries are counted, and its snoozes add up. So one
delivery holds up its channel, where the others wait for it, for a bounded time.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

from queue_service.app import App
from queue_service.connections import queries as connections
from queue_service.deliveries import tries as counting
from queue_service.deliveries.model import (
    ALLOWED,
    HANDLERS,
    NOT_MINE,
    STATUS_METHOD,
    TASK,
    Delivery,
    FailedDelivery,
    Rendered,
    Renderer,
    Shown,
)
from queue_service.deliveries.tries import MAX_ATTEMPTS, Tries
from queue_service.errors import AnswerRefused, ClaimLost, ConfigError, QueueServiceError, nearest
from queue_service.events.model import Event
from queue_service.exceptions import is_a, message, type_name
from queue_service.logs import get_logger
from queue_service.runs.model import Run
from queue_service.tasks import Cancel, Defer, Snooze, duration, wait_after

log = get_logger(__name__)

# A delivery that has waited behind others for as long as all tries take is not left to an owner once more after so many.
ENOUGH_FOR_AN_OWNER = 3

FailedHook = Callable[[FailedDelivery], object]


class Rendering:
    """`renderers` by platform. `failed` is called with each delivery that is given up here."""

    def __init__(
        self,
        app: App,
        renderers: Mapping[str, Renderer],
        *,
        headless: tuple[str, ...],
        timeout: timedelta,
        snooze_limit: timedelta,
        failed: FailedHook | None,
    ) -> None:
        self._app = app
        self._renderers = renderers
        self._headless = headless
        self._seconds = timeout.total_seconds()
        self._snooze_limit = snooze_limit
        self._failed = failed

    async def deliver(
        self,
        run: Run,
        *,
        stream: str,
        seq: int,
        kind: str,
        deployment: str,
        message_id: str,
        platform: str,
        channel_id: str | None,
        user_id: str | None,
        metadata: Mapping[str, Any],
    ) -> Cancel | Snooze | None:
        """The handler of the task."""
        stored = await self._app.events.read(stream, after=seq - 1, limit=1)
        event = next((each for each in stored if each.seq == seq), None)
        misfit = _misfit(event, kind, deployment, message_id, platform)
        if event is None or misfit is not None:
            log.error("a delivery was dropped", run_id=run.id, stream=stream, seq=seq, platform=platform, why=misfit)
            return Cancel(f"Nothing was delivered. {misfit}")
        tries = Tries.of(run)
        delivery = Delivery(
            event=event,
            platform=platform,
            channel_id=channel_id,
            user_id=user_id,
            message_id=message_id,
            deployment=deployment,
            metadata=metadata,
            last=tries.is_last,
            headless=channel_id is None or metadata.get("source") in self._headless,
            platform_message_id=await self._app.fetch(connections.platform_message_id(deployment, message_id)),
        )
        try:
            return await self._render(run, tries, delivery)
        except BaseException as error:
            if not _is_being_cancelled():
                await self._report_if_last(run, tries, delivery, error)
            raise

    async def _render(self, run: Run, tries: Tries, delivery: Delivery) -> Cancel | Snooze | None:
        answer = await self._answer(delivery)
        if answer is NOT_MINE:
            defer = await self._hand_over(run, tries, delivery)
            if defer is not None:
                return defer
            delivery = replace(delivery, last=True)
            answer = await self._answer(delivery)
        return await self._carry_out(answer, run, tries, delivery)

    async def _answer(self, delivery: Delivery) -> object:
        handle = self._handler(delivery)
        limit = asyncio.timeout(self._seconds)
        try:
            async with limit:
                return await handle(delivery)
        except TimeoutError as late:
            if not limit.expired():
                raise
            raise TimeoutError(
                f"The renderer of platform {delivery.platform!r} took longer than {self._seconds:g} s."
            ) from late

    def _handler(self, delivery: Delivery) -> Callable[[Delivery], Awaitable[Rendered]]:
        renderer = self._renderers.get(delivery.platform)
        if renderer is None:
            known = ", ".join(sorted(self._renderers)) or "none"
            raise ConfigError(
                f"No renderer is registered here for platform {delivery.platform!r}."
                f"{nearest(delivery.platform, self._renderers)} Registered platforms: {known}."
            )
        handler: Callable[[Delivery], Awaitable[Rendered]] = getattr(
            renderer, HANDLERS.get(delivery.event.kind, STATUS_METHOD)
        )
        return handler

    # What it answered

    async def _carry_out(self, answer: object, run: Run, tries: Tries, delivery: Delivery) -> Cancel | Snooze | None:
        if answer is None:
            return None
        if answer is NOT_MINE:
            raise _nobody_else(delivery)
        if is_a(answer, Shown):
            await self._remember(answer, run, delivery)
            return None
        if is_a(answer, Snooze):
            await self._put_off(answer, run, tries, delivery)
            return answer
        if is_a(answer, Cancel):
            log.warning(
                "a renderer dropped a delivery", run_id=run.id, stream=delivery.event.stream, seq=delivery.event.seq,
                platform=delivery.platform,
            )  # fmt: skip
            return answer
        # The next try would most likely show it once more, and answer the same.
        raise AnswerRefused(
            f"The renderer of platform {delivery.platform!r} answered with {type_name(answer)}, which says neither that "
            f"the event is shown nor what else is to be done. Allowed are {ALLOWED}."
        )

    async def _hand_over(self, run: Run, tries: Tries, delivery: Delivery) -> Defer | None:
        """To the owner, or to whoever may be it in a second. None: it has waited for that long enough, if behind others."""
        if delivery.headless or delivery.last or delivery.channel_id is None:
            raise _nobody_else(delivery)
        owner, now = await self._app.fetch(connections.owner((delivery.platform, delivery.channel_id)))
        has_waited = now - run.created_at >= timedelta(seconds=MAX_ATTEMPTS * counting.RETRY_DELAY)
        if owner is None or owner == self._app.identity:
            # Nobody to hand it to: the connection may be on its way from one process to another.
            return None if has_waited else Defer(counting.RETRY_DELAY)
        return None if has_waited and tries.count >= ENOUGH_FOR_AN_OWNER else Defer(0, owner)

    async def _remember(self, answer: Shown, run: Run, delivery: Delivery) -> None:
        """Before the run ends: the next delivery of the channel is claimed after that, and reads it."""
        query = connections.shown(run.claim, delivery.deployment, delivery.message_id, answer.platform_message_id)
        if not await self._app.fetch(query):
            log.warning(
                "the id of a platform's message is not kept: its turn is not remembered, or its run is another worker's",
                deployment=delivery.deployment, message_id=delivery.message_id,
            )  # fmt: skip

    async def _put_off(self, answer: Snooze, run: Run, tries: Tries, delivery: Delivery) -> None:
        """Count a snooze, unless the time for them is used up."""
        after = tries.snoozed_for(duration(answer.delay, "The delay of a Snooze").total_seconds())
        if after.snoozed > self._snooze_limit.total_seconds():
            raise AnswerRefused(
                f"The renderer of platform {delivery.platform!r} wants to put this off for {after.snoozed:g} s in all; the "
                f"limit is {self._snooze_limit.total_seconds():g} s. Deliveries(snooze_limit=) says another one."
            )
        await self._note(run, after)

    # Giving up

    async def _report_if_last(self, run: Run, tries: Tries, delivery: Delivery, error: BaseException) -> None:
        """Call the hook if this was the last try. Whoever lost its claim does not know that, and finds out here."""
        if is_a(error, ClaimLost) or wait_after(run, self._app.tasks[TASK].retry, error) is not None:
            return
        await self._note(run, tries.fresh())
        if self._failed is None:
            return
        failed = FailedDelivery(
            run_id=run.id,
            stream=delivery.event.stream,
            seq=delivery.event.seq,
            kind=delivery.event.kind,
            platform=delivery.platform,
            channel_id=delivery.channel_id,
            user_id=delivery.user_id,
            message_id=delivery.message_id,
            deployment=delivery.deployment,
            metadata=delivery.metadata,
            reason=message(error),
            error=error,
        )
        try:
            async with asyncio.timeout(self._seconds):
                called = self._failed(failed)
                if inspect.isawaitable(called):
                    await called
        except BaseException as broken:
            if _is_being_cancelled():
                raise
            log.error(
                "the callback for a failed delivery raised",
                run_id=run.id, error=type_name(broken), why=message(broken),
            )  # fmt: skip

    async def _note(self, run: Run, tries: Tries) -> None:
        if not await self._app.fetch(connections.note(run.claim, tries.metadata(run))):
            raise ClaimLost(*run.claim)


def _is_being_cancelled() -> bool:
    """Whether the worker stops this handler. A CancelledError alone may be the renderer's own."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _nobody_else(delivery: Delivery) -> QueueServiceError:
    why = f"this was the last of {MAX_ATTEMPTS} tries" if delivery.last else "the turn is headless"
    return QueueServiceError(
        f"The renderer of platform {delivery.platform!r} left the event to another process, but {why}. "
        "Let it render where `delivery.last` or `delivery.headless` is set."
    )


def _misfit(event: Event | None, kind: str, deployment: str, message_id: str, platform: str) -> str | None:
    """Why the event is not the one that the run was made for; None where it is."""
    if event is None:
        return "Its event does not exist any more."
    if event.kind != kind:
        return f"Its event is of kind {event.kind!r}, and the run says {kind!r}."
    if not event.terminal:
        return None
    if event.body.get("platform") != platform:
        return f"Its event is for another platform than the run's, {platform!r}."
    if event.body.get("deployment") != deployment or message_id not in list(event.body.get("message_ids") or ()):
        return f"Its event does not end message {message_id!r} of deployment {deployment!r}."
    return None
