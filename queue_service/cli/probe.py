from __future__ import annotations

import http.client
from datetime import timedelta
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import click
import msgspec

from queue_service.cli import render
from queue_service.cli.options import DURATION, command, json_option
from queue_service.errors import ConfigError

MAX_BODY = 64 * 1024


class Heard(NamedTuple):
    """`why` is None where all is well. Without an answer there is no `status`, and `body` is None."""

    url: str
    status: int | None
    why: str | None
    body: Any


@click.command()
@click.option("--ready", is_flag=True, show_envvar=True, help="Ask whether it works. The default.")
@click.option("--live", is_flag=True, show_envvar=True, help="Ask whether it is stuck, and should be restarted.")
@click.option(
    "--port",
    type=click.IntRange(1, 65_535),
    default=None,
    envvar="QUEUE_SERVICE_HEALTH_PORT",
    show_envvar=True,
    help="Health port of a worker on this machine.",
)
@click.option("--url", default=None, show_envvar=True, help="http://HOST:PORT of one elsewhere.")
@click.option("--timeout", type=DURATION, default="3s", show_envvar=True, help="How long to wait for the answer.")
@json_option
@command
def probe(
    *,
    ready: bool,
    live: bool,
    port: int | None,
    url: str | None,
    timeout: timedelta,
    as_json: bool,
    database_url: str | None,
) -> None:
    """Ask a worker whether it is ready, or live, for images without curl. Exits with 0 if it is, and 1 if not.

    The worker answers where it was started with --health-port. No database is asked but by the worker.
    """
    del database_url
    if ready and live:
        raise ConfigError("Ask one thing at a time: --ready or --live.")
    if url is None and port is None:
        raise ConfigError(
            "Which worker? Give the --health-port it was started with: --port, or QUEUE_SERVICE_HEALTH_PORT."
        )
    asked = "live" if live else "ready"
    heard = _ask(url or f"http://127.0.0.1:{port}", "/livez" if live else "/readyz", timeout.total_seconds())
    is_well = heard.body is not None and heard.status == http.client.OK
    if as_json:
        render.as_json({"ok": is_well, **heard._asdict()})
        if not is_well:
            raise click.exceptions.Exit(1)
    elif is_well:
        render.echo(f"{asked}: {heard.url} says {heard.why or 'ok'}")
    else:
        raise click.ClickException(f"not {asked}: {heard.url} {heard.why}")


def _ask(url: str, path: str, timeout: float) -> Heard:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as refused:
        raise ConfigError(f"--url {url}: {refused}. Write http://HOST:PORT.") from None
    if parts.scheme != "http" or host is None:
        raise ConfigError(f"--url {url}: only plain HTTP is asked. Write http://HOST:PORT.")
    path = parts.path if parts.path not in {"", "/"} else path
    url = f"http://{parts.netloc}{path}"
    connection = http.client.HTTPConnection(host, port or 80, timeout=timeout)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        content = answer.read(MAX_BODY)
    except ConnectionRefusedError:
        return Heard(url, None, "is not listened to. Does the worker run, with --health-port?", None)
    except TimeoutError:
        return Heard(url, None, f"did not answer within {timeout:g} s: its event loop may be blocked", None)
    except (OSError, http.client.HTTPException) as lost:
        return Heard(url, None, f"could not be asked: {lost or type(lost).__name__}", None)
    finally:
        connection.close()
    return Heard(url, answer.status, *_read(answer.status, content))


def _read(status: int, content: bytes) -> tuple[str | None, Any]:
    """What is wrong, in words, and the whole answer."""
    try:
        body = msgspec.json.decode(content)
        wrong = [f"{name}: {why}" for name, why in body["checks"].items() if why != "ok"]
    except (msgspec.DecodeError, LookupError, TypeError, AttributeError):
        return f"answered {status}, and nothing that a worker says", None
    if not wrong:
        return None, body
    return ("" if status == http.client.OK else f"answered {status}: ") + "; ".join(wrong), body
