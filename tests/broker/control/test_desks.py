"""Publishing and acquiring where memory cannot be held: each failure reaches the one it concerns."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from support.control_room import LAYOUT, NOWHERE, ControlRoom
from weight_broker.errors import BrokerError, Reason
from weight_brokerd.cards.messages import ImportRegion
from weight_brokerd.control.mailboxes import Granted
from weight_brokerd.core import decisions as decide
from weight_brokerd.core.publications import PublicationState
from weight_brokerd.dataplane.plane import Place
from weight_brokerd.kinds.published import PublishedMemory


def test_a_decision_that_cannot_be_carried_out_takes_no_other_with_it() -> None:
    async def run() -> None:
        room = ControlRoom(readers=1)
        control = room.control
        source = await control.publishing.publish(room.offer("source"), NOWHERE)
        async with asyncio.timeout(60):
            granted = await control.acquiring.begin(room.acquisition("reading")).get()
            assert isinstance(granted, Granted)
            waiting = control.acquiring.begin(room.acquisition("waiting"))
            assert isinstance(await waiting.get(), decide.Wait)
            room.regions.broken = {granted.transfer.transfer_id}
            with capture_logs() as logged:
                control.acquiring.end_call("reading")
            failed = [entry["decision"] for entry in logged if entry["event"] == "internal_error"]
            assert failed == ["EndTransfer"]
            assert isinstance(await waiting.get(), Granted), "it was next in the same queue"
        assert len(source.readers) == 1
        control.close()

    asyncio.run(run())


def test_a_source_that_the_broker_cannot_hold_is_left_out_and_the_next_one_taken() -> None:
    async def run() -> None:
        room = ControlRoom()
        control = room.control
        for name in ("one", "other"):
            await control.publishing.publish(room.offer(name), NOWHERE)
        room.regions.broken = {"transfer-1"}
        async with asyncio.timeout(60):
            with capture_logs() as logged:
                granted = await control.acquiring.begin(room.acquisition("receiver")).get()
        assert isinstance(granted, Granted)
        assert granted.transfer.transfer_id == "transfer-2"
        failed = [entry["decision"] for entry in logged if entry["event"] == "internal_error"]
        assert failed == ["Reserve", "EndTransfer"]
        assert control.counts().running_transfers == 1
        control.close()

    asyncio.run(run())


def test_memory_that_is_refused_is_told_to_its_publisher_and_nothing_of_it_stays() -> None:
    async def run() -> None:
        room = ControlRoom()
        control = room.control
        memory = PublishedMemory(Place("cpu", "", (ImportRegion("never offered", 8),), ((0, 0),)), b"")
        with pytest.raises(BrokerError) as refused:
            await control.publishing.publish(room.offer("one", LAYOUT), memory)
        assert refused.value.reason is Reason.REGION_REFUSED
        room.regions.broken = {"publication-2"}
        with pytest.raises(RuntimeError, match="no publication-2"):
            await control.publishing.publish(room.offer("two"), NOWHERE)
        assert control.counts().publications == 0
        assert not list(control.coordinator.weight_sets)
        control.close()

    asyncio.run(run())


def test_a_publisher_does_not_hear_of_what_went_wrong_for_those_who_waited_for_it() -> None:
    async def run() -> None:
        room = ControlRoom()
        control = room.control
        async with asyncio.timeout(60):
            assert isinstance(await control.acquiring.begin(room.acquisition("loading")).get(), decide.LoadFromDisk)
            waiting = control.acquiring.begin(room.acquisition("waiting"))
            assert isinstance(await waiting.get(), decide.Wait)
            room.regions.broken = {"transfer-1"}
            publication = await control.publishing.publish(room.offer("source"), NOWHERE)
            assert publication.state is PublicationState.RESIDENT
        control.close()

    asyncio.run(run())


def test_host_memory_is_resident_before_anything_else_happens() -> None:
    async def run() -> None:
        room = ControlRoom()
        publishing = asyncio.ensure_future(room.control.publishing.publish(room.offer("source"), NOWHERE))
        await asyncio.sleep(0)
        assert isinstance(room.control.acquiring.begin(room.acquisition("receiver")).get_nowait(), Granted)
        await publishing
        room.control.close()

    asyncio.run(run())


def test_a_retraction_returns_when_the_last_reader_has_ended() -> None:
    async def run() -> None:
        room = ControlRoom()
        control = room.control
        offer = room.offer("source")
        publication = await control.publishing.publish(offer, NOWHERE)
        async with asyncio.timeout(60):
            assert isinstance(await control.acquiring.begin(room.acquisition("receiver")).get(), Granted)
            retracting = asyncio.ensure_future(
                control.publishing.retract(offer.instance_id, publication.publication_id)
            )
            await asyncio.sleep(0)
            assert publication.state is PublicationState.RETRACTING
            control.acquiring.end_call("receiver")
            assert (await retracting).state is PublicationState.GONE
        control.close()

    asyncio.run(run())
