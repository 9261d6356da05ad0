"""grpc.health.v1.Health and reflection, as gRPC's own tools expect them.

grpcio's own health servicer sends while it holds the lock that a change of status needs: one Watch that nobody reads
would keep that status as it is, and the broker from stopping. Nor does it ever end a Watch.
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
    """The statuses, and whoever watches them."""

    def __init__(self) -> None:
        self._statuses: dict[str, int] = {}
        self._watchers: set[asyncio.Event] = set()
        self._ending = False

    def set(self, service: str, status: int) -> None:
        """Changes a status; every watcher hears of it as soon as it can."""
        self._statuses[service] = status
        for watcher in self._watchers:
            watcher.set()

    def end_watches(self) -> None:
        """Ends all Watch calls, those to come too, once they have sent the last status."""
        self._ending = True
        for watcher in self._watchers:
            watcher.set()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:
        """The status now; NOT_FOUND for a service that there is not."""
        status = self._statuses.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        return _response(status)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The status now and whenever it changes; of a service that there is not, that it is unknown."""
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
