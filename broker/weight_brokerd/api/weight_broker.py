"""WeightBrokerService: the calls of attached instances."""

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
from weight_brokerd.api.incoming.requests import Received
from weight_brokerd.api.incoming.turns import Turns
from weight_brokerd.api.large_grant import large_grant
from weight_brokerd.api.messages import DATA_PLANES, PATHS, Messages
from weight_brokerd.attach.server import Session
from weight_brokerd.control.control import Control
from weight_brokerd.control.mailboxes import Granted, Moved
from weight_brokerd.core import decisions as decide
from weight_brokerd.core.model import Acquisition, WaitReason
from weight_brokerd.kinds.place_request import text
from weight_brokerd.kinds.steps import Steps, T, at_once

log = structlog.get_logger()

Context = grpc.aio.ServicerContext[Any, Any]

FEW_TENSORS = 1000
"""Requests and answers with so many tensors are handled in one step."""
_SHARE_OF_DEADLINE = 0.95

_WAIT_REASONS = {
    WaitReason.COLD_LOAD: pb.Waiting.REASON_COLD_LOAD,
    WaitReason.SOURCES_BUSY: pb.Waiting.REASON_SOURCES_BUSY,
    WaitReason.LOAD_GROUP: pb.Waiting.REASON_LOAD_GROUP,
    WaitReason.REGISTERING: pb.Waiting.REASON_REGISTERING,
}


class WeightBrokerServicer(WeightBrokerServiceServicer):
    def __init__(
        self, control: Control, messages: Messages, turns: Turns, *, maximum_wait_seconds: float, lease_seconds: float
    ) -> None:
        self._control = control
        self._messages = messages
        self._maximum_wait_seconds = maximum_wait_seconds
        self._lease_seconds = lease_seconds
        self._turns = turns
        self._numbers = itertools.count(1)

    async def Acquire(  # type: ignore[override]  # the layout comes decoded
        self, received: Received[pb.AcquireRequest], context: Context
    ) -> AsyncIterator[pb.AcquireResponse | bytes]:
        session = identify(self._control, context)
        kind = await acquire_request.receiving_kind(received.message, self._control.kinds)
        call = self._call(session, context)
        acquisition, destination = await self._in_turns(acquire_request.acquisition(received, call, kind), received)
        request_id = received.message.request_id
        del received  # a call may wait for an hour, and this may be large
        acquisition_id = acquisition.acquisition_id
        logger = log.bind(
            acquisition_id=acquisition_id,
            request_id=request_id,
            instance_id=session.instance_id,
            weight_set_id=acquisition.key.id,
        )
        # Every end of the call - done, cancelled, past its deadline - frees its reader slot.
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
                    yield await self._granted(granted, acquisition)
                case Moved(transfer, seconds):
                    logger.info("moved", transfer_id=transfer.transfer_id, seconds=dict(seconds))
                    yield pb.AcquireResponse(moved=self._messages.moved(transfer, seconds))
                case decide.LoadFromDisk(_, lease):
                    logger.info("cold_load", fencing_token=lease.fencing_token)
                    yield pb.AcquireResponse(cold_load=pb.ColdLoad(cold_load_lease=self._messages.lease(lease)))
                    # Not reached if the call ends before its answer is sent: then the next waiter gets the lease.
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

    async def Publish(  # type: ignore[override]  # the layout comes decoded
        self, received: Received[pb.PublishRequest], context: Context
    ) -> pb.PublishResponse:
        session = identify(self._control, context)
        kind = await publish_request.published_kind(received.message, self._control.kinds)
        steps = publish_request.offer(received, session.instance_id, kind, session.peer)
        offer, memory = await self._in_turns(steps, received)
        publication = await self._control.publishing.publish(offer, memory)
        return pb.PublishResponse(publication=self._messages.publication(publication))

    async def Retract(self, request: pb.RetractRequest, context: Context) -> pb.RetractResponse:
        session = identify(self._control, context)
        publication_id = text("publication_id", request.publication_id)
        remaining = context.time_remaining()
        try:
            # A little less than the caller's deadline, so that the caller gets the reason and not DEADLINE_EXCEEDED.
            async with asyncio.timeout(remaining * _SHARE_OF_DEADLINE if remaining is not None else None):
                publication = await self._control.publishing.retract(session.instance_id, publication_id)
        except TimeoutError:
            raise RetractTimeout(
                f"publication {publication_id} still has readers and takes no new ones; call again",
                metadata={"publication_id": publication_id},
            ) from None
        return pb.RetractResponse(publication=self._messages.publication(publication))

    async def ReportLoad(self, request: pb.ReportLoadRequest, context: Context) -> pb.ReportLoadResponse:
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

    async def _in_turns(self, steps: Steps[T], received: Received[Any]) -> T:
        """Other calls get their turn between the steps, unless there are few."""
        if received.layout is None or len(received.layout) <= FEW_TENSORS:
            return at_once(steps)
        return await self._turns.take(steps)

    async def _granted(self, granted: Granted, acquisition: Acquisition) -> pb.AcquireResponse | bytes:
        source = granted.transfer.publication
        message = pb.Granted(
            transfer_id=granted.transfer.transfer_id,
            source=self._messages.publication(source),
            data_plane=DATA_PLANES[granted.transfer.data_plane],
            path=PATHS[granted.transfer.path],
        )
        layout = source.layout if acquisition.layout is None else None
        if len(source.layout) > FEW_TENSORS:
            return await self._turns.take(large_grant(message, granted.message, layout))
        message.MergeFromString(granted.message)
        if layout is not None:
            message.layout.CopyFrom(layout_to_wire(layout))
        return pb.AcquireResponse(granted=message)
