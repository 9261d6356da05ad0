"""Messages over a SOCK_SEQPACKET socket. A packet has a limit that the kernel sets, a message has none, so a message is
cut into packets, each beginning with a byte that says whether more follow."""

from __future__ import annotations

from collections.abc import Iterator

PACKET_BYTES = 32 << 10
MAXIMUM_MESSAGE_BYTES = 64 << 20
_LAST, _MORE = b"\0", b"\1"


def split(message: bytes) -> Iterator[bytes]:
    """The packets of a message."""
    step = PACKET_BYTES - 1
    for begin in range(0, max(len(message), 1), step):
        yield (_MORE if begin + step < len(message) else _LAST) + message[begin : begin + step]


class Joiner:
    """Puts messages together again."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def add(self, packet: bytes) -> bytes | None:
        """The message that this packet completes, or None. Raises ValueError for what `split` does not make."""
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
