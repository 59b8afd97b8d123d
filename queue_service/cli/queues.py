from __future__ import annotations

from datetime import datetime, timedelta

import click

from queue_service.app import App
from queue_service.cli import render
from queue_service.cli.options import DURATION, MOMENT, RATE, command, json_option, load_app, read, with_app
from queue_service.errors import ConfigError
from queue_service.queues.queries import Queue
from queue_service.runs import queries
from queue_service.runs.queries import Depth


@click.group()
def queues() -> None:
    """List, pause, resume, limit and purge queues."""


@queues.command("list")
@json_option
@command
def list_(as_json: bool, database_url: str | None) -> None:
    """The queues that hold runs, or about which something was set, and how much each holds."""

    async def body(app: App) -> list[tuple[Queue, Depth]]:
        return [(queue, await app.fetch(queries.depth(queue.name))) for queue in await app.queues.list()]

    found = read(database_url, body)
    if as_json:
        render.as_json([{**queue._asdict(), **depth._asdict()} for queue, depth in found])
        return
    render.table(
        ("queue", "due", "later", "running", "limits", "first due", "paused", "until"),
        [
            (
                queue.name,
                render.count(depth.due),
                render.count(depth.later),
                depth.running,
                limits_of(queue),
                depth.first_due,
                queue.paused_at,
                queue.resumes_at,
            )
            for queue, depth in found
        ],
        empty="No queue holds a run, and about none is anything set.",
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
    changed = with_app(load_app(None, database_url), lambda app: app.queues.pause(name, until=until or lasting))
    render.echo(f"queue {name}: {'paused' if changed else 'was paused already'}")


@queues.command()
@click.argument("name")
@click.option("--yes", is_flag=True, show_envvar=True, help="Do not ask.")
@command
def purge(name: str, yes: bool, database_url: str | None) -> None:
    """Forget all that is queued in the queue NAME, now or for later. It leaves no history; what is running goes on."""
    if not yes:
        click.confirm(f"Forget everything that is queued in {name}?", abort=True, err=True)
    with render.line() as show:
        count = with_app(
            load_app(None, database_url),
            lambda app: app.queues.purge(name, on_progress=lambda count: show(f"{count:,} forgotten")),
        )
    render.echo(f"queue {name}: {count:,} runs forgotten")


@queues.command()
@click.argument("name")
@command
def resume(name: str, database_url: str | None) -> None:
    """Let workers claim from the queue NAME again."""
    changed = with_app(load_app(None, database_url), lambda app: app.queues.resume(name))
    render.echo(f"queue {name}: {'resumed' if changed else 'was not paused'}")


@queues.command()
@click.argument("name")
@click.option("--max-running", type=int, default=None, show_envvar=True, help="So many of its runs go on at once.")
@click.option(
    "--max-running-per-key",
    type=int,
    default=None,
    show_envvar=True,
    help="So many with the same ordering key (1 without this).",
)
@click.option(
    "--rate", type=RATE, default=None, show_envvar=True, metavar="N/TIME", help="So many begin in a time: 100/1m."
)
@click.option("--burst", type=int, default=None, show_envvar=True, help="So many of them at once (all, without this).")
@click.option("--none", "unlimited", is_flag=True, show_envvar=True, help="Take the limits away.")
@command
def limit(
    name: str,
    max_running: int | None,
    max_running_per_key: int | None,
    rate: tuple[int, timedelta] | None,
    burst: int | None,
    unlimited: bool,
    database_url: str | None,
) -> None:
    """Set the limits of the queue NAME, for all workers together; what is not given here is not limited."""
    given = {"max_running": max_running, "max_running_per_key": max_running_per_key, "burst": burst}
    number, period = rate or (None, timedelta(seconds=1))
    if unlimited is any(value is not None for value in (*given.values(), number)):
        raise ConfigError("Say what limits the queue has from now on, or pass --none to take them all away.")
    changed = with_app(
        load_app(None, database_url), lambda app: app.queues.limit(name, **given, rate=number, period=period)
    )
    render.echo(f"queue {name}: {'limits set' if changed else 'had these limits already'}")


def limits_of(queue: Queue) -> str | None:
    """In few words; None where there are none."""
    parts = [f"{queue.max_running:,} running"] if queue.max_running else []
    parts += [f"{queue.max_running_per_key:,} of a key"] if queue.max_running_per_key else []
    if queue.rate and queue.period:
        parts.append(f"{queue.rate:,} in {queue.period.total_seconds():g} s")
        parts += [f"{queue.burst:,} at once"] if queue.burst != queue.rate else []
    return ", ".join(parts) or None
