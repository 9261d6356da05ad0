"""AdministrationService: changes by administrators."""

from __future__ import annotations

from typing import Any

import grpc

from weight_broker.errors import DrainTimeout, NotAdministrator
from weight_broker.v1 import administration_service_pb2 as pb
from weight_broker.v1.administration_service_pb2_grpc import AdministrationServiceServicer
from weight_broker.wire import MAX_REASON_CHARACTERS
from weight_brokerd.api import fields as validation
from weight_brokerd.api.caller import identify, require_administrator
from weight_brokerd.api.inspection import host_message
from weight_brokerd.api.messages import Messages
from weight_brokerd.control.control import Control
from weight_brokerd.kinds.place_request import text
from weight_brokerd.telemetry.audit import audit

Context = grpc.aio.ServicerContext[Any, Any]

MAXIMUM_DRAIN_SECONDS = 24 * 3600.0


class AdministrationServicer(AdministrationServiceServicer):
    def __init__(self, control: Control, messages: Messages, *, admin_gid: int | None, drain_seconds: float) -> None:
        self._control = control
        self._messages = messages
        self._admin_gid = admin_gid
        self._drain_seconds = drain_seconds

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        instance_id = self._authorise("drain", context)
        timeout_seconds = self._drain_seconds
        if request.HasField("timeout"):
            timeout_seconds = validation.seconds("timeout", request.timeout, limit=MAXIMUM_DRAIN_SECONDS)
        if not await self._control.draining.drain(timeout_seconds, instance_id):
            running = len(self._control.coordinator.transfers.running)
            raise DrainTimeout(
                f"{running} transfers still run after {timeout_seconds:g} s; the broker stays draining",
                metadata={"running_transfers": str(running)},
            )
        return pb.DrainResponse(host=host_message(self._control, self._messages))

    async def Evict(self, request: pb.EvictRequest, context: Context) -> pb.EvictResponse:
        instance_id = self._authorise("evict", context)
        publication = self._control.publishing.evict(instance_id, text("publication_id", request.publication_id))
        return pb.EvictResponse(publication=self._messages.publication(publication))

    async def Quarantine(self, request: pb.QuarantineRequest, context: Context) -> pb.QuarantineResponse:
        instance_id = self._authorise("quarantine", context)
        publication_id = text("publication_id", request.publication_id)
        reason = text("reason", request.reason, limit=MAX_REASON_CHARACTERS)
        publication = self._control.publishing.quarantine(instance_id, publication_id, reason)
        return pb.QuarantineResponse(publication=self._messages.publication(publication))

    def _authorise(self, action: str, context: Context) -> str:
        """The administrator's instance id, for the audit. A refusal is audited here."""
        session = identify(self._control, context)
        try:
            require_administrator(session, self._admin_gid)
        except NotAdministrator:
            audit("deny", **self._control.loop.author(session.instance_id), request=action)
            raise
        return session.instance_id
