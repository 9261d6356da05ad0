"""Takes requests in: first who sends, then the bytes, then the message.

gRPC hands a request over once it lies in memory as a whole, and knows one limit for all methods. So methods get their
requests as streams here, and nothing is read of a caller without a token where one is needed. Few requests are read at
a time, of each user and of each process.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from weight_broker.errors import BrokerUnavailable, InvalidArgument, Reason, from_reason
from weight_broker.v1 import inspection_service_pb2, weight_broker_service_pb2
from weight_brokerd.api.caller import Callers, identify
from weight_brokerd.api.incoming import requests
from weight_brokerd.api.incoming.layouts import LayoutCache
from weight_brokerd.api.incoming.slots import Slots
from weight_brokerd.api.incoming.turns import Turns
from weight_brokerd.api.incoming.wire_parts import Malformed
from weight_brokerd.control.control import Control
from weight_brokerd.core.model import Process
from weight_brokerd.kinds.steps import at_once

Context = grpc.aio.ServicerContext[Any, Any]

SMALL_BYTES = 256 << 10
"""The largest request without a layout."""
AT_ONCE_BYTES = 64 << 10
"""A request with a layout is parsed in one step up to this size."""
LARGE_BYTES = 64 << 20
"""The largest request with a layout: gRPC's limit for this broker."""
STRANGERS_BYTES = 1 << 20
"""The largest request with a layout of a caller without a token."""
LARGE_AT_ONCE = 2
"""Large requests that are parsed at the same time, of all users."""
WAITING_BYTES = 192 << 20
"""Large requests of one user that are parsed or wait for it, together."""

_WITHOUT_TOKEN = "weight_broker.v1.InspectionService"
_WITH_LAYOUT: dict[str, type[Message]] = {
    "/weight_broker.v1.WeightBrokerService/Acquire": weight_broker_service_pb2.AcquireRequest,
    "/weight_broker.v1.WeightBrokerService/Publish": weight_broker_service_pb2.PublishRequest,
    "/weight_broker.v1.InspectionService/Explain": inspection_service_pb2.ExplainRequest,
}


class Reception:
    """One for the whole broker. All methods are called on the loop."""

    def __init__(self, control: Control, callers: Callers) -> None:
        self._control = control
        self._callers = callers
        self._layouts = LayoutCache()
        self._turns = Turns()
        self._large = asyncio.Semaphore(LARGE_AT_ONCE)
        self._slots: dict[int, Slots] = {}
        self._waiting: Counter[int] = Counter()

    async def request(self, method: str, parse: Any, incoming: AsyncIterator[bytes], context: Context) -> object:
        """The request of a call of the broker's own services: a message, or `Received` if it may have a layout. Raises
        `NotAttached`, `InvalidArgument`."""
        user = self._callers.user(context)
        if user is None and method.split("/")[1] != _WITHOUT_TOKEN:
            identify(self._control, context)  # raises and says what is missing
        make = _WITH_LAYOUT.get(method)
        most = SMALL_BYTES if make is None else STRANGERS_BYTES if user is None else LARGE_BYTES
        process = self._process(context)
        wire = await self._read(incoming, most, process)
        return requests.parsed(wire, parse) if make is None else await self._received(wire, make, process.uid)

    async def read(self, incoming: AsyncIterator[bytes], context: Context) -> bytes:
        """The bytes of a small request. Raises `InvalidArgument`."""
        return await self._read(incoming, SMALL_BYTES, self._process(context))

    async def _read(self, incoming: AsyncIterator[bytes], most: int, process: Process) -> bytes:
        slots = self._slots.setdefault(process.uid, Slots())
        async with slots.slot(process):
            return await read(incoming, most)

    def _process(self, context: Context) -> Process:
        process = self._callers.process(context)
        if process is None:
            raise BrokerUnavailable("the connection of this call has ended")
        return process

    async def _received(self, wire: bytes, make: type[Message], user: int) -> object:
        steps = requests.received(wire, make, self._layouts)
        try:
            if len(wire) <= AT_ONCE_BYTES:
                return at_once(steps)
            with self._room_for(len(wire), user):
                async with self._large:
                    return await self._turns.take(steps)
        except (DecodeError, Malformed):
            raise requests.at_fault(wire) from None

    @contextmanager
    def _room_for(self, size: int, user: int) -> Iterator[None]:
        if self._waiting[user] + size > WAITING_BYTES:
            raise from_reason(
                Reason.LIMIT_EXCEEDED,
                f"the large requests of this user would be more than {WAITING_BYTES} bytes together; repeat this one "
                "once the others have their answers",
            )
        self._waiting[user] += size
        try:
            yield
        finally:
            self._waiting[user] -= size


def require_at_most(most: int, wire: bytes) -> None:
    """Raises `InvalidArgument` for a larger request."""
    if len(wire) > most:
        raise InvalidArgument("request", f"{len(wire)} bytes", f"at most {most} bytes for this method")


async def read(incoming: AsyncIterator[bytes], most: int) -> bytes:
    """The bytes of a request. Raises `InvalidArgument`."""
    async for wire in incoming:
        require_at_most(most, wire)
        return wire
    raise InvalidArgument("request", "none", "one message")
