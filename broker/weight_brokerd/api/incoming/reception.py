"""Takes requests in: first who sends, then the bytes, then the message.

gRPC hands a request over once it lies in memory as a whole, and knows one limit for all methods. So methods get their
requests as streams here, and nothing is read of a caller without a token where one is needed. Few requests are read at
a time: one of each process, some of each user.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from weight_broker.errors import BrokerUnavailable, InvalidArgument
from weight_broker.v1 import inspection_service_pb2, weight_broker_service_pb2
from weight_brokerd.api.caller import Callers, identify
from weight_brokerd.api.incoming import requests
from weight_brokerd.api.incoming.layouts import LayoutCache
from weight_brokerd.api.incoming.remains import Remains
from weight_brokerd.api.incoming.senders import Sender, Senders, paced
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

    def __init__(self, control: Control, callers: Callers, turns: Turns) -> None:
        self._control = control
        self._callers = callers
        self._layouts = LayoutCache(remains=Remains(turns, control.loop.spawn))
        self._turns = turns
        self._large = asyncio.Semaphore(LARGE_AT_ONCE)
        self._slots: dict[int, Slots] = {}
        self._senders = Senders()

    async def request(self, method: str, parse: Any, context: Context) -> object:
        """The request of a call of the broker's own services: a message, or `Received` if it may have a layout. Raises
        `NotAttached`, `InvalidArgument`."""
        user = self._callers.user(context)
        if user is None and method.split("/")[1] != _WITHOUT_TOKEN:
            identify(self._control, context)  # raises and says what is missing
        process, make = self._process(context), _WITH_LAYOUT.get(method)
        sender = self._senders.of(process)
        if make is None:
            async with sender.small:
                wire = await self._read(context, process, sender, SMALL_BYTES)
            return requests.parsed(wire, parse)
        async with sender.layouts:
            wire = await self._read(context, process, sender, STRANGERS_BYTES if user is None else LARGE_BYTES)
            async with paced(len(wire)):
                return await self._received(wire, make, self._slots_of(process))

    async def small(self, context: Context) -> bytes:
        """A request of a service that is not the broker's. Raises `InvalidArgument`."""
        process = self._process(context)
        return await self._read(context, process, self._senders.of(process), SMALL_BYTES)

    def _process(self, context: Context) -> Process:
        process = self._callers.process(context)
        if process is None:
            raise BrokerUnavailable("the connection of this call has ended")
        return process

    def _slots_of(self, process: Process) -> Slots:
        """For the requests of the process's user."""
        return self._slots.setdefault(process.uid, Slots(KEPT_BYTES))

    async def _read(self, context: Context, process: Process, sender: Sender, most: int) -> bytes:
        """The bytes of a request. Raises `InvalidArgument`; for one that is too large later, one after the other, when
        the bytes are forgotten: who waits for the answer sends no other meanwhile."""
        async with self._slots_of(process).slot(process):
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
