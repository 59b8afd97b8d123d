from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import click

from queue_service.app import App
from queue_service.cli import render
from queue_service.cli.options import command, json_option, load_app, read, with_app
from queue_service.errors import TurnUnknown
from queue_service.settings import format_duration
from queue_service.turns.model import SENTENCES, Marker, Outcome, TurnFailure
from queue_service.turns.queries import COUNT_LIMIT, TurnCounts

deployment_argument = click.argument("deployment")
yes_option = click.option("--yes", is_flag=True, show_envvar=True, help="Do not ask.")


@click.group()
def markers() -> None:
    """List, show, sweep, fail and discharge the turns that are owed an ending."""


@markers.command("list")
@click.option("--deployment", default=None, show_envvar=True)
@click.option("--stream", default=None, show_envvar=True)
@click.option("--platform", default=None, show_envvar=True)
@click.option("--organization-id", default=None, show_envvar=True)
@click.option("--overdue", is_flag=True, show_envvar=True, help="Only those whose deadline has passed.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_envvar=True)
@json_option
@command
def list_(as_json: bool, database_url: str | None, **filters: Any) -> None:
    """The turns that are owed an ending, those first that lapse first, and how many there are in all."""

    async def body(app: App) -> tuple[list[Marker], TurnCounts]:
        return await app.turns.list(**filters), await app.turns.tally()

    found, tally = read(database_url, body)
    if as_json:
        render.as_json({**tally._asdict(), "markers": found})
        return
    render.table(
        ("deployment", "message", "stream", "platform", "armed", "lapses", "run", "what"),
        [
            (
                marker.deployment,
                marker.message_id,
                marker.stream,
                marker.platform,
                marker.armed_at,
                marker.deadline,
                marker.run_id,
                _remark(marker),
            )
            for marker in found
        ],
        empty="No turns match.",
    )
    render.echo(counted(tally), err=True)


@markers.command()
@deployment_argument
@click.argument("message_id")
@json_option
@command
def show(deployment: str, message_id: str, as_json: bool, database_url: str | None) -> None:
    """What one turn awaits and until when, or how it ended."""

    async def body(app: App) -> tuple[Marker | None, Outcome | None]:
        # In this order: what ends between the two looks is found by the second.
        armed = await app.turns.list(deployment=deployment, message_id=message_id, limit=1)
        return (armed[0], None) if armed else (None, await app.turns.outcome(deployment, message_id))

    marker, outcome = read(database_url, body)
    standing = marker or outcome
    if standing is None:
        raise TurnUnknown(deployment, message_id)
    sentence = awaited(standing) if isinstance(standing, Marker) else ended(standing)
    if as_json:
        render.as_json({"why": sentence, "marker": marker, "outcome": outcome})
        return
    render.echo(sentence)
    shown = ((name, getattr(standing, name)) for name in standing.__struct_fields__)
    render.fields(
        (name, format_duration(value) if isinstance(value, timedelta) else str(value))
        for name, value in shown
        if value is not None and value is not False
    )


@markers.command()
@command
def sweep(database_url: str | None) -> None:
    """End the turns whose deadline has passed. Workers do this all the time."""
    count = with_app(load_app(None, database_url), lambda app: app.turns.sweep())
    render.echo(f"ended {_turns(count)}")


@markers.command()
@deployment_argument
@click.argument("message_ids", nargs=-1, metavar="[MESSAGE_ID...]")
@click.option("--code", type=click.Choice(sorted(SENTENCES)), required=True, show_envvar=True)
@click.option("--message", default=None, show_envvar=True, help="For the person who waits; by default the code's own.")
@click.option("--all", "every", is_flag=True, show_envvar=True, help="Every turn of the deployment.")
@yes_option
@command
def fail(
    deployment: str, message_ids: tuple[str, ...], code: str, message: str | None, every: bool, yes: bool,
    database_url: str | None,
) -> None:  # fmt: skip
    """End turns of a deployment with an error."""
    if every == bool(message_ids):
        raise click.UsageError("This needs the MESSAGE_IDs of the turns, or --all for every turn of the deployment.")
    failure = TurnFailure(code, message)
    if not every:
        what = f"End {_turns(len(message_ids))} of deployment {deployment} with {code}?"
        _confirm(what, yes=yes)
        _each(
            deployment, message_ids, database_url,
            lambda app, message_id: app.turns.fail(deployment, message_id, failure), done=f"ended with {code}",
        )  # fmt: skip
        return
    _confirm(f"End every turn of deployment {deployment} with {code}?", yes=yes)
    ids = with_app(load_app(None, database_url), lambda app: app.turns.fail_deployment(deployment, failure))
    for message_id in ids:
        render.echo(f"turn {message_id}: ended with {code}")
    if not ids:
        render.echo(f"No turn of deployment {deployment} is owed an ending.", err=True)


@markers.command()
@deployment_argument
@click.argument("message_ids", nargs=-1, required=True, metavar="MESSAGE_ID...")
@yes_option
@command
def discharge(deployment: str, message_ids: tuple[str, ...], yes: bool, database_url: str | None) -> None:
    """Forget what is owed to turns, without an event: they were answered by other means."""
    _confirm(f"Let {_turns(len(message_ids))} of deployment {deployment} end without an event?", yes=yes)
    _each(
        deployment, message_ids, database_url,
        lambda app, message_id: app.turns.discharge(deployment, message_id), done="discharged",
    )  # fmt: skip


def awaited(marker: Marker) -> str:
    """What an armed turn waits for, and until when."""
    lapses = render.ago(marker.deadline)
    if marker.failure_code is not None:
        reason = f" ({marker.failure_reason})" if marker.failure_reason else ""
        until = f"lapsed {lapses}, and the next sweep ends it" if marker.overdue else f"lapses {lapses}"
        return f"Withheld: {marker.failure_code}{reason}; {until}."
    what = (
        f"Armed {render.ago(marker.armed_at)}; waits for a worker's first sign of life"
        if marker.admitted_at is None
        else f"Taken up {render.ago(marker.admitted_at)}; waits for its reply, or the worker's next sign of life"
    )
    if marker.overdue:
        return f"{what}, which was due {lapses}: the next sweep ends it."
    return f"{what}, until {marker.deadline.astimezone():%H:%M:%S} ({lapses})."


def ended(outcome: Outcome) -> str:
    """How a turn ended."""
    if outcome.seq is None:
        return f"Discharged {render.ago(outcome.ended_at)}, without an event."
    event = f"event {outcome.seq} of stream {outcome.stream}"
    if outcome.code is None:
        return f"Answered {render.ago(outcome.ended_at)}: {outcome.kind}, {event}."
    return f"Failed {render.ago(outcome.ended_at)}: {outcome.code}, {event}. {outcome.message}"


def counted(tally: TurnCounts) -> str:
    """How many turns are owed an ending, and for how long the oldest overdue one has been."""
    owed = f"{_turns(tally.owed)} owed an ending"
    if tally.oldest_overdue is None:
        return f"{owed}, none overdue."
    seconds = timedelta(seconds=max(1, round(tally.oldest_overdue.total_seconds())))
    return f"{owed}, {_number(tally.overdue)} overdue, the oldest for {format_duration(seconds)}."


def _each(
    deployment: str,
    message_ids: tuple[str, ...],
    database_url: str | None,
    act: Callable[[App, str], Awaitable[bool]],
    *,
    done: str,
) -> None:
    async def body(app: App) -> dict[str, Outcome | None]:
        untouched = [message_id for message_id in message_ids if not await act(app, message_id)]
        return {message_id: await app.turns.outcome(deployment, message_id) for message_id in untouched}

    untouched = with_app(load_app(None, database_url), body)
    for message_id in message_ids:
        outcome = untouched.get(message_id)
        said = done if message_id not in untouched else "unknown" if outcome is None else f"no. {ended(outcome)}"
        render.echo(f"turn {message_id}: {said}")
    for message_id, outcome in untouched.items():
        if outcome is None:
            raise TurnUnknown(deployment, message_id)
    if untouched:
        raise click.exceptions.Exit(1)


def _confirm(question: str, *, yes: bool) -> None:
    if not yes:
        click.confirm(question, abort=True, err=True)


def _remark(marker: Marker) -> str:
    if marker.failure_code is not None:
        return f"withheld: {marker.failure_code}"
    state = "waits to be taken up" if marker.admitted_at is None else "taken up"
    return f"{state}, OVERDUE" if marker.overdue else state


def _turns(count: int) -> str:
    return "1 turn" if count == 1 else f"{_number(count)} turns"


def _number(count: int) -> str:
    return f"{count - 1:,}+" if count >= COUNT_LIMIT else f"{count:,}"
