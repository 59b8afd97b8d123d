"""`db check`."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Coroutine
from typing import Any

import click

from queue_service.cli import render
from queue_service.cli.db.reached import Reached, look
from queue_service.cli.options import command, json_option
from queue_service.db import revision, schema, server_facts
from queue_service.db.server_facts import Facts
from queue_service.db.server_findings import NAMES, Level, findings
from queue_service.db.session import Session
from queue_service.printable import printable
from queue_service.settings import Settings


@click.command()
@click.option(
    "--accept",
    "accepted",
    multiple=True,
    type=click.Choice(NAMES),
    envvar="QUEUE_SERVICE_DB_CHECK_ACCEPT",
    show_envvar=True,
    metavar="NAME",
    help="Take what is found under this name for a note, and not for a failure. May be repeated.",
)
@json_option
@command
def check(accepted: tuple[str, ...], as_json: bool, database_url: str | None) -> None:
    """Compare the tables in the database with those this version expects, and the server's settings with what our promises
    rest on. Exits with 1 where something is wrong, and with 4 where this version does not work on the schema. While older
    code is being replaced, the last revision is not there yet: a note says that the tables were not compared.

    Each finding has a name, in brackets behind its sentence. With --json they are a list of names, levels (failure, note)
    and sentences.
    """
    with Reached(database_url) as conninfo:
        look(conninfo, revision.require, prefers_writable=True)
        facts = look(conninfo, _look(click.get_current_context().obj), prefers_writable=True)
        is_comparable = not facts.place.is_standby and facts.schema.revision == revision.HEAD
        difference = _difference(conninfo) if is_comparable else None
    found = findings(facts, accepted)
    failures = [each for each in found if each.level is Level.FAILURE]
    if as_json:
        render.as_json(
            {
                "difference": difference,
                "lacking": [each._asdict() for each in facts.lacking],
                "findings": [each._asdict() for each in found],
            }
        )
        if difference or failures:
            raise click.exceptions.Exit(1)
        return
    for each in found:
        if each.level is Level.NOTE:
            render.echo(f"note: {each.sentence} [{each.name}]", err=True)
    sentences = [] if difference is None else [f"The database differs from what this version expects: {difference}"]
    sentences += [f"{printable(each.sentence)} [{each.name}]" for each in failures]
    if failures:
        sentences.append("--accept NAME takes what is found under a name for a note.")
    if sentences:
        raise click.ClickException("\n".join(sentences))


def _difference(conninfo: str) -> str | None:
    from alembic.util import CommandError

    try:
        # Alembic says on standard output that nothing differs, where a program reads JSON.
        with contextlib.redirect_stdout(io.StringIO()):
            schema.check(conninfo)
    except CommandError as different:
        return str(different)
    return None


def _look(ours: Settings) -> Callable[[Session], Coroutine[Any, Any, Facts]]:
    return lambda conn: server_facts.look(conn, silence=ours.lease, pool_size=ours.pool_size)
