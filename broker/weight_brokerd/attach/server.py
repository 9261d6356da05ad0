"""The attach socket: attests the identity of an instance, reports its end and passes its memory on.

An instance's death is its pidfd becoming readable, not the end of its connection: a child that it forked keeps the
connection open, and a client may close it and live on. Everything runs on the event loop and nothing here waits: a
client that does not read its answers or sends an invalid packet loses its connection and delays no other client.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog

from weight_broker.errors import BrokerError, Reason, from_reason
from weight_brokerd.attach.acceptor import CONNECTION_PACE, Acceptor, listen
from weight_brokerd.attach.conversation import After, Answer, Attendance, Conversation, Entrances, Session, refusal
from weight_brokerd.attach.peer import PeerCredentials, credentials, open_pidfd
from weight_brokerd.attach.strangers import Strangers
from weight_brokerd.core.conduct.pace import Pace, Paces
from weight_brokerd.core.model import Process
from weight_brokerd.processes import packets

__all__ = ["AttachServer", "Attendance", "PeerCredentials", "Session"]

HELLO_SECONDS = 5.0
"""A connection that has not said Hello by then is closed."""
PACKET_PACE = Pace(per_second=500, burst=4000)
"""Of each process. Packets beyond it wait."""

_BACKLOG = 32
"""Short: a process that connects behind a flood waits for all of it. Clients wait for room in the kernel's order."""
_SHORTEST_WAIT_SECONDS = 0.01
_PACES_KEPT = 1024
_TOO_FAST = refusal(
    from_reason(
        Reason.LIMIT_EXCEEDED,
        f"this process connects more than {CONNECTION_PACE.per_second:g} times a second; keep connections open",
    )
).SerializeToString()

log = structlog.get_logger("weight_brokerd.attach")


@dataclass(slots=True, eq=False)
class _Connection:
    """One process: first a stranger, then an instance, at last perhaps only a process whose end is awaited."""

    conversation: Conversation
    socket: socket.socket | None
    pidfd: int
    process: Process
    hello_timer: asyncio.TimerHandle | None = None


