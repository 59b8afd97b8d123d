"""The App of `queue-service demo`: one task that reads a file and returns its checksum."""

from __future__ import annotations

import hashlib
from pathlib import Path

from queue_service.app import App

app = App()


@app.task(queue="demo")
def checksum(path: str) -> dict[str, str]:
    return {"path": path, "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}
