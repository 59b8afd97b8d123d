"""Output: tables for people, JSON for programs, progress on a terminal.

All that the command line prints goes through here, where characters that a terminal would obey are escaped: much of it is
data, written by whoever may enqueue. `--raw` prints it as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import click
import msgspec

from queue_service.printable import printable, printable_json
from queue_service.runs.queries import COUNT_LIMIT

Advance = Callable[[int], None]

RAW = "queue_service.raw"


def echo(*lines: str, err: bool = False) -> None:
    """Print each of these as one line, on standard output or standard error. A line break in it is data's, and is escaped:
    otherwise a name could add a line that looks like ours."""
    for text in lines or ("",):
        if _is_raw():
            # With colours, or click would take out what looks like one where this is no terminal.
            click.echo(text, err=err, color=True)
        else:
            click.echo(printable(text, keep="\t"), err=err)


def fields(values: Iterable[tuple[str, str]]) -> None:
    """Print names and values, one below the other. More lines of a value are indented, so that none looks like a name."""
    for name, value in values:
        first, *more = value.split("\n")
        echo(f"{name:16} {first}", *(f"{'':17}{text}" for text in more))


def as_json(value: Any) -> None:
    click.echo(printable_json(msgspec.json.format(msgspec.json.encode(value), indent=2).decode()))


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]], *, empty: str) -> None:
    """Aligned columns; `empty` is said, on standard error, where there is nothing to show."""
    if not rows:
        echo(empty, err=True)
        return
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(headers), *cells]) for i in range(len(headers))]
    for row in [[header.upper() for header in headers], *cells]:
        echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def ago(moment: datetime | None) -> str:
    """How long ago, or in how long, in one unit."""
    if moment is None:
        return "-"
    seconds = (datetime.now(UTC) - moment).total_seconds()
    text = span(abs(seconds))
    return f"{text} ago" if seconds >= 0 else f"in {text}"


def span(seconds: float) -> str:
    """In one unit."""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.0f}s" if seconds >= 1 else f"{seconds * 1000:.0f}ms"


def count(number: int) -> str:
    """Those above COUNT_LIMIT were counted no further."""
    return f"{number - 1:,}+" if number >= COUNT_LIMIT else f"{number:,}"


@contextmanager
def line() -> Iterator[Callable[[str], None]]:
    """One line that is written over and over, on a terminal; nothing where standard error is none."""
    if not sys.stderr.isatty():
        yield lambda _text: None
        return
    yield lambda text: click.echo(f"\r{printable(text)}", nl=False, err=True)
    click.echo(err=True)


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Advance]:
    """A bar on a terminal; nothing where standard error is none, or without the `cli` extra."""
    bar = _rich() if sys.stderr.isatty() else None
    if bar is None:
        yield lambda _done: None
        return
    with bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


def _rich() -> Any:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        return None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return ago(value)
    # A line break would look like another row.
    return str(value) if _is_raw() else printable(str(value))


def _is_raw() -> bool:
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(RAW))
