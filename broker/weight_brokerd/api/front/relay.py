"""Carries the bytes of one connection both ways, as fast as its slower end."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Protocol

BUFFER_BYTES = 128 << 10
_SHORTEST_PAUSE_SECONDS = 0.01


class Allowance(Protocol):
    """What may be read of a connection now; its process has more of them."""

    def wait(self) -> float:
        """Seconds until it may send; 0 if it may now."""

    def spend(self, content: memoryview) -> None:
        """This was read of the connection at once."""


class Relay:
    """Between a client and the gRPC server. It ends when the client has gone, or when the server has closed its end and
    the client has all that the server wrote before."""

    def __init__(
        self,
        client: socket.socket,
        server: socket.socket,
        buffer: memoryview,
        on_end: Callable[[], None],
        allowance: Allowance | None = None,
    ) -> None:
        """Takes both sockets over. `buffer` is used within one turn of the loop only: all relays share it. `allowance`:
        what the client may send; anything if None."""
        self._sockets = client, server
        self._on_end = on_end
        self._requests = _Pump(
            client, server, buffer, allowance, on_source_end=self.close, on_sink_end=self._server_closed
        )
        self._responses = _Pump(server, client, buffer, None, on_source_end=self.close, on_sink_end=self.close)
        self._has_ended = False

    def close(self) -> None:
        """End the connection now. Idempotent."""
        if self._has_ended:
            return
        self._has_ended = True
        self._requests.stop()
        self._responses.stop()
        for connection in self._sockets:
            connection.close()
        self._on_end()

    def _server_closed(self) -> None:
        """What the server wrote before, the reasons of its end among it, is still on its way."""
        self._requests.stop()


class _Pump:
    """One direction."""

    def __init__(
        self,
        source: socket.socket,
        sink: socket.socket,
        buffer: memoryview,
        allowance: Allowance | None,
        *,
        on_source_end: Callable[[], None],
        on_sink_end: Callable[[], None],
    ) -> None:
        self._source, self._sink = source, sink
        self._buffer = buffer
        self._allowance = allowance
        self._pause: asyncio.TimerHandle | None = None
        self._on_source_end, self._on_sink_end = on_source_end, on_sink_end
        self._unsent = b""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(source.fileno(), self._read)

    def stop(self) -> None:
        """Carry nothing more. Idempotent."""
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._source.fileno())
        self._loop.remove_writer(self._sink.fileno())

    def _read(self) -> None:
        if self._must_wait():
            return
        try:
            count = self._source.recv_into(self._buffer)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            count = 0
        if not count:
            self._on_source_end()
            return
        if self._allowance is not None:
            self._allowance.spend(self._buffer[:count])
        self._write(self._buffer[:count])

    def _must_wait(self) -> bool:
        """Whether the source sends too much: then its bytes stay in the socket for a moment."""
        seconds = self._allowance.wait() if self._allowance is not None else 0.0
        if seconds <= 0:
            return False
        self._loop.remove_reader(self._source.fileno())
        self._pause = self._loop.call_later(max(seconds, _SHORTEST_PAUSE_SECONDS), self._go_on)
        return True

    def _go_on(self) -> None:
        self._pause = None
        self._loop.add_reader(self._source.fileno(), self._read)

    def _write(self, content: memoryview) -> None:
        sent = self._send(content)
        if sent is not None and sent < len(content):
            self._unsent = bytes(content[sent:])
            self._loop.remove_reader(self._source.fileno())
            self._loop.add_writer(self._sink.fileno(), self._write_rest)

    def _write_rest(self) -> None:
        sent = self._send(self._unsent)
        if sent is None:
            return
        self._unsent = self._unsent[sent:]
        if not self._unsent:
            self._loop.remove_writer(self._sink.fileno())
            self._loop.add_reader(self._source.fileno(), self._read)

    def _send(self, content: bytes | memoryview) -> int | None:
        """How many bytes the sink took; None if it takes no more."""
        try:
            return self._sink.send(content)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            self._on_sink_end()
            return None
