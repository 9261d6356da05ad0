"""Admits calls before their messages are received: a call that waits for its turn costs no memory but its header."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import grpc
from grpc_health.v1 import health

from weight_broker.errors import BrokerError
from weight_brokerd.api.admission.gate import Gate
from weight_brokerd.api.caller import on_end, process_of
from weight_brokerd.api.errors import to_status
from weight_brokerd.control.control import Control
from weight_brokerd.core.conduct.quota import Quota
from weight_brokerd.core.model import Process

_PROBE = f"/{health.SERVICE_NAME}/Check"
"""Probes decide whether the broker is restarted: they do not wait."""


class AdmissionInterceptor(grpc.aio.ServerInterceptor):
    """Bounds streams of the broker and of gRPC's own services alike, which the `ErrorInterceptor` does not see."""

    def __init__(self, control: Control, gate: Gate, streams: Mapping[str, Quota]) -> None:
        """`streams`: how many calls of a method may be open."""
        self._control = control
        self._gate = gate
        self._streams = streams

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Waits for the call's turn; returns the method's handler, bounded if it is a stream."""
        method: str = handler_call_details.method
        process = process_of(self._control, handler_call_details.invocation_metadata)
        if method != _PROBE:
            await self._gate.enter(process)
        handler = await continuation(handler_call_details)
        quota = self._streams.get(method)
        if handler is None or quota is None:
            return handler
        make, method_itself = (
            (grpc.unary_stream_rpc_method_handler, handler.unary_stream)
            if handler.unary_stream is not None
            else (grpc.stream_stream_rpc_method_handler, handler.stream_stream)
        )
        bounded = self._bounded(method_itself, quota, process)
        return make(bounded, handler.request_deserializer, handler.response_serializer)

    def _bounded(self, method: Any, quota: Quota, process: Process) -> Any:
        async def call(request: object, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[object]:
            try:
                quota.take(process)
            except BrokerError as error:
                self._gate.charge_refusal(process)
                await context.abort_with_status(to_status(error))
            on_end(context, lambda: quota.give_back(process))
            responses = method(request, context)
            del request  # a call may wait for an hour, and this may be large
            async for response in responses:
                yield response

        return call
