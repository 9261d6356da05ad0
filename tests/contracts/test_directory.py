"""What every directory promises: one holder for each weight set, tokens that grow, and an end that is reported."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest

from weight_broker.errors import LeaseLost
from weight_brokerd.core.model import ColdLoadLease
from weight_brokerd.core.sources import Holder
from weight_brokerd.directory.memory import MemoryDirectory
from weight_brokerd.directory.protocol import Directory

LEASE_SECONDS = 60.0
ONE, OTHER = Holder("host", "one", "name-one"), Holder("host", "other")


@dataclass
class Listener:
    """Records what a directory reports by itself."""

    ended: list[ColdLoadLease] = field(default_factory=list)
    called: asyncio.Event = field(default_factory=asyncio.Event)

    def lease_ended(self, lease: ColdLoadLease) -> None:
        self.ended.append(lease)
        self.called.set()


@dataclass
class Clock:
    """Time as the test tells it."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Harness:
    """A directory, its listener and its clock."""

    directory: Directory
    listener: Listener
    clock: Clock

    async def expire(self) -> None:
        """Let the directory notice that a time is over."""
        self.clock.now += 2 * LEASE_SECONDS
        async with asyncio.timeout(60):
            await self.listener.called.wait()


def memory() -> Harness:
    clock, listener = Clock(), Listener()
    directory = MemoryDirectory(lease_seconds=0.01, first_token=7, clock=clock)
    directory.subscribe(listener)
    return Harness(directory, listener, clock)


DIRECTORIES = [memory]
Scenario = Callable[[Harness], Awaitable[None]]


@pytest.fixture(params=DIRECTORIES, ids=[make.__name__ for make in DIRECTORIES])
def run(request: pytest.FixtureRequest) -> Callable[[Scenario], None]:
    def run_on_a_loop(scenario: Scenario) -> None:
        async def around() -> None:
            harness = request.param()
            try:
                await scenario(harness)
            finally:
                harness.directory.close()

        asyncio.run(around())

    return run_on_a_loop


def test_one_claimant_gets_the_lease_and_the_others_learn_who_has_it(run: Callable[[Scenario], None]) -> None:
    async def scenario(harness: Harness) -> None:
        first, second = [await harness.directory.claim("w", claimant) for claimant in (ONE, OTHER)]
        assert (first.granted, second.granted) == (True, False)
        assert second.lease == first.lease
        assert (first.lease.holder, first.lease.holder.name) == (ONE, "name-one")
        assert (await harness.directory.claim("another", OTHER)).granted

    run(scenario)


def test_a_released_lease_is_reported_once_and_goes_to_the_next_claimant_with_a_higher_token(
    run: Callable[[Scenario], None],
) -> None:
    async def scenario(harness: Harness) -> None:
        lease = (await harness.directory.claim("w", ONE)).lease
        for _ in range(2):
            await harness.directory.release(lease)
        assert harness.listener.ended == [lease]
        following = await harness.directory.claim("w", OTHER)
        assert following.granted
        assert following.lease.fencing_token > lease.fencing_token
        await harness.directory.release(lease)
        assert not (await harness.directory.claim("w", ONE)).granted, "an old lease ends no newer one"

    run(scenario)


def test_a_lease_whose_time_is_over_is_reported_and_free(run: Callable[[Scenario], None]) -> None:
    async def scenario(harness: Harness) -> None:
        lease = (await harness.directory.claim("w", ONE)).lease
        await harness.expire()
        assert harness.listener.ended == [lease]
        assert (await harness.directory.claim("w", OTHER)).granted

    run(scenario)


def test_an_extended_lease_ends_later_and_never_earlier(run: Callable[[Scenario], None]) -> None:
    async def scenario(harness: Harness) -> None:
        lease = (await harness.directory.claim("w", ONE)).lease
        longer = await harness.directory.extend(lease, 1000.0)
        assert longer.fencing_token == lease.fencing_token
        assert longer.expires_at > lease.expires_at
        assert (await harness.directory.extend(longer, 1.0)).expires_at == longer.expires_at

    run(scenario)


def test_a_lease_that_has_ended_cannot_be_extended(run: Callable[[Scenario], None]) -> None:
    async def scenario(harness: Harness) -> None:
        lease = (await harness.directory.claim("w", ONE)).lease
        await harness.directory.release(lease)
        with pytest.raises(LeaseLost):
            await harness.directory.extend(lease, 10.0)

    run(scenario)
