"""In a card process: the instances that have a staging buffer of this process mapped.

The driver takes a buffer from every process that has it mapped as soon as its owner ends, and an instance that is
copying at that moment can do nothing more with its card. So the owner outlives the daemon until its borrowers have let
go. The daemon gives it their stage connections: an instance that reads the end of its connection finishes its copy,
unmaps every staging buffer and closes its own end, as the kernel does for an instance that dies.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Collection, Iterable
from contextlib import suppress

from weight_brokerd.processes import packets
from weight_brokerd.processes.connection import die_with_parent, outlive_parent


class Borrowers:
    """Use it in the main thread."""

    def __init__(self) -> None:
        self._connections: dict[str, list[socket.socket]] = {}

    @property
    def buffers(self) -> Collection[str]:
        """The buffers that are lent."""
        return self._connections.keys()

    def lend(self, region_id: str, descriptor: int) -> None:
        """Takes the descriptor of the borrower's stage connection over."""
        outlive_parent()
        self._connections.setdefault(region_id, []).append(socket.socket(fileno=descriptor))

    def returned(self, region_id: str) -> None:
        """The daemon says that no instance has the buffer mapped. Idempotent."""
        for connection in self._connections.pop(region_id, ()):
            connection.close()
        if not self._connections:
            die_with_parent()

    def wait(self) -> None:
        """The daemon is gone: end all stage connections, and return when every borrower has let go or died."""
        connections = [connection for lent in self._connections.values() for connection in lent]
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
        _await_ends(connections)


def _await_ends(connections: Iterable[socket.socket]) -> None:
    waiting = {connection.fileno(): connection for connection in connections}
    poller = select.poll()
    for descriptor in waiting:
        poller.register(descriptor, select.POLLIN)
    while waiting:
        for descriptor, _ in poller.poll():
            if _has_ended(waiting[descriptor]):
                poller.unregister(descriptor)
                del waiting[descriptor]


def _has_ended(connection: socket.socket) -> bool:
    """Reads answers to the daemon, which has no use for them any more."""
    try:
        packet = packets.receive(connection)
    except BlockingIOError:
        return False
    except OSError:
        return True
    if packet is None:
        return True
    packet.close()
    return False
