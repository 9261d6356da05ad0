"""Layouts of requests, decoded once."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from weight_broker.layout import Layout
from weight_broker.v1 import weight_set_pb2
from weight_broker.wire import layout_from_wire


class LayoutCache:
    """Layouts that were validated already, by the digest of their message: instances of one model send the same
    bytes, and decoding 400 tensors takes longer than everything else the broker does for an acquisition."""

    def __init__(self, size: int = 64, tensors: int = 200_000) -> None:
        """Keeps at most `size` layouts with at most `tensors` tensors together, those used last."""
        self._size = size
        self._tensors = tensors
        self._kept_tensors = 0
        self._layouts: OrderedDict[bytes, Layout] = OrderedDict()

    def layout(self, message: weight_set_pb2.Layout) -> Layout:
        """The layout in the message."""
        digest = hashlib.sha256(message.SerializeToString(deterministic=True)).digest()
        layout = self._layouts.get(digest)
        if layout is None:
            layout = layout_from_wire(message)
            if len(layout) <= self._tensors:  # one that does not fit would only push the others out
                self._keep(digest, layout)
        else:
            self._layouts.move_to_end(digest)
        return layout

    def _keep(self, digest: bytes, layout: Layout) -> None:
        self._layouts[digest] = layout
        self._kept_tensors += len(layout)
        while len(self._layouts) > self._size or self._kept_tensors > self._tensors:
            _, oldest = self._layouts.popitem(last=False)
            self._kept_tensors -= len(oldest)
