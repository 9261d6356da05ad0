"""Requests are read in turn: of each process one, of each user a few, and only as many as there is room for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from weight_broker.errors import InvalidArgument
from weight_brokerd.api.incoming import slots as module
from weight_brokerd.api.incoming.slots import SLOTS_OF_USER, Slots
from weight_brokerd.core.model import Process


def process(number: int) -> Process:
    return Process(1, str(number))


def run(scenario: Callable[[Slots], Awaitable[None]]) -> None:
    async def begin() -> None:
        await asyncio.wait_for(scenario(Slots(100)), 60)

    asyncio.run(begin())


class Readers:
    """Calls that hold a slot until they are told to end."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self.reading: list[Process] = []
        self.tasks: list[tuple[Process, asyncio.Task[None]]] = []
        self._ends: list[tuple[Process, asyncio.Event]] = []

    async def begin(self, reader: Process, count: int = 1) -> None:
        for _ in range(count):
            self.tasks.append((reader, asyncio.create_task(self._read(reader))))
        await self._settle()

    async def end_one(self, reader: Process) -> None:
        """One that reads now has its request."""
        number = next(index for index, (owner, _) in enumerate(self._ends) if owner == reader)
        self._ends.pop(number)[1].set()
        await self._settle()

    async def cancel(self, reader: Process) -> None:
        for owner, task in self.tasks:
            if owner == reader:
                task.cancel()
        await self._settle()

    async def _read(self, reader: Process) -> None:
        async with self._slots.slot(reader):
            end = asyncio.Event()
            self.reading.append(reader)
            self._ends.append((reader, end))
            try:
                await end.wait()
            finally:
                self.reading.remove(reader)

    async def _settle(self) -> None:
        for _ in range(10):
            await asyncio.sleep(0)


def test_a_process_that_sends_many_requests_waits_for_itself_and_others_do_not() -> None:
    async def scenario(slots: Slots) -> None:
        readers = Readers(slots)
        await readers.begin(process(1), 1000)
        assert readers.reading == [process(1)]
        await readers.begin(process(2))
        assert readers.reading == [process(1), process(2)]
        await readers.end_one(process(1))
        assert readers.reading == [process(2), process(1)]

    run(scenario)


def test_few_requests_of_a_user_are_read_at_once_and_its_processes_take_turns() -> None:
    async def scenario(slots: Slots) -> None:
        readers = Readers(slots)
        for number in range(SLOTS_OF_USER):
            await readers.begin(process(number), 5)
        newcomer = process(SLOTS_OF_USER)
        await readers.begin(newcomer)
        assert len(readers.reading) == SLOTS_OF_USER
        for number in range(SLOTS_OF_USER):
            await readers.end_one(process(number))
        assert newcomer in readers.reading
        assert len(readers.reading) == SLOTS_OF_USER

    run(scenario)


def test_calls_that_are_cancelled_while_they_wait_or_read_leave_their_slots_to_others() -> None:
    async def scenario(slots: Slots) -> None:
        readers = Readers(slots)
        for number in range(3 * SLOTS_OF_USER):
            await readers.begin(process(number), 3)
        for number in range(3 * SLOTS_OF_USER - 1):
            await readers.cancel(process(number))
        assert readers.reading == [process(3 * SLOTS_OF_USER - 1)]
        await readers.cancel(process(3 * SLOTS_OF_USER - 1))
        await readers.begin(process(1))
        assert readers.reading == [process(1)]

    run(scenario)


def test_a_request_that_does_not_arrive_loses_its_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "READ_SECONDS", 0.01)

    async def scenario(slots: Slots) -> None:
        with pytest.raises(InvalidArgument, match="incomplete"):
            async with slots.slot(process(1)):
                await asyncio.Event().wait()
        async with slots.slot(process(1)):
            pass

    run(scenario)


def test_whoever_reads_has_less_time_once_another_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "READ_SECONDS", 1e6)
    monkeypatch.setattr(module, "CONTENDED_SECONDS", 0.01)

    async def scenario(slots: Slots) -> None:
        readers = Readers(slots)
        await readers.begin(process(1), 2)
        with pytest.raises(InvalidArgument, match="incomplete"):
            await readers.tasks[0][1]
        await readers.cancel(process(1))

    run(scenario)


def test_while_too_much_of_a_user_is_kept_its_next_requests_wait_unread() -> None:
    async def scenario(slots: Slots) -> None:
        readers = Readers(slots)
        with slots.keeping(60):
            with slots.keeping(60):
                await readers.begin(process(1))
                assert readers.reading == []
            await readers.begin(process(2))
            assert readers.reading == [process(1), process(2)]
        await readers.cancel(process(1))
        await readers.cancel(process(2))

    run(scenario)


def test_a_request_that_is_cancelled_while_there_is_no_room_takes_no_slot() -> None:
    async def scenario(slots: Slots) -> None:
        readers = Readers(slots)
        with slots.keeping(100):
            await readers.begin(process(1))
            await readers.cancel(process(1))
        await readers.begin(process(1))
        assert readers.reading == [process(1)]
        await readers.cancel(process(1))

    run(scenario)
