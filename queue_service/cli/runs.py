from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import click

from queue_service.app import App
from queue_service.cli import render
from queue_service.cli.options import command, json_option, load_app, with_app
from queue_service.errors import RunUnknown
from queue_service.runs import queries
from queue_service.runs.model import Run, RunState

ids = click.argument("run_ids", type=int, nargs=-1, required=True, metavar="ID...")


@click.group()
def runs() -> None:
    """List, show, retry, cancel and delete runs."""


@runs.command("list")
@click.option("--state", type=click.Choice([state.value for state in RunState]), default=None, show_envvar=True)
@click.option("--queue", default=None, show_envvar=True)
@click.option("--task", default=None, show_envvar=True)
@click.option("--before", type=int, default=None, show_envvar=True, help="Only ids below this: the next page.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_envvar=True)
@json_option
@command
def list_(as_json: bool, database_url: str | None, state: str | None, **filters: Any) -> None:
    """The newest runs first."""
    query = queries.page(state=RunState(state) if state else None, **filters)
    found = with_app(load_app(None, database_url), lambda app: app.fetch(query))
    if as_json:
        render.as_json(found)
        return
    render.table(
        ("id", "state", "queue", "task", "attempt", "failures", "losses", "created", "what"),
        [
            (
                run.id,
                run.state.value,
                run.queue,
                run.task,
                run.attempt,
                run.failures,
                run.losses,
                run.created_at,
                _remark(run),
            )
            for run in found
        ],
        empty="No runs match.",
    )
    if len(found) == filters["limit"]:
        click.echo(f"More: --before {found[-1].id}", err=True)


@runs.command()
@click.argument("run_id", type=int, metavar="ID")
@json_option
@command
def show(run_id: int, as_json: bool, database_url: str | None) -> None:
    """All there is to know about one run."""
    run = with_app(load_app(None, database_url), lambda app: app.get(run_id))
    if run is None:
        raise RunUnknown(run_id)
    if as_json:
        render.as_json(run)
        return
    for name in Run.__struct_fields__:
        value = getattr(run, name)
        if value is not None and value is not False:
            click.echo(f"{name:16} {_shown(value)}")


@runs.command()
@ids
@command
def retry(run_ids: tuple[int, ...], database_url: str | None) -> None:
    """Queue failed, cancelled or expired runs again."""
    _each(run_ids, database_url, lambda app: app.retry, done="queued again", otherwise="has not failed, or is unknown")


@runs.command()
@ids
@command
def cancel(run_ids: tuple[int, ...], database_url: str | None) -> None:
    """Cancel queued or running runs."""
    _each(run_ids, database_url, lambda app: app.cancel, done="cancelled", otherwise="is not live")


@runs.command()
@ids
@click.option("--yes", is_flag=True, show_envvar=True, help="Do not ask.")
@command
def delete(run_ids: tuple[int, ...], yes: bool, database_url: str | None) -> None:
    """Forget queued or finished runs."""
    if not yes:
        click.confirm(f"Delete {len(run_ids)} runs for good?", abort=True, err=True)
    _each(run_ids, database_url, lambda app: app.delete, done="deleted", otherwise="is running, or unknown")


def _each(
    run_ids: tuple[int, ...],
    database_url: str | None,
    method: Callable[[App], Callable[[int], Awaitable[bool]]],
    *,
    done: str,
    otherwise: str,
) -> None:
    async def body(app: App) -> list[int]:
        act = method(app)
        return [run_id for run_id in run_ids if not await act(run_id)]

    untouched = with_app(load_app(None, database_url), body)
    for run_id in run_ids:
        click.echo(f"run {run_id}: {otherwise if run_id in untouched else done}")
    if untouched:
        raise click.exceptions.Exit(1)


def _remark(run: Run) -> str:
    if run.error:
        return f"{run.error.get('reason')}: {run.error.get('message')}".splitlines()[0][:60]
    if run.state is RunState.QUEUED:
        return f"due {render.ago(run.run_at)}"
    return ""


def _shown(value: Any) -> str:
    if isinstance(value, RunState):
        return value.value
    if isinstance(value, dict):
        return "\n                 ".join(f"{key}: {item}" for key, item in value.items())
    return str(value)
