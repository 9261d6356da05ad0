"""A message of the wire, cut between its fields: each part is a message, and all of them merged are the whole.

So a large message is parsed in short steps, and its parts are counted before one of them takes memory: a part of two
bytes may become an object of a hundred. Raises `Malformed` for bytes that are no message.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_LONGEST_VARINT = 10


class Malformed(ValueError):
    """The bytes are no protobuf message."""


class Field(NamedTuple):
    """A field where it lies in the wire: from `start` to `end`, its content from `content` on."""

    number: int
    start: int
    content: int
    end: int


def fields(wire: bytes, start: int, end: int) -> Iterator[Field]:
    """The fields of the message that lies between `start` and `end`."""
    at = start
    while at < end:
        begun = at
        tag = wire[at]
        at += 1
        if tag >= 0x80:
            tag, at = _varint(wire, begun, end)
        kind = tag & 7
        if kind == _LENGTH:
            if at >= end:
                raise Malformed
            length = wire[at]
            if length < 0x80:
                at += 1
            else:
                length, at = _varint(wire, at, end)
            content, at = at, at + length
        elif kind == _VARINT:
            content = at
            _, at = _varint(wire, at, end)
        elif kind in (_FIXED64, _FIXED32):
            content, at = at, at + (8 if kind == _FIXED64 else 4)
        else:  # groups: no message of this package has one
            raise Malformed
        if at > end or tag < 8:
            raise Malformed
        yield Field(tag >> 3, begun, content, at)


def _varint(wire: bytes, at: int, end: int) -> tuple[int, int]:
    """Its value, and where it ends."""
    value = 0
    for shift in range(0, 7 * _LONGEST_VARINT, 7):
        if at >= end:
            raise Malformed
        byte = wire[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise Malformed
