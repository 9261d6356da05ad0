"""One place where errors become gRPC statuses.

A `BrokerError` travels as the code that `weight_broker.errors.TABLE` gives for its reason, with google.rpc.ErrorInfo.
Anything else is a defect: it is logged here, and the caller hears only that there was one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from weight_broker.errors import (
    ERROR_DOMAIN,
    QUIESCED_METADATA,
    TABLE,
    TOUCHED_METADATA,
    BrokerError,
    InvalidArgument,
    Reason,
    from_reason,
)

log = structlog.get_logger()

# A status travels in HTTP/2 headers, of which a gRPC client takes 8 KiB. The message is in there twice, once with every
# byte that is not ASCII written as three; the metadata, and what is said of a field, once, in base64.
_MESSAGE_BYTES = 900
_METADATA_BYTES = 1536


def to_status(error: BrokerError) -> grpc.Status:
    """The status that carries the error, cut to what headers can hold."""
    code = grpc.StatusCode[TABLE[error.reason].code]
    status = status_pb2.Status(code=code.value[0], message=_cut(error.message, _MESSAGE_BYTES))
    share = _METADATA_BYTES // max(len(error.metadata), 1)
    metadata = {name: _cut(value, share) for name, value in error.metadata.items()}
    if error.touched:
        metadata[TOUCHED_METADATA] = "true"
    if not error.quiesced:
        metadata[QUIESCED_METADATA] = "false"
    status.details.add().Pack(
        error_details_pb2.ErrorInfo(reason=str(error.reason), domain=ERROR_DOMAIN, metadata=metadata)
    )
    if isinstance(error, InvalidArgument):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=_cut(error.field, share), description=f"expected {metadata.get('expected', '')}"
        )
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
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
        # Without a deserializer here: what gRPC's own makes of bytes that are no message is UNKNOWN and its exception.
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                _wrap_unary(handler.unary_unary, handler.request_deserializer), None, handler.response_serializer
            )
        return grpc.unary_stream_rpc_method_handler(
            _wrap_stream(handler.unary_stream, handler.request_deserializer), None, handler.response_serializer
        )


def _wrap_unary(method: Any, parse: Any) -> Any:
    async def call(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> object:
        try:
            return await method(_parsed(request, parse), context)
        except BrokerError as error:
            await context.abort_with_status(to_status(error))
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001 - the last line of defence: a defect must not leak its text
            await context.abort_with_status(to_status(_defect(error)))

    return call


def _wrap_stream(method: Any, parse: Any) -> Any:
    async def call(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[object]:
        try:
            async for response in method(_parsed(request, parse), context):
                yield response
        except BrokerError as error:
            await context.abort_with_status(to_status(error))
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001 - as above
            await context.abort_with_status(to_status(_defect(error)))

    return call


def _parsed(request: bytes, parse: Callable[[bytes], object]) -> object:
    try:
        return parse(request)
    except DecodeError:
        raise InvalidArgument(
            "request", f"{len(request)} bytes", "a message of the method's request type, with texts in UTF-8"
        ) from None


def _defect(error: Exception) -> BrokerError:
    log.error("internal_error", exc_info=error)
    return from_reason(Reason.INTERNAL, "the broker failed; its log says how")


def _cut(text: str, limit: int) -> str:
    """The text without what UTF-8 cannot carry, and at most `limit` bytes of it."""
    return text.encode("utf-8", "replace")[:limit].decode("utf-8", "ignore")
