"""grpc.health.v1.Health, for checkers that may not read what they asked for.

grpcio's own servicer sends while it holds the lock that a change of status needs: one Watch that nobody reads would
keep that status as it is, and the broker from stopping. Nor does it ever end a Watch.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

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

    async def Check(  # noqa: N802 - named by the proto
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        """The status now; NOT_FOUND for a service that there is not."""
        status = self._statuses.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        return _response(status)

    async def Watch(  # noqa: N802 - named by the proto
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
