"""Layouts of requests, decoded once."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from weakref import WeakValueDictionary

from weight_broker.errors import InvalidArgument
from weight_broker.layout import MAX_TENSORS, Layout, LayoutBuilder
from weight_broker.v1 import weight_set_pb2
from weight_broker.wire import check_fingerprint, specs_from_wire
from weight_brokerd.api.incoming.remains import Remains
from weight_brokerd.api.incoming.untracked import untrack, untrack_layout
from weight_brokerd.api.incoming.wire_parts import fields
from weight_brokerd.kinds.steps import PER_STEP, Steps

MAXIMUM_TENSOR_BYTES = 32 << 10
"""Of one tensor's message: more than the longest names and the most dimensions take."""
Part = tuple[int, int]
"""Where bytes lie in a request: from, to."""

_HASHED_BYTES = 1 << 20
_TENSORS = weight_set_pb2.Layout.DESCRIPTOR.fields_by_name["tensors"].number


class LayoutCache:
    """Validated layouts by the digest of their message. Instances of one model send the same bytes, and to decode 400
    tensors takes longer than all other work of an acquisition.

    Layouts with the same fingerprint are one object for as long as a publication or an acquisition has it, whether it
    is among the last used or not."""

    def __init__(self, size: int = 64, tensors: int = 200_000, remains: Remains | None = None) -> None:
        """Keeps the last used layouts: at most `size`, with at most `tensors` tensors together. `remains` frees what is
        gone."""
        self._remains = remains
        self._size = size
        self._tensors = tensors
        self._kept_tensors = 0
        self._layouts: OrderedDict[bytes, Layout] = OrderedDict()
        self._alive: WeakValueDictionary[str, Layout] = WeakValueDictionary()
        """All layouts that anything in this process has, by fingerprint."""

    def layout(self, wire: bytes, parts: Sequence[Part]) -> Steps[Layout]:
        """The layout that is serialized in these parts of a request. Raises `InvalidArgument`; `DecodeError` or
        `Malformed` for other bytes."""
        digest = yield from _digest(wire, parts)
        layout = self._layouts.get(digest)
        if layout is None:
            decoded = yield from _decoded(wire, parts)
            if self._remains is not None:
                self._remains.follow(decoded)
            layout = self._alive.setdefault(decoded.fingerprint, decoded)
            if len(layout) <= self._tensors:  # a larger layout would only evict all others
                self._keep(digest, layout)
        else:
            self._layouts.move_to_end(digest)
        return layout

    def _keep(self, digest: bytes, layout: Layout) -> None:
        if digest in self._layouts:  # another request brought it meanwhile
            return
        self._layouts[digest] = layout
        self._kept_tensors += len(layout)
        while len(self._layouts) > self._size or self._kept_tensors > self._tensors:
            _, oldest = self._layouts.popitem(last=False)
            self._kept_tensors -= len(oldest)


def _decoded(wire: bytes, parts: Sequence[Part]) -> Steps[Layout]:
    """The layout, parsed and validated some tensors at a time, and counted before."""
    slices = yield from _slices(wire, parts)
    builder = LayoutBuilder()
    fingerprint = ""
    for start, end in slices:
        part = weight_set_pb2.Layout.FromString(wire[start:end])
        fingerprint = part.fingerprint or fingerprint
        specs = specs_from_wire(part)
        builder.add(specs)
        untrack(specs)
        yield
    layout = builder.finish()
    untrack_layout(layout)
    check_fingerprint(layout, fingerprint)
    return layout


def _slices(wire: bytes, parts: Sequence[Part]) -> Steps[list[Part]]:
    """The parts, cut into slices of so many fields each."""
    slices: list[Part] = []
    tensors = 0
    for begun, end in parts:
        cut = begun
        for number, field in enumerate(fields(wire, begun, end), 1):
            size = field.end - field.start
            if size > MAXIMUM_TENSOR_BYTES:
                raise InvalidArgument("layout.tensors", f"{size} bytes", f"at most {MAXIMUM_TENSOR_BYTES} for a tensor")
            tensors += field.number == _TENSORS
            if tensors > MAX_TENSORS:
                raise InvalidArgument("layout.tensors", f"more than {MAX_TENSORS}", f"at most {MAX_TENSORS} tensors")
            if number % PER_STEP == 0:
                slices.append((cut, field.end))
                cut = field.end
            if number % (16 * PER_STEP) == 0:
                yield
        slices.append((cut, end))
    return slices


def _digest(wire: bytes, parts: Sequence[Part]) -> Steps[bytes]:
    found = hashlib.sha256()
    view = memoryview(wire)
    for begun, end in parts:
        for start in range(begun, end, _HASHED_BYTES):
            found.update(view[start : min(start + _HASHED_BYTES, end)])
            if start > begun:
                yield
    return found.digest()
