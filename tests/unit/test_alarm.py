"""The sleep of a loop ends when something is to be done, and when the loop is to stop."""

from __future__ import annotations

import asyncio

from queue_service.worker.pace import Alarm


async def test_it_ends_when_it_is_woken() -> None:
    alarm = Alarm()
    async with asyncio.timeout(60):
        async with asyncio.TaskGroup() as group:
            group.create_task(alarm.sleep(3_600))
            await asyncio.sleep(0)
            alarm.wake()


async def test_it_does_not_begin_once_the_loop_is_to_stop() -> None:
    alarm = Alarm()
    alarm.stop()
    async with asyncio.timeout(60):
        await alarm.sleep(3_600)
        await alarm.sleep(3_600)


async def test_it_does_not_hear_of_what_came_before_it() -> None:
    alarm = Alarm()
    alarm.wake()
    await alarm.sleep(0)
    sleeping = asyncio.create_task(alarm.sleep(3_600))
    await asyncio.sleep(0)
    assert not sleeping.done()
    alarm.wake()
    async with asyncio.timeout(60):
        await sleeping
