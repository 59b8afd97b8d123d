"""What a request is refused with: a status, a sentence, and the field it is about."""

from __future__ import annotations

import math
import random

from starlette.responses import JSONResponse

from queue_service.errors import (
    ConfigError,
    DatabaseUnavailable,
    MessageConflict,
    PayloadRefused,
    QueueServiceError,
    StreamEnded,
)
from queue_service.logs import get_logger

log = get_logger(__name__)

STATUS_CODES: tuple[tuple[type[QueueServiceError], int], ...] = (
    (MessageConflict, 409),
    (StreamEnded, 409),
    (ConfigError, 400),
    (PayloadRefused, 400),
    (DatabaseUnavailable, 503),
)


class Refused(Exception):
    """`retry_after` is in seconds; callers get whole ones."""

    def __init__(self, status: int, why: str, *, field: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(why)
        self.status = status
        self.field = field
        self.retry_after = retry_after

    @property
    def response(self) -> JSONResponse:
        headers = {} if self.retry_after is None else {"retry-after": str(max(1, math.ceil(self.retry_after)))}
        return JSONResponse({"error": str(self), "field": self.field}, self.status, headers)


def refusal(error: QueueServiceError) -> Refused:
    """An error of ours, as its caller sees it."""
    status = next((status for kind, status in STATUS_CODES if isinstance(error, kind)), 500)
    # Not what the driver said: addresses and names are not for callers.
    why = {500: "This cannot be done now.", 503: "The database cannot be reached. Try again."}.get(status) or str(error)
    if status >= 500:
        log.error("a request failed", why=str(error))
    return Refused(status, why, retry_after=random.uniform(1, 3) if status == 503 else None)  # noqa: S311
