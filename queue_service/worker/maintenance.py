"""What a worker does for all others, without a leader: sweeps what has lapsed, fires schedules, keeps history in bounds."""

from __future__ import annotations

from datetime import timedelta

from queue_service.app import App
from queue_service.db.execute import REFUSED
from queue_service.exceptions import message
from queue_service.logs import get_logger
from queue_service.services.loop import Work, every
from queue_service.services.pruner import Pruner
from queue_service.services.scheduler import Scheduler
from queue_service.services.sweeper import Sweeper
from queue_service.settings import Settings

log = get_logger(__name__)

# Partitions are made three days ahead: however long history is kept, somebody has to look in time.
PRUNING = timedelta(hours=1)


class Maintenance:
    def __init__(self, app: App, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        self._sweeper = Sweeper(
            app.fetch, app.notify, max_losses=settings.max_losses, grace=settings.lease / 3,
            final_tasks=[name for name, task in app.tasks.items() if task.on_lost == "fail"],
        )  # fmt: skip
        self._scheduler = Scheduler(
            app.fetch, app.notify, poll_interval=settings.poll_interval, retention=settings.retention
        )
        self._pruner = Pruner(app.pool, retention=settings.retention, retention_failed=settings.retention_failed)

    async def begin(self, *, once: bool) -> None:
        """What comes before anything can end. With `once`, what is due by a schedule is enqueued now."""
        # A partition is attached without trouble while nothing is written where it will be.
        try:
            await self._pruner.partitions.make_and_drop()
        except REFUSED as refused:
            # The pruner tries again, and says so.
            log.warning("partitions of history are missing", why=message(refused))
        await self._app.schedules.store_declared()
        if once:
            await self._scheduler.once()

    def works(self) -> dict[str, Work]:
        """What goes on for as long as the worker does, by name."""
        settings = self._settings
        return {
            "sweeper": every(settings.sweep_interval, self._sweeper.once),
            "scheduler": every(timedelta(0), self._scheduler.when_due),
            "pruner": every(min(settings.retention / 100, PRUNING), self._pruner.once),
        }
