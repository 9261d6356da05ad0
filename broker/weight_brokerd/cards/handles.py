"""From the wire to what a card process imports."""

from __future__ import annotations

from weight_broker.v1 import weight_set_pb2
from weight_brokerd.cards.messages import ImportRegion


def import_request(region_id: str, region: weight_set_pb2.Region) -> ImportRegion:
    """What imports `region` under an id that is unique on this host. Raises ValueError if it is no device's memory."""
    match region.WhichOneof("handle"):
        case "npu_allocation":
            return ImportRegion(region_id, region.size_bytes, export_key=region.npu_allocation.export_key.hex())
        case "npu_segment":
            segment = region.npu_segment
            handles = tuple(segment.shareable_handles)
            return ImportRegion(
                region_id, region.size_bytes, shareable_handles=handles, chunk_bytes=segment.chunk_bytes
            )
        case "cuda_allocation":
            handle = region.cuda_allocation.ipc_handle.hex()
            return ImportRegion(region_id, region.size_bytes, ipc_handle=handle, device_id=region.device_id)
        case other:
            raise ValueError(f"region {region.region_id!r} is no device's memory: {other}")
