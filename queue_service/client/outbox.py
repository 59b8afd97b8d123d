"""Where messages are kept until they are answered: nowhere but in memory, or in a file that outlives the process.

The file holds a JSON line for each message, on disk before `put` returns, and one for each answer. A line about an answer
that is lost does no harm: the message is sent again under the same id. One client at a time has the file, by its lock.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import msgspec

from queue_service.errors import ConfigError, OutboxInUse
from queue_service.logs import get_logger

log = get_logger(__name__)


class Line(msgspec.Struct, frozen=True, omit_defaults=True):
    """Either a message that was put in, or that one was answered."""

    put: int | None = None
    done: int | None = None
    name: str = ""
    body: msgspec.Raw = msgspec.Raw()


class Outbox:
    """In memory there is nothing to keep beyond the queue itself."""

    is_durable = False

    def __init__(self) -> None:
        # What an earlier client left unanswered, in order.
        self.left: list[Line] = []

    def put(self, number: int, name: str, body: bytes) -> None:
        """Keep a message. When this returns, it will be sent."""

    def done(self, number: int) -> None:
        """It was answered, one way or the other."""

    def close(self) -> None:
        """Leave what is unanswered to the next client."""


class FileOutbox(Outbox):
    is_durable = True

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        # Messages are private, whatever the umask says.
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._lock()
            self._size = self._load()
            self._sync_folder()
        except BaseException:
            os.close(self._file)
            raise
        self._unanswered = {line.put for line in self.left}
        if self._size and not self._unanswered:
            self._empty()

    def put(self, number: int, name: str, body: bytes) -> None:
        self._append(Line(put=number, name=name, body=msgspec.Raw(body)), sync=True)
        self._unanswered.add(number)

    def done(self, number: int) -> None:
        self._unanswered.discard(number)
        try:
            if self._unanswered:
                self._append(Line(done=number), sync=False)
            else:
                self._empty()
        except OSError as failed:
            log.warning("an answer was not noted; its message may be sent again", path=str(self._path), why=str(failed))

    def close(self) -> None:
        # The lock goes with it.
        os.close(self._file)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutboxInUse(str(self._path)) from None

    def _load(self) -> int:
        """Read what is there, and cut off a last line that was not written to its end. How many bytes are left."""
        *lines, torn = self._read().split(b"\n")
        found: dict[int, Line] = {}
        size = 0
        for place, text in enumerate(lines, 1):
            try:
                line = msgspec.json.decode(text, type=Line)
            except (msgspec.DecodeError, UnicodeDecodeError):
                if place < len(lines) or torn:
                    raise self._is_no_outbox(f"line {place} cannot be read") from None
                torn = text
                break
            if line.put is not None:
                found[line.put] = line
            elif line.done is not None:
                found.pop(line.done, None)
            else:
                raise self._is_no_outbox(f"line {place} is about something else")
            size += len(text) + 1
        # A power cut may leave zeros where a line was to be. Anything else was not written by us, and is not ours to cut.
        if not torn.startswith(b"{") and torn.strip(b"\0"):
            raise self._is_no_outbox("it does not hold JSON lines")
        os.ftruncate(self._file, size)
        self.left = list(found.values())
        return size

    def _read(self) -> bytes:
        with os.fdopen(os.dup(self._file), "rb") as file:
            return file.read()

    def _is_no_outbox(self, why: str) -> ConfigError:
        return ConfigError(f"{self._path} is no outbox: {why}. Name another file, or move this one away.")

    def _append(self, line: Line, *, sync: bool) -> None:
        """All of the line, or nothing: half of one would spoil the next."""
        data = msgspec.json.encode(line) + b"\n"
        try:
            left = data
            while left:
                left = left[os.write(self._file, left) :]
            if sync:
                os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, self._size)
            raise
        self._size += len(data)

    def _empty(self) -> None:
        os.ftruncate(self._file, 0)
        self._size = 0

    def _sync_folder(self) -> None:
        """A new file is there after a power cut only if its folder says so."""
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
