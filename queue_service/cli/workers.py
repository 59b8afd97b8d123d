from __future__ import annotations

import click

from queue_service.cli import render
from queue_service.cli.options import command, json_option, read
from queue_service.roster import queries as roster


@click.group()
def workers() -> None:
    """List worker processes."""


@workers.command("list")
@json_option
@command
def list_(as_json: bool, database_url: str | None) -> None:
    """The worker processes, and whether each was heard of within its lease."""
    found = read(database_url, lambda app: app.fetch(roster.listed(app.settings.lease)))
    if as_json:
        render.as_json([worker._asdict() for worker in found])
        return
    render.table(
        ("id", "name", "alive", "failing", "holds", "queues", "started", "seen", "version"),
        [
            (
                worker.id,
                worker.name,
                "yes" if worker.is_alive else "NO",
                ", ".join(worker.failing) or "-",
                worker.holds,
                ", ".join(f"{queue}:{concurrency}" for queue, concurrency in worker.queues.items()),
                worker.started_at,
                worker.seen_at,
                worker.version,
            )
            for worker in found
        ],
        empty="No worker is running. Start one with `queue-service worker -a module:app`.",
    )
