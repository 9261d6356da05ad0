"""The end of the daemon's loop: calls that were cut off end by themselves, and one that does not is not waited for."""

from __future__ import annotations

import asyncio

import pytest

from weight_brokerd.daemon import application


async def some_turns() -> str:
    for _ in range(10):
        await asyncio.sleep(0)
    return "ended"


def test_what_is_left_in_the_loop_ends_by_itself() -> None:
    async def run() -> asyncio.Task[str]:
        call = asyncio.create_task(some_turns())
        await application._last_turns()
        return call

    assert asyncio.run(run()).result() == "ended"


def test_what_does_not_end_is_cancelled_with_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(application, "STOP_SECONDS", 0.01)

    async def run() -> asyncio.Task[bool]:
        call = asyncio.create_task(asyncio.Event().wait())
        await application._last_turns()
        return call

    assert asyncio.run(run()).cancelled()
