"""Requests about device memory that the broker does not map, checked as `weight_brokerd.api.fields` checks."""

from __future__ import annotations

from collections.abc import Collection

from weight_broker.errors import BrokerError, InvalidArgument, PublishRefused, TransferFailed
from weight_broker.v1 import resources_pb2, weight_broker_service_pb2
from weight_broker.wire import digests_from_wire, key_from_wire
from weight_brokerd.api import fields as validation
from weight_brokerd.api.messages import DEVICE_KIND_NAMES
from weight_brokerd.core.coordinator import STAGE_INSTEAD
from weight_brokerd.core.model import HOST_MEMORY, Offer
from weight_brokerd.dataplane.protocol import Place, StagedBy
from weight_brokerd.kinds.published import PublishedMemory
from weight_brokerd.kinds.registry import DeviceKinds


def require_path(devices: DeviceKinds | None, kind: str, path: str, refusal: type[BrokerError]) -> None:
    """Whether a kind of memory may take the path `direct` or `staged`. No devices at all is for others to refuse."""
    if devices is None or devices.path_of(kind) in ("auto", path):
        return
    if path == "direct":
        raise refusal(f"this broker maps no {kind} memory (cards.path is 'staged')", metadata=STAGE_INSTEAD)
    fix = " (cards.path is 'direct'); set it to 'auto'" if kind == "npu" else ""
    raise refusal(f"this broker copies no {kind} memory through buckets{fix}")


def require_not_staged(request: weight_broker_service_pb2.AcquireRequest) -> None:
    """Host memory has no other path."""
    if request.path == resources_pb2.TRANSFER_PATH_STAGED:
        raise InvalidArgument("path", request.path, "TRANSFER_PATH_COPY or TRANSFER_PATH_ZERO_COPY for host memory")
    if request.stage_id:
        raise InvalidArgument("stage_id", request.stage_id, "empty for host memory")


def destination(
    request: weight_broker_service_pb2.AcquireRequest,
    kind: str,
    instance_id: str,
    devices: DeviceKinds | None,
    cards: Collection[str],
) -> Place:
    """Where the receiver is to copy the bytes to."""
    require_path(devices, kind, "staged", TransferFailed)
    if request.regions or request.placements:
        raise InvalidArgument("regions", len(request.regions), "none for TRANSFER_PATH_STAGED")
    return _place("stage_id", request.stage_id, instance_id, "device_id", request.device_id, devices, cards)


def offer(
    request: weight_broker_service_pb2.PublishRequest,
    instance_id: str,
    layouts: validation.LayoutCache,
    devices: DeviceKinds | None,
    served: Collection[str],
    cards: Collection[str],
) -> tuple[Offer, PublishedMemory]:
    """What an instance offers to copy. `served` are the kinds of memory, `cards` the identities of the devices."""
    request_id = validation.text("request_id", request.request_id)
    key = key_from_wire(request.key)
    layout = layouts.layout(request.layout)
    digests_from_wire(request.digests, len(layout))
    if request.regions or request.placements:
        raise InvalidArgument("staged", "set", f"not set beside {len(request.regions)} regions: it is instead of them")
    staged = request.staged
    kind = DEVICE_KIND_NAMES.get(staged.device_kind)
    if kind is None or kind == HOST_MEMORY:
        raise InvalidArgument("staged.device_kind", staged.device_kind, "a kind of device memory")
    if kind not in served:
        raise PublishRefused(
            f"the memory is of kind {kind}; this broker serves: {', '.join(sorted(served))}",
            metadata={"field": "staged.device_kind", "value": kind},
        )
    require_path(devices, kind, "staged", PublishRefused)
    place = _place(
        "staged.stage_id", staged.stage_id, instance_id, "staged.device_id", staged.device_id, devices, cards
    )
    memory = PublishedMemory((), weight_broker_service_pb2.Granted(digests=request.digests).SerializeToString(), place)
    return (
        Offer(
            key=key,
            layout=layout,
            instance_id=instance_id,
            device_kind=kind,
            device_id=staged.device_id,
            fencing_token=request.fencing_token,
            request_id=request_id,
            is_staged=True,
            rank=validation.rank_of_group(request.load_group) if request.HasField("load_group") else None,
        ),
        memory,
    )


def _place(
    stage_field: str,
    stage_id: str,
    instance_id: str,
    device_field: str,
    device_id: str,
    devices: DeviceKinds | None,
    cards: Collection[str],
) -> Place:
    validation.text(stage_field, stage_id)
    if device_id not in cards:
        raise InvalidArgument(device_field, device_id, f"a device of this host: {', '.join(sorted(cards)) or 'none'}")
    if devices is None or not devices.stages.has(instance_id):
        raise InvalidArgument(
            stage_field, stage_id, "a name on a stage connection", hint="Open one first: ServeStage in attach.proto."
        )
    return Place(device_id, (), (), StagedBy(instance_id, stage_id))
