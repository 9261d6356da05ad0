"""What every kind of memory promises to the daemon, tried on each, and on one that exists only here."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from support.kind_harness import (
    FOURTH,
    FOURTH_TRAITS,
    HARNESSES,
    SIZE,
    Harness,
    TapeHarness,
    changed,
    place_request,
    publication,
    transfer,
)
from support.kinds import control_of
from support.received import as_received
from weight_broker.digest import FULL_BLOCK_BYTES, ContentDigests, DigestAlgorithm, DigestCoverage
from weight_broker.errors import BrokerError, InvalidArgument, PublishRefused
from weight_broker.key import WeightSetKey
from weight_broker.kinds import TRAITS, MemoryKind
from weight_broker.v1 import resources_pb2
from weight_broker.v1 import weight_broker_service_pb2 as service
from weight_broker.v1 import weight_set_pb2 as pb
from weight_broker.wire import digests_to_wire, key_to_wire, layout_to_wire
from weight_brokerd.api import acquire_request, publish_request
from weight_brokerd.attach.peer import PeerCredentials
from weight_brokerd.control.mailboxes import Granted, Moved
from weight_brokerd.core.publications import PublicationState
from weight_brokerd.dataplane.plane import PlaneName
from weight_brokerd.kinds.place_request import StagingName
from weight_brokerd.kinds.registry import KindNotServed, Kinds
from weight_brokerd.kinds.steps import at_once

Scenario = Callable[[Harness], Coroutine[Any, Any, None]]


@pytest.fixture(autouse=True)
def _fourth_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRAITS, FOURTH, FOURTH_TRAITS)


@pytest.fixture(params=sorted(HARNESSES))
def make(request: pytest.FixtureRequest) -> Callable[[], Harness]:
    return HARNESSES[request.param]


def run(make: Callable[[], Harness], scenario: Scenario) -> None:
    """The scenario with a kind that is ready."""

    async def whole() -> None:
        harness = make()
        harness.kind.start()
        async with asyncio.timeout(10):
            await harness.kind.ready()
            await scenario(harness)
            await harness.kind.close()

    asyncio.run(whole())


def test_every_kind_is_tried() -> None:
    assert set(HARNESSES) == {*MemoryKind, FOURTH}


def test_a_kind_has_a_row_of_traits_and_names_its_devices(make: Callable[[], Harness]) -> None:
    async def scenario(harness: Harness) -> None:
        kind = harness.kind
        assert kind.name in TRAITS
        assert kind.is_served
        assert kind.health.problem == ""
        assert not kind.health.devices or harness.device_id in kind.health.device_ids

    run(make, scenario)


def beyond_the_region(placement: pb.TensorPlacement) -> None:
    placement.offset_bytes = 1


def in_no_region(placement: pb.TensorPlacement) -> None:
    placement.region_index = 1


@pytest.mark.parametrize("spoil", [beyond_the_region, in_no_region])
def test_a_tensor_outside_its_region_is_refused_by_name(
    make: Callable[[], Harness], spoil: Callable[[pb.TensorPlacement], None]
) -> None:
    async def scenario(harness: Harness) -> None:
        request = place_request(harness, "r")
        spoil(request.placements[0])
        with pytest.raises(InvalidArgument) as refused:
            harness.kind.place(request)
        assert refused.value.field.startswith("placements[weight]")

    run(make, scenario)


def foreign_handle(region: pb.Region) -> None:
    region.ClearField("handle")


def no_size(region: pb.Region) -> None:
    region.size_bytes = 0


def another_kind(region: pb.Region) -> None:
    region.device_kind = pb.DeviceKind.ValueType(region.device_kind % len(TRAITS) + 1)


def unknown_kind(region: pb.Region) -> None:
    region.device_kind = pb.DeviceKind.ValueType(99)


def another_device(region: pb.Region) -> None:
    region.device_id = "elsewhere"


@pytest.mark.parametrize(
    ("spoil", "field"),
    [
        (foreign_handle, "regions[0].handle"),
        (no_size, "regions[0].size_bytes"),
        (another_kind, "regions[0].device_kind"),
        (unknown_kind, "regions[0].device_kind"),
        (another_device, "regions[0].device_id"),
    ],
)
def test_a_region_that_does_not_fit_is_refused_by_field(
    make: Callable[[], Harness], spoil: Callable[[pb.Region], None], field: str
) -> None:
    async def scenario(harness: Harness) -> None:
        request = place_request(harness, "r")
        spoil(request.regions[0])
        with pytest.raises(InvalidArgument) as refused:
            harness.kind.place(request)
        assert refused.value.field == field

    run(make, scenario)


def test_content_without_regions_and_regions_of_one_name_are_refused(make: Callable[[], Harness]) -> None:
    async def scenario(harness: Harness) -> None:
        with pytest.raises(InvalidArgument, match="regions"):
            harness.kind.place(place_request(harness))
        with pytest.raises(InvalidArgument, match="no other region"):
            harness.kind.place(place_request(harness, "r", "r"))

    run(make, scenario)


def test_only_a_kind_that_can_be_staged_takes_a_stage(make: Callable[[], Harness]) -> None:
    async def scenario(harness: Harness) -> None:
        both = changed(place_request(harness, "r"), stage=StagingName("stage_id", "s"))
        only = changed(both, regions=(), placements=(), is_mapped=False)
        if not TRAITS[harness.kind.name].can_be_staged:
            for request in (both, only):
                with pytest.raises(BrokerError):
                    harness.kind.place(request)
            return
        place = harness.kind.place(both)
        assert place.regions
        assert place.stage is not None
        assert not place.is_staged
        assert harness.kind.place(only).is_staged

    run(make, scenario)


def test_held_memory_is_counted_and_readable_until_it_is_released(make: Callable[[], Harness]) -> None:
    async def scenario(harness: Harness) -> None:
        kind = harness.kind
        harness.lend("r", SIZE)
        source = publication(harness)
        held = await kind.hold(source, kind.place(place_request(harness, "r")))
        assert not held.is_staged
        assert held.stage is None
        assert (kind.health.region_count, kind.health.region_bytes) == (1, SIZE)
        granted = service.Granted.FromString(kind.grant(transfer(source)))
        assert not granted.digests
        copies_itself = not TRAITS[kind.name].broker_copies
        assert bool(granted.regions) == bool(granted.placements) == copies_itself
        for _ in range(2):
            kind.end(transfer(source))
            await kind.release(source.publication_id)
        assert (kind.health.region_count, kind.health.region_bytes) == (0, 0)

    run(make, scenario)


def test_a_reader_that_copies_for_itself_keeps_the_memory_after_its_publication(make: Callable[[], Harness]) -> None:
    async def scenario(harness: Harness) -> None:
        kind = harness.kind
        harness.lend("r", SIZE)
        source = publication(harness)
        await kind.hold(source, kind.place(place_request(harness, "r")))
        kind.grant(transfer(source))
        await kind.release(source.publication_id)
        assert kind.health.region_count == (0 if TRAITS[kind.name].broker_copies else 1)
        kind.end(transfer(source))
        assert kind.health.region_count == 0

    run(make, scenario)


def test_memory_that_cannot_be_held_is_refused_and_leaves_nothing(make: Callable[[], Harness]) -> None:
    async def scenario(harness: Harness) -> None:
        kind = harness.kind
        harness.lend("r", SIZE)
        place = kind.place(place_request(harness, "r"))
        harness.refuse("r")
        with pytest.raises(PublishRefused):
            await kind.hold(publication(harness), place)
        await kind.release("publication-1")
        assert kind.health.region_count == 0

    run(make, scenario)


def test_memory_that_is_given_up_while_it_is_made_readable_leaves_nothing(make: Callable[[], Harness]) -> None:
    async def scenario(harness: Harness) -> None:
        kind = harness.kind
        harness.lend("r", SIZE)
        holding = kind.hold(publication(harness), kind.place(place_request(harness, "r")))
        holding.cancel()
        await asyncio.wait({holding})
        await kind.release("publication-1")
        assert kind.health.region_count == 0

    run(make, scenario)


def test_a_region_of_two_publications_stays_until_both_are_released(make: Callable[[], Harness]) -> None:
    async def scenario(harness: Harness) -> None:
        kind = harness.kind
        for number in (1, 2):
            harness.lend(f"r{number}", SIZE)
            place = kind.place(place_request(harness, f"r{number}"))
            await kind.hold(publication(harness, number), place)
        await kind.release("publication-1")
        assert kind.health.region_count == 1
        await kind.release("publication-2")
        assert kind.health.region_count == 0

    run(make, scenario)


def test_what_the_broker_moves_has_a_plane_and_what_it_does_not_has_none(make: Callable[[], Harness]) -> None:
    async def scenario(harness: Harness) -> None:
        place = harness.kind.place(place_request(harness, "r"))
        if TRAITS[harness.kind.name].broker_copies:
            plane = harness.kind.route(place, place)
            assert plane.name in PlaneName
            assert inspect.iscoroutinefunction(plane.move)
        else:
            with pytest.raises(AssertionError, match="no data plane"):
                harness.kind.route(place, place)

    run(make, scenario)


def test_a_kind_can_be_closed_before_it_is_ready_and_again(make: Callable[[], Harness]) -> None:
    async def whole() -> None:
        kind = make().kind
        kind.start()
        for _ in range(2):
            await kind.close()

    asyncio.run(whole())


def test_a_kind_that_is_not_served_is_refused_with_those_that_are(make: Callable[[], Harness]) -> None:
    async def scenario(harness: Harness) -> None:
        kinds = Kinds([harness.kind])
        assert await kinds.ready(harness.kind.name) is harness.kind
        with pytest.raises(KindNotServed, match=rf"regions\[0\] is in wool memory.* serves: {harness.kind.name}"):
            kinds.of("wool", "regions[0]")

    run(make, scenario)


def test_a_kind_that_no_version_knows_is_published_and_read_without_another_line() -> None:
    """Adding a kind is adding a folder: the api, the core and the control plane serve it as it is."""

    async def scenario(harness: Harness) -> None:
        assert isinstance(harness, TapeHarness)
        control, _ = control_of(harness.kind)
        wanted = place_request(harness, "r")
        digests = ContentDigests(DigestAlgorithm.MULTILINEAR_64, DigestCoverage.FULL, FULL_BLOCK_BYTES, (7,))
        offered = service.PublishRequest(
            request_id="request",
            key=key_to_wire(WeightSetKey("model")),
            layout=layout_to_wire(wanted.layout),
            digests=[digests_to_wire(digests)],
            regions=wanted.regions,
            placements=wanted.placements,
        )
        holder = control.sessions.attach(PeerCredentials(1, 0, 0, frozenset()), "holder", "").instance_id
        kind = await publish_request.published_kind(offered, control.kinds)
        source = await control.publishing.publish(*at_once(publish_request.offer(as_received(offered), holder, kind)))
        assert source.state is PublicationState.RESIDENT
        asked = service.AcquireRequest(
            request_id="request",
            key=offered.key,
            layout=offered.layout,
            if_absent=service.IF_ABSENT_FAIL,
            path=resources_pb2.TRANSFER_PATH_COPY,
            device_kind=wanted.regions[0].device_kind,
            device_id=harness.device_id,
            regions=wanted.regions,
            placements=wanted.placements,
        )
        reader = control.sessions.attach(PeerCredentials(2, 0, 0, frozenset()), "reader", "").instance_id
        call = acquire_request.Call("acquisition-1", reader, control.loop.now(), 60.0)
        kind = await acquire_request.receiving_kind(asked, control.kinds)
        mailbox = control.acquiring.begin(*at_once(acquire_request.acquisition(as_received(asked), call, kind)))
        assert isinstance(await mailbox.get(), Granted)
        assert isinstance(await mailbox.get(), Moved)
        assert harness.tape.plane.moved == [(harness.device_id, harness.device_id)]
        control.sessions.departed(holder, "test")
        control.close()

    run(TapeHarness, scenario)
