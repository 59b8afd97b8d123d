"""Messages on disk: sent by the next client, whatever became of this one."""

from __future__ import annotations

import asyncio
import errno
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from queue_service.client import ChatClient
from queue_service.client.outbox import FileOutbox
from queue_service.errors import ConfigError, OutboxFull, OutboxInUse, SendFailed
from tests.client.server import Answer, Gateway
from tests.support import eventually

Make = Callable[..., ChatClient]

SENDER = """
    import asyncio, sys
    from queue_service.client import ChatClient

    async def main():
        chat = ChatClient(sys.argv[1], outbox=sys.argv[2])
        for n in range(3):
            chat.send("s", {"text": str(n)}, client_message_id=f"m{n}")
        try:
            await chat.connect()
        finally:
            await asyncio.Event().wait()

    asyncio.run(main())
"""


def content(path: Path) -> bytes:
    return path.read_bytes()


def left_in(path: Path) -> list[tuple[str, bytes]]:
    outbox = FileOutbox(path)
    outbox.close()
    return [(line.name, bytes(line.body)) for line in outbox.left]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "outbox"


@pytest.fixture
def two_lines(path: Path) -> bytes:
    outbox = FileOutbox(path)
    outbox.put(1, "send", b'{"a":1}')
    outbox.put(2, "send", b'{"a":2}')
    outbox.close()
    return path.read_bytes()


