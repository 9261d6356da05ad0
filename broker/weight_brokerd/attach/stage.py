"""The stage connections: on them the broker asks instances to copy between their memory and its buckets."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import Callable

import structlog
from google.protobuf.message import DecodeError

from weight_broker.v1 import attach_pb2 as pb
from weight_brokerd.processes import packets

log = structlog.get_logger("weight_brokerd.attach")


class StageRefused(Exception):
    """The instance did not do it; the text says why. It goes on answering."""


class StageGone(Exception):
    """The instance has no stage connection any more. It copies nothing for anybody, and has no bucket mapped."""


class StageSilent(StageGone):
    """The instance did not answer, so the connection was ended. It may still be copying."""


class Stages:
    """All stage connections, at most one of each instance."""

    def __init__(self, on_lost: Callable[[str, str], None]) -> None:
        """`on_lost` (instance, why): its stage connection has ended, although the instance has not."""
        self._on_lost = on_lost
        self._connections: dict[str, _Connection] = {}

    def connected(self, instance_id: str, connection: socket.socket) -> None:
        """Takes a connection over; it replaces the one before."""
        self.drop(instance_id)
        self._connections[instance_id] = _Connection(instance_id, connection, self._ended)

    def has(self, instance_id: str) -> bool:
        """Whether the instance can be asked."""
        return instance_id in self._connections

    async def ask(self, instance_id: str, request: pb.StageRequest, timeout: float) -> None:
        """Has the instance do something within `timeout` seconds; one that does not answer loses its connection. If
        this is cancelled the instance may go on; it does what it is asked in order.
        Raises StageRefused, StageGone, StageSilent."""
        connection = self._connections.get(instance_id)
        if connection is None:
            raise StageGone("it has no stage connection")
        await connection.ask(request, timeout)

    def drop(self, instance_id: str) -> None:
        """Ends the instance's connection, if it has one; nobody hears of it."""
        connection = self._connections.pop(instance_id, None)
        if connection is not None:
            connection.end(StageGone("its stage connection has ended"))

    def close(self) -> None:
        """Ends all of them."""
        for instance_id in list(self._connections):
            self.drop(instance_id)

    def _ended(self, connection: _Connection, why: StageGone) -> None:
        if self._connections.get(connection.instance_id) is connection:
            del self._connections[connection.instance_id]
            self._on_lost(connection.instance_id, str(why))


class _Connection:
    """One of them."""

    def __init__(
        self, instance_id: str, connection: socket.socket, on_end: Callable[[_Connection, StageGone], None]
    ) -> None:
        self.instance_id = instance_id
        self._socket: socket.socket | None = connection
        self._on_end = on_end
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[None]] = {}
        connection.setblocking(False)
        asyncio.get_running_loop().add_reader(connection.fileno(), self._readable)

    async def ask(self, request: pb.StageRequest, timeout: float) -> None:
        """See `Stages.ask`."""
        if self._socket is None:
            raise StageGone("its stage connection has ended")
        number = next(self._numbers)
        request.number = number
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            try:
                packets.send(self._socket, request.SerializeToString())
            except BlockingIOError:
                self._break_off("it does not read what it is asked")
            except OSError:
                self.end(StageGone("its stage connection has ended"))
            async with asyncio.timeout(timeout):
                await answer
        except TimeoutError:
            self._break_off(f"it did not answer within {timeout:g} s")
            raise StageSilent(f"it did not answer within {timeout:g} s") from None
        finally:
            self._waiting.pop(number, None)

    def end(self, why: StageGone) -> None:
        """Ends the connection; whoever waits hears why. Idempotent."""
        ended, self._socket = self._socket, None
        if ended is None:
            return
        asyncio.get_running_loop().remove_reader(ended.fileno())
        ended.close()
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(why)
        self._on_end(self, why)

    def _break_off(self, why: str) -> None:
        log.warning("stage_broken_off", instance_id=self.instance_id, why=why)
        self.end(StageSilent(why))

    def _readable(self) -> None:
        if self._socket is None:
            return
        try:
            packet = packets.receive(self._socket)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            packet = None
        if packet is None:
            self.end(StageGone("its stage connection has ended"))
            return
        packet.close()
        response = pb.StageResponse()
        try:
            response.ParseFromString(packet.data)
        except DecodeError:
            response.Clear()
        kind = response.WhichOneof("response")
        if kind is None:
            self._break_off("it answered what makes no sense")
            return
        answer = self._waiting.get(response.number)
        if answer is None or answer.done():  # nobody waits for it any more
            return
        if kind == "accepted":
            answer.set_result(None)
        else:
            answer.set_exception(StageRefused(response.refused.message))