class AttachServer:
    """Serves the attach socket on the running event loop."""

    def __init__(
        self, attendance: Attendance, *, host_id: str, broker_version: str, entrances: Entrances | None = None
    ) -> None:
        self._attendance = attendance
        self._entrances = entrances
        self._host_id = host_id
        self._broker_version = broker_version
        self._loop = asyncio.get_running_loop()
        self._acceptor: Acceptor | None = None
        self._strangers: Strangers[_Connection] = Strangers()
        self._asking = Paces(PACKET_PACE)
        self._instances: dict[str, _Connection] = {}

    def open(self, path: Path) -> None:
        """Binds and listens. The caller holds the runtime lock and has set the umask; a stale socket is replaced."""
        self._acceptor = Acceptor(listen(path, socket.SOCK_SEQPACKET, _BACKLOG), self._let_in, _refuse)

    def close(self) -> None:
        """Closes everything, without events. The socket's file stays. Idempotent."""
        if self._acceptor is not None:
            self._acceptor.close()
        for connection in [*self._strangers, *self._instances.values()]:
            self._forget(connection)

    # A connection's beginning

    def _let_in(self, accepted: socket.socket, process: Process) -> None:
        """Admits a connection, or refuses and closes it."""
        try:
            self._admit(accepted, process)
        except (BrokerError, OSError) as error:
            log.warning("attach_refused", why=str(error))
            if isinstance(error, BrokerError):
                with contextlib.suppress(OSError):
                    packets.send(accepted, refusal(error).SerializeToString())
            accepted.close()

    def _admit(self, accepted: socket.socket, process: Process) -> None:
        peer = credentials(accepted)
        pidfd = open_pidfd(accepted, peer)
        conversation = Conversation(
            self._attendance,
            peer,
            host_id=self._host_id,
            broker_version=self._broker_version,
            open_entrance=partial(self._entrances.open, process=process) if self._entrances is not None else None,
        )
        connection = _Connection(conversation, accepted, pidfd, process)
        too_many = self._strangers.one_too_many(process)
        if too_many is not None:
            self._forget(too_many)
        self._strangers.add(process, connection)
        connection.hello_timer = self._loop.call_later(HELLO_SECONDS, self._forget, connection)
        self._loop.add_reader(accepted.fileno(), self._readable, connection)
        self._loop.add_reader(pidfd, self._process_ended, connection)

    # Its requests

    def _must_wait(self, connection: _Connection, attached: socket.socket) -> bool:
        """Whether the process asks too fast: then its packets stay in the socket for a moment."""
        now = self._loop.time()
        if len(self._asking) > _PACES_KEPT:
            self._asking.tidy(now)
        wait = self._asking.wait(connection.process, now)
        if wait <= 0:
            self._asking.spend(connection.process, now)
            return False
        self._loop.remove_reader(attached.fileno())
        self._loop.call_later(max(wait, _SHORTEST_WAIT_SECONDS), self._read_again, connection, attached)
        return True

    def _read_again(self, connection: _Connection, attached: socket.socket) -> None:
        if connection.socket is attached:
            self._loop.add_reader(attached.fileno(), self._readable, connection)

    def _readable(self, connection: _Connection) -> None:
        """Takes one packet; the loop calls again for the next one, after the other connections."""
        if connection.socket is None or self._must_wait(connection, connection.socket):
            return
        try:
            packet = packets.receive(connection.socket)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            packet = None
        if packet is None:
            self._hang_up(connection)
            return
        try:
            answer = connection.conversation.answer(packet)
        finally:
            packet.close()
        if connection in self._strangers and connection.conversation.instance_id:
            self._greet(connection)
        if answer.after is After.DEPART:
            # First the departure, then the answer: a process that has the answer can rely on it.
            self._tell(self._attendance.departed, connection.conversation.instance_id, "it said goodbye")
        sent = self._send(connection, answer)
        if answer.after is After.DEPART:
            self._forget(connection)
        elif answer.after is After.HANG_UP or not sent:
            self._hang_up(connection)
        elif answer.after is After.HAND_OVER:
            self._hand_over(connection)

    def _hand_over(self, connection: _Connection) -> None:
        """Hands the socket to the new reader; the instance's own attach connection goes on watching its process."""
        handed, connection.socket = connection.socket, None
        self._forget(connection)
        if handed is not None:
            self._loop.remove_reader(handed.fileno())
            self._attendance.stage_connected(connection.conversation.stage_owner, handed)

    def _greet(self, connection: _Connection) -> None:
        self._strangers.discard(connection)
        self._instances[connection.conversation.instance_id] = connection
        if connection.hello_timer is not None:
            connection.hello_timer.cancel()

    def _send(self, connection: _Connection, answer: Answer) -> bool:
        if connection.socket is None:
            return False
        try:
            packets.send(connection.socket, answer.response.SerializeToString(), answer.descriptor)
        except ConnectionError:
            return True  # the peer reads no more answers, but its Goodbye may still be in the socket
        except OSError as error:
            if answer.after is not After.DEPART:  # a process that says goodbye need not wait for the answer
                instance_id = connection.conversation.instance_id
                log.warning("attach_answer_not_sent", instance_id=instance_id, error=error.strerror)
            return False
        return True

    # Its end

    def _hang_up(self, connection: _Connection) -> None:
        """Ends the connection. An instance is watched until its process ends."""
        if not connection.conversation.instance_id:
            self._forget(connection)
            return
        self._close_socket(connection)
        self._tell(self._attendance.disconnected, connection.conversation.instance_id)

    def _process_ended(self, connection: _Connection) -> None:
        self._forget(connection)
        if connection.conversation.instance_id:
            self._tell(self._attendance.departed, connection.conversation.instance_id, "the process ended")

    def _forget(self, connection: _Connection) -> None:
        self._strangers.discard(connection)
        self._instances.pop(connection.conversation.instance_id, None)
        if self._entrances is not None:
            self._entrances.close(connection.conversation.instance_id)
        if connection.hello_timer is not None:
            connection.hello_timer.cancel()
        self._close_socket(connection)
        if connection.pidfd >= 0:
            self._loop.remove_reader(connection.pidfd)
            os.close(connection.pidfd)
            connection.pidfd = -1

    def _close_socket(self, connection: _Connection) -> None:
        if connection.socket is not None:
            self._loop.remove_reader(connection.socket.fileno())
            connection.socket.close()
            connection.socket = None

    def _tell(self, event: Callable[..., None], *arguments: str) -> None:
        try:
            event(*arguments)
        except Exception:  # of any kind: the other processes must stay watched
            log.exception("attendance_failed", arguments=arguments)


def _refuse(accepted: socket.socket) -> None:
    packets.send(accepted, _TOO_FAST)
