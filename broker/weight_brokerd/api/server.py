"""Adds the broker's servicers to a server."""

from __future__ import annotations

import grp

import grpc

from weight_broker.v1.administration_service_pb2_grpc import add_AdministrationServiceServicer_to_server
from weight_broker.v1.inspection_service_pb2_grpc import add_InspectionServiceServicer_to_server
from weight_broker.v1.weight_broker_service_pb2_grpc import add_WeightBrokerServiceServicer_to_server
from weight_brokerd.api.administration import AdministrationServicer
from weight_brokerd.api.incoming.turns import Turns
from weight_brokerd.api.inspection import InspectionServicer
from weight_brokerd.api.messages import Messages
from weight_brokerd.api.weight_broker import WeightBrokerServicer
from weight_brokerd.config.loading import Config
from weight_brokerd.control.control import Control

SERVICE_NAMES = (
    "weight_broker.v1.WeightBrokerService",
    "weight_broker.v1.InspectionService",
    "weight_broker.v1.AdministrationService",
)


def add_services(server: grpc.aio.Server, control: Control, config: Config, turns: Turns) -> None:
    """`turns`: those of long work, shared with the reception."""
    messages = Messages(control)
    limits = config.limits
    add_WeightBrokerServiceServicer_to_server(
        WeightBrokerServicer(
            control,
            messages,
            turns,
            maximum_wait_seconds=limits.maximum_wait_seconds,
            lease_seconds=limits.cold_load_lease_seconds,
        ),
        server,
    )
    add_InspectionServiceServicer_to_server(InspectionServicer(control, messages, turns), server)
    admin_gid = grp.getgrnam(config.broker.admin_group).gr_gid if config.broker.admin_group else None
    add_AdministrationServiceServicer_to_server(
        AdministrationServicer(control, messages, admin_gid=admin_gid, drain_seconds=limits.drain_seconds), server
    )
