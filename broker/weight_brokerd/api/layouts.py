"""Layouts of requests, decoded once."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from weight_broker.layout import Layout
from weight_broker.v1 import weight_set_pb2
from weight_broker.wire import layout_from_wire


class LayoutCache:
    """Validated layouts by the digest of their message. Instances of one model send the same bytes, and to decode 400
    tensors takes longer than all other work of an acquisition."""

    def __init__(self, size: int = 64, tensors: int = 200_000) -> None:
        """Keeps the last used layouts: at most `size`, with at most `tensors` tensors together."""
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
            if len(layout) <= self._tensors:  # a larger layout would only evict all others
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
