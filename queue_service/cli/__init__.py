"""The command line. Commands are imported when they are used, so that each starts quickly."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import click

from queue_service.printable import printable

COMMANDS = {
    "config": ("queue_service.cli.config:config", "Show the settings in force."),
    "db": ("queue_service.cli.db:db", "Migrate, start, stop and inspect the database."),
    "demo": ("queue_service.cli.demo:demo", "See a worker killed, an agent killed, and nothing lost."),
    "enqueue": ("queue_service.cli.enqueue:enqueue", "Enqueue one run, or many from standard input."),
    "gateway": ("queue_service.cli.gateway:gateway", "Serve conversations over HTTP: events down, messages up."),
    "markers": ("queue_service.cli.markers:markers", "List and end the turns that are owed an ending."),
    "probe": ("queue_service.cli.probe:probe", "Ask a worker whether it is live, or ready."),
    "queues": ("queue_service.cli.queues:queues", "List, pause, resume, limit and purge queues."),
    "runs": ("queue_service.cli.runs:runs", "List, show, explain, retry, cancel and delete runs."),
    "schedules": ("queue_service.cli.schedules:schedules", "List, show, run, pause, resume, add and delete schedules."),
    "version": ("queue_service.cli.config:version", "Show the version and the schema revision it needs."),
    "worker": ("queue_service.cli.worker:worker", "Work on queues."),
    "workers": ("queue_service.cli.workers:workers", "List worker processes."),
}


@contextlib.contextmanager
def _printable_errors() -> Iterator[None]:
    """The text of an error may quote data, and click prints it."""
    try:
        yield
    except click.ClickException as error:
        error.message = printable(error.message, keep="\n\t")  # type: ignore[misc]
        raise


class LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _printable_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with _printable_errors():
            return super().invoke(ctx)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in sorted(COMMANDS)])


@click.group(
    cls=LazyGroup,
    context_settings={
        "auto_envvar_prefix": "QUEUE_SERVICE",
        "help_option_names": ["-h", "--help"],
        "show_default": True,
    },
)
def cli() -> None:
    """A durable runs queue on Postgres.

    The database is --database-url, or QUEUE_SERVICE_DATABASE_URL, DATABASE_URL, PG*, or else an embedded Postgres.
    Exit codes: 0 ok, 1 failed, 2 usage, 3 database unreachable, 4 schema behind, 5 runs failed.
    """


def main() -> None:
    cli(prog_name="queue-service")
