"""Requests as they arrive: who sends one is known before it is read, how large it may be before it is parsed.

A large request is parsed in steps, two at most at a time. What may repeat in it is counted first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from google.protobuf.message import DecodeError, Message

from weight_broker.errors import InvalidArgument
from weight_broker.layout import MAX_TENSORS, Layout
from weight_broker.v1 import weight_set_pb2
from weight_brokerd.api.incoming.layouts import LayoutCache, Part
from weight_brokerd.api.incoming.wire_parts import Field, fields
from weight_brokerd.kinds.steps import PER_STEP, Steps

PART_BYTES = 128 << 10
"""Bytes that are parsed in one step."""
MAXIMUM_FIELD_BYTES = 4 << 20
"""Of one field beside the layout: more than the longest key and the longest digests take."""
MAXIMUM_COUNTS: Mapping[str, int] = {"placements": MAX_TENSORS, "regions": 65_536, "digests": 16}
"""Of fields that repeat."""
MAXIMUM_ATTRIBUTES = 1024
"""Engine attributes that are parsed; a key has fewer."""

M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True)
class Received(Generic[M]):
    """A request with a layout."""

    message: M
    """Without its layout."""
    layout: Layout | None
    """None if the request has none."""


def received(wire: bytes, make: type[M], layouts: LayoutCache) -> Steps[Received[M]]:
    """The request. Raises `InvalidArgument`; `Malformed` or `DecodeError` for bytes that are no such message."""
    shape = _Shape(make)
    message = make()
    layout_parts: list[Part] = []
    begun = 0
    for number, field in enumerate(fields(wire, 0, len(wire)), 1):
        if field.number == shape.layout:
            message.MergeFromString(wire[begun : field.start])
            layout_parts.append((field.content, field.end))
            begun = field.end
            continue
        shape.check(wire, field)
        if field.end - begun >= PART_BYTES:
            message.MergeFromString(wire[begun : field.end])
            begun = field.end
            yield
        elif number % (4 * PER_STEP) == 0:
            yield
    message.MergeFromString(wire[begun:])
    layout = (yield from layouts.layout(wire, layout_parts)) if layout_parts else None
    return Received(message, layout)


def at_fault(wire: bytes) -> InvalidArgument:
    """The error for bytes that are no request."""
    return InvalidArgument(
        "request", f"{len(wire)} bytes", "a message of the method's request type, with texts in UTF-8"
    )


def parsed(wire: bytes, parse: Any) -> Message:
    """A small request. Raises `InvalidArgument`."""
    try:
        return cast(Message, parse(wire))
    except DecodeError:
        raise at_fault(wire) from None


class _Shape:
    """What may be in a request, by the numbers of its fields."""

    def __init__(self, make: type[Message]) -> None:
        by_name = make.DESCRIPTOR.fields_by_name
        self._names = {field.number: name for name, field in by_name.items()}
        self._room = {by_name[name].number: most for name, most in MAXIMUM_COUNTS.items() if name in by_name}
        self._key = by_name["key"].number
        self.layout = by_name["layout"].number

    def check(self, wire: bytes, field: Field) -> None:
        """Raises `InvalidArgument` for a field that is too large, or one too many."""
        if (room := self._room.get(field.number)) is not None:
            if room == 0:
                name = self._names[field.number]
                raise InvalidArgument(name, f"more than {MAXIMUM_COUNTS[name]}", f"at most {MAXIMUM_COUNTS[name]}")
            self._room[field.number] = room - 1
        size = field.end - field.start
        if size > MAXIMUM_FIELD_BYTES:
            name = self._names.get(field.number, "request")
            raise InvalidArgument(name, f"{size} bytes", f"at most {MAXIMUM_FIELD_BYTES} bytes")
        if field.number == self._key and size > MAXIMUM_ATTRIBUTES:  # an attribute has a byte or more
            _check_key(wire, field)


def _check_key(wire: bytes, key: Field) -> None:
    number = weight_set_pb2.WeightSetKey.DESCRIPTOR.fields_by_name["engine_attributes"].number
    room = MAXIMUM_ATTRIBUTES
    for field in fields(wire, key.content, key.end):
        room -= field.number == number
        if room < 0:
            raise InvalidArgument(
                "key.engine_attributes", f"more than {MAXIMUM_ATTRIBUTES}", f"at most {MAXIMUM_ATTRIBUTES}"
            )
