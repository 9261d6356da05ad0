"""Each kind of memory behind one face, for the tests of what all kinds promise."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Mapping
from typing import Protocol

from support.kinds import RecordedEvents, ServingConnections, npu_kind
from support.scripted_cards import ScriptedCards
from support.sealed_memory import memfd
from weight_broker.errors import PublishRefused
from weight_broker.key import WeightSetKey
from weight_broker.kinds import TRAITS, Traits
from weight_broker.layout import Layout, TensorSpec
from weight_broker.v1 import weight_set_pb2 as pb
from weight_brokerd.cards.configuration import CardsConfiguration
from weight_brokerd.cards.messages import ImportRegion
from weight_brokerd.core.model import DataPlane as WirePlane
from weight_brokerd.core.model import TransferPath
from weight_brokerd.core.publications import Publication
from weight_brokerd.core.sources import Holder
from weight_brokerd.core.transfers import Transfer
from weight_brokerd.dataplane.plane import DataPlane, PhaseSeconds, Place, PlaneName
from weight_brokerd.kinds.cuda.kind import CudaKind
from weight_brokerd.kinds.host.kind import HostKind
from weight_brokerd.kinds.host.regions import RegionTable
from weight_brokerd.kinds.kind import UNREAD, ContentCheck, Kind, KindHealth
from weight_brokerd.kinds.place_request import PlaceRequest, placements_of, regions_of, require_unstaged

SIZE = 4096
LAYOUT = Layout([TensorSpec("weight", "int8", (SIZE,), (1,), SIZE)])
OWNER = "instance-1"
FOURTH = "tape"
FOURTH_TRAITS = Traits(
    wire_number=4,
    broker_copies=True,
    outlives_owner=True,
    is_copied_to_publish=True,
    is_packed=True,
    has_devices=True,
    can_be_staged=False,
    handles=("host_memory",),
)


class Harness(Protocol):
    """A kind, and the world that it is in."""

    kind: Kind
    device_id: str

    def handle(self, region: pb.Region) -> None:
        """Names the region's memory as this kind does."""

    def lend(self, region_id: str, size: int) -> None:
        """An instance has such memory."""

    def refuse(self, region_id: str) -> None:
        """The memory cannot be made readable."""


class HostHarness:
    """Memfds."""

    device_id = ""

    def __init__(self) -> None:
        self.regions = RegionTable(regions_per_instance=8)
        self.kind: Kind = HostKind(self.regions)

    def handle(self, region: pb.Region) -> None:
        region.host_memory.SetInParent()

    def lend(self, region_id: str, size: int) -> None:
        self.regions.offer(OWNER, region_id, size, memfd(bytes(size)))

    def refuse(self, region_id: str) -> None:
        self.regions.withdraw(OWNER, region_id)


class CardHarness:
    """What NPUs and GPUs have in common here: scripted cards."""

    def __init__(self, device_id: str) -> None:
        self.device_id = device_id
        self.cards = ScriptedCards(device_id, f"{device_id}-other")

    def lend(self, region_id: str, size: int) -> None:
        """Cards ask nobody."""

    def refuse(self, region_id: str) -> None:
        self.cards.refused.add(f"{OWNER}/{region_id}")


class NpuHarness(CardHarness):
    """NPUs."""

    def __init__(self) -> None:
        super().__init__("npu:0")
        self.events = RecordedEvents()
        self.kind: Kind = npu_kind(self.cards, ServingConnections(OWNER), self.events)

    def handle(self, region: pb.Region) -> None:
        region.npu_allocation.export_key = b"key"


class CudaHarness(CardHarness):
    """GPUs."""

    def __init__(self) -> None:
        super().__init__("GPU-0")
        configuration = CardsConfiguration("", 0, kind="cuda")
        self.kind: Kind = CudaKind(configuration, RecordedEvents(), is_wanted=True, supervise=self.cards.supervise)

    def handle(self, region: pb.Region) -> None:
        region.cuda_allocation.ipc_handle = bytes(64)


class TapePlane:
    """Moves at once."""

    name = PlaneName.COPY

    def __init__(self) -> None:
        self.moved: list[tuple[str, str]] = []

    async def move(
        self, layout: Layout, source: Place, destination: Place, *, timeout: float, peer: str
    ) -> PhaseSeconds:
        self.moved.append((source.device_id, destination.device_id))
        return {"transfer": 1.0}


