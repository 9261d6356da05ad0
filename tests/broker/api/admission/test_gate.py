"""The gate lets calls in by turns, a few in each turn of the event loop, and forgets those that end while they wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from weight_brokerd.api.admission.gate import AT_ONCE, MOST_WAITING, Gate
from weight_brokerd.core.conduct.pace import Pace
from weight_brokerd.core.conduct.turns import Turns
from weight_brokerd.core.model import Process

FLOOD, HONEST = Process(1, "1"), Process(1, "2")
FAST = Pace(per_second=1e6, burst=1e6)


def run(scenario: Callable[[Gate], Coroutine[Any, Any, None]], pace: Pace = FAST) -> None:
    async def begin() -> None:
        clock = asyncio.get_running_loop().time
        gate = Gate(Turns(process=pace, user=FAST), clock)
        await asyncio.wait_for(scenario(gate), 60)

    asyncio.run(begin())


def test_few_calls_of_a_flood_are_served_before_an_honest_one() -> None:
    async def scenario(gate: Gate) -> None:
        seen: list[Process] = []

        async def call(process: Process) -> None:
            await gate.enter(process)
            seen.append(process)

        calls = [asyncio.create_task(call(FLOOD)) for _ in range(1000)]
        calls.append(asyncio.create_task(call(HONEST)))
        await asyncio.gather(*calls)
        assert seen.index(HONEST) <= 2 * AT_ONCE
        assert len(seen) == 1001

    run(scenario)


def test_a_process_beyond_its_pace_waits_while_others_pass() -> None:
    async def scenario(gate: Gate) -> None:
        flood = [asyncio.create_task(gate.enter(FLOOD)) for _ in range(100)]
        await asyncio.sleep(0)
        await gate.enter(HONEST)
        left = [task for task in flood if not task.done()]
        assert len(left) >= 90
        for task in left:
            task.cancel()
        await asyncio.gather(*flood, return_exceptions=True)
        await gate.enter(HONEST)

    run(scenario, Pace(per_second=0.1, burst=5))


def test_nothing_more_is_read_of_a_process_with_many_calls_that_wait() -> None:
    async def scenario(gate: Gate) -> None:
        flood = [asyncio.create_task(gate.enter(FLOOD)) for _ in range(MOST_WAITING + 10)]
        await asyncio.sleep(0)
        assert gate.overrun(FLOOD) > 0
        assert gate.overrun(HONEST) == 0
        for task in flood:
            task.cancel()
        await asyncio.gather(*flood, return_exceptions=True)

    run(scenario, Pace(per_second=1e3, burst=1))


def test_calls_that_are_cancelled_while_they_wait_count_as_calls() -> None:
    async def scenario(gate: Gate) -> None:
        for _ in range(50):
            call = asyncio.create_task(gate.enter(FLOOD))
            await asyncio.sleep(0)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
        assert gate.overrun(FLOOD) > 1
        assert gate.overrun(HONEST) == 0

    run(scenario, Pace(per_second=10, burst=2))


def test_a_call_that_waited_is_let_in_when_its_time_has_come() -> None:
    async def scenario(gate: Gate) -> None:
        for _ in range(6):
            await gate.enter(FLOOD)

    run(scenario, Pace(per_second=1000, burst=2))
