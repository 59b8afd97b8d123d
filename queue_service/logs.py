"""Where log lines go. Library code only asks for a logger: its events reach the standard `logging` tree with their
fields as `extra`, and nothing is printed that the application did not ask for. The command line calls `configure`.
Payloads, results and connection strings are never logged.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("auto", "console", "json")


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
    """Send everything to standard error (console on a terminal, JSON otherwise): standard output is for results."""
    console = fmt == "console" or (fmt == "auto" and sys.stderr.isatty())
    renderer: Any = structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                structlog.stdlib.ExtraAdder(),
                structlog.stdlib.add_logger_name,
                structlog.stdlib.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                *([] if console else [structlog.processors.format_exc_info]),
            ],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Its lines about plugins and contexts help nobody who migrates.
    logging.getLogger("alembic").setLevel(max(logging.WARNING, root.level))
