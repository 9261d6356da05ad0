"""Asking for health; the type stubs of grpcio's own client lack its methods."""

from __future__ import annotations

from typing import Any

import grpc
from grpc_health.v1 import health_pb2


def check(channel: grpc.Channel, service: str = "") -> int:
    """The status of a service now."""
    call = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    status: int = call(health_pb2.HealthCheckRequest(service=service), timeout=60).status
    return status


def watch(channel: grpc.Channel, service: str = "", timeout: float = 60) -> Any:
    """The call that says the status now and whenever it changes."""
    call = channel.unary_stream(
        "/grpc.health.v1.Health/Watch",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    return call(health_pb2.HealthCheckRequest(service=service), timeout=timeout)
