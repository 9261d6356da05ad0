"""Stage connections: on them the broker asks instances to copy between their memory and its staging buffers."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import Callable
from contextlib import suppress

import structlog
from google.protobuf.message import DecodeError

from weight_broker.v1 import attach_pb2 as pb
from weight_brokerd.processes import packets

log = structlog.get_logger("weight_brokerd.attach")
_NO_CONNECTION = "it has no stage connection"


class StagingRefused(Exception):
    """The instance refused; the text says why. It goes on answering."""


class StagingGone(Exception):
    """The instance has no stage connection any more. `let_go` says when it has no staging buffer mapped."""


class StagingSilent(StagingGone):
    """The instance did not answer, so the broker closed the connection. The instance may still be copying."""


class StagingConnections:
    """All stage connections, at most one of each instance."""

    def __init__(self, on_lost: Callable[[str, str], None]) -> None:
        """`on_lost` (instance, why): the stage connection has ended, but the instance lives."""
        self._on_lost = on_lost
        self._connections: dict[str, _Connection] = {}
        self._leaving: set[_Connection] = set()
        """Of instances that are asked nothing more, and have not closed their end yet."""
        self._holding: set[str] = set()
        """Instances that the ending daemon does not wait for: they may have staging buffers mapped."""

    def connected(self, instance_id: str, connection: socket.socket) -> None:
        """Takes a connection over; it replaces the instance's earlier connection."""
        self.drop(instance_id)
        self._connections[instance_id] = _Connection(instance_id, connection, self._ended, self._leaving.discard)

    def has(self, instance_id: str) -> bool:
        """Whether the instance has a stage connection."""
        return instance_id in self._connections

    def connection_of(self, instance_id: str) -> int:
        """The descriptor of the instance's stage connection; duplicate it before the next turn of the loop. Raises
        StagingGone."""
        connection = self._connections.get(instance_id)
        if connection is None:
            raise StagingGone(_NO_CONNECTION)
        return connection.fileno()

    async def ask(self, instance_id: str, request: pb.StageRequest, timeout: float) -> None:
        """Sends a request and waits for its answer. An instance that does not answer within `timeout` seconds loses its
        connection. After a cancellation the instance may go on; it carries requests out in order.
        Raises StagingRefused, StagingGone, StagingSilent."""
        connection = self._connections.get(instance_id)
        if connection is None:
            raise StagingGone(_NO_CONNECTION)
        await connection.ask(request, timeout)

    async def let_go(self, instance_id: str) -> bool:
        """Return when the instance has unmapped the staging buffers of every connection that has ended. It does so,
        and closes its end, after what it is doing; or it dies. False: the daemon ends first."""
        leaving = [connection for connection in self._leaving if connection.instance_id == instance_id]
        await asyncio.gather(*(connection.closed.wait() for connection in leaving))
        return instance_id not in self._holding

    def drop(self, instance_id: str) -> None:
        """Closes the instance's connection, if it has one, without calling `on_lost`."""
        connection = self._connections.pop(instance_id, None)
        if connection is not None:
            connection.end(StagingGone("its stage connection has ended"))

    def close(self) -> None:
        """Closes all connections, and waits for no instance."""
        for instance_id in list(self._connections):
            self.drop(instance_id)
        for connection in list(self._leaving):
            self._holding.add(connection.instance_id)
            connection.close()

    def _ended(self, connection: _Connection, why: StagingGone) -> None:
        if not connection.closed.is_set():
            self._leaving.add(connection)
        if self._connections.get(connection.instance_id) is connection:
            del self._connections[connection.instance_id]
            self._on_lost(connection.instance_id, str(why))


class _Connection:
    def __init__(
        self,
        instance_id: str,
        connection: socket.socket,
        on_end: Callable[[_Connection, StagingGone], None],
        on_closed: Callable[[_Connection], None],
    ) -> None:
        self.instance_id = instance_id
        self.closed = asyncio.Event()
        """The instance has closed its end, or is not waited for."""
        self._socket = connection
        self._has_ended = False
        self._on_end = on_end
        self._on_closed = on_closed
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[None]] = {}
        connection.setblocking(False)
        asyncio.get_running_loop().add_reader(connection.fileno(), self._readable)

    def fileno(self) -> int:
        """Of the socket."""
        return self._socket.fileno()

    async def ask(self, request: pb.StageRequest, timeout: float) -> None:
        """See `StagingConnections.ask`."""
        if self._has_ended:
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
        """Ask nothing more, and raise `why` in every waiter. The instance reads the end of the connection, unmaps every
        staging buffer and closes its own end, which sets `closed`. Idempotent."""
        if self._has_ended:
            return
        self._has_ended = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(why)
        self._on_end(self, why)

    def close(self) -> None:
        """The instance has closed its end, or is not waited for. Idempotent."""
        if self.closed.is_set():
            return
        self.closed.set()
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        self._socket.close()
        self._on_closed(self)

    def _break_off(self, why: str) -> None:
        log.warning("stage_connection_closed", instance_id=self.instance_id, why=why)
        self.end(StagingSilent(why))

    def _readable(self) -> None:
        try:
            packet = packets.receive(self._socket)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            packet = None
        if packet is None:
            self.close()
            self.end(StagingGone("its stage connection has ended"))
            return
        packet.close()
        if self._has_ended:
            return
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
