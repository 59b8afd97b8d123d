"""`db rls`."""

from __future__ import annotations

import click

from queue_service.cli import render
from queue_service.cli.db.reached import Reached
from queue_service.cli.options import command, json_option
from queue_service.db import row_security
from queue_service.db.row_security import Secured


@click.group()
def rls() -> None:
    """Let each role see the rows of one organization: that of its setting queue_service.organization_id."""


@rls.command()
@click.option(
    "--exempt", "exempt", multiple=True, metavar="ROLE", show_envvar=True,
    help="A role that sees and works on everything: that of workers, of gateways. May be given several times.",
)  # fmt: skip
@json_option
@command
def enable(exempt: tuple[str, ...], as_json: bool, database_url: str | None) -> None:
    """Turn row security on, or bring it up to date. Roles that were exempt before stay so."""
    with Reached(database_url) as conninfo:
        secured = row_security.enable(conninfo, exempt, tell=_tell)
    if as_json:
        render.as_json({"is_enabled": True, **secured._asdict()})
        return
    _say(secured, "row security on")
    exempted = ", ".join(secured.exempt) or "none but the owner of the schema"
    render.echo(f"exempt roles: {exempted}")


@rls.command()
@json_option
@command
def disable(as_json: bool, database_url: str | None) -> None:
    """Turn row security off: every role sees what its grants say, whatever its organization."""
    with Reached(database_url) as conninfo:
        secured = row_security.disable(conninfo, tell=_tell)
    if as_json:
        render.as_json({"is_enabled": False, **secured._asdict()})
        return
    _say(secured, "row security off")


def _say(secured: Secured, what: str) -> None:
    for table in secured.changed:
        render.echo(f"{table}: {what}")
    if not secured.changed:
        render.echo(f"{what}: it was so already, and nothing has changed")


def _tell(sentence: str) -> None:
    render.echo(sentence, err=True)
