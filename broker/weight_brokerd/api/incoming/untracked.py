"""Layouts that Python's garbage collector leaves out.

It looks at all objects that might be part of a cycle, again and again: 0.3 s for each million tensors, in which no
call is answered. A tensor refers to texts and numbers only, so nothing is lost; plain tuples of such are left out by
Python.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

from weight_broker.layout import Layout, TensorSpec

_untrack = ctypes.pythonapi.PyObject_GC_UnTrack
_untrack.argtypes = (ctypes.py_object,)
_untrack.restype = None


def untrack(tensors: Iterable[TensorSpec]) -> None:
    """The collector does not visit these tensors any more; they end with their last reference."""
    for tensor in tensors:
        _untrack(tensor.shape)
        _untrack(tensor.stride)
        _untrack(tensor)


def untrack_layout(layout: Layout) -> None:
    """The same for a layout of such tensors: not even their number costs the collector time."""
    _untrack(layout.tensors)
    _untrack(layout.content_sizes)
