"""A durable runs queue on Postgres."""

from queue_service.app import App
from queue_service.runs.model import Run, RunState
from queue_service.tasks import Cancel, Retry, Snooze
from queue_service.worker.process import Worker

__version__ = "0.1.0"

__all__ = ["App", "Cancel", "Retry", "Run", "RunState", "Snooze", "Worker"]
