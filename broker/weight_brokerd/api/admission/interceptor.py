"""Admits calls before their messages are received: a call that waits for its turn costs no memory but its header."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import grpc
from grpc_health.v1 import health

from weight_broker.errors import BrokerError
from weight_brokerd.api.admission.gate import Gate
from weight_brokerd.api.caller import Callers, on_end
from weight_brokerd.api.errors import to_status
from weight_brokerd.core.conduct.quota import Quota
from weight_brokerd.core.model import Process

Context = grpc.aio.ServicerContext[Any, Any]

_PROBE = f"/{health.SERVICE_NAME}/Check"
"""Probes decide whether the broker is restarted: they do not wait."""


class AdmissionInterceptor(grpc.aio.ServerInterceptor):
    """The outermost but for the metrics. Methods get their requests as streams from the others, so that nothing is read
    while a call waits here. It bounds streams of the broker and of gRPC's own services alike."""

    def __init__(self, callers: Callers, gate: Gate, streams: Mapping[str, Quota]) -> None:
        """`streams`: how many calls of a method may be open."""
        self._callers = callers
        self._gate = gate
        self._streams = streams
        self._handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        self._unknown: grpc.RpcMethodHandler[Any, Any] = grpc.stream_unary_rpc_method_handler(self._unimplemented)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The method's handler, which waits for the call's turn: made once, for a call should cost little before."""
        method: str = handler_call_details.method
        admitted = self._handlers.get(method)
        if admitted is None:
            handler = await continuation(handler_call_details)
            if handler is None:
                return self._unknown
            admitted = self._handlers[method] = handler if method == _PROBE else self._admitted(handler, method)
        return admitted

    def _admitted(self, handler: Any, method: str) -> grpc.RpcMethodHandler[Any, Any]:
        serialize = handler.response_serializer
        if handler.stream_unary is not None:
            return grpc.stream_unary_rpc_method_handler(self._answer(handler.stream_unary), None, serialize)
        stream = self._stream(handler.stream_stream, self._streams.get(method))
        return grpc.stream_stream_rpc_method_handler(stream, None, serialize)

    def _answer(self, method: Any) -> Any:
        async def call(incoming: AsyncIterator[bytes], context: Context) -> object:
            await self._enter(context)
            return await method(incoming, context)

        return call

    def _stream(self, method: Any, quota: Quota | None) -> Any:
        async def call(incoming: AsyncIterator[bytes], context: Context) -> AsyncIterator[object]:
            process = await self._enter(context)
            if quota is not None:
                await self._take(quota, process, context)
            async for response in method(incoming, context):
                yield response

        return call

    async def _unimplemented(self, _: AsyncIterator[bytes], context: Context) -> object:
        await self._enter(context)
        return await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")

    async def _enter(self, context: Context) -> Process:
        """Wait for the turn of the caller's process."""
        process = self._callers.process(context)
        if process is None:
            await context.abort(
                grpc.StatusCode.UNAVAILABLE, "the connection has ended, or did not come through broker.sock"
            )
        await self._gate.enter(process)
        try:
            self._callers.require_room(context)
        except BrokerError as error:
            await self._refuse(error, process, context)
        return process

    async def _take(self, quota: Quota, process: Process, context: Context) -> None:
        try:
            quota.take(process)
        except BrokerError as error:
            await self._refuse(error, process, context)
        on_end(context, lambda: quota.give_back(process))

    async def _refuse(self, error: BrokerError, process: Process, context: Context) -> None:
        self._gate.charge_refusal(process)
        await context.abort_with_status(to_status(error))
