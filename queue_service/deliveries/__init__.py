"""Events handed to the renderers of chat platforms."""

from queue_service.deliveries.deliveries import Deliveries
from queue_service.deliveries.model import NOT_MINE, Answer, Delivery, FailedDelivery, Rendered, Renderer, Shown
from queue_service.deliveries.tries import MAX_ATTEMPTS, RETRY_DELAY

__all__ = [
    "MAX_ATTEMPTS",
    "NOT_MINE",
    "RETRY_DELAY",
    "Answer",
    "Deliveries",
    "Delivery",
    "FailedDelivery",
    "Rendered",
    "Renderer",
    "Shown",
]
