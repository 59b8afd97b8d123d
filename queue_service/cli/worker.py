from __future__ import annotations

import os
import signal
import socket
from collections import Counter
from typing import Any

import click

from queue_service.cli import render
from queue_service.cli.options import app_option, command, load_app, run, setting
from queue_service.errors import ConfigError
from queue_service.worker.dump import on_signal
from queue_service.worker.signals import StoppedBySignals
from queue_service.worker.suspect_process import own_command, stop_with_parent
from queue_service.worker.tally import Tally
from queue_service.worker.worker import Worker

DEFAULT_CONCURRENCY = 10
RUNS_FAILED = 5


@click.command()
@app_option
@click.option(
    "-q",
    "--queue",
    "queues",
    multiple=True,
    metavar="NAME[:N]",
    envvar="QUEUE_SERVICE_QUEUES",
    show_envvar=True,
    help="Queue and concurrency.",
)
@click.option("--once", is_flag=True, show_envvar=True, help="Work off what is due, then exit (5 if runs failed).")
@click.option(
    "--processes", type=click.IntRange(1), default=None, show_envvar=True, help="For process tasks; one for each core."
)
@click.option(
    "--health-port",
    type=click.IntRange(0, 65_535),
    default=None,
    envvar="QUEUE_SERVICE_HEALTH_PORT",
    show_envvar=True,
    help="Answer probes at /livez and /readyz; 0 takes a free port.",
)
@click.option(
    "--health-host",
    default="127.0.0.1",
    envvar="QUEUE_SERVICE_HEALTH_HOST",
    show_envvar=True,
    help="Address for them; 0.0.0.0 for probes from outside.",
)
@click.option("--only-suspects", is_flag=True, hidden=True)
@click.option("--name", default=None, show_envvar=True, help="Name in the roster; HOST:PID otherwise.")
@setting("drain_timeout")
@setting("lease")
@setting("poll_interval")
@setting("sweep_interval")
@setting("max_losses", int)
@setting("pool_size", int)
@setting("lent_connections", int)
@setting("lent_statement_timeout")
@command
def worker(
    app_path: str | None,
    queues: tuple[str, ...],
    once: bool,
    processes: int | None,
    health_port: int | None,
    health_host: str,
    only_suspects: bool,
    name: str | None,
    database_url: str | None,
    **settings: Any,
) -> None:
    """Work on queues until stopped.

    SIGTERM or Ctrl-C stops claiming and lets handlers end within --drain-timeout; a second one cancels them. What was
    not finished goes back to its queue, and no attempt is charged for it. SIGUSR1 logs what runs, with its stacks.

    Runs that lost a worker before run in a process of their own, which this one starts while there are any.
    """
    if app_path is None:
        raise ConfigError("A worker needs the App that defines its tasks: `-a module:app`, or QUEUE_SERVICE_APP.")
    app = load_app(app_path, database_url, **settings)
    if not app.tasks:
        raise ConfigError(f"The App at {app_path} has no tasks. Import the modules that define them where the App is.")
    wanted = _queues(queues) or dict.fromkeys(
        sorted({task.queue for task in app.tasks.values()}) or ["default"], DEFAULT_CONCURRENCY
    )
    if only_suspects:
        once, health_port, name = True, None, f"{name or socket.gethostname()}:suspects:{os.getpid()}"
    made = Worker(
        app, wanted, name=name, processes=processes, health_port=health_port, health_host=health_host,
        only_suspects=only_suspects, suspect_command=own_command("--only-suspects"),
    )  # fmt: skip
    with on_signal(signal.SIGUSR1, made.dump), StoppedBySignals(made) as stopped:
        if only_suspects:
            stop_with_parent()
        else:
            shown = ", ".join(f"{queue} ({concurrency} at once)" for queue, concurrency in made.queues.items())
            render.echo(f"working on {shown}. Ctrl-C stops.", err=True)
        tally = run(_work(made, stopped, once=once))
    if only_suspects:
        return
    if code := _exit_code(tally, once=once):
        raise click.exceptions.Exit(code)


async def _work(worker: Worker, stopped: StoppedBySignals, *, once: bool) -> Tally:
    tally = await worker.run(once=once)
    stopped.has_stopped(_exit_code(tally, once=once))
    return tally


def _exit_code(tally: Tally, *, once: bool) -> int:
    return RUNS_FAILED if once and tally.failed else 0


def _queues(texts: tuple[str, ...]) -> dict[str, int]:
    queues = [_queue(text) for text in texts]
    twice = [name for name, count in Counter(name for name, _ in queues).items() if count > 1]
    if twice:
        raise ConfigError(f"-q names queue {twice[0]} twice. Name it once, with its concurrency.")
    return dict(queues)


def _queue(text: str) -> tuple[str, int]:
    if ":" not in text:
        return text, DEFAULT_CONCURRENCY
    name, _, concurrency = text.rpartition(":")
    if not name or not concurrency.isdigit():
        raise ConfigError(f"-q {text}: this names no queue with a concurrency. Write NAME or NAME:10.")
    return name, int(concurrency)
