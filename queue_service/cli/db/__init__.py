from __future__ import annotations

import click

from queue_service.cli.db.checking import check
from queue_service.cli.db.migrating import current, migrate, sql
from queue_service.cli.db.rights import grants_
from queue_service.cli.db.row_security import rls
from queue_service.cli.db.server import psql, start, stop, url_


@click.group()
def db() -> None:
    """Migrate, start, stop and inspect the database."""


for each in (migrate, current, check, grants_, rls, sql, start, stop, url_, psql):
    db.add_command(each)
