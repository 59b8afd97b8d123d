"""Where log lines go. Library code only asks for a logger: its events reach the standard `logging` tree with their
fields as `extra`, and nothing is printed that the application did not ask for. The command line calls `configure`.
Payloads, results and connection strings are never logged.

What handlers log can carry their run: `run_context` for structlog, `RunFilter` for the standard library. Each looks the
run up when something is logged, since binding its fields for every run would cost more than many a handler.
"""

from __future__ import annotations

import logging
import sys
from contextvars import ContextVar
from typing import Any, Protocol

import structlog

from queue_service.printable import printable

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("auto", "console", "json")


OURS = "queue_service."


class Executed(Protocol):
    """A run, as its handler's log shows it."""

    @property
    def id(self) -> int: ...
    @property
    def task(self) -> str: ...
    @property
    def queue(self) -> str: ...
    @property
    def attempt(self) -> int: ...
    @property
    def turn(self) -> Any: ...


# The run whose handler this is. Each has a context of its own, which the tasks and threads that it starts inherit.
running: ContextVar[Executed | None] = ContextVar("queue_service_running", default=None)
# The level and the format that `configure` was given, for the processes that a worker starts.
configured: tuple[str, str] | None = None


def run_context(_logger: Any, _method: str, event: Any) -> Any:
    """A structlog processor: what is logged in a handler, or in what it started, gets `run_id`, `task`, `queue` and
    `attempt`, each unless the event says it itself. One with a `run_id` of its own is about another run, and stays as it
    is."""
    run = running.get()
    if run is None or "run_id" in event:
        return event
    return {"run_id": run.id, "task": run.task, "queue": run.queue, "attempt": run.attempt, **event}


class RunFilter(logging.Filter):
    """The same for the standard library: `handler.addFilter(RunFilter())`. It lets every record pass, and gives it these
    four attributes, None outside of a run, for a format such as `%(run_id)s %(message)s`."""

    def filter(self, record: logging.LogRecord) -> bool:
        run = None if hasattr(record, "run_id") else running.get()
        for name, of_run in (("run_id", "id"), ("task", "task"), ("queue", "queue"), ("attempt", "attempt")):
            if not hasattr(record, name):
                setattr(record, name, getattr(run, of_run, None))
        return True


def get_logger(name: str) -> Any:
    """A structlog logger over `logging.getLogger(name)`; context bound by `structlog.contextvars` is included."""
    return structlog.wrap_logger(
        logging.getLogger(name),
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.render_to_log_kwargs,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
    )


def configure(*, level: str, fmt: str) -> None:
    """Send everything to standard error (console on a terminal, JSON otherwise): standard output is for results. What is
    logged with `structlog.get_logger()` too, unless the program configures structlog itself later on."""
    global configured  # noqa: PLW0603 - so is what it names: one for each process
    configured = (level, fmt)
    console = fmt == "console" or (fmt == "auto" and sys.stderr.isatty())
    stamps: list[Any] = [
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.contextvars.merge_contextvars,
            run_context,
            *stamps,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.processors.StackInfoRenderer(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_formatter(stamps, console=console))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Its lines about plugins and contexts help nobody who migrates.
    logging.getLogger("alembic").setLevel(max(logging.WARNING, root.level))


def _formatter(stamps: list[Any], *, console: bool) -> logging.Formatter:
    # Exceptions are text by then. Before its release 26.1, structlog warns of that unless it is to show them plainly.
    of_console = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    renderer: Any = of_console if console else structlog.processors.JSONRenderer()
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[structlog.stdlib.ExtraAdder(), _foreign_context, *stamps],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            *([_printable] if console else []),
            renderer,
        ],
    )


def _printable(_logger: Any, _method: str, event: Any) -> Any:
    """What a terminal would obey is escaped: some of what is logged was written by others."""
    return {printable(str(name)): _visible(name, value) for name, value in event.items()}


def _visible(name: str, value: Any) -> Any:
    if isinstance(value, (bool, int, float)) or value is None:
        return value
    text = value if isinstance(value, str) else repr(value)
    # Only what we format has lines of its own: elsewhere a line break would begin what looks like another entry.
    return printable(text, keep="\n\t" if name in {"exception", "stack"} else "")


def _foreign_context(logger: Any, method: str, event: Any) -> Any:
    # Our own lines name the run where they are about one; and what works for the whole process may have been started by
    # one handler, in whose context it stays.
    return event if event["_record"].name.startswith(OURS) else run_context(logger, method, event)
