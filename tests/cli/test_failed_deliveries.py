"""Why a delivery failed can be read on the command line."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest
from click.testing import CliRunner

from queue_service import Delivery, Retry
from queue_service.cli import cli
from tests.worker.test_deliveries import Make, ended, named, replica

__all__ = ["replica"]


def raises(_: Delivery) -> object:
    raise ConnectionError("the platform is down")


@pytest.mark.parametrize(
    ("platform", "answer", "why"),
    [
        ("chat", lambda _: {"ok": True}, "The renderer of platform 'chat' answered with dict, which says neither that"),
        ("chat", raises, "the platform is down"),
        ("mail", raises, "No renderer is registered here for platform 'mail'. Registered platforms: chat."),
    ],
    ids=["answer", "exception", "no renderer"],
)
async def test_a_failed_delivery_is_listed_and_shown_with_its_reason(
    replica: Make, database: str, platform: str, answer: Callable[[Delivery], object], why: str
) -> None:
    here = await replica(retry=Retry(max_attempts=1))
    here.screen.answer = answer
    await ended(here.app, named("m1", platform=platform))
    await here.work()

    async def command(*arguments: str) -> str:
        environment = {"QUEUE_SERVICE_DATABASE_URL": database}
        invoke = CliRunner().invoke
        result = await asyncio.to_thread(invoke, cli, arguments, env=environment, prog_name="queue-service")
        assert result.exit_code == 0, result.output
        return result.stdout

    failed = ("runs", "list", "--queue", "thread_response", "--state", "failed")
    listed = json.loads(await command(*failed, "--json"))
    assert [(run["task"], run["state"]) for run in listed] == [("deliver", "failed")]
    run_id = str(listed[0]["id"])
    assert run_id in await command(*failed)
    shown = await command("runs", "show", run_id)
    assert why in " ".join(shown.split())