class TestMessages:
    async def test_are_sent_by_the_next_client_after_a_crash_in_order_and_under_the_same_ids(
        self, gateway: Gateway, client: Make, path: Path
    ) -> None:
        # The first is answered; the second is accepted, and the process dies before it knows.
        gateway.next["send"].extend([Answer(does=True), Answer(does=True, lost=True), Answer(hold=asyncio.Event())])
        program = [sys.executable, "-c", textwrap.dedent(SENDER), gateway.url, str(path)]
        process = await asyncio.create_subprocess_exec(*program)
        try:
            await eventually(lambda: len(gateway.asked("send")) == 3, within=30)
        finally:
            process.kill()
            await process.wait()
        gateway.requests.clear()
        chat = client(outbox=path)
        last = chat.send("s", {"text": "3"})
        await chat.connect()
        receipts = await asyncio.gather(*chat.recovered.values(), last)
        assert list(chat.recovered) == ["m1", "m2"]
        assert [receipt.seq for receipt in receipts] == [2, 3, 4]
        assert gateway.sent() == ["1", "2", "3"]
        assert content(path) == b""

    async def test_are_on_disk_when_send_returns(
        self, client: Make, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        synced: list[bytes] = []
        monkeypatch.setattr(os, "fsync", lambda _: synced.append(content(path)))
        chat = client(outbox=path)
        chat.send("s", {"text": "hi"}, client_message_id="m1")
        assert b"m1" in synced[-1]

    async def test_that_were_answered_are_not_sent_again(self, gateway: Gateway, client: Make, path: Path) -> None:
        chat = client(outbox=path)
        gateway.next["send"].extend([Answer(), Answer(409), Answer(503, {"Retry-After": "60"})])
        first, refused, kept = (chat.send("s", {"text": text}) for text in "123")
        await chat.connect()
        await first
        with pytest.raises(SendFailed, match="409"):
            await refused
        await chat.close()
        with pytest.raises(SendFailed, match="the next client of this outbox sends it"):
            await kept
        after = client(outbox=path)
        await after.connect()
        await asyncio.gather(*after.recovered.values())
        assert gateway.sent() == ["1", "2", "3", "3"]

    async def test_count_for_the_cap_when_they_come_from_an_earlier_client(self, client: Make, path: Path) -> None:
        before = client(outbox=path)
        for text in "123":
            before.send("s", {"text": text})
        await before.close()
        with pytest.raises(OutboxFull):
            client(outbox=path, cap=3).send("s", {"text": "4"})

    async def test_that_cannot_be_stored_are_not_taken(
        self, client: Make, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        chat = client(outbox=path)
        chat.send("s", {"text": "1"})
        before = content(path)

        def full(file: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space left"):
                chat.send("s", {"text": "2"})
        assert content(path) == before
        chat.send("s", {"text": "3"})
        await chat.close()
        assert [b'"text":"3"' in body for _, body in left_in(path)] == [False, True]

    async def test_an_answer_to_the_agent_is_kept_as_well(self, gateway: Gateway, client: Make, path: Path) -> None:
        before = client(outbox=path)
        answering = asyncio.ensure_future(before.permission("s", "r1", "yes"))
        await eventually(path.read_bytes)
        await before.close()
        with pytest.raises(SendFailed):
            await answering
        after = client(outbox=path)
        await after.connect()
        await eventually(lambda: path.read_bytes() == b"")
        assert [request.body["request_id"] for request in gateway.asked("permission")] == ["r1"]
        assert after.recovered == {}


class TestTheFile:
    async def test_is_empty_when_all_are_answered(self, client: Make, path: Path) -> None:
        chat = client(outbox=path)
        await chat.connect()
        await asyncio.gather(*(chat.send("s", {"text": str(n)}) for n in range(10)))
        assert content(path) == b""

    @pytest.mark.usefixtures("two_lines")
    def test_is_private(self, path: Path) -> None:
        assert path.stat().st_mode & 0o777 == 0o600

    @pytest.mark.parametrize(
        "torn",
        [b'{"put":3,"na', b"{", b'{"put":3,"name":"send","body":{}}', b"\0" * 40, b'{"pu\n', b'{"name":"\xff"}\n'],
    )
    def test_may_end_in_a_torn_line(self, two_lines: bytes, path: Path, torn: bytes) -> None:
        path.write_bytes(two_lines + torn)
        outbox = FileOutbox(path)
        assert [line.put for line in outbox.left] == [1, 2]
        outbox.put(3, "send", b'{"a":3}')
        outbox.close()
        assert left_in(path) == [("send", b'{"a":%d}' % n) for n in (1, 2, 3)]

    @pytest.mark.usefixtures("two_lines")
    def test_knows_what_was_answered(self, path: Path) -> None:
        outbox = FileOutbox(path)
        outbox.done(1)
        outbox.close()
        assert left_in(path) == [("send", b'{"a":2}')]

    def test_forgets_what_was_answered_when_nothing_else_is_left(self, two_lines: bytes, path: Path) -> None:
        path.write_bytes(two_lines + b'{"done":1}\n{"done":2}\n')
        assert left_in(path) == []
        assert path.read_bytes() == b""

    @pytest.mark.parametrize(
        "text", ["some notes", "some notes\n", '{"level":"info"}\n', '{"put":1,"body":{}}\nnotes\n{"done":1}\n', "7"]
    )
    def test_that_is_something_else_is_refused_and_left_as_it_is(self, path: Path, text: str) -> None:
        path.write_text(text)
        with pytest.raises(ConfigError, match="is no outbox"):
            FileOutbox(path)
        assert path.read_text() == text

    async def test_is_for_one_client_at_a_time(self, client: Make, path: Path) -> None:
        chat = client(outbox=path)
        with pytest.raises(OutboxInUse, match="Another client"):
            client(outbox=path)
        await chat.close()
        client(outbox=path)

    async def test_keeps_what_is_sent_while_the_disk_is_full_for_answers(
        self, gateway: Gateway, client: Make, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        chat = client(outbox=path)
        gateway.next["send"].extend([Answer(), Answer(503, {"Retry-After": "60"})])
        first = chat.send("s", {"text": "1"})
        chat.send("s", {"text": "2"}).add_done_callback(lambda failed: failed.exception())
        write = os.write

        def full(file: int, data: bytes) -> int:
            if data.startswith(b'{"done"'):
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(file, data)

        monkeypatch.setattr(os, "write", full)
        await chat.connect()
        assert (await first).seq == 1
        await chat.close()
        assert len(left_in(path)) == 2
