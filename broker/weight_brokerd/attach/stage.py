"""Stage connections: on them the broker asks instances to copy between their memory and its staging buffers."""

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


class StagingRefused(Exception):
    """The instance refused; the text says why. It goes on answering."""


class StagingGone(Exception):
    """The instance has no stage connection any more: it copies nothing and has no staging buffer mapped."""


class StagingSilent(StagingGone):
    """The instance did not answer, so the broker closed the connection. The instance may still be copying."""


class StagingConnections:
    """All stage connections, at most one of each instance."""

    def __init__(self, on_lost: Callable[[str, str], None]) -> None:
        """`on_lost` (instance, why): the stage connection has ended, but the instance lives."""
        self._on_lost = on_lost
        self._connections: dict[str, _Connection] = {}

    def connected(self, instance_id: str, connection: socket.socket) -> None:
        """Takes a connection over; it replaces the instance's earlier connection."""
        self.drop(instance_id)
        self._connections[instance_id] = _Connection(instance_id, connection, self._ended)

    def has(self, instance_id: str) -> bool:
        """Whether the instance has a stage connection."""
        return instance_id in self._connections

    async def ask(self, instance_id: str, request: pb.StageRequest, timeout: float) -> None:
        """Sends a request and waits for its answer. An instance that does not answer within `timeout` seconds loses its
        connection. After a cancellation the instance may go on; it carries requests out in order.
        Raises StagingRefused, StagingGone, StagingSilent."""
        connection = self._connections.get(instance_id)
        if connection is None:
            raise StagingGone("it has no stage connection")
        await connection.ask(request, timeout)

    def drop(self, instance_id: str) -> None:
        """Closes the instance's connection, if it has one, without calling `on_lost`."""
        connection = self._connections.pop(instance_id, None)
        if connection is not None:
            connection.end(StagingGone("its stage connection has ended"))

    def close(self) -> None:
        """Closes all connections."""
        for instance_id in list(self._connections):
            self.drop(instance_id)

    def _ended(self, connection: _Connection, why: StagingGone) -> None:
        if self._connections.get(connection.instance_id) is connection:
            del self._connections[connection.instance_id]
            self._on_lost(connection.instance_id, str(why))


class _Connection:
    def __init__(
        self, instance_id: str, connection: socket.socket, on_end: Callable[[_Connection, StagingGone], None]
    ) -> None:
        self.instance_id = instance_id
        self._socket: socket.socket | None = connection
        self._on_end = on_end
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[None]] = {}
        connection.setblocking(False)
        asyncio.get_running_loop().add_reader(connection.fileno(), self._readable)

    async def ask(self, request: pb.StageRequest, timeout: float) -> None:
        """See `StagingConnections.ask`."""
        if self._socket is None:
            raise StagingGone("its stage connection has ended")
        number = next(self._numbers)
        request.number = number
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            try:
                packets.send(self._socket, request.SerializeToString())
            except BlockingIOError:
                self._break_off("it does not read its requests")
            except OSError:
                self.end(StagingGone("its stage connection has ended"))
            async with asyncio.timeout(timeout):
                await answer
        except TimeoutError:
            self._break_off(f"it did not answer within {timeout:g} s")
            raise StagingSilent(f"it did not answer within {timeout:g} s") from None
        finally:
            self._waiting.pop(number, None)

    def end(self, why: StagingGone) -> None:
        """Closes the connection and fails all open requests with `why`. Idempotent."""
        connection, self._socket = self._socket, None
        if connection is None:
            return
        asyncio.get_running_loop().remove_reader(connection.fileno())
        connection.close()
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(why)
        self._on_end(self, why)

    def _break_off(self, why: str) -> None:
        log.warning("stage_connection_closed", instance_id=self.instance_id, why=why)
        self.end(StagingSilent(why))

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
            self.end(StagingGone("its stage connection has ended"))
            return
        packet.close()
        response = pb.StageResponse()
        try:
            response.ParseFromString(packet.data)
        except DecodeError:
            response.Clear()
        kind = response.WhichOneof("response")
        if kind is None:
            self._break_off("its answer is not a StageResponse")
            return
        answer = self._waiting.get(response.number)
        if answer is None or answer.done():  # the request was cancelled
            return
        if kind == "accepted":
            answer.set_result(None)
        else:
            answer.set_exception(StagingRefused(response.refused.message))
