from __future__ import annotations

import inspect
import signal
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from queue_service.app import App
from queue_service.cli import render
from queue_service.cli.options import app_option, command, import_module, load_app, run
from queue_service.errors import ConfigError, install_extra, nearest

if TYPE_CHECKING:
    from queue_service.gateway import Authorize, Gateway

# A client that stopped taking what it is sent holds its socket no longer than this, in seconds; so does one that vanished.
UNACKNOWLEDGED_SECONDS = 30
SHUTDOWN_SECONDS = 10


@click.command()
@app_option
@click.option("--host", default="127.0.0.1", show_envvar=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65_535), default=8000, show_envvar=True, help="0 takes a free one.")
@click.option("--token", default=None, show_envvar=True, help="What callers must know; needed beyond this machine.")
@click.option(
    "--authorize",
    "authorize_path",
    default=None,
    metavar="MODULE:FUNCTION",
    envvar="QUEUE_SERVICE_GATEWAY_AUTHORIZE",
    show_envvar=True,
    help="Your own function that says who calls, instead of a token.",
)
@click.option("--task", default="agent_turn", show_envvar=True, help="Task that works on messages.")
@click.option("--queue", default=None, show_envvar=True, help="Queue of its runs; the task's own otherwise.")
@click.option("--origin", "origins", multiple=True, show_envvar=True, help="Origin of a page served elsewhere.")
@click.option("--max-connections", type=int, default=10_000, show_envvar=True, help="Clients at a time.")
@click.option("--no-page", is_flag=True, show_envvar=True, help="Leave the bundled page out.")
@command
def gateway(
    app_path: str | None,
    host: str,
    port: int,
    token: str | None,
    authorize_path: str | None,
    task: str,
    queue: str | None,
    origins: tuple[str, ...],
    max_connections: int,
    no_page: bool,
    database_url: str | None,
) -> None:
    """Serve conversations: server-sent events down, POST up.

    Without a token only this machine may use it. With --token (better: its variable, since arguments can be seen by
    others) callers send it as `Authorization: Bearer`, or the page asks for it. With --authorize your own function is
    called with each request, as `Gateway(authorize=…)` does. Put TLS in front of it.
    """
    try:
        from queue_service.gateway import Gateway, Limits, Token, loopback
    except ModuleNotFoundError as missing:
        raise ConfigError(f"The gateway needs {missing.name}. {install_extra('gateway')}") from None
    if token is not None and authorize_path is not None:
        raise ConfigError("--token and --authorize both say who may use this gateway. Pass one of them.")
    if token is None and authorize_path is None and host not in ("127.0.0.1", "::1", "localhost"):
        raise ConfigError(
            f"Everybody who reaches {host} could use this gateway. Set QUEUE_SERVICE_GATEWAY_TOKEN to something that only "
            "its users know (`openssl rand -hex 24`), name a function with --authorize, or listen on 127.0.0.1."
        )
    app = load_app(app_path, database_url)
    authorize: Authorize = loopback if token is None else Token(token)
    if authorize_path is not None:
        authorize = _authorize(authorize_path)
    made = Gateway(
        app,
        authorize=authorize,
        task=task,
        queue=queue,
        origins=origins,
        limits=Limits(connections=max_connections, messages=1_000),
    )
    with _listening(host, port) as listening:
        run(_serve(app, made, listening, with_page=not no_page))


def _authorize(path: str) -> Authorize:
    """The function at `module:function`. Raises ConfigError for what cannot be called with a request."""
    module_name, name, module = import_module(path, "--authorize", "function", "myproject.web:authorize")
    functions = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
    found = getattr(module, name, None)
    if found is None:
        raise ConfigError(f"{module_name} has no function named {name!r}.{nearest(name, functions)}")
    if not callable(found):
        raise ConfigError(f"{path} is {type(found).__name__}, which cannot be called with a request. Name a function.")
    if not _takes_one(found):
        raise ConfigError(
            f"{path} cannot be called with one argument, the request. Write `def {name}(request) -> Principal | None`."
        )
    authorize: Authorize = found
    return authorize


def _takes_one(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        return False
    except ValueError:
        # Written in C, it does not say.
        return True
    return True


def _listening(host: str, port: int) -> socket.socket:
    try:
        made = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048
        )
    except OSError as refused:
        raise ConfigError(
            f"Nothing can listen on {host}:{port}: {refused.strerror}. Stop what does, or choose another --port."
        ) from None
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * UNACKNOWLEDGED_SECONDS)
    return made


async def _serve(app: App, made: Gateway, listening: socket.socket, *, with_page: bool) -> None:
    import uvicorn

    host, port = listening.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    config = uvicorn.Config(
        made.asgi(with_page=with_page),
        log_config=None,
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        timeout_keep_alive=30,
        server_header=False,
    )
    # The server raises the signal that stopped it once more when it has stopped; that is no news by then.
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: None)
    async with app:
        render.echo(f"gateway on {address}. Ctrl-C stops.", err=True)
        await uvicorn.Server(config).serve(sockets=[listening])
