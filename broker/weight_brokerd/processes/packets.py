"""Packets of SOCK_SEQPACKET sockets, each with at most one file descriptor, and messages of several packets.

The kernel limits the size of a packet but not of a message: the first byte of each packet of a message says whether
more follow.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass

MAXIMUM_PACKET_BYTES = 16 * 1024
"""On the attach socket, where a packet is a message."""
# Room for one descriptor more than a request has, so that a second one is noticed. The kernel opens no more than fit.
_ANCILLARY_BYTES = socket.CMSG_SPACE(2 * array.array("i").itemsize)


@dataclass(slots=True)
class Packet:
    """A received packet. It owns its descriptors until they are taken out."""

    data: bytes
    descriptors: list[int]
    cut: bool = False
    """The packet was longer than allowed; `data` is only its beginning."""
    descriptors_lost: bool = False
    """The kernel did not open all descriptors: there were too many, or this process has too many files open."""

    def close(self) -> None:
        """Closes the descriptors that were not taken out."""
        while self.descriptors:
            with contextlib.suppress(OSError):
                os.close(self.descriptors.pop())


def receive(connection: socket.socket, maximum: int = MAXIMUM_PACKET_BYTES) -> Packet | None:
    """The next packet, None at the end of the connection. Raises BlockingIOError if there is none yet, or OSError."""
    try:
        data, ancillary, flags, _ = connection.recvmsg(maximum, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:
        # The peer closed without reading its last answers. Its last requests, a Goodbye perhaps, can still be read.
        data, ancillary, flags, _ = connection.recvmsg(maximum, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
    descriptors = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
    packet = Packet(
        data,
        descriptors.tolist(),
        cut=bool(flags & socket.MSG_TRUNC),
        descriptors_lost=bool(flags & socket.MSG_CTRUNC),
    )
    if not data:  # the end, or an empty packet, which the protocol does not have
        packet.close()
        return None
    return packet


def send(connection: socket.socket, data: bytes, descriptor: int | None = None) -> None:
    """Sends a packet. Raises BlockingIOError if the peer does not read, or another OSError."""
    if descriptor is None:
        connection.send(data)
    else:
        socket.send_fds(connection, [data], [descriptor])


PACKET_BYTES = 32 << 10
MAXIMUM_MESSAGE_BYTES = 64 << 20
_LAST, _MORE = b"\0", b"\1"


def split(message: bytes) -> Iterator[bytes]:
    """The packets of a message."""
    step = PACKET_BYTES - 1
    for begin in range(0, max(len(message), 1), step):
        yield (_MORE if begin + step < len(message) else _LAST) + message[begin : begin + step]


class Joiner:
    """Joins packets to messages."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def add(self, packet: bytes) -> bytes | None:
        """The message that this packet completes, or None. Raises ValueError for a packet that `split` did not make."""
        if packet[:1] not in (_LAST, _MORE):
            raise ValueError(f"a packet begins with {packet[:1]!r}")
        self._parts.append(packet[1:])
        self._size += len(packet)
        if self._size > MAXIMUM_MESSAGE_BYTES:
            raise ValueError(f"a message has more than {MAXIMUM_MESSAGE_BYTES} bytes")
        if packet[:1] == _MORE:
            return None
        message = b"".join(self._parts)
        self._parts.clear()
        self._size = 0
        return message
