"""`db start`, `db stop`, `db url` and `db psql`."""

from __future__ import annotations

import signal
import subprocess
import sys

import click

from queue_service.cli import render
from queue_service.cli.db.reached import cluster_of, target_of
from queue_service.cli.options import command
from queue_service.db import embedded, url
from queue_service.errors import ConfigError


@click.command()
@command
def start(database_url: str | None) -> None:
    """Start the embedded Postgres and leave it running until `db stop`."""
    cluster = cluster_of(database_url)
    cluster.start(keep=True)
    render.echo(f"embedded Postgres is running at {cluster.path}", err=True)
    render.echo(cluster.url)


@click.command()
@command
def stop(database_url: str | None) -> None:
    """Stop the embedded Postgres."""
    cluster = cluster_of(database_url)
    render.echo(f"embedded Postgres at {cluster.path}: {'stopped' if cluster.stop() else 'was not running'}")


@click.command("url")
@command
def url_(database_url: str | None) -> None:
    """Print how to connect, for other programs. Passwords are masked."""
    target = target_of(database_url)
    if isinstance(target, url.Server):
        render.echo(url.masked(target.conninfo))
    else:
        render.echo(embedded.cluster(target.path).url)


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@command
def psql(arguments: tuple[str, ...], database_url: str | None) -> None:
    """Open psql on the database; further arguments are psql's."""
    target = target_of(database_url)
    if isinstance(target, url.EmbeddedCluster):
        cluster = embedded.cluster(target.path)
        cluster.use()
        program = cluster.psql()
    else:
        cluster, program = None, ["psql", *([target.conninfo] if target.conninfo else [])]
    # Ctrl-C is psql's: it gives up a query or a line with it, and goes on. (A function, since psql would inherit SIG_IGN.)
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        sys.exit(subprocess.run([*program, *arguments], check=False).returncode)
    except FileNotFoundError:
        raise ConfigError("psql is not installed. Install the Postgres client programs.") from None
    finally:
        signal.signal(signal.SIGINT, before)
        if cluster is not None:
            cluster.leave()
