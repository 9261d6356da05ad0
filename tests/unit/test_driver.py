"""The driver where a directory is slow or fails, and where nobody hears the answer any more."""

from __future__ import annotations

import asyncio

from weight_broker.errors import Reason
from weight_broker.key import WeightSetKey
from weight_brokerd.attach.peer import PeerCredentials
from weight_brokerd.core import decisions as decide
from weight_brokerd.core.coordinator import Coordinator
from weight_brokerd.core.leases import LeaseClaim
from weight_brokerd.core.model import Acquisition, IfAbsent, Limits, TransferPath
from weight_brokerd.directory.memory import MemoryDirectory
from weight_brokerd.driver import Driver
from weight_brokerd.memory.host import RegionTable

KEY = WeightSetKey("model")


class BrokenDirectory(MemoryDirectory):
    """One that cannot be reached."""

    async def claim_lease(self, weight_set_id: str, *, instance_id: str, instance_name: str) -> LeaseClaim:
        raise ConnectionError("test")


def driver_with(directory: MemoryDirectory) -> Driver:
    coordinator = Coordinator(host_id="host", limits=Limits())
    return Driver(coordinator=coordinator, regions=RegionTable(regions_per_instance=8), directory=directory)


def acquisition(driver: Driver, name: str) -> Acquisition:
    instance_id = driver.attach(PeerCredentials(1, 0, 0, frozenset()), name, "").instance_id
    now = driver.clock()
    return Acquisition(
        name, KEY, None, instance_id, IfAbsent.LOAD, "cpu", "", TransferPath.ZERO_COPY, begun_at=now, deadline=now + 60
    )


def test_a_directory_that_fails_sends_everybody_to_the_disk_and_nobody_waits_for_ever() -> None:
    async def run() -> None:
        driver = driver_with(BrokenDirectory(host_id="host", lease_seconds=60, first_token=1))
        mailboxes = [driver.begin_acquisition(acquisition(driver, name)) for name in ("one", "two")]
        async with asyncio.timeout(5):
            for event in [await mailbox.get() for mailbox in mailboxes]:
                assert isinstance(event, decide.Fail)
                assert event.error.reason is Reason.BROKER_UNAVAILABLE
        assert not list(driver.coordinator.weight_sets)
        driver.close()

    asyncio.run(run())


def test_a_lease_of_which_nobody_heard_goes_to_the_next_waiter() -> None:
    async def run() -> None:
        driver = driver_with(MemoryDirectory(host_id="host", lease_seconds=60, first_token=1))
        unread = driver.begin_acquisition(acquisition(driver, "one"))
        waiting = driver.begin_acquisition(acquisition(driver, "two"))
        async with asyncio.timeout(5):
            assert isinstance(await waiting.get(), decide.Wait)
            assert not unread.empty()
            driver.end_acquisition("one")  # cancelled before it took the answer out
            told = await waiting.get()
        assert isinstance(told, decide.TellColdLoad)
        assert told.lease.fencing_token == 2
        driver.close()

    asyncio.run(run())
