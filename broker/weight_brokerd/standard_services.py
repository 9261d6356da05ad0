"""Health and reflection, as gRPC's own tools expect them."""

from __future__ import annotations

from collections.abc import Iterable

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2
from grpc_reflection.v1alpha._async import ReflectionServicer

from weight_brokerd.health import HealthServicer

LIVENESS = "liveness"
"""Serving as long as the process answers, also while it drains: for probes that restart what does not."""

_REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """Health of each service, of the whole ("") and of the process."""

    def __init__(self, service_names: Iterable[str]) -> None:
        self._names = ("", *service_names)
        self._servicer = HealthServicer()

    def serve(self, server: grpc.aio.Server) -> None:
        """Adds the service; everything is NOT_SERVING except the process."""
        self._servicer.set(LIVENESS, SERVING)
        self.stop_serving()
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    def start_serving(self) -> None:
        """New work is welcome."""
        for name in self._names:
            self._servicer.set(name, SERVING)

    def stop_serving(self) -> None:
        """No new work, please."""
        for name in self._names:
            self._servicer.set(name, NOT_SERVING)

    def set_card(self, device_id: str, ready: bool) -> None:
        """Health of one card, as service "card/npu:0". The broker serves without it."""
        self._servicer.set(f"card/{device_id}", SERVING if ready else NOT_SERVING)

    def end_watches(self) -> None:
        """Ends the calls of those who watch; what was set before has been sent to them."""
        self._servicer.end_watches()


def add_reflection(server: grpc.aio.Server, service_names: Iterable[str]) -> None:
    """Adds reflection in both versions: grpcio has v1alpha only, whose messages are those of v1."""
    # v1 itself is not listed: nothing here has its schema, and tools that list methods stop at a service without one.
    names = (*service_names, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    handler = grpc.stream_stream_rpc_method_handler(
        ReflectionServicer(names).ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(_REFLECTION_V1, {"ServerReflectionInfo": handler}),)
    )