class TapeKind:
    """A kind that no version knows: nothing but this class and a row of traits."""

    name = FOURTH
    is_served = True

    def __init__(self) -> None:
        self.plane = TapePlane()
        self.refused: set[str] = set()
        self._held: dict[str, Place] = {}

    @property
    def health(self) -> KindHealth:
        sizes = [region.size_bytes for place in self._held.values() for region in place.regions]
        return KindHealth(region_count=len(sizes), region_bytes=sum(sizes))

    def start(self) -> None:
        """Nothing to look for."""

    async def ready(self) -> None:
        """At once."""

    async def close(self) -> None:
        """Nothing to end."""

    def place(self, request: PlaceRequest) -> Place:
        require_unstaged(self.name, request)
        regions = regions_of(self.name, request, lambda _field, name, region: ImportRegion(name, region.size_bytes))
        return Place(self.name, request.device_id, regions, placements_of(self.name, request).pairs)

    def hold(self, publication: Publication, place: Place) -> asyncio.Future[Place]:
        return asyncio.ensure_future(self._hold(publication.publication_id, place))

    async def release(self, publication_id: str) -> None:
        self._held.pop(publication_id, None)

    def grant(self, transfer: Transfer) -> bytes:
        return b""

    async def check(self, publication: Publication, digests: bytes) -> ContentCheck:
        return UNREAD

    def end(self, transfer: Transfer) -> None:
        """Nothing was held for it."""

    def route(self, source: Place, destination: Place) -> DataPlane:
        return self.plane

    async def _hold(self, publication_id: str, place: Place) -> Place:
        await asyncio.sleep(0)
        if any(region.region_id in self.refused for region in place.regions):
            raise PublishRefused("the tape is torn")
        self._held[publication_id] = place
        return place


class TapeHarness:
    """The fourth kind."""

    device_id = "tape-0"

    def __init__(self) -> None:
        self.tape = TapeKind()
        self.kind: Kind = self.tape

    def handle(self, region: pb.Region) -> None:
        region.host_memory.SetInParent()

    def lend(self, region_id: str, size: int) -> None:
        """Nobody is asked."""

    def refuse(self, region_id: str) -> None:
        self.tape.refused.add(f"{OWNER}/{region_id}")


HARNESSES: Mapping[str, Callable[[], Harness]] = {
    "cpu": HostHarness,
    "npu": NpuHarness,
    "cuda": CudaHarness,
    FOURTH: TapeHarness,
}


def place_request(harness: Harness, *region_ids: str) -> PlaceRequest:
    """A weight set in regions of `SIZE` bytes, its only tensor in the first."""
    regions = []
    for region_id in region_ids:
        region = pb.Region(
            region_id=region_id,
            device_kind=pb.DeviceKind.ValueType(TRAITS[harness.kind.name].wire_number),
            device_id=harness.device_id,
            size_bytes=SIZE,
        )
        harness.handle(region)
        regions.append(region)
    return PlaceRequest(
        owner=OWNER,
        layout=LAYOUT,
        device_field="device_id",
        device_id=harness.device_id,
        regions=regions,
        placements=[pb.TensorPlacement(region_index=0, offset_bytes=0)],
    )


def publication(harness: Harness, number: int = 1) -> Publication:
    """A publication of the layout."""
    return Publication(
        f"publication-{number}",
        WeightSetKey("model"),
        LAYOUT,
        generation=number,
        holder=Holder("host", OWNER, "name"),
        device_kind=harness.kind.name,
        device_id=harness.device_id,
        reader_limit=4,
        published_at=0.0,
        request_id="request",
        fencing_token=0,
    )


def transfer(source: Publication, number: int = 1) -> Transfer:
    """A reader of it."""
    return Transfer(
        number, "acquisition-1", source, Holder("host", "instance-2"), TransferPath.COPY, WirePlane.LOCAL, 0.0
    )


def changed(request: PlaceRequest, **fields: object) -> PlaceRequest:
    """The request with other fields."""
    return dataclasses.replace(request, **fields)  # type: ignore[arg-type]
