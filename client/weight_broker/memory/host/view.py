"""Tensors that are copy-on-write views of regions of host memory: nothing is copied at any size."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

from weight_broker.errors import InvalidArgument, TransferFailed
from weight_broker.layout import ITEM_SIZES, Layout, MemoryFormat, TensorSpec
from weight_broker.memory.host.address_space import Mapping
from weight_broker.memory.host.fill import check_regions

Framework = Literal["torch", "numpy"]


def map_tensors(
    layout: Layout,
    fds: Sequence[int],
    placements: Sequence[tuple[int, int]],
    *,
    framework: Framework = "torch",
) -> dict[str, Any]:
    """The tensors of sealed memfds by name, mapped, not copied. The file descriptors stay the caller's.

    Pages are shared with everyone who maps them until they are written; a write is seen by this process only. The
    memory stays mapped as long as one of the tensors lives. Every tensor has its layout's stride and storage offset 0;
    a tensor with gaps comes packed (row-major). Aliases are the same object.

    Raises `TransferFailed` if the regions are not what they should be, `InvalidArgument` if the framework lacks a type.
    """
    if framework not in ("torch", "numpy"):
        raise InvalidArgument("framework", framework, "'torch' or 'numpy'")
    check_regions(layout, fds, placements)
    make = _torch_maker(layout) if framework == "torch" else _numpy_maker(layout)
    try:
        # The views own the mappings: nothing here closes them.
        buffers = [Mapping(fd, os.fstat(fd).st_size, writable=True).owning_buffer() for fd in fds]
    except OSError as error:
        raise TransferFailed(f"cannot map the source's memory: {error.strerror}") from error
    tensors: dict[str, Any] = {}
    for spec, (region, offset) in zip(layout.tensors, placements, strict=True):
        if spec.alias_of:
            tensors[spec.name] = tensors[spec.alias_of]
            continue
        if spec.memory_format is not MemoryFormat.STRIDED or offset % ITEM_SIZES[spec.dtype]:
            raise TransferFailed(f"tensor {spec.name!r} cannot be mapped: its elements are not plain aligned memory")
        tensors[spec.name] = make(spec, buffers[region][offset : offset + spec.content_bytes])
    return tensors


def _stride(spec: TensorSpec) -> tuple[int, ...]:
    if spec.is_dense:
        return spec.stride
    stride: list[int] = []
    step = 1
    for size in reversed(spec.shape):
        stride.insert(0, step)
        step *= size
    return tuple(stride)


def _torch_maker(layout: Layout) -> Callable[[TensorSpec, memoryview], Any]:
    import torch

    host = torch.device("cpu")  # also where another device is the default
    types = {name: getattr(torch, name, None) for name in {spec.dtype for spec in layout}}
    _require_types(types, f"torch {torch.__version__}")

    def make(spec: TensorSpec, content: memoryview) -> torch.Tensor:
        dtype: Any = types[spec.dtype]
        if not content:
            return torch.empty_strided(spec.shape, spec.stride, dtype=dtype, device=host)
        storage = torch.frombuffer(content, dtype=torch.uint8).untyped_storage()
        # Not a view of another tensor: a view could not become a leaf without a trace of its base.
        with torch.inference_mode(False):  # usable outside of it too
            return torch.empty(0, dtype=dtype, device=host).set_(storage, 0, spec.shape, _stride(spec))

    return make


def _numpy_maker(layout: Layout) -> Callable[[TensorSpec, memoryview], Any]:
    import numpy

    types = {name: _numpy_type(name) for name in {spec.dtype for spec in layout}}
    _require_types(types, "numpy, with ml_dtypes for the types of machine learning,")

    def make(spec: TensorSpec, content: memoryview) -> numpy.ndarray[Any, Any]:
        item_size = ITEM_SIZES[spec.dtype]
        if not content:
            return numpy.empty(spec.shape, types[spec.dtype])
        return numpy.ndarray(
            spec.shape, types[spec.dtype], content, strides=[step * item_size for step in _stride(spec)]
        )

    return make


def _numpy_type(name: str) -> Any:
    import numpy

    try:
        return numpy.dtype(name)
    except TypeError:
        pass
    try:
        import ml_dtypes
    except ImportError:
        return None
    return getattr(ml_dtypes, name, None)


def _require_types(types: dict[str, Any], library: str) -> None:
    missing = sorted(name for name, found in types.items() if found is None)
    if missing:
        raise InvalidArgument(
            "framework", ", ".join(missing), f"types that {library} has", hint="Use the other framework."
        )
