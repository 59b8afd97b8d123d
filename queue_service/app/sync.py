"""The App's methods, blocking: each call runs on one event loop, in a thread of its own.

A call with `conn=` runs in the calling thread instead, on the caller's connection, and needs no loop at all.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self, TypeVar

from queue_service.app import enqueue as enqueueing
from queue_service.app.enqueue import OnConflict, drive_sync
from queue_service.db.borrowed import borrow_sync
from queue_service.errors import ConfigError
from queue_service.runs.model import Run

if TYPE_CHECKING:
    from queue_service.app.app import App

T = TypeVar("T")


class SyncApp:
    """Use as `with app.sync as q:`. `app` is its own to open and close. May be used from any thread, but not from inside
    an event loop, which it would block."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> None:
        if self._loop is not None:
            raise ConfigError("This is open already. Take another `app.sync` for a second use at the same time.")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="queue_service sync", daemon=True)
        self._thread.start()
        try:
            self._call(self._app.open())
        except BaseException:
            self._stop()
            raise

    def close(self) -> None:
        if self._loop is not None:
            try:
                self._call(self._app.close())
            finally:
                self._stop()

    def enqueue(
        self,
        task: str,
        payload: Mapping[str, Any],
        /,
        *,
        on_conflict: OnConflict = "return",
        conn: Any = None,
        **options: Any,
    ) -> int:
        """As `App.enqueue`, with the same options."""
        if conn is None:
            return self._call(self._app.enqueue(task, payload, on_conflict=on_conflict, **options))
        enqueueing.check_policy(on_conflict)
        new = enqueueing.new_run(self._app.tasks, self._app.settings.payload_limit, task, payload, **options)
        return drive_sync(enqueueing.enqueue(new, on_conflict, enqueueing.notice(new)), borrow_sync(conn))

    def enqueue_many(
        self, task: str, payloads: Iterable[Mapping[str, Any]], /, *, conn: Any = None, **options: Any
    ) -> list[int]:
        """As `App.enqueue_many`."""
        if conn is None:
            return self._call(self._app.enqueue_many(task, payloads, **options))
        common, texts = enqueueing.new_runs(self._app.tasks, self._app.settings.payload_limit, task, payloads, options)
        return drive_sync(enqueueing.enqueue_many(common, texts, enqueueing.notice(common)), borrow_sync(conn))

    def wait(self, run_id: int, *, timeout: timedelta | float | None = None) -> Run:
        return self._call(self._app.wait(run_id, timeout=timeout))

    def get(self, run_id: int) -> Run | None:
        return self._call(self._app.get(run_id))

    def cancel(self, run_id: int) -> bool:
        return self._call(self._app.cancel(run_id))

    def retry(self, run_id: int) -> bool:
        return self._call(self._app.retry(run_id))

    def delete(self, run_id: int) -> bool:
        return self._call(self._app.delete(run_id))

    def pause(self, queue: str) -> bool:
        return self._call(self._app.pause(queue))

    def resume(self, queue: str) -> bool:
        return self._call(self._app.resume(queue))

    def _call(self, call: Coroutine[Any, Any, T]) -> T:
        if self._loop is None or threading.current_thread() is self._thread:
            call.close()
            raise ConfigError("This App is not connected. Use it inside `with app.sync as q:`.")
        return asyncio.run_coroutine_threadsafe(call, self._loop).result()

    def _stop(self) -> None:
        loop, self._loop = self._loop, None
        if loop is not None and self._thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            self._thread.join()
            loop.close()
