"""Host memory: memfds that instances handed over. Receivers copy or map them."""

from __future__ import annotations

import asyncio

from weight_broker.errors import InvalidArgument
from weight_broker.kinds import MemoryKind
from weight_broker.v1.weight_broker_service_pb2 import Granted
from weight_broker.v1.weight_set_pb2 import Region
from weight_brokerd.cards.messages import ImportRegion
from weight_brokerd.core.publications import Publication
from weight_brokerd.core.transfers import Transfer
from weight_brokerd.dataplane.plane import DataPlane, Place
from weight_brokerd.kinds.host.content import Content, ContentReader
from weight_brokerd.kinds.host.regions import RegionTable
from weight_brokerd.kinds.kind import ContentCheck, KindHealth
from weight_brokerd.kinds.place_request import PlaceRequest, placements_of, regions_of


class HostKind:
    """As `weight_brokerd.kinds.kind.Kind`."""

    name: str = MemoryKind.CPU
    is_served = True

    def __init__(self, regions: RegionTable) -> None:
        """`regions` has the memfds from the attach socket."""
        self._regions = regions
        self._reader = ContentReader()
        self._published: dict[str, Place] = {}

    @property
    def health(self) -> KindHealth:
        """There is always host memory."""
        return KindHealth(region_count=self._regions.region_count, region_bytes=self._regions.region_bytes)

    def start(self) -> None:
        """Nothing to look for."""

    async def ready(self) -> None:
        """At once."""

    async def close(self) -> None:
        """Ends the checks. The table closes the regions."""
        await self._reader.close()

    def place(self, request: PlaceRequest) -> Place:
        """The place of a publication; receivers copy for themselves and name no place."""
        if request.stage is not None:
            field = request.stage.field
            raise InvalidArgument(field, request.stage.stage_id, "not set: host memory is never staged")
        if request.device_id:
            raise InvalidArgument(request.device_field, request.device_id, "empty for host memory")
        regions = regions_of(self.name, request, _import_region)
        granted = Granted(regions=request.regions).SerializeToString() + placements_of(self.name, request).granted
        return Place(self.name, "", regions, granted=granted)

    def hold(self, publication: Publication, place: Place) -> asyncio.Future[Place]:
        """Done at once: the broker has the memory open already."""
        held: asyncio.Future[Place] = asyncio.get_running_loop().create_future()
        held.set_result(self._hold(publication, place))
        return held

    async def release(self, publication_id: str) -> None:
        """Transfers that were granted keep the memory open."""
        self._published.pop(publication_id, None)
        self._regions.release(publication_id)

    def grant(self, transfer: Transfer) -> bytes:
        """The regions and placements. The transfer holds the memory as the publication does."""
        publication = transfer.publication
        place = self._published[publication.publication_id]
        region_ids = [region.region_id for region in place.regions]
        self._regions.hold(transfer.transfer_id, publication.instance_id, region_ids)
        return place.granted

    async def check(self, publication: Publication, digests: bytes) -> ContentCheck:
        """Reads the memfds, which are held meanwhile."""
        place = self._published[publication.publication_id]
        holder = f"check of {publication.publication_id}"
        self._regions.hold(holder, publication.instance_id, [region.region_id for region in place.regions])
        try:
            descriptors = [self._regions.descriptor(holder, index) for index in range(len(place.regions))]
            return await self._reader.check(Content(publication.layout, place.granted, digests, descriptors))
        finally:
            self._regions.release(holder)

    def end(self, transfer: Transfer) -> None:
        """The receiver copied or mapped the memory, or gave up."""
        self._regions.release(transfer.transfer_id)

    def route(self, source: Place, destination: Place) -> DataPlane:
        """The receiver copies host memory itself."""
        raise AssertionError(f"{source.kind} -> {destination.kind}: no data plane moves host memory")

    def _hold(self, publication: Publication, place: Place) -> Place:
        instance_id, publication_id = publication.instance_id, publication.publication_id
        for region in place.regions:
            self._check_size(instance_id, region)
        region_ids = [region.region_id for region in place.regions]
        self._regions.hold(publication_id, instance_id, region_ids)
        for region_id in region_ids:  # from now on the publication holds the regions
            self._regions.withdraw(instance_id, region_id)
        self._published[publication_id] = place
        return place

    def _check_size(self, instance_id: str, region: ImportRegion) -> None:
        offered = self._regions.size_bytes(instance_id, region.region_id)
        if region.size_bytes > offered:
            raise InvalidArgument(
                f"regions[{region.region_id}].size_bytes", region.size_bytes, f"at most the {offered} that were offered"
            )


def _import_region(field: str, region_id: str, region: Region) -> ImportRegion:
    """The region under the owner's id, because the table knows regions by instance."""
    return ImportRegion(region.region_id, region.size_bytes)
