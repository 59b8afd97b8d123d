from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import click
import msgspec

from queue_service.app import App
from queue_service.app.history import RETRIABLE
from queue_service.cli import render
from queue_service.cli.options import DURATION, command, json_option, load_app, read, with_app
from queue_service.cli.queues import limits_of
from queue_service.errors import ConfigError, RunUnknown
from queue_service.queues import queries as queues
from queue_service.roster import queries as roster
from queue_service.runs import walks
from queue_service.runs.model import Attempt, Progress, Run, RunState
from queue_service.steps import queries as steps
from queue_service.steps.model import Step
from queue_service.turns import queries as turns

ids = click.argument("run_ids", type=int, nargs=-1, required=True, metavar="ID...")


@click.group()
def runs() -> None:
    """List, show, explain, retry, cancel and delete runs."""


@runs.command("list")
@click.option("--state", type=click.Choice([state.value for state in RunState]), default=None, show_envvar=True)
@click.option("--queue", default=None, show_envvar=True)
@click.option("--task", default=None, show_envvar=True)
@click.option("--before", type=int, default=None, show_envvar=True, help="Only ids below this: the next page.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_envvar=True)
@json_option
@command
def list_(as_json: bool, database_url: str | None, state: str | None, before: int | None, **filters: Any) -> None:
    """The newest runs first. Where few fit, the search stops when it has lasted for a while, and says where to go on."""
    filters["state"] = RunState(state) if state else None
    found, below = read(database_url, lambda app: _newest(app, before, **filters))
    if as_json:
        render.as_json(found)
    else:
        _table(found)
    if below is None:
        return
    if len(found) == filters["limit"]:
        render.echo(f"More: --before {below}", err=True)
    else:
        render.echo(
            f"Stopped looking at run {below}: go on with --before {below}, or look for longer with "
            "QUEUE_SERVICE_READ_TIMEOUT=10s.",
            err=True,
        )


async def _newest(app: App, below: int | None, *, limit: int, **filters: Any) -> walks.Page:
    """As many as are asked for, or what was found within the time for a read."""
    found: list[Run] = []
    patience = time.monotonic() + app.settings.read_timeout.total_seconds()
    while True:
        page = await app.fetch(walks.page(before=below, limit=limit - len(found), **filters))
        found, below = found + page.runs, page.below
        if below is None or len(found) == limit or time.monotonic() > patience:
            return walks.Page(found, below)


def _table(found: Sequence[Run]) -> None:
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


@runs.command()
@click.argument("run_id", type=int, metavar="ID")
@json_option
@command
def show(run_id: int, as_json: bool, database_url: str | None) -> None:
    """All there is to know about one run, and tables of its attempts and its steps."""

    async def body(app: App) -> tuple[Run | None, list[Step]]:
        return await app.get(run_id), await app.fetch(steps.of_run(run_id))

    run, done = read(database_url, body)
    if run is None:
        raise RunUnknown(run_id)
    if as_json:
        render.as_json({**msgspec.to_builtins(run), "steps": done})
        return
    shown = ((field, getattr(run, field.name)) for field in msgspec.structs.fields(Run) if field.name != "attempts")
    render.fields(
        (field.encode_name, _shown(value)) for field, value in shown if value is not None and value is not False
    )
    if run.attempts:
        render.echo()
        render.table(
            ("attempt", "worker", "began", "took", "what"),
            [
                (each.attempt, each.worker_id, each.claimed_at, _took(each), _came_to(run, each))
                for each in run.attempts
            ],
            empty="",
        )
    if done:
        render.echo()
        render.table(
            ("step", "attempt", "done", "result"),
            [(each.name, each.attempt, each.created_at, _result(each)) for each in done],
            empty="",
        )


class Surroundings(NamedTuple):
    """What a run depends on: its queue, the workers, and the turn it works on, with its deadline."""

    queue: queues.Queue | None
    workers: Sequence[roster.WorkerRow]
    turn: tuple[str, str, datetime] | None


@runs.command()
@click.argument("run_id", type=int, metavar="ID")
@json_option
@command
def why(run_id: int, as_json: bool, database_url: str | None) -> None:
    """What a run awaits, and until when."""

    async def body(app: App) -> tuple[Run | None, Surroundings]:
        run = await app.get(run_id)
        known = {queue.name: queue for queue in await app.fetch(queues.listed())}
        workers = await app.fetch(roster.listed(app.settings.lease))
        turn = await app.fetch(turns.of_run(run_id))
        return run, Surroundings(known.get(run.queue) if run else None, workers, turn)

    run, around = read(database_url, body)
    if run is None:
        raise RunUnknown(run_id)
    sentence = " ".join(filter(None, (awaited(run, around), turn_of(around))))
    if as_json:
        render.as_json({"id": run.id, "state": run.state, "why": sentence})
    else:
        render.echo(sentence)


@runs.command()
@click.argument("run_ids", type=int, nargs=-1, metavar="[ID...]")
@click.option(
    "--state",
    type=click.Choice([state.value for state in RETRIABLE]),
    default=None,
    show_envvar=True,
    help="All that ended so (failed).",
)
@click.option("--queue", default=None, show_envvar=True, help="All of this queue.")
@click.option("--task", default=None, show_envvar=True, help="All of this task.")
@click.option(
    "--since", type=DURATION, default=None, show_envvar=True, help="All that ended within so long, such as 2h."
)
@click.option("--limit", type=click.IntRange(1), default=None, show_envvar=True, help="At most so many.")
@click.option("--dry-run", is_flag=True, show_envvar=True, help="Only count them.")
@json_option
@command
def retry(
    run_ids: tuple[int, ...], as_json: bool, database_url: str | None, dry_run: bool, state: str | None, **filters: Any
) -> None:
    """Queue failed, cancelled or expired runs again: those of these IDs, or all that fit, the oldest first."""
    chosen = {name: value for name, value in {"state": state, **filters}.items() if value is not None}
    if run_ids:
        if chosen or dry_run or as_json:
            raise ConfigError(
                "Name runs by their ids, or choose them with --state, --queue, --task and --since; not both. "
                "--limit, --dry-run and --json are for those that are chosen."
            )
        _each(
            run_ids, database_url, lambda app: app.retry, done="queued again", otherwise="has not failed, or is unknown"
        )
        return
    if not chosen.keys() - {"limit"}:
        raise ConfigError(
            "Which runs? Name them by their ids, or choose them, such as all that failed: --state failed."
        )
    with render.line() as show:
        done = with_app(
            load_app(None, database_url),
            lambda app: app.retry_many(
                **chosen, dry_run=dry_run, on_progress=lambda so_far: show(f"{so_far.runs:,} runs queued again")
            ),
        )
    if as_json:
        render.as_json({**done._asdict(), "dry_run": dry_run})
    elif dry_run:
        render.echo(f"{render.count(done.runs)} runs would be queued again")
    else:
        skipped = f"; {done.skipped:,} skipped: a live run holds their singleton key" if done.skipped else ""
        render.echo(f"{done.runs:,} runs queued again{skipped}")


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


def awaited(run: Run, around: Surroundings) -> str:
    """What the run waits for, and until when; or how it ended."""
    if run.state is RunState.QUEUED:
        return _queued(run, around)
    if run.state is RunState.RUNNING:
        return _running(run, around)
    how = f", {_failure(run)}" if run.error else ""
    return f"Ended {run.state.value} {_when(run.finished_at)}{how}."


def turn_of(around: Surroundings) -> str:
    """The turn that the run works on; nothing where there is none."""
    if around.turn is None:
        return ""
    deployment, message_id, deadline = around.turn
    return f"It works on turn {message_id} of deployment {deployment}, whose deadline is {_when(deadline)}."


def _queued(run: Run, around: Surroundings) -> str:
    expires = "" if run.expires_at is None else f" It expires {_when(run.expires_at)}."
    tried = f"Attempt {run.attempt} failed ({_failure(run)}); " if run.failures and run.error else ""
    if _is_ahead(run.run_at):
        what = f"{tried}tried again {_when(run.run_at)}." if tried else f"Scheduled for {_when(run.run_at)}."
        return what + expires
    what = f"{tried}{'queued' if tried else 'Queued'}, and due since {_when(run.run_at)}"
    return f"{what}; {_taken_up_by(run, around)}.{expires}"


def _taken_up_by(run: Run, around: Surroundings) -> str:
    queue = around.queue
    if queue is not None and queue.paused_at is not None:
        until = "" if queue.resumes_at is None else f" until {_when(queue.resumes_at)}"
        since = f"{render.ago(queue.paused_at)}{until}"
        return f"queue {run.queue} was paused {since}: `queue-service queues resume {run.queue}` goes on with it"
    serving = [worker for worker in around.workers if worker.is_alive and run.queue in worker.queues]
    if not serving:
        start = f"queue-service worker -a module:app -q {run.queue}"
        return f"no live worker works on queue {run.queue}: start one with `{start}`"
    count = "a free place of the worker" if len(serving) == 1 else f"a free place of the {len(serving)} workers"
    lane = "" if run.ordering_key is None else f"its turn in lane {run.ordering_key}, for "
    limits = queue and limits_of(queue)
    room = f"room in the limits of the queue ({limits}), for " if limits else ""
    return f"waits for {lane}{room}{count} on queue {run.queue}, and for one that knows task {run.task}"


def _running(run: Run, around: Surroundings) -> str:
    since = "" if run.claimed_at is None else f" {render.ago(run.claimed_at)}"
    what = f"Attempt {run.attempt} began{since} and runs on"
    asked = " Its cancellation was asked for." if run.cancel_requested else ""
    for worker in around.workers:
        if worker.id == run.worker_id:
            seen = f"which was heard of {render.ago(worker.seen_at)}"
            fate = "" if worker.is_alive else ": when its lease lapses, another worker takes over"
            return f"{what} worker {worker.id} ({worker.name}), {seen}{fate}.{asked}"
    return f"{what} a worker that is gone: when its lease lapses, another takes over.{asked}"


def _took(attempt: Attempt) -> str | None:
    if attempt.ended_at is None:
        return None
    return render.span((attempt.ended_at - attempt.claimed_at).total_seconds())


def _came_to(run: Run, attempt: Attempt) -> str:
    return _failure(attempt)[:80] if attempt.error else run.state.value


def _result(step: Step) -> str:
    if step.unreadable is not None:
        return f"unreadable: {step.unreadable}"[:80]
    return msgspec.json.encode(step.result).decode()[:80]


def _failure(run: Run | Attempt) -> str:
    error = run.error or {}
    return f"{error.get('reason')}: {error.get('message')}".splitlines()[0]


def _is_ahead(moment: datetime) -> bool:
    return moment > datetime.now(UTC)


def _when(moment: datetime | None) -> str:
    return "at some time" if moment is None else f"{moment.astimezone():%Y-%m-%d %H:%M:%S} ({render.ago(moment)})"


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
        render.echo(f"run {run_id}: {otherwise if run_id in untouched else done}")
    if untouched:
        raise click.exceptions.Exit(1)


def _remark(run: Run) -> str:
    if run.error:
        return _failure(run)[:60]
    if run.state is RunState.QUEUED:
        return f"due {render.ago(run.run_at)}"
    return "" if run.reported is None else _progress(run.reported)


def _progress(progress: Progress) -> str:
    return f"{progress.value:.0%} {progress.note or ''}".rstrip()


def _shown(value: Any) -> str:
    if isinstance(value, RunState):
        return value.value
    if isinstance(value, Progress):
        return f"{_progress(value)} ({render.ago(value.at)})"
    if isinstance(value, dict):
        return "\n".join(f"{key}: {item}" for key, item in value.items())
    return str(value)
