"""Handlers on the worker's event loop: they run in the task of their slot, which hears when they first wait."""

from __future__ import annotations

import contextvars
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any


@types.coroutine
def watched(
    call: Coroutine[Any, Any, Any], context: contextvars.Context, on_suspend: Callable[[], None]
) -> Generator[Any, Any, Any]:
    """`await call` in this context, and a word when it first waits for something."""
    try:
        waits_for = context.run(call.send, None)
        on_suspend()
        while True:
            try:
                sent = yield waits_for
            except BaseException as thrown:  # noqa: BLE001 - a cancellation goes to whom it was meant for
                waits_for = context.run(call.throw, thrown)
            else:
                waits_for = context.run(call.send, sent)
    except StopIteration as done:
        return done.value


async def awaited(called: Awaitable[Any]) -> Any:
    return await called
