from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import Any

import click

from queue_service.app import App
from queue_service.cli import render
from queue_service.cli.options import DURATION, app_option, command, json_option, load_app, read, with_app
from queue_service.codec import loads
from queue_service.cron import zone
from queue_service.errors import PayloadRefused, TaskUnknown
from queue_service.schedules.model import Misfire, Schedule
from queue_service.settings import format_duration

name_argument = click.argument("name")
names_argument = click.argument("names", nargs=-1, required=True, metavar="NAME...")


@click.group()
def schedules() -> None:
    """List, show, run, pause, resume, add and delete schedules."""


@schedules.command("list")
@json_option
@command
def list_(as_json: bool, database_url: str | None) -> None:
    """The schedules by name, when each is due, and what it last fired for."""
    found = read(database_url, lambda app: app.schedules.list())
    if as_json:
        render.as_json(found)
        return
    render.table(
        ("name", "task", "queue", "when", "next", "last slot", "last run"),
        [
            (
                each.name,
                each.task,
                each.queue,
                _timing(each),
                "paused" if each.paused_at is not None else each.next_at,
                each.last_slot,
                each.last_run_id,
            )
            for each in found
        ],
        empty="There are no schedules. Declare one with @app.schedule, or add one with `queue-service schedules add`.",
    )


@schedules.command()
@name_argument
@json_option
@command
def show(name: str, as_json: bool, database_url: str | None) -> None:
    """All there is to know about one schedule."""
    found = _there(read(database_url, lambda app: app.schedules.get(name)), name)
    if as_json:
        render.as_json(found)
        return
    shown = ((name, getattr(found, name)) for name in Schedule.__struct_fields__)
    render.fields((name, _shown(value)) for name, value in shown if value is not None)


@schedules.command("next")
@name_argument
@click.option("--count", type=click.IntRange(1, 1_000), default=5, show_envvar=True, help="How many.")
@json_option
@command
def next_(name: str, count: int, as_json: bool, database_url: str | None) -> None:
    """When the schedule is due next, in its own time zone."""

    async def body(app: App) -> tuple[Schedule | None, list[datetime] | None]:
        return await app.schedules.get(name), await app.schedules.next(name, count)

    schedule, slots = read(database_url, body)
    schedule, slots = _there(schedule, name), _there(slots, name)
    local = [slot.astimezone(zone(schedule.timezone)) for slot in slots]
    if as_json:
        render.as_json({"name": name, "paused_at": schedule.paused_at, "slots": local})
        return
    for slot in local:
        render.echo(f"{slot:%a %Y-%m-%d %H:%M:%S %Z}  {render.ago(slot)}")
    if schedule.paused_at is not None:
        render.echo(f"It is paused: `queue-service schedules resume {name}` goes on with it.", err=True)


@schedules.command()
@name_argument
@json_option
@command
def run(name: str, as_json: bool, database_url: str | None) -> None:
    """Enqueue the schedule's run now, out of turn, also while it is paused."""
    run_id = _there(with_app(load_app(None, database_url), lambda app: app.schedules.run_now(name)), name)
    render.as_json({"id": run_id}) if as_json else render.echo(f"enqueued run {run_id}")


@schedules.command()
@names_argument
@command
def pause(names: tuple[str, ...], database_url: str | None) -> None:
    """Let schedules not fire until they are resumed."""
    _each(names, database_url, lambda app, name: app.schedules.pause(name), "paused", "was paused already")


@schedules.command()
@names_argument
@command
def resume(names: tuple[str, ...], database_url: str | None) -> None:
    """Let schedules fire again, from their next slots on."""
    _each(names, database_url, lambda app, name: app.schedules.resume(name), "resumed", "was not paused")


@schedules.command()
@name_argument
@click.argument("task")
@click.argument("payload", required=False, default=None)
@app_option
@click.option("--cron", default=None, show_envvar=True, help="Five fields, or @daily and the like.")
@click.option("--every", type=DURATION, default=None, show_envvar=True, help="An interval instead, such as 15m.")
@click.option("--timezone", default="UTC", show_envvar=True, help="Where the cron expression is read.")
@click.option(
    "--misfire",
    type=click.Choice([each.value for each in Misfire]),
    default="last",
    show_envvar=True,
    help="What happens about slots that passed while no worker was there.",
)
@click.option("--queue", default=None, show_envvar=True, help="Queue; the task's own otherwise.")
@click.option("--priority", type=int, default=0, show_envvar=True, help="Higher goes first.")
@click.option(
    "--expires-in", type=DURATION, default=None, show_envvar=True, help="Its runs end expired if not started by then."
)
@command
def add(
    name: str, task: str, payload: str | None, app_path: str | None, database_url: str | None, **options: Any
) -> None:
    """Store a schedule NAME that enqueues TASK with PAYLOAD, a JSON object; one that has this name is changed.

    With -a the task must be one of the App's, its own queue is used, and the payload is held against its parameters.
    """
    try:
        value = loads(payload or "{}")
    except ValueError as refused:
        raise PayloadRefused(f"The payload is not JSON: {refused}. Nothing was stored.") from None
    app = load_app(app_path, database_url)
    if app_path is not None and task not in app.tasks:
        raise TaskUnknown(task, app.tasks)
    stored = with_app(app, lambda opened: opened.schedules.put(name, task, value, **options))
    render.echo(f"schedule {name}: {'added' if stored else 'is like this already' if stored is None else 'changed'}")


@schedules.command()
@names_argument
@click.option("--yes", is_flag=True, show_envvar=True, help="Do not ask.")
@command
def delete(names: tuple[str, ...], yes: bool, database_url: str | None) -> None:
    """Forget schedules. Their runs stay."""
    if not yes:
        click.confirm(f"Delete {', '.join(names)} for good?", abort=True, err=True)
    _each(names, database_url, _deleted, "deleted", "")


async def _deleted(app: App, name: str) -> bool | None:
    return await app.schedules.delete(name) or None


def _each(
    names: tuple[str, ...],
    database_url: str | None,
    act: Callable[[App, str], Awaitable[bool | None]],
    done: str,
    otherwise: str,
) -> None:
    async def body(app: App) -> dict[str, bool | None]:
        return {name: await act(app, name) for name in names}

    answers = with_app(load_app(None, database_url), body)
    for name, changed in answers.items():
        render.echo(f"schedule {name}: {'unknown' if changed is None else done if changed else otherwise}")
    if None in answers.values():
        raise click.exceptions.Exit(1)


def _there(found: Any, name: str) -> Any:
    if found is None:
        raise click.ClickException(
            f"There is no schedule {name!r}. `queue-service schedules list` shows those there are."
        )
    return found


def _timing(schedule: Schedule) -> str:
    if schedule.every is not None:
        return f"every {format_duration(schedule.every)}"
    return str(schedule.cron) if schedule.timezone == "UTC" else f"{schedule.cron} {schedule.timezone}"


def _shown(value: Any) -> str:
    if isinstance(value, timedelta):
        return format_duration(value)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {item}" for key, item in value.items())
    return str(value)
