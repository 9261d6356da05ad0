"""Requests are read in turn: of each process one, of each user a few, and only as many as there is room for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from weight_brokerd.api.incoming.senders import BYTES_PER_SECOND, PACED_BYTES, Senders, paced
from weight_brokerd.api.incoming.slots import Slots
from weight_brokerd.core.model import Process

ONE, OTHER = Process(1, "100"), Process(1, "200")


class Readers:
    """Requests that are read until they are let go."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._end = asyncio.Event()
        self.read: list[str] = []
        """Names of the requests whose reading has begun."""

    async def begin(self, name: str, turn: asyncio.Lock | None = None) -> None:
        async with self._slots.slot(turn):
            self.read.append(name)
            await self._end.wait()

    @asynccontextmanager
    async def reading(self, *requests: tuple[str, asyncio.Lock]) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as group:
            for name, turn in requests:
                group.create_task(self.begin(name, turn))
                await idle()
            yield
            self._end.set()


async def idle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def within_a_minute() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(within_a_minute())


def test_a_process_that_sends_many_requests_waits_for_itself_and_others_do_not() -> None:
    async def test() -> None:
        senders = Senders()
        one, other = senders.of(ONE), senders.of(OTHER)
        readers = Readers(Slots(2, 100))
        many = [(f"one {number}", one.reading) for number in range(5)]
        async with readers.reading(*many, ("other", other.reading)):
            assert readers.read == ["one 0", "other"]
        assert sorted(readers.read) == sorted([name for name, _ in many] + ["other"])

    run(test)


def test_few_requests_of_a_user_are_read_at_once_whatever_the_number_of_its_processes() -> None:
    async def test() -> None:
        readers = Readers(Slots(2, 100))
        async with readers.reading(*((str(number), asyncio.Lock()) for number in range(5))):
            assert readers.read == ["0", "1"]
        assert len(readers.read) == 5

    run(test)


def test_while_too_much_of_a_user_is_kept_its_next_requests_wait_unread() -> None:
    async def test() -> None:
        slots = Slots(2, 100)
        readers = Readers(slots)
        with slots.keeping(60):
            async with asyncio.TaskGroup() as group:
                with slots.keeping(60):
                    group.create_task(readers.begin("later"))
                    await idle()
                    assert readers.read == []
                await idle()
                assert readers.read == ["later"]
                readers._end.set()

    run(test)


def test_a_request_that_is_cancelled_while_it_waits_takes_no_turn_and_no_slot() -> None:
    async def test() -> None:
        slots, turn = Slots(1, 100), asyncio.Lock()
        readers = Readers(slots)
        with slots.keeping(100):
            waiting = asyncio.create_task(readers.begin("cancelled", turn))
            await idle()
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        async with readers.reading(("next", turn)):
            assert readers.read == ["next"]

    run(test)


def test_a_process_is_known_as_long_as_it_sends_something() -> None:
    senders = Senders()
    one = senders.of(ONE)
    assert senders.of(ONE) is one
    assert senders.of(OTHER) is not one
    del one
    assert len(senders) == 0


@pytest.mark.parametrize("fails", [True, False])
def test_a_large_request_takes_its_time_also_if_it_is_refused_at_once(*, fails: bool) -> None:
    async def test() -> None:
        order: list[str] = []

        async def large() -> None:
            try:
                async with paced(BYTES_PER_SECOND // 2):
                    if fails:
                        raise ValueError
            except ValueError:
                pass
            order.append("large")

        async def small() -> None:
            async with paced(PACED_BYTES):
                pass
            order.append("small")

        async def meanwhile() -> None:
            await asyncio.sleep(0.1)
            order.append("meanwhile")

        await asyncio.gather(large(), small(), meanwhile())
        assert order == ["small", "meanwhile", "large"]

    run(test)
