from __future__ import annotations

import dataclasses
import os
from datetime import timedelta
from typing import Any

import click

from queue_service import __version__
from queue_service import settings as settings_module
from queue_service.cli import render
from queue_service.cli.options import command, json_option
from queue_service.db import url
from queue_service.db.revision import HEAD


@click.group()
def config() -> None:
    """Show the settings in force."""


@config.command()
@json_option
@command
def show(as_json: bool, database_url: str | None) -> None:
    """Each setting, its value, its variable, and what it means. Passwords are masked."""
    settings: settings_module.Settings = click.get_current_context().obj
    database = url.choose(database_url, os.environ, settings.data_dir)
    rows: list[tuple[str, Any, str, str]] = [
        ("database_url", str(database), "QUEUE_SERVICE_DATABASE_URL", "which database, and who said so")
    ]
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        shown = settings_module.format_duration(value) if isinstance(value, timedelta) else value
        if field.name == "listen_url" and value is not None:
            shown = str(url.parse(value, source=settings_module.env_name(field.name)))
        rows.append((field.name, shown, settings_module.env_name(field.name), field.metadata["doc"]))
    if as_json:
        render.as_json({name: str(value) if not isinstance(value, int) else value for name, value, _, _ in rows})
    else:
        render.table(("setting", "value", "variable", "meaning"), rows, empty="")


@click.command()
@json_option
@command
def version(as_json: bool, database_url: str | None) -> None:
    """The version and the schema revision it needs."""
    del database_url
    if as_json:
        render.as_json({"version": __version__, "schema": HEAD})
    else:
        render.echo(f"queue_service {__version__}, schema {HEAD}")
