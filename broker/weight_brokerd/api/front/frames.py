"""Counts the HTTP/2 frames that a client sends. gRPC spends as much on a ping of 17 bytes as on 16 KiB of a request."""

from __future__ import annotations

_PREFACE_BYTES = 24
_HEADER_BYTES = 9
_LENGTH_BYTES = 3


class FrameCounter:
    """Of one connection, from its first byte on."""

    def __init__(self) -> None:
        self._ahead = _PREFACE_BYTES
        """Bytes before the next header."""
        self._header = b""
        """Its beginning, if only that has arrived."""

    def count(self, content: memoryview) -> int:
        """How many frames begin in the next bytes of the connection."""
        at, frames = 0, 0
        while at + self._ahead < len(content):
            at += self._ahead
            self._ahead = 0
            missing = _HEADER_BYTES - len(self._header)
            self._header += content[at : at + missing]
            at = min(at + missing, len(content))
            if len(self._header) < _HEADER_BYTES:
                return frames
            self._ahead = int.from_bytes(self._header[:_LENGTH_BYTES], "big")
            self._header = b""
            frames += 1
        self._ahead -= len(content) - at
        return frames
