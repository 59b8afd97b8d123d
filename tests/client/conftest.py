"""A scripted gateway, and clients of it that are quick to try again."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from queue_service.client import ChatClient
from tests.client.server import Gateway, serving

QUICK = {"first_pause": 0.01, "longest_pause": 0.05, "answer_timeout": 20.0}


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    async with serving() as gateway:
        yield gateway


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[Callable[..., ChatClient]]:
    """Makes clients, which are closed after the test."""
    made: list[ChatClient] = []

    def make(**options: Any) -> ChatClient:
        made.append(ChatClient(gateway.url, **QUICK | options))
        return made[-1]

    yield make
    for chat in made:
        await chat.close()


@pytest.fixture
def chat(client: Callable[..., ChatClient]) -> ChatClient:
    return client()
