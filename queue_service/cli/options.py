"""What commands share: the database and log options, loading an App, and errors that end as a sentence and a code."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Coroutine
from datetime import datetime
from types import ModuleType
from typing import Any, TypeVar

import click
from psycopg import errors as pg

from queue_service import logs
from queue_service import settings as settings_module
from queue_service.app import App
from queue_service.cli import render
from queue_service.db import url
from queue_service.db.meaning import meaning
from queue_service.db.session import Limits
from queue_service.errors import ConfigError, DatabaseUnavailable, QueueServiceError, nearest
from queue_service.settings import Settings

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


class Duration(click.ParamType):  # type: ignore[type-arg]
    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return settings_module.parse_duration(value)
        except ConfigError as refused:
            self.fail(str(refused), param, ctx)


DURATION = Duration()


class Moment(click.ParamType):  # type: ignore[type-arg]
    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return datetime.fromisoformat(value) if isinstance(value, str) else value
        except ValueError:
            self.fail(f"{value!r} is no ISO 8601 time such as 2030-01-31T12:00:00+00:00.", param, ctx)


MOMENT = Moment()


class Rate(click.ParamType):  # type: ignore[type-arg]
    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number, slash, period = value.partition("/") if isinstance(value, str) else ("", "", "")
        if not number.isdecimal() or not slash:
            self.fail(
                f"{value!r} is no rate such as 100/1m: a number, and the time in which so many begin.", param, ctx
            )
        return int(number), DURATION.convert(period, param, ctx)


RATE = Rate()


class Failure(click.ClickException):
    def __init__(self, error: QueueServiceError) -> None:
        super().__init__(str(error))
        self.exit_code = error.exit_code  # type: ignore[misc]


def setting(name: str, type: Any = DURATION, flag: str | None = None) -> Callable[[F], F]:  # noqa: A002
    """An option for one of the settings, with the variable that `settings.load` reads."""
    field = Settings.__dataclass_fields__[name]
    variable = settings_module.env_name(name)
    help_text = f"{field.metadata['doc'].capitalize()}.  [env var: {variable}]"
    return click.option(flag or "--" + name.replace("_", "-"), name, type=type, default=None, help=help_text)


def command(function: F) -> F:
    """The options every command takes, and its errors as exit codes. Comes under the `@group.command()` line."""

    @click.option(
        "--database-url", default=None, help="Postgres URL, or file:PATH.  [env var: QUEUE_SERVICE_DATABASE_URL]"
    )
    @setting("log_level", click.Choice(logs.LEVELS))
    @setting("log_format", click.Choice(logs.FORMATS))
    @click.option("--debug", is_flag=True, envvar="QUEUE_SERVICE_DEBUG", show_envvar=True, help="Show tracebacks.")
    @functools.wraps(function)
    def wrapped(*args: Any, log_level: str | None, log_format: str | None, debug: bool, **kwargs: Any) -> Any:
        try:
            settings = settings_module.load(os.environ, log_level=log_level, log_format=log_format)
            click.get_current_context().obj = settings
            logs.configure(level=settings.log_level, fmt=settings.log_format)
            return function(*args, **kwargs)
        except (click.exceptions.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            # Whoever reads what is printed may stop doing so; click ends without a word then.
            raise
        except Exception as error:  # noqa: BLE001 - a person gets a sentence, or with --debug the traceback as well
            if debug:
                render.echo(*traceback.format_exc().splitlines(), err=True)
            raise _failure(error) from None

    return wrapped  # type: ignore[return-value]


def _failure(error: Exception) -> click.ClickException:
    if isinstance(error, QueueServiceError):
        return Failure(error)
    if isinstance(error, pg.InsufficientPrivilege):
        return click.ClickException(str(meaning(error)))
    return click.ClickException(f"{type(error).__name__}: {error} (--debug shows where)")


app_option = click.option(
    "-a",
    "--app",
    "app_path",
    default=None,
    metavar="MODULE:APP",
    envvar="QUEUE_SERVICE_APP",
    show_envvar=True,
    help="Where the App is.",
)


def json_option(function: F) -> F:
    """For commands that show data: `--json`, and `--raw`."""
    as_json = click.option("--json", "as_json", is_flag=True, show_envvar=True, help="Print JSON, for programs.")
    raw = click.option(
        "--raw",
        is_flag=True,
        expose_value=False,
        callback=_set_raw,
        show_envvar=True,
        help="Print data as it is, also characters that a terminal obeys.",
    )
    return as_json(raw(function))


def _set_raw(context: click.Context, _option: click.Parameter, value: bool) -> None:
    context.meta[render.RAW] = value


def load_app(path: str | None, database_url: str | None, **settings: Any) -> App:
    """The App at `module:attribute` (the working directory is on the path), or a bare one. Says which database it has."""
    loaded = settings_module.load(os.environ, **settings)
    app = App(database_url, settings=loaded) if path is None else _imported(path)
    if path is not None:
        app.settings = loaded
        if database_url:
            app.database = url.parse(database_url, source="argument")
    render.echo(f"database: {app.database}", err=True)
    return app


def _imported(path: str) -> App:
    module_name, attribute, module = import_module(path, "-a", "App", "myproject.queue:app")
    app = getattr(module, attribute, None)
    if not isinstance(app, App):
        apps = [name for name, value in vars(module).items() if isinstance(value, App)]
        found = f"It has: {', '.join(apps)}." if apps else "It has no App at all."
        raise ConfigError(f"{module_name} has no App named {attribute!r}.{nearest(attribute, apps)} {found}")
    return app


def import_module(path: str, option: str, what: str, example: str) -> tuple[str, str, ModuleType]:
    """The module of `module:attribute` (the working directory is on the path), between its name and the attribute's."""
    module_name, _, attribute = path.partition(":")
    if not attribute or not module_name or module_name.startswith("."):
        raise ConfigError(f"{option} {path} names no {what}. Write module:name, such as `{option} {example}`.")
    # Like `python -m`: a project is used from its own directory without being installed.
    here = os.getcwd()  # noqa: PTH109
    sys.path.insert(0, here)
    try:
        return module_name, attribute, importlib.import_module(module_name)
    except ModuleNotFoundError as missing:
        if missing.name is None or not module_name.startswith(missing.name):
            raise
        raise ConfigError(f"There is no module {missing.name!r} on the path or in {here}.") from None


