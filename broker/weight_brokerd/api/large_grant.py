"""An AcquireResponse with very many tensors, serialized in steps: pieces in a row are one message."""

from __future__ import annotations

from weight_broker.layout import Layout
from weight_broker.v1 import weight_broker_service_pb2 as pb
from weight_broker.v1 import weight_set_pb2
from weight_broker.wire import tensors_to_wire
from weight_brokerd.kinds.steps import PER_STEP, Steps

_LENGTH_DELIMITED = 2


def large_grant(head: pb.Granted, memory: bytes, layout: Layout | None) -> Steps[bytes]:
    """The response that grants what `head` says: `memory` is a serialized Granted, `layout` is added if it is one."""
    pieces = [head.SerializeToString(), memory]
    if layout is not None:
        pieces.append(pb.Granted(layout=weight_set_pb2.Layout(fingerprint=layout.fingerprint)).SerializeToString())
        for start in range(0, len(layout), PER_STEP):
            part = pb.Granted()
            tensors_to_wire(layout[start : start + PER_STEP], part.layout)
            pieces.append(part.SerializeToString())
            yield
    number = pb.AcquireResponse.DESCRIPTOR.fields_by_name["granted"].number
    length = sum(map(len, pieces))
    return b"".join([_varint(number << 3 | _LENGTH_DELIMITED), _varint(length), *pieces])


def add_layout(layout: Layout, message: weight_set_pb2.Layout) -> Steps[None]:
    """Writes the layout to an empty message."""
    message.fingerprint = layout.fingerprint
    for start in range(0, len(layout), PER_STEP):
        tensors_to_wire(layout[start : start + PER_STEP], message)
        yield


def _varint(value: int) -> bytes:
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])
