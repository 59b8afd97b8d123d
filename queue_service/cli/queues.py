from __future__ import annotations

import click
import msgspec

from queue_service.app import App
from queue_service.cli import render
from queue_service.cli.options import command, json_option, load_app, with_app
from queue_service.queues import queries as queue_queries
from queue_service.runs import queries


@click.group()
def queues() -> None:
    """List, pause and resume queues."""


@queues.command("list")
@json_option
@command
def list_(as_json: bool, database_url: str | None) -> None:
    """The queues that hold runs or are paused, and how much each holds."""

    async def body(app: App) -> list[dict[str, object]]:
        found = await app.fetch(queue_queries.listed())
        depths = [await app.fetch(queries.depth(queue.name)) for queue in found]
        return [{**queue._asdict(), **depth._asdict()} for queue, depth in zip(found, depths, strict=True)]

    found = with_app(load_app(None, database_url), body)
    if as_json:
        click.echo(msgspec.json.encode(found))
        return
    render.table(
        ("queue", "due", "later", "running", "first due", "paused"),
        [
            (row["name"], _count(row["due"]), _count(row["later"]), row["running"], row["first_due"], row["paused_at"])
            for row in found
        ],
        empty="No queue holds a run, and none is paused.",
    )


@queues.command()
@click.argument("name")
@command
def pause(name: str, database_url: str | None) -> None:
    """Let no worker claim from the queue NAME; what is running goes on."""
    changed = with_app(load_app(None, database_url), lambda app: app.pause(name))
    click.echo(f"queue {name}: {'paused' if changed else 'was paused already'}")


@queues.command()
@click.argument("name")
@command
def resume(name: str, database_url: str | None) -> None:
    """Let workers claim from the queue NAME again."""
    changed = with_app(load_app(None, database_url), lambda app: app.resume(name))
    click.echo(f"queue {name}: {'resumed' if changed else 'was not paused'}")


def _count(count: object) -> str:
    assert isinstance(count, int)
    return f"{count - 1:,}+" if count >= queries.COUNT_LIMIT else f"{count:,}"
