from __future__ import annotations

import sys
from datetime import datetime, timedelta

import click
import msgspec

from queue_service.app import App
from queue_service.cli import render
from queue_service.cli.options import DURATION, MOMENT, command, json_option, load_app, with_app
from queue_service.errors import ConfigError
from queue_service.queues import queries as queue_queries
from queue_service.runs import queries


@click.group()
def queues() -> None:
    """List, pause, resume and purge queues."""


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
        ("queue", "due", "later", "running", "first due", "paused", "until"),
        [
            (
                row["name"],
                _count(row["due"]),
                _count(row["later"]),
                row["running"],
                row["first_due"],
                row["paused_at"],
                row["resumes_at"],
            )
            for row in found
        ],
        empty="No queue holds a run, and none is paused.",
    )


@queues.command()
@click.argument("name")
@click.option("--until", type=MOMENT, default=None, show_envvar=True, help="Until this time, with a time zone.")
@click.option("--for", "lasting", type=DURATION, default=None, show_envvar=True, help="For so long.")
@command
def pause(name: str, until: datetime | None, lasting: timedelta | None, database_url: str | None) -> None:
    """Let no worker claim from the queue NAME, until it is resumed; what is running goes on."""
    if until is not None and lasting is not None:
        raise ConfigError("--until and --for both say for how long. Pass one of them.")
    changed = with_app(load_app(None, database_url), lambda app: app.pause(name, until=until or lasting))
    click.echo(f"queue {name}: {'paused' if changed else 'was paused already'}")


@queues.command()
@click.argument("name")
@click.option("--yes", is_flag=True, show_envvar=True, help="Do not ask.")
@command
def purge(name: str, yes: bool, database_url: str | None) -> None:
    """Forget all that is queued in the queue NAME, now or for later. It leaves no history; what is running goes on."""
    if not yes:
        click.confirm(f"Forget everything that is queued in {name}?", abort=True, err=True)
    shown = sys.stderr.isatty()

    def told(count: int) -> None:
        if shown:
            click.echo(f"\r{count:,} forgotten", nl=False, err=True)

    count = with_app(load_app(None, database_url), lambda app: app.purge(name, told=told))
    click.echo(f"{chr(10) if shown and count else ''}queue {name}: {count:,} runs forgotten")


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
