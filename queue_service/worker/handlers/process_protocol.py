"""What a worker and a process for handlers send to each other: JSON, one line for each message."""

from __future__ import annotations

from datetime import timedelta

import msgspec

from queue_service.runs.model import Ending, Return, Run
from queue_service.settings import Pooler


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A run to execute, and where its task is found. `conninfo` is the database that the worker is connected to, `pooler`
    what is in between, `logging` the level and the format if its log was configured by us."""

    module: str
    main: str | None
    main_file: str | None
    run: Run
    conninfo: str
    pooler: Pooler
    limit: int
    lent_statement_timeout: timedelta
    max_attempts: int
    worker_id: int
    logging: tuple[str, str] | None = None


class HandlerBegun(msgspec.Struct, frozen=True, tag="begun"):
    """The handler is called now."""


class HandlerWaits(msgspec.Struct, frozen=True, tag="waits"):
    """The handler begins to wait for a connection of ours, or no longer does."""

    waits: bool


class RunSettled(msgspec.Struct, frozen=True, tag="settled"):
    """The handler has ended its run, in a transaction of its own."""

    ending: Ending


class ProgressReported(msgspec.Struct, frozen=True, tag="reported"):
    """A JSON object of value and note."""

    progress: str


class RunEnded(msgspec.Struct, frozen=True, tag="ended"):
    outcome: Ending


class RunReturned(msgspec.Struct, frozen=True, tag="returned"):
    outcome: Return


# What comes before the answer.
Message = HandlerBegun | HandlerWaits | RunSettled | ProgressReported
