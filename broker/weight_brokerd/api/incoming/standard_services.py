"""Requests of gRPC's own services, health and reflection: small ones, few at a time, parsed here."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from weight_broker.errors import BrokerUnavailable, InvalidArgument
from weight_brokerd.api.incoming import requests
from weight_brokerd.api.incoming.reception import Reception


def guarded(handler: Any, reception: Reception) -> Any:
    """The handler of a method, with limits."""
    parse, serialize = handler.request_deserializer, handler.response_serializer
    if handler.unary_unary is not None:
        return grpc.stream_unary_rpc_method_handler(_unary(handler.unary_unary, parse, reception), None, serialize)
    if handler.unary_stream is not None:
        return grpc.stream_stream_rpc_method_handler(_stream(handler.unary_stream, parse, reception), None, serialize)
    return grpc.stream_stream_rpc_method_handler(_streams(handler.stream_stream, parse, reception), None, serialize)


def _unary(method: Any, parse: Any, reception: Reception) -> Any:
    async def call(_: object, context: Any) -> object:
        return await method(await _request(context, parse, reception), context)

    return call


def _stream(method: Any, parse: Any, reception: Reception) -> Any:
    async def call(_: object, context: Any) -> AsyncIterator[object]:
        async for response in method(await _request(context, parse, reception), context):
            yield response

    return call


def _streams(method: Any, parse: Any, reception: Reception) -> Any:
    async def messages(context: Any) -> AsyncIterator[object]:
        """Each request is read as a call's only one is: a caller that asks nothing for a while has finished."""
        while True:
            try:
                wire = await reception.small(context)
            except (InvalidArgument, BrokerUnavailable):
                return
            yield await _checked(wire, context, parse)

    async def call(_: object, context: Any) -> AsyncIterator[object]:
        async for response in method(messages(context), context):
            yield response

    return call


async def _request(context: Any, parse: Any, reception: Reception) -> object:
    try:
        return requests.parsed(await reception.small(context), parse)
    except InvalidArgument as error:
        return await context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.message)
    except BrokerUnavailable as error:
        return await context.abort(grpc.StatusCode.UNAVAILABLE, error.message)


async def _checked(wire: bytes, context: Any, parse: Any) -> object:
    try:
        return requests.parsed(wire, parse)
    except InvalidArgument as error:
        return await context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.message)
