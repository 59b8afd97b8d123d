"""`db migrate`, `db current` and `db sql`."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta

import click

from queue_service import settings as settings_module
from queue_service.cli import render
from queue_service.cli.db.reached import Reached, current_revision, look
from queue_service.cli.options import DURATION, command, json_option, run
from queue_service.db import revision, schema
from queue_service.db.downgrade import downgrade, is_older
from queue_service.db.phases import Caution
from queue_service.db.pool import Pool
from queue_service.db.session import Address
from queue_service.errors import ConfigError, DatabaseUnavailable, SchemaMismatch
from queue_service.services.partitions import DAYS_AHEAD_BY_HAND, Partitions

# (seconds) Between two looks of who waits.
AGAIN = 1.0


@click.command()
@click.option(
    "--to",
    "target",
    default=None,
    show_envvar=True,
    help="Exactly this revision, or `head`; an older one drops what came later. Without it, as far as nobody is in the way",
)
@click.option(
    "--only-expand", is_flag=True, show_envvar=True, help="Stop before what takes away something that older code uses."
)
@click.option(
    "--yes", is_flag=True, show_envvar=True, help="Drop what an older revision does not have, without asking."
)
@click.option(
    "--force",
    is_flag=True,
    show_envvar=True,
    help="Also while workers are at work that this ends, turns are owed, or runs wait.",
)
@command
def migrate(target: str | None, only_expand: bool, yes: bool, force: bool, database_url: str | None) -> None:
    """Bring the schema to this version's revision, beside workers of older versions: what takes something away from them
    waits until they are gone, and says who they are. Safe to run from many places at once. An older revision (`--to`) drops
    tables and columns with all that is in them: they are listed, and you are asked. Also makes the daily
    partitions of history for a week."""
    if target is not None:
        schema.known(target)
    with Reached(database_url) as conninfo:
        have = current_revision(conninfo)
        if target is not None and is_older(have, target):
            assert have is not None
            _downgrade(conninfo, have, target, yes=yes, force=force)
            render.echo(f"schema queue_service: {have} -> {current_revision(conninfo) or 'none'}")
            return
        caution = Caution(settings_module.load(os.environ).lease, force=force, only_expand=only_expand)
        done = schema.upgrade(conninfo, target, caution=caution, tell=_tell)
        render.echo(f"schema queue_service: {have or 'none'} -> {done.revision or 'none'}")
        if done.works:
            _make_partitions(conninfo)
    if done.held is not None and done.works:
        render.echo(done.held, err=True)
    elif done.held is not None:
        raise ConfigError(f"{done.held} Until then this version does not work on the database.")


def _downgrade(conninfo: str, have: str, target: str, *, yes: bool, force: bool) -> None:
    lease = settings_module.load(os.environ).lease
    losses = downgrade(conninfo, target, lease=lease, force=force, commit=False, tell=_tell)
    render.echo(f"Going back from revision {have} to {target} drops for good:", *losses.lines(), err=True)
    if not yes:
        if not sys.stdin.isatty():
            raise click.UsageError("Nothing was changed. Say --yes to drop it.")
        click.confirm("Drop it?", abort=True, err=True)
    downgrade(conninfo, target, lease=lease, force=force, commit=True, tell=_tell)


def _make_partitions(conninfo: str) -> None:
    """Those of history, for workers that may not: it is their owner who migrates."""

    async def make() -> list[str]:
        settings = settings_module.load(os.environ)
        pool = Pool(Address(conninfo, pooler=settings.pooler), size=1)
        await pool.open()
        try:
            partitions = Partitions(pool, retention=settings.retention, retention_failed=settings.retention_failed)
            return await partitions.make(DAYS_AHEAD_BY_HAND)
        finally:
            await pool.close()

    if made := run(make()):
        _tell(f"history: {len(made)} daily partitions made, up to {made[-1]}")


def _tell(sentence: str) -> None:
    render.echo(sentence, err=True)


@click.command()
@click.option(
    "--wait",
    "patience",
    type=DURATION,
    default=None,
    show_envvar=True,
    help="Wait so long for a database that this version works on, such as 5m.",
)
@json_option
@command
def current(patience: timedelta | None, as_json: bool, database_url: str | None) -> None:
    """The revision of the database, and those that this version works on. Exits with 4 where it does not work on it."""
    with Reached(database_url) as conninfo:
        found = look(conninfo, revision.look) if patience is None else _awaited(conninfo, patience)
    have = found.revision
    if as_json:
        shown = {"have": have, "want": revision.HEAD, "oldest": revision.OLDEST, "oldest_code": found.oldest_code}
        render.as_json({**shown, "works": found.works})
    else:
        render.echo(f"schema queue_service: {have or 'none'} ({_wanted(found)})")
    if not found.works:
        raise click.exceptions.Exit(SchemaMismatch.exit_code)


def _wanted(found: revision.Schema) -> str:
    head, oldest, have = revision.HEAD, revision.OLDEST, found.revision
    if found.works:
        built = "" if have == head else f", which was built for {head}"
        more = "; `queue-service db migrate` does the rest" if have is not None and have < head else ""
        return f"this version works on it{built}{more}"
    if not found.takes_this_code:
        return f"it takes versions built for {found.oldest_code} or later, and this one was built for {head}"
    return f"this version needs {oldest}" + ("" if oldest == head else f" or later, up to {head}")


def _awaited(conninfo: str, patience: timedelta) -> revision.Schema:
    """What the database says as soon as this version works on it, or else when the time is over. Raises DatabaseUnavailable
    where it cannot be reached then."""
    until = time.monotonic() + patience.total_seconds()
    is_said = False
    while True:
        lost: DatabaseUnavailable | None = None
        found = revision.Schema()
        try:
            found = look(conninfo, revision.look)
        except DatabaseUnavailable as unavailable:
            lost = unavailable
        left = until - time.monotonic()
        if found.works or (left <= 0 and lost is None):
            return found
        if left <= 0 and lost is not None:
            raise lost
        if not is_said:
            _tell(str(lost or found.mismatch()) + " Waiting for that.")
            is_said = True
        time.sleep(min(AGAIN, left))


@click.command()
@command
def sql(database_url: str | None) -> None:
    """Print the migrations as SQL, for those who apply them by other means."""
    del database_url
    schema.sql()
