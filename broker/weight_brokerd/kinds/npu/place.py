"""Places in an NPU's memory: mapped by the broker, or copied by their owner through a staging buffer."""

from __future__ import annotations

from collections.abc import Collection

from weight_broker.errors import InvalidArgument, NotAttached
from weight_broker.kinds import MemoryKind
from weight_broker.v1.weight_set_pb2 import Region
from weight_brokerd.cards.messages import NOT_SAID, ImportRegion
from weight_brokerd.core.answers import STAGE_INSTEAD
from weight_brokerd.dataplane.plane import Place, StagedBy
from weight_brokerd.dataplane.staged import Asker
from weight_brokerd.kinds.place_request import PlaceRequest, StagingName, device_of, placements_of, regions_of, text

MAX_EXPORT_KEY_BYTES = 128

_MAPS = {"direct": True, "auto": True, "staged": False}
_STAGES = {"direct": False, "auto": True, "staged": True}


class NpuPlaces:
    """Makes the places that `cards.path` allows."""

    def __init__(self, path: str, staging: Asker) -> None:
        """`path`: `direct`, `staged` or `auto`; `staging`: the instances that copy."""
        self._staging = staging
        self.maps = _MAPS[path]
        """Whether the broker maps the memory of instances."""
        self.may_stage = _STAGES[path] and self.maps
        """Whether memory that cannot be mapped may be staged instead."""
        self._takes_stages = _STAGES[path]

    def place(self, request: PlaceRequest, device_ids: Collection[str]) -> Place:
        """The place, in the ways that both the request and the settings allow: a request may offer two."""
        stage = request.stage if self._takes_stages else None
        is_mapped = request.is_mapped and self.maps
        if not is_mapped and stage is None:
            raise self._refusal(request)
        device_id = device_of(request, device_ids)
        place = Place(MemoryKind.NPU, device_id)
        if is_mapped:
            regions = regions_of(MemoryKind.NPU, request, import_region)
            place = Place(MemoryKind.NPU, device_id, regions, placements_of(MemoryKind.NPU, request).pairs)
            stage = stage if regions else None  # without content there is nothing to copy
        if stage is None:
            return place
        return Place(place.kind, device_id, place.regions, place.placements, self._staged_by(request.owner, stage))

    def require_connection(self, owner: str) -> None:
        """Raises `NotAttached` if the instance has no stage connection (any more): it may end at any moment, so that
        the request is not to blame."""
        if not self._staging.has(owner):
            raise NotAttached.without_stage()

    def _staged_by(self, owner: str, stage: StagingName) -> StagedBy:
        text(stage.field, stage.stage_id)
        self.require_connection(owner)
        return StagedBy(owner, stage.stage_id)

    def _refusal(self, request: PlaceRequest) -> Exception:
        if request.is_mapped:
            return request.refusal(
                "this broker does not map npu memory (cards.path is 'staged'); offer to stage it, or set cards.path to "
                "'auto'",
                metadata=STAGE_INSTEAD,
            )
        return request.refusal(
            "staged transfers of npu memory are disabled (cards.path is 'direct'); set cards.path to 'auto'"
        )


def import_region(field: str, region_id: str, region: Region) -> ImportRegion:
    """The import request of a region: an allocation or the chunks of a segment."""
    if region.WhichOneof("handle") == "npu_allocation":
        key = region.npu_allocation.export_key
        if not 0 < len(key) <= MAX_EXPORT_KEY_BYTES:
            raise InvalidArgument(f"{field}.npu_allocation.export_key", len(key), f"1 to {MAX_EXPORT_KEY_BYTES} bytes")
        return ImportRegion(region_id, region.size_bytes, export_key=key.hex())
    segment = region.npu_segment
    handles = tuple(segment.shareable_handles)
    if not handles or segment.chunk_bytes * len(handles) != region.size_bytes:
        raise InvalidArgument(
            f"{field}.npu_segment",
            f"{len(handles)} chunks of {segment.chunk_bytes} bytes",
            f"chunks that make up the region's {region.size_bytes} bytes",
        )
    return ImportRegion(
        region_id,
        region.size_bytes,
        shareable_handles=handles,
        chunk_bytes=segment.chunk_bytes,
        container_device=region.container_device if region.HasField("container_device") else NOT_SAID,
    )
