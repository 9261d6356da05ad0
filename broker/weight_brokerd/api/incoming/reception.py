"""Takes requests in: first who sends, then the bytes, then the message.

gRPC hands a request over once it lies in memory as a whole, and knows one limit for all methods. So methods get their
requests as streams here, and nothing is read of a caller without a token where one is needed. Few requests are read at
a time: one of each process, some of each user, and of all callers without a token some.
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
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
        self._refused_strangers = asyncio.Lock()

    async def request(self, method: str, parse: Any, context: Context) -> object:
        """The request of a call of the broker's own services: a message, or `Received` if it may have a layout. Raises
        `NotAttached`, `InvalidArgument`."""
        service, make = method.split("/")[1], _WITH_LAYOUT.get(method)
        process = process_of(self._control, context.invocation_metadata())
        if process != UNKNOWN:
            slots, sender = self._slots_of(process.uid), self._senders.of(process)
        else:
            if service != _WITHOUT_TOKEN:
                identify(self._control, context)  # raises and says what is missing
            slots, sender = self._slots_of(service), Sender(self._refused_strangers)
        if make is None:
            async with sender.small:
                wire = await _read(context, slots, sender, SMALL_BYTES)
            return requests.parsed(wire, parse)
        async with sender.layouts:
            wire = await _read(context, slots, sender, LARGE_BYTES if process != UNKNOWN else STRANGERS_BYTES)
            async with paced(len(wire)):
                return await self._received(wire, make, slots)

    async def small(self, service: str, context: Context) -> bytes:
        """A request of a service that is not the broker's. Raises `InvalidArgument`."""
        return await _read(context, self._slots_of(service), Sender(self._refused_strangers), SMALL_BYTES)

    def _slots_of(self, sender: Hashable) -> Slots:
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


async def _read(context: Context, slots: Slots, sender: Sender, most: int) -> bytes:
    """The bytes of a request. Raises `InvalidArgument`; for one that is too large later, one after the other, when the
    bytes are forgotten: who waits for the answer sends no other meanwhile."""
    async with slots.slot(sender.reading):
        # Not from the iterator that the handler gets: it keeps the bytes until the call ends, maybe for an hour.
        read = await context.read()
    if not isinstance(read, bytes):  # the end
        raise InvalidArgument("request", "none", "one message")
    size = len(read)
    if size <= most:
        return read
    del read
    async with sender.refused, paced(size):
        raise InvalidArgument("request", f"{size} bytes", f"at most {most} bytes for this method")
