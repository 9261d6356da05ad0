"""WeightBrokerService: what attached instances call."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

import grpc
import structlog

from weight_broker.errors import InvalidArgument, RetractTimeout
from weight_broker.v1 import weight_broker_service_pb2 as pb
from weight_broker.v1.weight_broker_service_pb2_grpc import WeightBrokerServiceServicer
from weight_broker.wire import MAX_REASON_CHARACTERS, layout_to_wire
from weight_brokerd.api import acquire_request, publish_request
from weight_brokerd.api import fields as validation
from weight_brokerd.api.caller import identify, on_end
from weight_brokerd.api.layouts import LayoutCache
from weight_brokerd.api.messages import DATA_PLANES, PATHS, Messages
from weight_brokerd.attach.server import Session
from weight_brokerd.control.control import Control
from weight_brokerd.control.mailboxes import Granted, Moved
from weight_brokerd.core import decisions as decide
from weight_brokerd.core.model import Acquisition, WaitReason
from weight_brokerd.kinds.place_request import text

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
    """Validates, identifies, asks the control plane, answers."""

    def __init__(
        self, control: Control, messages: Messages, *, maximum_wait_seconds: float, lease_seconds: float
    ) -> None:
        self._control = control
        self._messages = messages
        self._maximum_wait_seconds = maximum_wait_seconds
        self._lease_seconds = lease_seconds
        self._layouts = LayoutCache()
        self._numbers = itertools.count(1)

    async def Acquire(self, request: pb.AcquireRequest, context: Context) -> AsyncIterator[pb.AcquireResponse]:
        """See the proto."""
        session = identify(self._control, context)
        kind = await acquire_request.receiving_kind(request, self._control.kinds)
        call = self._call(session, context)
        acquisition, destination = acquire_request.acquisition(request, call, self._layouts, kind)
        acquisition_id = acquisition.acquisition_id
        logger = log.bind(
            acquisition_id=acquisition_id,
            request_id=request.request_id,
            instance_id=session.instance_id,
            weight_set_id=acquisition.key.id,
        )
        # However the call ends - done, cancelled, past its deadline - its reader slot is free then.
        on_end(context, lambda: self._control.acquiring.end_call(acquisition_id))
        mailbox = self._control.acquiring.begin(acquisition, destination)
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
                case decide.LoadFromDisk(_, lease):
                    logger.info("cold_load", fencing_token=lease.fencing_token)
                    yield pb.AcquireResponse(cold_load=pb.ColdLoad(cold_load_lease=self._messages.lease(lease)))
                    # Of a call that ends before its answer is on its way, nobody comes here: the lease goes on then.
                    self._control.acquiring.confirm_lease(acquisition_id)
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
        session = identify(self._control, context)
        transfer_id = text("transfer_id", request.transfer_id)
        match request.WhichOneof("outcome"):
            case "succeeded":
                arrival = validation.arrival(request.succeeded)
                self._control.acquiring.succeeded(session.instance_id, transfer_id, arrival)
            case "failed":
                cause = validation.cause(request.failed.cause)
                detail = text("failed.detail", request.failed.detail, limit=MAX_REASON_CHARACTERS, required=False)
                await self._control.acquiring.failed(session.instance_id, transfer_id, cause, detail)
            case _:
                raise InvalidArgument("outcome", None, "succeeded or failed")
        return pb.ReportTransferResponse()

    async def Publish(self, request: pb.PublishRequest, context: Context) -> pb.PublishResponse:
        """See the proto."""
        session = identify(self._control, context)
        kind = await publish_request.published_kind(request, self._control.kinds)
        offer, memory = publish_request.offer(request, session.instance_id, self._layouts, kind, session.peer)
        publication = await self._control.publishing.publish(offer, memory)
        return pb.PublishResponse(publication=self._messages.publication(publication))

    async def Retract(self, request: pb.RetractRequest, context: Context) -> pb.RetractResponse:
        """See the proto."""
        session = identify(self._control, context)
        publication_id = text("publication_id", request.publication_id)
        remaining = context.time_remaining()
        try:
            # A little less than the caller has, so that it hears the reason instead of gRPC's own deadline.
            async with asyncio.timeout(remaining * _SHARE_OF_DEADLINE if remaining is not None else None):
                publication = await self._control.publishing.retract(session.instance_id, publication_id)
        except TimeoutError:
            raise RetractTimeout(
                f"publication {publication_id} still has readers; no new ones are let in, call again",
                metadata={"publication_id": publication_id},
            ) from None
        return pb.RetractResponse(publication=self._messages.publication(publication))

    async def ReportLoad(self, request: pb.ReportLoadRequest, context: Context) -> pb.ReportLoadResponse:
        """See the proto."""
        session = identify(self._control, context)
        weight_set_id = validation.weight_set_id("weight_set_id", request.weight_set_id)
        held = (session.instance_id, weight_set_id, request.fencing_token)
        match request.WhichOneof("action"):
            case "give_up":
                reason = text("give_up.reason", request.give_up.reason, limit=MAX_REASON_CHARACTERS, required=False)
                await self._control.leasing.give_up(*held, reason, unpublishable=request.give_up.unpublishable)
                return pb.ReportLoadResponse()
            case "extend":
                seconds = self._lease_seconds
                if request.extend.HasField("duration"):
                    seconds = validation.seconds(
                        "extend.duration", request.extend.duration, limit=validation.MAX_EXTENSION_SECONDS
                    )
                lease = await self._control.leasing.extend(*held, seconds)
                return pb.ReportLoadResponse(cold_load_lease=self._messages.lease(lease))
            case _:
                raise InvalidArgument("action", None, "give_up or extend")

    def _call(self, session: Session, context: Context) -> acquire_request.Call:
        remaining = context.time_remaining()
        wait = self._maximum_wait_seconds if remaining is None else min(remaining, self._maximum_wait_seconds)
        return acquire_request.Call(
            f"acquisition-{next(self._numbers)}",
            session.instance_id,
            self._control.loop.now(),
            wait_seconds=wait,
            peer=session.peer,
        )

    def _granted(self, granted: Granted, acquisition: Acquisition) -> pb.Granted:
        source = granted.transfer.publication
        message = pb.Granted.FromString(granted.message)
        message.transfer_id = granted.transfer.transfer_id
        message.source.CopyFrom(self._messages.publication(source))
        message.data_plane = DATA_PLANES[granted.transfer.data_plane]
        message.path = PATHS[granted.transfer.path]
        if acquisition.layout is None:
            message.layout.CopyFrom(layout_to_wire(source.layout))
        return message
