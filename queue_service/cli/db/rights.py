"""`db grants`."""

from __future__ import annotations

import click

from queue_service.cli import render
from queue_service.cli.db.reached import Reached, look
from queue_service.cli.options import command
from queue_service.db import grants, revision
from queue_service.db.grants import Kind
from queue_service.errors import ConfigError
from queue_service.printable import printable

OWNER = "owner"


@click.command("grants")
@click.argument("name", required=False)
@click.option(
    "--role", "kinds", type=click.Choice([*(kind.value for kind in Kind), OWNER]), multiple=True, show_envvar=True,
    help="What it is for; several may be given. Without it, all but `owner`.",
)  # fmt: skip
@command
def grants_(name: str | None, kinds: tuple[str, ...], database_url: str | None) -> None:
    """Print the SQL after which the role NAME (without it, that of the database URL) may do what its kind needs, and
    nothing else in the schema; and what it needs behind a pooler of transactions. `--role owner` makes it the owner of the
    schema and of all that is in it. The owner of the schema executes it, again after each migration."""
    if OWNER in kinds and len(kinds) > 1:
        raise click.UsageError("The owner may do everything: say --role owner alone.")
    with Reached(database_url) as conninfo:
        look(conninfo, revision.require)
        where = look(conninfo, grants.place)
        found = look(conninfo, grants.belongings) if OWNER in kinds else []
    name = name or where.user
    if unprintable := [each for each in (name, *where, *(each.what for each in found)) if printable(each) != each]:
        raise ConfigError(
            f"{unprintable[0]!r} is a name with characters that a terminal does not show. Grant it by hand."
        )
    if OWNER in kinds:
        render.echo(*grants.ownership(name, found, where))
    else:
        wanted = {Kind(kind) for kind in kinds} or set(Kind)
        render.echo(*grants.rights(name, wanted, where))
    render.echo(*grants.settings(name, where))
