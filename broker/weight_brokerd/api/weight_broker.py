"""WeightBrokerService: what attached instances call."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

import grpc
import structlog

from weight_broker.errors import InvalidArgument, PublishRefused, RetractTimeout, TransferFailed
from weight_broker.layout import Layout
from weight_broker.v1 import weight_broker_service_pb2 as pb
from weight_broker.v1 import weight_set_pb2
from weight_broker.v1.weight_broker_service_pb2_grpc import WeightBrokerServiceServicer
from weight_broker.wire import MAX_REASON_CHARACTERS, key_from_wire, layout_to_wire
from weight_brokerd.api import fields as validation
from weight_brokerd.api import publish_request as staging
from weight_brokerd.api.caller import identify, on_end
from weight_brokerd.api.messages import DATA_PLANES, DEVICE_KIND_NAMES, PATHS, Messages
from weight_brokerd.control.broker import Driver
from weight_brokerd.control.mailboxes import Granted, Moved
from weight_brokerd.core import decisions as decide
from weight_brokerd.core.model import HOST_MEMORY, Acquisition, TransferPath, WaitReason
from weight_brokerd.dataplane.protocol import Place

log = structlog.get_logger()

Context = grpc.aio.ServicerContext[Any, Any]

_SHARE_OF_DEADLINE = 0.95

_WAIT_REASONS = {
    WaitReason.COLD_LOAD: pb.Waiting.REASON_COLD_LOAD,
    WaitReason.SOURCES_BUSY: pb.Waiting.REASON_SOURCES_BUSY,
    WaitReason.LOAD_GROUP: pb.Waiting.REASON_LOAD_GROUP,
    WaitReason.REGISTERING: pb.Waiting.REASON_REGISTERING,
}


class WeightBrokerServicer(WeightBrokerServiceServicer):
    """Validates, identifies, asks the driver, answers."""

    def __init__(
        self, driver: Driver, messages: Messages, *, maximum_wait_seconds: float, lease_seconds: float
    ) -> None:
        self._driver = driver
        self._messages = messages
        self._maximum_wait_seconds = maximum_wait_seconds
        self._lease_seconds = lease_seconds
        self._layouts = validation.LayoutCache()
        self._numbers = itertools.count(1)

    async def Acquire(self, request: pb.AcquireRequest, context: Context) -> AsyncIterator[pb.AcquireResponse]:
        """See the proto."""
        session = identify(self._driver, context)
        devices = await self._devices(request.device_kind)
        acquisition, destination = self._acquisition(request, session.instance_id, context, devices)
        acquisition_id = acquisition.acquisition_id
        logger = log.bind(
            acquisition_id=acquisition_id,
            request_id=request.request_id,
            instance_id=session.instance_id,
            weight_set_id=acquisition.key.id,
        )
        # However the call ends - done, cancelled, past its deadline - its reader slot is free then.
        on_end(context, lambda: self._driver.end_acquisition(acquisition_id))
        mailbox = self._driver.begin_acquisition(acquisition, destination)
        logger.info("acquire", model=acquisition.key.model, if_absent=str(acquisition.if_absent))
        while True:
            match await mailbox.get():
                case decide.Wait(_, reason, lease):
                    yield pb.AcquireResponse(
                        waiting=pb.Waiting(
                            reason=_WAIT_REASONS[reason],
                            cold_load_lease=self._messages.lease(lease) if lease is not None else None,
                        )
                    )
                case Granted() as granted:
                    logger.info("granted", transfer_id=granted.transfer.transfer_id)
                    yield pb.AcquireResponse(granted=self._granted(granted, acquisition))
                case Moved(transfer, seconds):
                    logger.info("moved", transfer_id=transfer.transfer_id, seconds=dict(seconds))
                    yield pb.AcquireResponse(moved=self._messages.moved(transfer, seconds))
                case decide.TellColdLoad(_, lease):
                    logger.info("cold_load", fencing_token=lease.fencing_token)
                    yield pb.AcquireResponse(cold_load=pb.ColdLoad(cold_load_lease=self._messages.lease(lease)))
                    # Of a call that ends before its answer is on its way, nobody comes here: the lease goes on then.
                    self._driver.lease_heard(acquisition_id)
                    return
                case decide.Complete(_, transfer, arrival):
                    logger.info("done", transfer_id=transfer.transfer_id, size_bytes=arrival.size_bytes)
                    yield pb.AcquireResponse(done=pb.Done(report=self._messages.report(transfer, arrival)))
                    return
                case decide.Fail(_, error):
                    logger.info("failed", reason=str(error.reason), error=error.message)
                    raise error

    async def ReportTransfer(self, request: pb.ReportTransferRequest, context: Context) -> pb.ReportTransferResponse:
        """See the proto."""
        session = identify(self._driver, context)
        transfer_id = validation.text("transfer_id", request.transfer_id)
        match request.WhichOneof("outcome"):
            case "succeeded":
                arrival = validation.arrival(request.succeeded)
                self._driver.transfer_succeeded(session.instance_id, transfer_id, arrival)
            case "failed":
                cause = validation.cause(request.failed.cause)
                detail = validation.text(
                    "failed.detail", request.failed.detail, limit=MAX_REASON_CHARACTERS, required=False
                )
                transfer = self._driver.coordinator.transfers.running.get(transfer_id)
                self._driver.transfer_failed(session.instance_id, transfer_id, cause, detail)
                if transfer is not None:  # whoever gives up may use the memory for something else now
                    await self._driver.settled(transfer.acquisition_id)
            case _:
                raise InvalidArgument("outcome", None, "succeeded or failed")
        return pb.ReportTransferResponse()

    async def Publish(self, request: pb.PublishRequest, context: Context) -> pb.PublishResponse:
        """See the proto."""
        session = identify(self._driver, context)
        kind = validation.published_kind(request)
        devices = await self._devices(kind)
        if request.HasField("staged"):
            offer, memory = staging.offer(request, session.instance_id, self._layouts, self._driver.devices, *devices)
        else:
            staging.require_path(self._driver.devices, DEVICE_KIND_NAMES.get(kind, ""), "direct", PublishRefused)
            offer, memory = validation.offer(request, session.instance_id, self._layouts, *devices)
        publication = await self._driver.publish(offer, memory)
        return pb.PublishResponse(publication=self._messages.publication(publication))

    async def Retract(self, request: pb.RetractRequest, context: Context) -> pb.RetractResponse:
        """See the proto."""
        session = identify(self._driver, context)
        publication_id = validation.text("publication_id", request.publication_id)
        remaining = context.time_remaining()
        try:
            # A little less than the caller has, so that it hears the reason instead of gRPC's own deadline.
            async with asyncio.timeout(remaining * _SHARE_OF_DEADLINE if remaining is not None else None):
                publication = await self._driver.retract(session.instance_id, publication_id)
        except TimeoutError:
            raise RetractTimeout(
                f"publication {publication_id} still has readers; no new ones are let in, call again",
                metadata={"publication_id": publication_id},
            ) from None
        return pb.RetractResponse(publication=self._messages.publication(publication))

    async def ReportLoad(self, request: pb.ReportLoadRequest, context: Context) -> pb.ReportLoadResponse:
        """See the proto."""
        session = identify(self._driver, context)
        weight_set_id = validation.weight_set_id("weight_set_id", request.weight_set_id)
        held = (session.instance_id, weight_set_id, request.fencing_token)
        match request.WhichOneof("action"):
            case "give_up":
                reason = validation.text(
                    "give_up.reason", request.give_up.reason, limit=MAX_REASON_CHARACTERS, required=False
                )
                await self._driver.give_up_lease(*held, reason, unpublishable=request.give_up.unpublishable)
                return pb.ReportLoadResponse()
            case "extend":
                seconds = self._lease_seconds
                if request.extend.HasField("duration"):
                    seconds = validation.seconds(
                        "extend.duration", request.extend.duration, limit=validation.MAX_EXTENSION_SECONDS
                    )
                lease = await self._driver.extend_lease(*held, seconds)
                return pb.ReportLoadResponse(cold_load_lease=self._messages.lease(lease))
            case _:
                raise InvalidArgument("action", None, "give_up or extend")

    async def _devices(self, kind_number: weight_set_pb2.DeviceKind.ValueType) -> tuple[frozenset[str], frozenset[str]]:
        """Kinds of memory that are served, and the identities of all devices of one of them. Who needs a device waits
        until they are known."""
        devices, kind = self._driver.devices, DEVICE_KIND_NAMES.get(kind_number, "")
        if devices is None:
            return frozenset({HOST_MEMORY}), frozenset()
        await devices.ready(kind)
        return devices.served | {HOST_MEMORY}, devices.identities(kind)

    def _acquisition(
        self,
        request: pb.AcquireRequest,
        instance_id: str,
        context: Context,
        devices: tuple[frozenset[str], frozenset[str]],
    ) -> tuple[Acquisition, Place | None]:
        served, cards = devices
        validation.text("request_id", request.request_id)
        key = key_from_wire(request.key)
        path = validation.path(request.path)
        layout = self._layouts.layout(request.layout) if request.HasField("layout") else None
        if layout is None and path is not TransferPath.ZERO_COPY:
            raise InvalidArgument("layout", "not set", "the receiver's layout, unless path is TRANSFER_PATH_ZERO_COPY")
        if_absent = validation.if_absent(request.if_absent)
        device_kind = validation.receiving_device(request.device_kind, request.device_id, served)
        destination = None
        if device_kind == HOST_MEMORY:
            validation.no_regions(request)
            staging.require_not_staged(request)
        elif path is TransferPath.STAGED:
            destination = staging.destination(request, device_kind, instance_id, self._driver.devices, cards)
        else:
            if request.stage_id:
                raise InvalidArgument("stage_id", request.stage_id, "empty, unless path is TRANSFER_PATH_STAGED")
            staging.require_path(self._driver.devices, device_kind, "direct", TransferFailed)
            destination = validation.destination(request, instance_id, layout or Layout(()), cards)
        now = self._driver.clock()
        remaining = context.time_remaining()
        wait = self._maximum_wait_seconds if remaining is None else min(remaining, self._maximum_wait_seconds)
        if request.HasField("timeout"):
            wait = min(wait, validation.seconds("timeout", request.timeout, limit=validation.MAX_TIMEOUT_SECONDS))
        acquisition = Acquisition(
            acquisition_id=f"acquisition-{next(self._numbers)}",
            key=key,
            layout=layout,
            instance_id=instance_id,
            if_absent=if_absent,
            device_kind=device_kind,
            device_id=request.device_id,
            path=path,
            begun_at=now,
            deadline=now + wait,
            rank=(
                validation.rank_of_group(request.load_group, request.assembly_timeout)
                if request.HasField("load_group")
                else None
            ),
        )
        return acquisition, destination

    def _granted(self, granted: Granted, acquisition: Acquisition) -> pb.Granted:
        source = granted.transfer.publication
        message = pb.Granted.FromString(granted.memory.grant)
        message.transfer_id = granted.transfer.transfer_id
        message.source.CopyFrom(self._messages.publication(source))
        message.data_plane = DATA_PLANES[granted.transfer.data_plane]
        message.path = PATHS[granted.transfer.path]
        if acquisition.layout is None:
            message.layout.CopyFrom(layout_to_wire(source.layout))
        return message
