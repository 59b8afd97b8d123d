"""The example in `docs/client.md` runs."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

from tests.client.server import Gateway
from tests.support import eventually

PAGE = Path(__file__).parents[2] / "docs" / "client.md"


async def test_the_example_sends_a_message_and_hears_its_ending(gateway: Gateway, tmp_path: Path) -> None:
    (code,) = re.findall(r"```py\n(.*?)```", PAGE.read_text(), re.DOTALL)
    program = tmp_path / "example.py"
    program.write_text(code.replace("http://127.0.0.1:8000", gateway.url))
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(program), cwd=tmp_path, stdout=asyncio.subprocess.PIPE
    )
    await eventually(lambda: gateway.receipts, within=30)
    await gateway.append("conv-1", "delta")
    await gateway.append("conv-1", "reply", body={"message_ids": list(gateway.receipts)})
    printed, _ = await process.communicate()
    assert (process.returncode, printed.decode()) == (0, "conv-1 1 message\nconv-1 2 delta\nconv-1 3 reply\n")
