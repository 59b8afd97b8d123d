"""A durable runs queue on Postgres, and turns that always end."""

from queue_service.app import App
from queue_service.deliveries import NOT_MINE, Deliveries, Delivery, FailedDelivery, Renderer, Shown
from queue_service.events.model import Event, StreamState
from queue_service.runs.model import Attempt, Progress, Run, RunState
from queue_service.supervisor import Supervisor, Supervisors
from queue_service.tasks import Cancel, Defer, HandedOn, ProcessDied, Retry, RetryLater, Snooze
from queue_service.turn import Turn
from queue_service.turns.model import Outcome, TurnFailure
from queue_service.version import VERSION
from queue_service.worker.worker import Worker

__version__ = VERSION

__all__ = [
    "NOT_MINE",
    "App",
    "Attempt",
    "Cancel",
    "Defer",
    "Deliveries",
    "Delivery",
    "Event",
    "FailedDelivery",
    "HandedOn",
    "Outcome",
    "ProcessDied",
    "Progress",
    "Renderer",
    "Retry",
    "RetryLater",
    "Run",
    "RunState",
    "Shown",
    "Snooze",
    "StreamState",
    "Supervisor",
    "Supervisors",
    "Turn",
    "TurnFailure",
    "Worker",
]
