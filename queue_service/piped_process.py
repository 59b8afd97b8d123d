"""A child process and its two pipes, neither of which can hold anyone up.

The pipes are made here and not by asyncio, whose process ends only when they do: a process that the child left behind
can keep them open for ever, and the child's own end has to be noticed all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Self, cast

PR_SET_PDEATHSIG = 1

# After the child's end, whoever else holds its output is listened to for this long, in seconds.
LINGER = 1.0


class PipedProcess:
    """A running process. `take` is called with each line it writes, `overrun` with a sentence if one is too long."""

    def __init__(self, process: asyncio.subprocess.Process, output: _Output, incoming: _Input) -> None:
        self._process = process
        self._output = output
        self._input = incoming

    @classmethod
    async def spawn(
        cls,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None,
        cwd: str | Path | None,
        limit: int,
        take: Callable[[bytes], None],
        overrun: Callable[[str], None],
    ) -> Self:
        """Raises OSError or ValueError for what cannot be started. `limit` is the longest line, in bytes."""
        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as ends:
            theirs_in, ours_out = _pipe(ends)
            ours_in, theirs_out = _pipe(ends)
            # A session of its own: Ctrl-C in our terminal is for us, and we stop the child. (uvloop has no process_group.)
            process = await asyncio.create_subprocess_exec(
                *command, stdin=theirs_in, stdout=theirs_out, env=env, cwd=cwd, start_new_session=True
            )
            theirs_in.close()
            theirs_out.close()
            ends.pop_all()
        _, incoming = await loop.connect_write_pipe(_Input, ours_out)
        _, output = await loop.connect_read_pipe(lambda: _Output(limit, take, overrun), ours_in)
        return cls(process, output, incoming)

    @property
    def pid(self) -> int:
        return self._process.pid

    # Its input

    @property
    def is_full(self) -> bool:
        return not self._input.flowing.is_set()

    def write(self, line: bytes) -> None:
        """Never waits; what the child does not take stays in memory."""
        if not self._input.transport.is_closing():
            self._input.transport.write(line + b"\n")

    async def written(self) -> bool:
        """Wait until the child takes what is written. False: it takes nothing any more."""
        await self._input.flowing.wait()
        return not self._input.transport.is_closing()

    # Its output

    def resume(self) -> None:
        """What was taken is dealt with: more may come."""
        self._output.resume()

    async def silent(self) -> None:
        """After the end: until all that the child wrote was taken."""
        while not self._output.closed.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LINGER):
                    await self._output.closed.wait()
            # What comes this long after the end is not the child's; but what nobody could take yet is.
            if not self._output.is_paused:
                self._output.transport.close()
                return

    # Its end

    async def ended(self) -> str:
        """How it ended: `exit code 3` or `killed by SIGKILL`."""
        code = await self._process.wait()
        # Whoever waits to write need not.
        self._input.abort()
        return _how(code)

    def signal(self, number: signal.Signals) -> None:
        """Raises OSError; ProcessLookupError if it has ended."""
        send_signal(self._process, number)

    def close(self) -> None:
        self._input.abort()
        self._output.transport.close()


def send_signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    """Raises OSError; ProcessLookupError if it has ended.

    asyncio's own looks first whether the child has ended (before Python 3.12.3), and takes the exit status from the thread
    that waits for it: that thread then reports 255 (https://github.com/python/cpython/issues/87744)."""
    if process.returncode is not None:
        raise ProcessLookupError
    os.kill(process.pid, number)


def _how(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def _pipe(ends: contextlib.ExitStack) -> tuple[FileIO, FileIO]:
    """Its two ends, to read and to write."""
    reading, writing = os.pipe()
    return ends.enter_context(FileIO(reading, "rb")), ends.enter_context(FileIO(writing, "wb"))


class _Input(asyncio.BaseProtocol):
    def __init__(self) -> None:
        self.flowing = asyncio.Event()
        self.flowing.set()
        self.transport: asyncio.WriteTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.WriteTransport", transport)

    def abort(self) -> None:
        if not self.transport.is_closing():
            self.transport.abort()

    def pause_writing(self) -> None:
        self.flowing.clear()

    def resume_writing(self) -> None:
        self.flowing.set()

    def connection_lost(self, _why: Exception | None) -> None:
        self.flowing.set()


class _Output(asyncio.Protocol):
    """Splits what comes into lines. Reading pauses when more was taken than four of the longest lines hold."""

    def __init__(self, limit: int, take: Callable[[bytes], None], overrun: Callable[[str], None]) -> None:
        self._limit = limit
        self._take = take
        self._overrun = overrun
        self._rest = b""
        self._taken = 0
        self.is_paused = False
        self.closed = asyncio.Event()
        self.transport: asyncio.ReadTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.ReadTransport", transport)

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._take_one(line)
        if len(self._rest) > self._limit:
            self._rest = b""
            self._overrun(f"it wrote a line of more than {self._limit:,} bytes")
        self._taken += len(data)
        if self._taken > 4 * self._limit and not self.is_paused:
            self.is_paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        self._taken = 0
        if self.is_paused:
            self.is_paused = False
            self.transport.resume_reading()

    def eof_received(self) -> None:
        # A child that ends in good order need not end its last line; one that was killed did not finish it.
        self._take_one(self._rest)
        self._rest = b""
        self.closed.set()

    def connection_lost(self, _why: Exception | None) -> None:
        self.closed.set()

    def _take_one(self, line: bytes) -> None:
        if len(line) > self._limit:
            self._overrun(f"it wrote a line of more than {self._limit:,} bytes")
        elif line and not line.isspace():
            self._take(line)


# The other side: in the child itself


def taken_pipes() -> tuple[FileIO, FileIO]:
    """Our standard input and output, under numbers of their own that no process started here inherits: what is printed goes
    to standard error, and what is run here neither reads our lines nor holds our pipes open."""
    incoming, outgoing = FileIO(os.dup(0), "rb"), FileIO(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.close(nothing)
    return incoming, outgoing


def die_with_parent() -> None:
    """On Linux even a child that is stopped, or blocks its loop, does not outlive the supervisor's process."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