def run(call: Coroutine[Any, Any, T]) -> T:
    """Run to the end, on uvloop where it is installed."""
    on_loop: Callable[[Coroutine[Any, Any, T]], T] = asyncio.run
    with contextlib.suppress(ImportError):
        import uvloop

        on_loop = uvloop.run
    # Not while the ImportError is handled: it would be the context of whatever is raised in here, and begin the traceback
    # that is stored with each run that fails.
    return on_loop(call)


def read(database_url: str | None, body: Callable[[App], Coroutine[Any, Any, T]]) -> T:
    """As `with_app`, for what is only to be shown: no statement may keep the database busy for long."""

    async def hurried(app: App) -> T:
        allowed = app.settings.read_timeout
        app.pool.limits = Limits(statement=allowed)
        try:
            return await body(app)
        except DatabaseUnavailable as refused:
            if not isinstance(refused.__cause__, pg.QueryCanceled):
                raise
            raise DatabaseUnavailable(
                f"The database did not find it within {settings_module.format_duration(allowed)}, and stopped looking. "
                "Narrow down what is asked for, or allow more: QUEUE_SERVICE_READ_TIMEOUT=10s."
            ) from refused

    return with_app(load_app(None, database_url), hurried)


def with_app(app: App, body: Callable[[App], Coroutine[Any, Any, T]]) -> T:
    async def opened() -> T:
        async with app:
            return await body(app)

    return run(opened())
