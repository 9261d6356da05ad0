"""A large layout that nothing has any more is freed in steps, between which others go on."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable

import pytest

from weight_broker.layout import Layout, TensorSpec
from weight_broker.wire import layout_to_wire
from weight_brokerd.api.incoming.layouts import LayoutCache
from weight_brokerd.api.incoming.remains import FREED_AT_ONCE, Remains
from weight_brokerd.api.incoming.turns import Turns
from weight_brokerd.kinds.steps import at_once


async def turns_until(done: Callable[[], bool]) -> int:
    """Turns of the loop."""
    async with asyncio.timeout(60):
        count = 0
        while not done():
            count += 1
            await asyncio.sleep(0)
        return count


@pytest.mark.parametrize("in_a_thread", [True, False])
def test_the_tensors_of_a_layout_that_is_gone_are_freed_some_in_each_turn_of_the_loop(*, in_a_thread: bool) -> None:
    layout = Layout([TensorSpec(f"{number:06}", "int8", (8,), (1,), 8) for number in range(6 * FREED_AT_ONCE)])
    wire = layout_to_wire(layout).SerializeToString()

    async def test() -> None:
        tasks: list[asyncio.Task[None]] = []
        remains = Remains(Turns(), lambda work: tasks.append(asyncio.get_running_loop().create_task(work)))
        cache = LayoutCache(tensors=1, remains=remains)
        held = [at_once(cache.layout(wire, [(0, len(wire))]))]
        first, last = held[0][0], held[0][-1]
        kept = sys.getrefcount(first)
        assert sys.getrefcount(last) == kept
        if in_a_thread:
            thread = threading.Thread(target=held.clear)
            thread.start()
            thread.join()
        else:
            held.clear()
        assert sys.getrefcount(first) == kept, "nothing is freed yet"
        await turns_until(lambda: sys.getrefcount(last) < kept)
        assert await turns_until(lambda: sys.getrefcount(first) < kept) >= 5
        await asyncio.gather(*tasks)

    asyncio.run(test())


def test_layouts_may_outlive_the_loop() -> None:
    async def remains() -> Remains:
        return Remains(Turns(), lambda work: work.close())

    layout = Layout([TensorSpec(f"{number:06}", "int8", (8,), (1,), 8) for number in range(2 * FREED_AT_ONCE)])
    asyncio.run(remains()).follow(layout)
    del layout
