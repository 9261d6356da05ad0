"""One place where errors become gRPC statuses.

A `BrokerError` travels as the code that `weight_broker.errors.TABLE` gives for its reason, with google.rpc.ErrorInfo.
Any other exception is an internal error: the log gets the exception, the caller a message without it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import grpc
import structlog
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
from weight_brokerd.api.incoming.reception import Reception
from weight_brokerd.api.incoming.standard_services import guarded
from weight_brokerd.core.conduct.quota import RETRY_SECONDS

log = structlog.get_logger()

# A status travels in HTTP/2 headers, of which a gRPC client takes 8 KiB. They hold the message twice, once with every
# byte that is not ASCII written as three, and the metadata and the field violation once, in base64.
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
    if retry := error.metadata.get(RETRY_SECONDS):
        pause = error_details_pb2.RetryInfo()
        pause.retry_delay.FromMilliseconds(int(1000 * float(retry)))
        status.details.add().Pack(pause)
    if isinstance(error, InvalidArgument):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=_cut(error.field, share), description=f"expected {metadata.get('expected', '')}"
        )
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    return rpc_status.to_status(status)


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every method: requests come through the reception, errors leave as statuses."""

    def __init__(self, reception: Reception) -> None:
        self._reception = reception

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Returns the method's handler, wrapped."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        if not method.startswith("/weight_broker."):
            standard: grpc.RpcMethodHandler[Any, Any] = guarded(handler, self._reception)
            return standard
        # No deserializer: gRPC answers bytes that it cannot parse with UNKNOWN and the text of the exception.
        read = partial(self._reception.request, method, handler.request_deserializer)
        if handler.unary_unary is not None:
            return grpc.stream_unary_rpc_method_handler(
                _wrap_unary(handler.unary_unary, read), None, handler.response_serializer
            )
        return grpc.stream_stream_rpc_method_handler(
            _wrap_stream(handler.unary_stream, read), None, _serializer(handler.response_serializer)
        )


def _wrap_unary(method: Any, read: Any) -> Any:
    async def call(_: object, context: grpc.aio.ServicerContext[Any, Any]) -> object:
        try:
            return await method(await read(context), context)
        except BrokerError as error:
            await context.abort_with_status(to_status(error))
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001 - of any kind: the caller must not see its text
            await context.abort_with_status(to_status(_internal_error(error)))

    return call


def _wrap_stream(method: Any, read: Any) -> Any:
    async def call(_: object, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[object]:
        try:
            async for response in method(await read(context), context):
                yield response
        except BrokerError as error:
            await context.abort_with_status(to_status(error))
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001 - as above
            await context.abort_with_status(to_status(_internal_error(error)))

    return call


def _serializer(serialize: Any) -> Any:
    """For methods that serialize large messages themselves."""
    return lambda response: response if isinstance(response, bytes) else serialize(response)


def _internal_error(error: Exception) -> BrokerError:
    log.error("internal_error", exc_info=error)
    return from_reason(Reason.INTERNAL, "the broker failed; load from disk and report the broker's log")


def _cut(text: str, limit: int) -> str:
    """The text without what UTF-8 cannot carry, and at most `limit` bytes of it."""
    return text.encode("utf-8", "replace")[:limit].decode("utf-8", "ignore")
