"""One place where errors become gRPC statuses.

A `BrokerError` travels as the code that `weight_broker.errors.TABLE` gives for its reason, with google.rpc.ErrorInfo.
Anything else is a defect: it is logged here, and the caller hears only that there was one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import structlog
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from weight_broker.errors import ERROR_DOMAIN, TABLE, BrokerError, Reason, from_reason

log = structlog.get_logger()

_MAXIMUM_METADATA_CHARACTERS = 1024


def to_status(error: BrokerError) -> grpc.Status:
    """The status that carries the error."""
    code = grpc.StatusCode[TABLE[error.reason].code]
    status = status_pb2.Status(code=code.value[0], message=_printable(error.message))
    metadata = {name: _printable(value) for name, value in error.metadata.items()}
    status.details.add().Pack(
        error_details_pb2.ErrorInfo(reason=str(error.reason), domain=ERROR_DOMAIN, metadata=metadata)
    )
    return rpc_status.to_status(status)


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every method of the broker's own services."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Returns the method's handler, wrapped."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith("/weight_broker."):
            return handler
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                _wrap_unary(handler.unary_unary), handler.request_deserializer, handler.response_serializer
            )
        return grpc.unary_stream_rpc_method_handler(
            _wrap_stream(handler.unary_stream), handler.request_deserializer, handler.response_serializer
        )


def _wrap_unary(method: Any) -> Any:
    async def call(request: object, context: grpc.aio.ServicerContext[Any, Any]) -> object:
        try:
            return await method(request, context)
        except BrokerError as error:
            await context.abort_with_status(to_status(error))
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001 - the last line of defence: a defect must not leak its text
            await context.abort_with_status(to_status(_defect(error)))

    return call


def _wrap_stream(method: Any) -> Any:
    async def call(request: object, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[object]:
        try:
            async for response in method(request, context):
                yield response
        except BrokerError as error:
            await context.abort_with_status(to_status(error))
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001 - as above
            await context.abort_with_status(to_status(_defect(error)))

    return call


def _defect(error: Exception) -> BrokerError:
    log.error("defect", exc_info=error)
    return from_reason(Reason.INTERNAL, "the broker failed; its log says how")


def _printable(text: str) -> str:
    """Text that a gRPC status can carry: no surrogates, not too long for an HTTP/2 header."""
    return text.encode("utf-8", "replace").decode("utf-8")[:_MAXIMUM_METADATA_CHARACTERS]
