"""The instance's end of the attach socket: it proves who this process is and carries file descriptors.

The broker learns from the kernel which process connected; its token goes into the metadata of every gRPC call. The
connection stays open while the process is attached. protobuf is imported only once the socket exists, so that a host
without a broker costs well under a millisecond.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from weight_broker._version import __version__
from weight_broker.connection import room, standard_streams
from weight_broker.connection.deadline import REQUEST_TIMEOUT_SECONDS
from weight_broker.connection.label import name_label
from weight_broker.errors import BrokerError, BrokerUnavailable, NotAttached, Reason, from_reason
from weight_broker.runtime_directory import GRPC_SOCKET, not_admitted, refuse_shared

if TYPE_CHECKING:
    from weight_broker.v1.attach_pb2 import AttachRequest, AttachResponse, Refused, Welcome

PROTOCOL_VERSION = 1
MAX_PACKET_BYTES = 64 * 1024
_MAX_DESCRIPTORS = 4
_LOST = -1


class _Closed(NotAttached):
    """By the broker, without an answer."""


class AttachConnection:
    """One connection to the attach socket at `path`. Threads may share it: requests are answered one at a time.

    `NotAttached` means that the broker closed the connection (it has probably been restarted); `BrokerUnavailable` that
    it cannot be reached or does not answer in time. A broker that hangs, by `REQUEST_TIMEOUT_SECONDS`, ends the
    connection; a caller with less time leaves its request behind, which the broker may still carry out.
    """

    def __init__(self, path: str | Path, name: str = "") -> None:
        self.path = Path(path)
        self.name = name_label(name)
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._entrance: Entrance | None = None
        self._goodbye = b""
        # Responses not yet read. A request that was interrupted or timed out leaves its response in the socket; the
        # next request reads and drops it, so that answers never shift against questions.
        self._owed = 0
        # True while a signal's handler that raises (KeyboardInterrupt) would leave `_owed` wrong.
        self._unsure = False

    @property
    def grpc_socket(self) -> Path:
        """For the calls of this process, while it is attached."""
        return self._entrance.path if self._entrance is not None else self.path.parent / GRPC_SOCKET

    def connect(self, timeout: float = 2.0) -> Welcome:
        """Attach this process; returns the token and the ids. Raises `BrokerUnavailable`, or what the broker refuses
        with."""
        # Without a broker, or without permission to see its socket, the import below is not worth its time.
        if not os.path.exists(self.path):
            _connect(self.path, time.monotonic() + timeout).close()
        # Before the clock starts: on a busy host this takes as long as a broker may take to answer.
        with room.importing():
            from weight_broker.v1.attach_pb2 import AttachRequest, Goodbye, Hello

        deadline = time.monotonic() + timeout
        self._goodbye = AttachRequest(goodbye=Goodbye()).SerializeToString()
        hello = AttachRequest(
            hello=Hello(protocol_version=PROTOCOL_VERSION, name=self.name, client_version=__version__, entrance=True)
        )
        try:
            return self._greet(hello, deadline)
        except _Closed:
            # A broker that ends closes connections that it has not looked at; another may have its place already.
            pass
        try:
            return self._greet(hello, deadline)
        except _Closed as error:
            raise BrokerUnavailable(f"the broker on {self.path} is ending: {error.message}") from error

    def offer_region(self, region_id: str, fd: int, size_bytes: int, *, timeout: float | None = None) -> None:
        """Hand the sealed memfd `fd` over; the caller keeps its descriptor."""
        from weight_broker.v1.attach_pb2 import AttachRequest, OfferRegion

        request = AttachRequest(offer_region=OfferRegion(region_id=region_id, size_bytes=size_bytes))
        self._ask(request, fds=(fd,), timeout=timeout)

    def withdraw_region(self, region_id: str, *, timeout: float | None = None) -> None:
        """Take back a region that no publication uses."""
        from weight_broker.v1.attach_pb2 import AttachRequest, WithdrawRegion

        self._ask(AttachRequest(withdraw_region=WithdrawRegion(region_id=region_id)), timeout=timeout)

    def claim_region(self, transfer_id: str, region_index: int, *, timeout: float | None = None) -> int:
        """A new descriptor of the source's region `region_index` of a running transfer; the caller closes it."""
        from weight_broker.v1.attach_pb2 import AttachRequest, ClaimRegion

        request = AttachRequest(claim_region=ClaimRegion(transfer_id=transfer_id, region_index=region_index))
        _, received = self._ask(request, timeout=timeout)
        if _LOST in received:
            _close_all(received)
            raise BrokerUnavailable(
                "this process has no file descriptor left for the source's memory; raise its limit (LimitNOFILE)"
            )
        if len(received) != 1:
            _close_all(received)
            raise BrokerError(f"the broker sent {len(received)} descriptors for region {region_index}, not one")
        return received[0]

    def goodbye(self) -> None:
        """Ends the attachment and waits for the broker to confirm that everything is retracted."""
        from weight_broker.v1.attach_pb2 import AttachRequest, Goodbye

        self._ask(AttachRequest(goodbye=Goodbye()), timeout=2.0)

    def leave(self) -> None:
        """Say goodbye without waiting and close. Safe in a finalizer: imports nothing."""
        connected, self._socket = self._socket, None
        if connected is not None:
            with contextlib.suppress(OSError):
                connected.send(self._goodbye, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            connected.close()

    def break_off(self) -> None:
        """End the attachment without waiting: a broker that recovers undoes everything of it. The keeper attaches
        again."""
        connected = self._socket
        if connected is not None:
            self._break_off(connected)

    def close(self) -> None:
        """Close without a goodbye. Publications stay until the process ends."""
        with self._lock:
            connected, self._socket = self._socket, None
            if connected is not None:
                connected.close()

    def forget(self) -> None:
        """For a forked child: close its copy of the socket, which the broker does not notice."""
        connected, self._socket = self._socket, None
        self._lock = threading.Lock()
        if connected is not None:
            connected.close()

    def fileno(self) -> int:
        """The socket's descriptor, to poll for its end; -1 if it is closed."""
        connected = self._socket
        return connected.fileno() if connected is not None else -1

    def is_over(self) -> bool:
        """True once either end is closed."""
        descriptor = self.fileno()
        if descriptor < 0:
            return True
        poller = select.poll()
        poller.register(descriptor, select.POLLRDHUP)
        return bool(poller.poll(0))

    def _greet(self, hello: AttachRequest, deadline: float) -> Welcome:
        self._owed = 0
        self._socket = _connect(self.path, deadline)
        try:
            response, received = self._ask(hello, timeout=max(deadline - time.monotonic(), 0.001))
        except BaseException:
            self.leave()  # a broker that reads Hello only later must not list this attachment for ever
            raise
        self._entrance = Entrance.of(received)
        return response.welcome

    def _ask(
        self, request: AttachRequest, *, fds: Sequence[int] = (), timeout: float | None = None
    ) -> tuple[AttachResponse, list[int]]:
        from weight_broker.v1.attach_pb2 import AttachResponse

        packet = request.SerializeToString()
        timeout = REQUEST_TIMEOUT_SECONDS if timeout is None else timeout
        deadline = time.monotonic() + timeout
        if not self._lock.acquire(timeout=timeout):
            raise self._unanswered(timeout)
        try:
            answer, received = self._exchange(packet, fds, timeout, deadline)
        finally:
            self._lock.release()
        response = AttachResponse.FromString(answer)
        if response.WhichOneof("response") == "refused":
            _close_all(received)
            raise decode_refusal(response.refused)
        return response, received

    def _exchange(self, packet: bytes, fds: Sequence[int], timeout: float, deadline: float) -> tuple[bytes, list[int]]:
        if self._socket is None:
            raise NotAttached("the attach connection is closed")
        if self._unsure:
            self._break_off(self._socket)
            raise NotAttached("a request on the attach connection was interrupted; attach again")
        is_sent = False
        try:
            self._send(self._socket, packet, fds, timeout)
            is_sent = True
            return self._receive_last(self._socket, deadline)
        except TimeoutError:
            if not is_sent or timeout >= REQUEST_TIMEOUT_SECONDS:
                # A broker that recovers carries out the request. The goodbye behind it then ends the session, so that
                # no region or lease stays that this process does not know of. The keeper publishes again.
                self._break_off(self._socket)
            raise self._unanswered(timeout) from None
        except OSError as error:
            raise _Closed(f"the broker closed the attach connection ({error.strerror or error})") from None
        finally:
            if self._unsure:
                self._break_off(self._socket)

    def _unanswered(self, seconds: float) -> BrokerUnavailable:
        return BrokerUnavailable(f"the broker does not answer on {self.path} within {seconds:.3g} s")

    def _send(self, connected: socket.socket, packet: bytes, fds: Sequence[int], timeout: float) -> None:
        connected.settimeout(timeout)
        self._unsure = True
        try:
            socket.send_fds(connected, [packet], fds)
        except OSError:
            self._unsure = False  # nothing was sent
            raise
        self._owed += 1
        self._unsure = False

    def _receive_last(self, connected: socket.socket, deadline: float) -> tuple[bytes, list[int]]:
        readable = select.poll()
        readable.register(connected, select.POLLIN)
        while True:
            # An interruption in poll() leaves nothing in doubt: nothing was read yet.
            if not readable.poll(max(deadline - time.monotonic(), 0.001) * 1000):
                raise TimeoutError
            self._unsure = True
            answer, received = _receive_packet(connected)
            self._owed -= 1
            self._unsure = False
            if not answer:
                raise ConnectionResetError("end of file")
            if self._owed == 0:
                return answer, received
            _close_all(received)

    def _break_off(self, connected: socket.socket) -> None:
        """End a connection on which answers may have shifted against questions. The descriptor stays open, so that the
        threads that poll it see the end."""
        with contextlib.suppress(OSError):
            connected.send(self._goodbye, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        with contextlib.suppress(OSError):
            connected.shutdown(socket.SHUT_RDWR)


class Entrance:
    """A gRPC socket of the broker for this process alone: no other can fill its backlog."""

    def __init__(self, descriptor: int) -> None:
        """Takes the descriptor over."""
        self._descriptor = descriptor
        self.path = Path(f"/proc/self/fd/{descriptor}")

    @classmethod
    def of(cls, received: Sequence[int]) -> Entrance | None:
        """From the descriptors that came with Welcome; None if there is none that can be used."""
        if len(received) == 1 and received[0] != _LOST and os.path.exists(f"/proc/self/fd/{received[0]}"):
            return cls(received[0])
        _close_all(received)
        return None

    def __del__(self) -> None:
        """Nothing connects through it any more."""
        with contextlib.suppress(OSError):
            os.close(self._descriptor)


def connect_to(path: Path, timeout: float) -> socket.socket:
    """A connection to the attach socket, before any request. Raises `BrokerUnavailable`."""
    return _connect(path, time.monotonic() + timeout)


def _connect(path: Path, deadline: float) -> socket.socket:
    standard_streams.occupy()
    refuse_shared(path.parent)
    try:
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    except OSError as error:  # a limit of this process or its sandbox, for example no file descriptor left
        raise BrokerUnavailable(
            f"this process cannot open a socket to the broker on {path}: {error.strerror}"
        ) from error
    try:
        _connect_in_turn(connected, path, deadline)
        return connected
    except PermissionError as error:
        connected.close()
        raise not_admitted(path) from error
    except OSError as error:
        connected.close()
        raise BrokerUnavailable(f"no broker answers on {path}: {error.strerror or error}") from error
    except BaseException:
        connected.close()
        raise


def _connect_in_turn(connected: socket.socket, path: Path, deadline: float) -> None:
    """Connect; where the backlog is full, as many instances start at once or one process floods it, wait for room. The
    kernel lets those in order that wait in connect(2); one that asked again and again would never be in time."""
    while True:
        connected.settimeout(None)
        _limit_sending(connected, max(deadline - time.monotonic(), 0.001))
        try:
            connected.connect(os.fspath(path))
            connected.getpeername()
        except OSError as error:
            # Python takes a wait that a signal interrupts for a connection.
            if error.errno != errno.ENOTCONN or time.monotonic() >= deadline:
                raise
            continue
        _limit_sending(connected, 0.0)
        return


def _limit_sending(connected: socket.socket, seconds: float) -> None:
    """How long connect(2) may block; 0 for ever."""
    whole = int(seconds)
    limit = struct.pack("@ll", whole, int((seconds - whole) * 1_000_000))
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


def _receive_packet(connected: socket.socket) -> tuple[bytes, list[int]]:
    """One packet and its descriptors, closed on exec: `socket.recv_fds` drops the flag for that. `_LOST` stands for
    those that this process had no room for."""
    descriptors = array.array("i")
    answer, ancillary, flags, _ = connected.recvmsg(
        MAX_PACKET_BYTES, socket.CMSG_SPACE(_MAX_DESCRIPTORS * descriptors.itemsize), socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    return answer, [*descriptors, *([_LOST] if flags & socket.MSG_CTRUNC else [])]


def decode_refusal(refused: Refused) -> BrokerError:
    """The exception for the caller."""
    try:
        return from_reason(Reason(refused.reason), refused.message)
    except ValueError:  # a newer broker
        return BrokerError(f"{refused.reason}: {refused.message}")


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        if descriptor != _LOST:
            os.close(descriptor)
