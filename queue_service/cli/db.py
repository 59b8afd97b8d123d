from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import click

from queue_service import settings as settings_module
from queue_service.cli import render
from queue_service.cli.options import command, json_option, run
from queue_service.db import embedded, grants, revision, schema, url
from queue_service.db.cluster import Cluster
from queue_service.db.downgrade import downgrade, is_older
from queue_service.db.session import Address, Session, connect
from queue_service.errors import ConfigError, SchemaMismatch
from queue_service.printable import printable

T = TypeVar("T")


@click.group()
def db() -> None:
    """Migrate, start, stop and inspect the database."""


@db.command()
@click.option(
    "--to", "target", default="head", show_envvar=True, help="Revision; an older one drops what came after it."
)
@click.option(
    "--yes", is_flag=True, show_envvar=True, help="Drop what an older revision does not have, without asking."
)
@click.option(
    "--force", is_flag=True, show_envvar=True, help="Also while turns are owed, runs wait or workers are at work."
)
@command
def migrate(target: str, yes: bool, force: bool, database_url: str | None) -> None:
    """Bring the schema to this version's revision. Safe to run from many places at once. An older revision (`--to`) drops
    tables and columns with all that is in them: they are listed, and you are asked."""
    with _Reached(database_url) as conninfo:
        have = _current(conninfo)
        if have is not None and is_older(have, target):
            _downgrade(conninfo, have, target, yes=yes, force=force)
        else:
            schema.upgrade(conninfo, target, tell=_tell)
        render.echo(f"schema queue_service: {have or 'none'} -> {_current(conninfo) or 'none'}")


def _downgrade(conninfo: str, have: str, target: str, *, yes: bool, force: bool) -> None:
    lease = settings_module.load(os.environ).lease
    losses = downgrade(conninfo, target, lease=lease, force=force, commit=False, tell=_tell)
    render.echo(f"Going back from revision {have} to {target} drops for good:", *losses.lines(), err=True)
    if not yes:
        if not sys.stdin.isatty():
            raise click.UsageError("Nothing was changed. Say --yes to drop it.")
        click.confirm("Drop it?", abort=True, err=True)
    downgrade(conninfo, target, lease=lease, force=force, commit=True, tell=_tell)


def _tell(sentence: str) -> None:
    render.echo(sentence, err=True)


@db.command()
@json_option
@command
def current(as_json: bool, database_url: str | None) -> None:
    """The revision of the database, and the one this version needs. Exits with 4 where they differ."""
    with _Reached(database_url) as conninfo:
        have = _current(conninfo)
    if as_json:
        render.as_json({"have": have, "want": revision.HEAD})
    else:
        render.echo(f"schema queue_service: {have or 'none'} (this version needs {revision.HEAD})")
    if have != revision.HEAD:
        raise click.exceptions.Exit(SchemaMismatch.exit_code)


@db.command()
@json_option
@command
def check(as_json: bool, database_url: str | None) -> None:
    """Compare the tables in the database with those this version expects, and behind a pooler of transactions the settings
    of the role with those it needs. Exits with 1 where they differ, and with 4 where the schema is at another revision."""
    with _Reached(database_url) as conninfo:
        _look(conninfo, revision.require)
        difference = _difference(conninfo)
        where, lacking = _look(conninfo, _settings_of_the_role)
    sentences = [] if difference is None else [f"The database differs from what this version expects: {difference}"]
    sentences += [
        f"Behind a pooler of transactions, sessions of the role {where.user} begin with {each.name} = {each.have!r}, "
        f"and not with {each.want!r}."
        for each in lacking
    ]
    if lacking:
        sentences.append(f"`queue-service db grants {shlex.quote(where.user)}` prints how to set that on the role.")
    if as_json:
        render.as_json({"difference": difference, "lacking": [each._asdict() for each in lacking]})
        if sentences:
            raise click.exceptions.Exit(1)
    elif sentences:
        raise click.ClickException("\n".join(sentences))


def _difference(conninfo: str) -> str | None:
    from alembic.util import CommandError

    try:
        schema.check(conninfo)
    except CommandError as different:
        return str(different)
    return None


async def _settings_of_the_role(conn: Session) -> tuple[grants.Place, list[grants.Lacking]]:
    """Elsewhere sessions have ours, whatever the role has."""
    return await grants.place(conn), await grants.lacking(conn) if conn.is_pooled else []


@db.command("grants")
@click.argument("role", required=False)
@command
def grants_(role: str | None, database_url: str | None) -> None:
    """Print the SQL that lets ROLE (without it, the role of the database URL) work, serve and read, for the owner of the
    schema to execute; and what it needs behind a pooler of transactions."""
    with _Reached(database_url) as conninfo:
        _look(conninfo, revision.require)
        where = _look(conninfo, grants.place)
    role = role or where.user
    if unprintable := [name for name in (role, *where) if printable(name) != name]:
        raise ConfigError(
            f"{unprintable[0]!r} is a name with characters that a terminal does not show. Grant it by hand."
        )
    render.echo(*grants.rights(role, where), *grants.settings(role, where))


@db.command()
@command
def sql(database_url: str | None) -> None:
    """Print the migrations as SQL, for those who apply them by other means."""
    del database_url
    schema.sql()


@db.command()
@command
def start(database_url: str | None) -> None:
    """Start the embedded Postgres and leave it running until `db stop`."""
    cluster = _cluster(database_url)
    cluster.start(keep=True)
    render.echo(f"embedded Postgres is running at {cluster.path}", err=True)
    render.echo(cluster.url)


@db.command()
@command
def stop(database_url: str | None) -> None:
    """Stop the embedded Postgres."""
    cluster = _cluster(database_url)
    render.echo(f"embedded Postgres at {cluster.path}: {'stopped' if cluster.stop() else 'was not running'}")


@db.command("url")
@command
def url_(database_url: str | None) -> None:
    """Print how to connect, for other programs. Passwords are masked."""
    target = _target(database_url)
    if isinstance(target, url.Server):
        render.echo(url.masked(target.conninfo))
    else:
        render.echo(embedded.cluster(target.path).url)


@db.command(context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@command
def psql(arguments: tuple[str, ...], database_url: str | None) -> None:
    """Open psql on the database; further arguments are psql's."""
    target = _target(database_url)
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


class _Reached:
    """The connection string, with an embedded server running for as long as it is needed."""

    def __init__(self, database_url: str | None) -> None:
        self._target = _target(database_url)
        self._cluster: Cluster | None = None

    def __enter__(self) -> str:
        render.echo(f"database: {self._target}", err=True)
        conninfo, self._cluster = embedded.reach(self._target)
        return conninfo

    def __exit__(self, *_: object) -> None:
        if self._cluster is not None:
            self._cluster.leave()


def _target(database_url: str | None) -> url.Server | url.EmbeddedCluster:
    return url.choose(database_url, os.environ, settings_module.load(os.environ).data_dir)


def _cluster(database_url: str | None) -> Cluster:
    target = _target(database_url)
    if isinstance(target, url.Server):
        raise ConfigError(f"{target} is not ours to start or stop. Name an embedded cluster with file:PATH.")
    return embedded.cluster(target.path)


def _current(conninfo: str) -> str | None:
    return _look(conninfo, revision.current)


def _look(conninfo: str, look: Callable[[Session], Coroutine[Any, Any, T]]) -> T:
    async def body() -> T:
        where = Address(conninfo, pooler=settings_module.load(os.environ).pooler)
        conn = await connect(where, writable=False)
        try:
            return await look(conn)
        finally:
            await conn.close()

    return run(body())
