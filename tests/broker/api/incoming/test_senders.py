"""Who sends many or large requests waits for itself."""

from __future__ import annotations

import asyncio

import pytest

from weight_brokerd.api.incoming.senders import BYTES_PER_SECOND, PACED_BYTES, Senders, paced
from weight_brokerd.core.model import Process

ONE, OTHER = Process(1, "100"), Process(1, "200")


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

    asyncio.run(asyncio.wait_for(test(), 60))
