"""Takes requests in: first who sends, then the bytes, then the message.

gRPC hands a request over once it lies in memory as a whole, and knows one limit for all methods. So methods get their
requests as streams here, and nothing is read of a caller without a token where one is needed. Few requests are read at
a time: one of each process, some of each user, and of all callers without a token some.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Hashable
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from weight_broker.errors import InvalidArgument
from weight_broker.v1 import inspection_service_pb2, weight_broker_service_pb2
from weight_brokerd.api.caller import identify, process_of
from weight_brokerd.api.incoming import requests
from weight_brokerd.api.incoming.layouts import LayoutCache
from weight_brokerd.api.incoming.remains import Remains
from weight_brokerd.api.incoming.senders import Sender, Senders, paced
from weight_brokerd.api.incoming.slots import Slots
from weight_brokerd.api.incoming.turns import Turns
from weight_brokerd.api.incoming.wire_parts import Malformed
from weight_brokerd.control.control import Control
from weight_brokerd.core.conduct.turns import UNKNOWN
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
READ_AT_ONCE = 2
"""Requests of one user that are read at the same time: gRPC needs several times the size of each."""
LARGE_AT_ONCE = 2
"""Large requests that are parsed at the same time, of all users."""
KEPT_BYTES = 192 << 20
"""Large requests of one user that are parsed or wait for it, together: while there are more, no other one of this user
is read."""

_WITHOUT_TOKEN = "weight_broker.v1.InspectionService"
_WITH_LAYOUT: dict[str, type[Message]] = {
    "/weight_broker.v1.WeightBrokerService/Acquire": weight_broker_service_pb2.AcquireRequest,
    "/weight_broker.v1.WeightBrokerService/Publish": weight_broker_service_pb2.PublishRequest,
    "/weight_broker.v1.InspectionService/Explain": inspection_service_pb2.ExplainRequest,
}


class Reception:
    """One for the whole broker. All methods are called on the loop."""

    def __init__(self, control: Control, turns: Turns) -> None:
        self._control = control
        self._layouts = LayoutCache(remains=Remains(turns, control.loop.spawn))
        self._turns = turns
        self._large = asyncio.Semaphore(LARGE_AT_ONCE)
        self._slots: dict[Hashable, Slots] = {}
        self._senders = Senders()

    async def request(self, method: str, parse: Any, incoming: AsyncIterator[bytes], context: Context) -> object:
        """The request of a call of the broker's own services: a message, or `Received` if it may have a layout. Raises
        `NotAttached`, `InvalidArgument`."""
        service, make = method.split("/")[1], _WITH_LAYOUT.get(method)
        process = process_of(self._control, context.invocation_metadata())
        if process != UNKNOWN:
            slots, sender = self.slots(process.uid), self._senders.of(process)
        else:
            if service != _WITHOUT_TOKEN:
                identify(self._control, context)  # raises and says what is missing
            slots, sender = self.slots(service), Sender()
        if make is None:
            return requests.parsed(await _small(incoming, slots, sender), parse)
        most = LARGE_BYTES if process != UNKNOWN else STRANGERS_BYTES
        async with sender.layouts:
            async with slots.slot(sender.reading):
                wire = await read(incoming)
            async with paced(len(wire)):
                require_at_most(most, wire)
                return await self._received(wire, make, slots)

    def slots(self, sender: Hashable) -> Slots:
        """For the requests of a user, or of all callers of a service that need no token."""
        return self._slots.setdefault(sender, Slots(READ_AT_ONCE, KEPT_BYTES))

    async def _received(self, wire: bytes, make: type[Message], slots: Slots) -> object:
        steps = requests.received(wire, make, self._layouts)
        try:
            if len(wire) <= AT_ONCE_BYTES:
                return at_once(steps)
            with slots.keeping(len(wire)):
                async with self._large:
                    return await self._turns.take(steps)
        except (DecodeError, Malformed):
            raise requests.at_fault(wire) from None


async def _small(incoming: AsyncIterator[bytes], slots: Slots, sender: Sender) -> bytes:
    async with sender.small:
        async with slots.slot(sender.reading):
            wire = await read(incoming)
        async with paced(len(wire)):
            require_at_most(SMALL_BYTES, wire)
    return wire


def require_at_most(most: int, wire: bytes) -> None:
    """Raises `InvalidArgument` for a larger request."""
    if len(wire) > most:
        raise InvalidArgument("request", f"{len(wire)} bytes", f"at most {most} bytes for this method")


async def read(incoming: AsyncIterator[bytes]) -> bytes:
    """The bytes of a request. Raises `InvalidArgument`."""
    async for wire in incoming:
        return wire
    raise InvalidArgument("request", "none", "one message")
