"""The driver where a directory is slow or fails, and where nobody hears the answer any more."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import pytest
from structlog.testing import capture_logs

from support.kinds import host_driver, memory_directory
from weight_broker.errors import BrokerError, Reason
from weight_broker.key import WeightSetKey
from weight_broker.layout import Layout, TensorSpec
from weight_brokerd.attach.peer import PeerCredentials
from weight_brokerd.cards.messages import ImportRegion
from weight_brokerd.control.broker import Driver
from weight_brokerd.control.mailboxes import Granted
from weight_brokerd.core import decisions as decide
from weight_brokerd.core.model import Acquisition, IfAbsent, LeaseClaim, Limits, Offer, PublicationState, TransferPath
from weight_brokerd.dataplane.plane import Place
from weight_brokerd.directory.memory import MemoryDirectory
from weight_brokerd.kinds.host.regions import RegionTable
from weight_brokerd.kinds.published import PublishedMemory

KEY = WeightSetKey("model")


LAYOUT = Layout([TensorSpec("weight", "int8", (8,), (1,), 8)])
EMPTY = Layout([TensorSpec("empty", "int8", (0,), (1,), 0)])


class BrokenDirectory(MemoryDirectory):
    """One that cannot be reached."""

    async def claim_lease(self, weight_set_id: str, *, instance_id: str, instance_name: str) -> LeaseClaim:
        raise ConnectionError("test")


def driver_with(directory: MemoryDirectory) -> Driver:
    return host_driver(directory=directory)


def attach(driver: Driver, name: str) -> str:
    return driver.attach(PeerCredentials(1, 0, 0, frozenset()), name, "").instance_id


def acquisition(driver: Driver, name: str) -> Acquisition:
    instance_id = attach(driver, name)
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


@pytest.mark.parametrize("taken", [False, True], ids=["never taken out", "never sent"])
def test_a_lease_of_which_nobody_heard_goes_to_the_next_waiter(taken: bool) -> None:
    async def run() -> None:
        driver = driver_with(memory_directory())
        unread = driver.begin_acquisition(acquisition(driver, "one"))
        waiting = driver.begin_acquisition(acquisition(driver, "two"))
        async with asyncio.timeout(5):
            assert isinstance(await waiting.get(), decide.Wait)
            assert unread.qsize() == 1
            if taken:
                assert isinstance(unread.get_nowait(), decide.TellColdLoad)
            driver.end_acquisition("one")
            told = await waiting.get()
        assert isinstance(told, decide.TellColdLoad)
        assert told.lease.fencing_token == 2
        driver.close()

    asyncio.run(run())


def test_a_lease_of_which_somebody_heard_outlives_its_call() -> None:
    async def run() -> None:
        driver = driver_with(memory_directory())
        mailbox = driver.begin_acquisition(acquisition(driver, "one"))
        async with asyncio.timeout(5):
            assert isinstance(await mailbox.get(), decide.TellColdLoad)
        driver.lease_heard("one")
        driver.end_acquisition("one")
        await asyncio.sleep(0.01)
        assert driver.counts().cold_load_leases == 1
        driver.close()

    asyncio.run(run())


class Regions(RegionTable):
    """One that fails whoever is in `broken`, in a way that nobody has thought of."""

    def __init__(self) -> None:
        super().__init__(regions_per_instance=8)
        self.broken: set[str] = set()

    def hold(self, holder: str, instance_id: str, region_ids: Iterable[str]) -> None:
        if holder in self.broken:
            raise RuntimeError(f"no {holder}")
        super().hold(holder, instance_id, region_ids)

    def release(self, holder: str) -> None:
        super().release(holder)
        if holder in self.broken:
            raise RuntimeError(f"no {holder}")


def offer(driver: Driver, name: str, layout: Layout = EMPTY) -> Offer:
    return Offer(KEY, layout, attach(driver, name), "cpu", "", 0, f"request of {name}")


NOTHING = PublishedMemory(Place("cpu", ""), b"")


def test_a_decision_that_cannot_be_carried_out_takes_no_other_with_it() -> None:
    async def run() -> None:
        regions = Regions()
        driver = host_driver(limits=Limits(readers_per_publication=1), regions=regions)
        source = await driver.publish(offer(driver, "source"), NOTHING)
        async with asyncio.timeout(5):
            reading = driver.begin_acquisition(acquisition(driver, "reading"))
            granted = await reading.get()
            assert isinstance(granted, Granted)
            waiting = driver.begin_acquisition(acquisition(driver, "waiting"))
            assert isinstance(await waiting.get(), decide.Wait)
            regions.broken = {granted.transfer.transfer_id}
            with capture_logs() as logged:
                driver.end_acquisition("reading")
            assert [one["decision"] for one in logged if one["event"] == "defect"] == ["EndTransfer"]
            assert isinstance(await waiting.get(), Granted), "it was next in the same list of decisions"
        assert len(source.readers) == 1
        driver.close()

    asyncio.run(run())


def test_a_source_that_the_broker_cannot_hold_is_left_out_and_the_next_one_taken() -> None:
    async def run() -> None:
        regions = Regions()
        driver = host_driver(regions=regions)
        for name in ("one", "other"):
            await driver.publish(offer(driver, name), NOTHING)
        regions.broken = {"transfer-1"}
        async with asyncio.timeout(5):
            with capture_logs() as logged:
                granted = await driver.begin_acquisition(acquisition(driver, "receiver")).get()
        assert isinstance(granted, Granted)
        assert granted.transfer.transfer_id == "transfer-2"
        assert [one["decision"] for one in logged if one["event"] == "defect"] == ["Grant", "EndTransfer"]
        assert driver.counts().running_transfers == 1
        driver.close()

    asyncio.run(run())


def test_memory_that_is_refused_is_told_to_its_publisher_and_nothing_of_it_stays() -> None:
    async def run() -> None:
        regions = Regions()
        driver = host_driver(regions=regions)
        memory = PublishedMemory(Place("cpu", "", (ImportRegion("never offered", 8),)), b"")
        with pytest.raises(BrokerError) as refused:
            await driver.publish(offer(driver, "one", LAYOUT), memory)
        assert refused.value.reason is Reason.REGION_REFUSED
        regions.broken = {"publication-2"}
        with pytest.raises(RuntimeError, match="no publication-2"):
            await driver.publish(offer(driver, "two"), NOTHING)
        assert driver.counts().publications == 0
        assert not list(driver.coordinator.weight_sets)
        driver.close()

    asyncio.run(run())


def test_a_publisher_does_not_hear_of_what_went_wrong_for_those_who_waited_for_it() -> None:
    async def run() -> None:
        regions = Regions()
        driver = host_driver(regions=regions)
        async with asyncio.timeout(5):
            loading = driver.begin_acquisition(acquisition(driver, "loading"))
            assert isinstance(await loading.get(), decide.TellColdLoad)
            waiting = driver.begin_acquisition(acquisition(driver, "waiting"))
            assert isinstance(await waiting.get(), decide.Wait)
            regions.broken = {"transfer-1"}
            publication = await driver.publish(offer(driver, "source"), NOTHING)
            assert publication.state is PublicationState.RESIDENT
        driver.close()

    asyncio.run(run())
