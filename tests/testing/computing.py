"""An App whose task runs in a process of its own, which has to find it by importing this module."""

from __future__ import annotations

from queue_service import App, Retry

app = App("postgresql://nowhere.invalid/production")


@app.task(process=True, retry=Retry(max_attempts=1))
def divide(a: int, b: int) -> float:
    return a / b
