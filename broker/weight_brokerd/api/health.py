"""grpc.health.v1.Health and reflection, as gRPC's own tools expect them.

grpcio's health servicer is not used: it sends while it holds the lock that a change of status needs, so a Watch without
a reader would block the change and the broker's stop; and it never ends a Watch.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2
from grpc_reflection.v1alpha._async import ReflectionServicer

Context = grpc.aio.ServicerContext[Any, Any]


class HealthServicer(health_pb2_grpc.HealthServicer):
    """The statuses and their watchers."""

    def __init__(self) -> None:
        self._statuses: dict[str, int] = {}
        self._watchers: set[asyncio.Event] = set()
        self._ending = False

    def set(self, service: str, status: int) -> None:
        """Change a status; watchers get their latest status, not every change."""
        self._statuses[service] = status
        for watcher in self._watchers:
            watcher.set()

    def end_watches(self) -> None:
        """End all Watch calls, also later ones, once they have sent the last status."""
        self._ending = True
        for watcher in self._watchers:
            watcher.set()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:
        """The status now; NOT_FOUND for an unknown service."""
        status = self._statuses.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        return _response(status)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The status now and after every change; SERVICE_UNKNOWN for an unknown service."""
        changed = asyncio.Event()
        self._watchers.add(changed)
        last = None
        try:
            while True:
                changed.clear()
                ending = self._ending
                status = self._statuses.get(request.service, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
                if status != last:
                    last = status
                    yield _response(status)
                if ending:
                    return
                await changed.wait()
        finally:
            self._watchers.discard(changed)


def _response(status: int) -> health_pb2.HealthCheckResponse:
    response = health_pb2.HealthCheckResponse()
    response.status = status
    return response


LIVENESS = "liveness"
"""Serving while the process answers, also during a drain: for probes that restart a process that hangs."""

_REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """Health of each service, of the whole ("") and of the process."""

    def __init__(self, service_names: Iterable[str]) -> None:
        self._names = ("", *service_names)
        self._servicer = HealthServicer()

    def serve(self, server: grpc.aio.Server) -> None:
        """Add the service; only the process itself is SERVING."""
        self._servicer.set(LIVENESS, SERVING)
        self.stop_serving()
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    def start_serving(self) -> None:
        """The broker takes new work."""
        for name in self._names:
            self._servicer.set(name, SERVING)

    def stop_serving(self) -> None:
        """The broker takes no new work."""
        for name in self._names:
            self._servicer.set(name, NOT_SERVING)

    def set_card(self, device_id: str, ready: bool) -> None:
        """Set the health of one card, service "card/npu:0". The broker also serves without the card."""
        self._servicer.set(f"card/{device_id}", SERVING if ready else NOT_SERVING)

    def end_watches(self) -> None:
        """End all Watch calls, once they have sent the last status."""
        self._servicer.end_watches()


def add_reflection(server: grpc.aio.Server, service_names: Iterable[str]) -> None:
    """Adds reflection in both versions. grpcio has only v1alpha, with the same messages as v1."""
    # v1 is not listed: its schema is not here, and tools that list methods stop at a service without a schema.
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
