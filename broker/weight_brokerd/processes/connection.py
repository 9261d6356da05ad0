"""A child process's end of its socket."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import threading
from typing import Generic, TypeVar

from weight_brokerd.processes import packets
from weight_brokerd.processes.codec import Codec
from weight_brokerd.processes.packets import PACKET_BYTES, Joiner, split

M = TypeVar("M")
_PR_SET_PDEATHSIG = 1
_NO_SIGNAL = 0


def belong_to_parent() -> None:
    """Ignore signals to the daemon's process group: this process ends when the daemon closes the socket. The kernel
    kills it with the daemon, also during a call that does not notice the closed socket."""
    for ignored in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    die_with_parent()


def die_with_parent() -> None:
    """The kernel kills this process with the daemon. Call it in the main thread, as `outlive_parent`: the kernel
    remembers the signal of each thread."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def outlive_parent() -> None:
    """The kernel does not kill this process with the daemon; `Connection.receive` still says that the daemon is
    gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, _NO_SIGNAL)


class Connection(Generic[M]):
    """Receives in one thread, answers from any thread."""

    def __init__(self, connection: socket.socket, codec: Codec[M]) -> None:
        self.descriptors: list[int] = []
        """Descriptors of the last message. Take a descriptor out to keep it; the next `receive` closes the others."""
        self._connection = connection
        self._codec = codec
        self._joiner = Joiner()
        self._sending = threading.Lock()

    def receive(self) -> tuple[int, M] | None:
        """The next message and its number; None when the daemon has closed the socket."""
        self.close_descriptors()
        while True:
            try:
                packet = packets.receive(self._connection, PACKET_BYTES)
            except ConnectionError:
                return None
            if packet is None:
                return None
            self.descriptors += packet.descriptors
            message = self._joiner.add(packet.data)
            if message is not None:
                return self._codec.decode(message)

    def answer(self, number: int, answer: M, descriptor: int | None = None) -> None:
        """Sends an answer. If the daemon is gone, the answer is lost, and `receive` returns None."""
        with self._sending, contextlib.suppress(ConnectionError):
            for packet in split(self._codec.encode(number, answer)):
                packets.send(self._connection, packet, descriptor)
                descriptor = None

    def close_descriptors(self) -> None:
        """Closes the descriptors that were not taken out."""
        while self.descriptors:
            os.close(self.descriptors.pop())
