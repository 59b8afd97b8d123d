from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from typing import IO, Any

import click

from queue_service.app import App
from queue_service.app.enqueue import POLICIES
from queue_service.cli import render
from queue_service.cli.options import DURATION, MOMENT, app_option, command, json_option, load_app, with_app
from queue_service.codec import loads
from queue_service.errors import PayloadRefused, TaskUnknown

LINES_AT_ONCE = 5_000


@click.command()
@click.argument("task")
@click.argument("payload", required=False, default=None)
@app_option
@click.option("--queue", default=None, show_envvar=True, help="Queue; the task's own otherwise.")
@click.option("--priority", type=int, default=0, show_envvar=True, help="Higher goes first.")
@click.option("--delay", type=DURATION, default=None, show_envvar=True, help="Due after this time.")
@click.option("--run-at", type=MOMENT, default=None, show_envvar=True, help="Due at this time, with a time zone.")
@click.option(
    "--expires-in", type=DURATION, default=None, show_envvar=True, help="Ends expired if not started by then."
)
@click.option("--singleton-key", default=None, show_envvar=True, help="At most one live run of the queue has this key.")
@click.option(
    "--on-conflict", type=click.Choice(POLICIES), default="return", show_envvar=True, help="When the key is taken."
)
@click.option("--ordering-key", default=None, show_envvar=True, help="Lane within the queue.")
@click.option("--max-attempts", type=int, default=None, show_envvar=True, help="Attempts before it ends failed.")
@click.option("--retry-delay", type=DURATION, default=None, show_envvar=True, help="Fixed wait between attempts.")
@click.option("--timeout", type=DURATION, default=None, show_envvar=True, help="Longest time for one attempt.")
@click.option("--organization-id", default=None, show_envvar=True, help="Tenant.")
@json_option
@command
def enqueue(
    task: str, payload: str | None, app_path: str | None, as_json: bool, database_url: str | None, **options: Any
) -> None:
    """Enqueue TASK with PAYLOAD, a JSON object; `-` reads one object a line from standard input and enqueues them all.

    With -a the task must be one of the App's, and its own queue is used.
    """
    app = load_app(app_path, database_url)
    if app_path is not None and task not in app.tasks:
        raise TaskUnknown(task, app.tasks)
    given = {name: value for name, value in options.items() if value is not None}
    if payload == "-":
        count = with_app(app, lambda opened: _many(opened, task, sys.stdin, given))
        render.as_json({"count": count}) if as_json else render.echo(f"enqueued {count:,} runs")
        return
    value = _parse(payload or "{}", "The payload")
    run_id = with_app(app, lambda opened: opened.enqueue(task, value, **given))
    render.as_json({"id": run_id}) if as_json else render.echo(f"enqueued run {run_id}")


async def _many(app: App, task: str, lines: IO[str], options: dict[str, Any]) -> int:
    shared = {name: value for name, value in options.items() if name != "on_conflict"}
    numbered = _payloads(lines)
    count = last = 0
    try:
        with render.progress("enqueueing", None) as advance:
            while batch := list(islice(numbered, LINES_AT_ONCE)):
                stored = await app.enqueue_many(task, [payload for _, payload in batch], **shared)
                count, last = count + len(stored), batch[-1][0]
                advance(len(stored))
    except BaseException:
        if count:
            render.echo(
                f"The lines up to {last:,} are enqueued, {count:,} runs: leave them out the next time.", err=True
            )
        raise
    return count


def _payloads(lines: IO[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, _parse(line, f"Line {number}")


def _parse(text: str, what: str) -> dict[str, Any]:
    try:
        value = loads(text.encode())
    except ValueError as refused:
        raise PayloadRefused(f"{what} is not JSON: {refused}.") from None
    if not isinstance(value, dict):
        raise PayloadRefused(f'{what} must be a JSON object such as {{"path": "a.txt"}}, not {type(value).__name__}.')
    return value
