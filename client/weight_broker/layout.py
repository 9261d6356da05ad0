"""The layout of a weight set: what tensors there are and how their elements lie in memory.

A source can serve a receiver only if their layouts have the same fingerprint. Where they do not, `differences` says
why, by tensor and field.
"""

from __future__ import annotations

import enum
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from typing import NamedTuple, overload

from weight_broker.errors import InvalidArgument

MAX_TENSORS = 200_000
MAX_DIMENSIONS = 64
MAX_NAME_CHARACTERS = 1024
MAX_TENSOR_BYTES = 1 << 46
MAX_LAYOUT_BYTES = 1 << 50
_MOST_COUNTED = 1000
"""Differences between two layouts."""
_COMPARED_AT_ONCE = 256
_FORM_START, _FORM_END = b'["layout/1",[', b"]]"

# Bytes per element of every PyTorch type whose elements are plain memory. Types of less than a byte are refused, and so
# are the quantized types, whose scales live outside the elements.
ITEM_SIZES = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "uint16": 2,
    "int16": 2,
    "uint32": 4,
    "int32": 4,
    "uint64": 8,
    "int64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1,
    "complex32": 4,
    "complex64": 8,
    "complex128": 16,
}


class MemoryFormat(enum.StrEnum):
    """How a tensor's elements lie in memory."""

    STRIDED = "strided"
    FRACTAL_NZ = "fractal_nz"
    FRACTAL_NZ_C0_16 = "fractal_nz_c0_16"
    FRACTAL_NZ_C0_32 = "fractal_nz_c0_32"
    FRACTAL_NZ_C0_2 = "fractal_nz_c0_2"
    FRACTAL_NZ_C0_4 = "fractal_nz_c0_4"
    FRACTAL_NZ_C0_8 = "fractal_nz_c0_8"


class TensorSpec(NamedTuple):
    """One tensor of a layout."""

    name: str
    """Unique within the layout."""
    dtype: str
    """Element type by its PyTorch name."""
    shape: tuple[int, ...]
    """Size of each dimension; empty for a scalar."""
    stride: tuple[int, ...]
    """Distance between neighbours in each dimension, in elements."""
    storage_bytes: int
    """Bytes from the first to the last element, in the memory format; 0 if there are no elements."""
    storage_offset: int = 0
    """Offset of the first element in the instance's storage, in elements. It says where one instance keeps the tensor,
    not what the tensor is, and so is not part of the fingerprint."""
    memory_format: MemoryFormat = MemoryFormat.STRIDED
    """How the elements lie in memory."""
    alias_of: str = ""
    """Name of the tensor that this one shares all its memory with (tied weights)."""

    @property
    def element_count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_dense(self) -> bool:
        """True if the elements fill their memory without gaps, in any order."""
        return (
            self.memory_format is not MemoryFormat.STRIDED
            or self.element_count * ITEM_SIZES[self.dtype] == self.storage_bytes
        )

    @property
    def content_bytes(self) -> int:
        """Bytes that move for this tensor: its memory if that is dense, else its elements packed in row-major order;
        0 for an alias."""
        if self.alias_of:
            return 0
        if self.memory_format is not MemoryFormat.STRIDED:
            return self.storage_bytes
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]  # what a dense tensor's memory amounts to as well


class Layout(Sequence[TensorSpec]):
    """All tensors of a weight set, sorted by name. Creating one validates it (`InvalidArgument`)."""

    def __init__(self, tensors: Iterable[TensorSpec]) -> None:
        self.tensors: tuple[TensorSpec, ...] = tuple(sorted(tensors, key=lambda spec: spec.name))
        _validate(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @overload
    def __getitem__(self, index: int) -> TensorSpec: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[TensorSpec, ...]: ...

    def __getitem__(self, index: int | slice) -> TensorSpec | tuple[TensorSpec, ...]:
        return self.tensors[index]

    def __iter__(self) -> Iterator[TensorSpec]:
        return iter(self.tensors)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.tensors == other.tensors

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"Layout({len(self)} tensors, {self.content_bytes} bytes, fingerprint {self.fingerprint[:12]})"

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the canonical form: everything but `storage_offset`, in the order of names."""
        return hashlib.sha256(_FORM_START + _form(self.tensors) + _FORM_END).hexdigest()

    @cached_property
    def content_sizes(self) -> tuple[int, ...]:
        """`TensorSpec.content_bytes` of each tensor."""
        return tuple([spec.content_bytes for spec in self.tensors])

    @cached_property
    def content_bytes(self) -> int:
        """Bytes of content, aliases counted once."""
        return sum(self.content_sizes)


class LayoutBuilder:
    """A layout whose tensors come in parts, sorted by name: each takes a short time, however large the whole is."""

    def __init__(self) -> None:
        self._tensors: list[TensorSpec] = []
        self._by_name: dict[str, TensorSpec] = {}
        self._sizes: list[int] = []
        self._total_bytes = 0
        self._form = hashlib.sha256(_FORM_START)

    def add(self, part: Sequence[TensorSpec]) -> None:
        """The next tensors. Raises `InvalidArgument`."""
        _check_count(len(self._tensors) + len(part))
        last = self._tensors[-1].name if self._tensors else ""
        for spec in part:
            if spec.name < last:
                raise InvalidArgument("layout.tensors", "not sorted", "tensors sorted by name")
            last = spec.name
        self._total_bytes += _validate_part(part, self._by_name)
        self._form.update((b"," if self._tensors and part else b"") + _form(part))
        self._sizes += [spec.content_bytes for spec in part]
        self._tensors += part

    def finish(self) -> Layout:
        """The layout of all parts. Raises `InvalidArgument`."""
        if not self._tensors:
            raise InvalidArgument("layout.tensors", "empty", "at least one tensor")
        _check_total(self._total_bytes)
        self._form.update(_FORM_END)
        layout = Layout.__new__(Layout)
        layout.tensors = tuple(self._tensors)
        layout.__dict__.update(  # cached properties, computed already
            fingerprint=self._form.hexdigest(), content_sizes=tuple(self._sizes), content_bytes=sum(self._sizes)
        )
        return layout


def differences(resident: Layout, wanted: Layout, limit: int = 8) -> list[str]:
    """What differs between the resident layout and the wanted one, a sentence each, at most `limit` and a count: first
    tensors that one of them lacks. Beyond a thousand they are not counted."""
    found = _Differences(limit)
    for have, want in _pairs(resident.tensors, wanted.tensors):
        found.add(have, want)
        if found.count > limit + _MOST_COUNTED:
            return [*found.shown(), f"and more than {_MOST_COUNTED} more"]
    shown = found.shown()
    return shown + ([f"and {found.count - len(shown)} more"] if found.count > len(shown) else [])


class _Differences:
    """Each difference, to be put into words if it is shown: there may be many, and few are."""

    def __init__(self, limit: int) -> None:
        self.count = 0
        self._limit = limit
        self._missing: list[Callable[[], str]] = []
        self._surplus: list[Callable[[], str]] = []
        self._changed: list[Callable[[], str]] = []

    def add(self, have: TensorSpec | None, want: TensorSpec | None) -> None:
        """A resident tensor, and the wanted one of the same name."""
        if want is None and have is not None:
            self._note(self._missing, "{}: missing from the receiver's tensors".format, have.name)
        elif have is None and want is not None:
            self._note(self._surplus, "{}: not in the resident weight set".format, want.name)
        elif have is not None and want is not None:
            for field in ("dtype", "shape", "stride", "storage_bytes", "memory_format", "alias_of"):
                own, wished = getattr(have, field), getattr(want, field)
                if own != wished:
                    self._note(self._changed, _difference, want.name, field, own, wished)

    def shown(self) -> list[str]:
        """The first ones."""
        return [words() for words in [*self._missing, *self._surplus, *self._changed][: self._limit]]

    def _note(self, group: list[Callable[[], str]], words: Callable[..., str], *facts: object) -> None:
        self.count += 1
        if len(group) < self._limit:
            group.append(partial(words, *facts))


def _pairs(
    resident: Sequence[TensorSpec], wanted: Sequence[TensorSpec]
) -> Iterator[tuple[TensorSpec | None, TensorSpec | None]]:
    """Tensors of the same name, and those that have no counterpart; parts that are equal are left out."""
    at, to = 0, 0
    while at < len(resident) or to < len(wanted):
        if resident[at : at + _COMPARED_AT_ONCE] == wanted[to : to + _COMPARED_AT_ONCE]:
            at, to = at + _COMPARED_AT_ONCE, to + _COMPARED_AT_ONCE
            continue
        for _ in range(_COMPARED_AT_ONCE):
            have = resident[at] if at < len(resident) else None
            want = wanted[to] if to < len(wanted) else None
            if have is not None and want is not None and have.name != want.name:
                have, want = (have, None) if have.name < want.name else (None, want)
            at, to = at + (have is not None), to + (want is not None)
            if have != want:
                yield have, want


def _difference(name: str, field: str, own: object, wished: object) -> str:
    return f"{name}.{field}: resident {_show(own)}, wanted {_show(wished)}"


def _show(value: object) -> str:
    if isinstance(value, tuple):
        return "x".join(map(str, value)) or "scalar"
    return str(value) or "none"


def _form(tensors: Iterable[TensorSpec]) -> bytes:
    """The rows of the canonical form, without the brackets around them."""
    rows = [
        (name, dtype, shape, stride, storage_bytes, memory_format, alias_of)
        for name, dtype, shape, stride, storage_bytes, _, memory_format, alias_of in tensors
    ]
    return json.dumps(rows, separators=(",", ":"), ensure_ascii=False)[1:-1].encode("utf-8")


def _validate(tensors: Sequence[TensorSpec]) -> None:
    if not tensors:
        raise InvalidArgument("layout.tensors", "empty", "at least one tensor")
    _check_count(len(tensors))
    _check_total(_validate_part(tensors, {}))


def _check_count(count: int) -> None:
    if count > MAX_TENSORS:
        raise InvalidArgument("layout.tensors", count, f"at most {MAX_TENSORS} tensors")


def _check_total(total_bytes: int) -> None:
    if total_bytes > MAX_LAYOUT_BYTES:
        raise InvalidArgument("layout.tensors", f"{total_bytes} bytes", f"at most {MAX_LAYOUT_BYTES} bytes in total")


def _validate_part(tensors: Sequence[TensorSpec], by_name: dict[str, TensorSpec]) -> int:
    """Adds the tensors to `by_name`; returns their bytes."""
    total_bytes = 0
    for spec in tensors:
        name = spec.name
        if name in by_name:
            raise InvalidArgument("layout.tensors.name", name, "a name that no other tensor has")
        _validate_spec(spec)
        total_bytes += spec.storage_bytes
        if spec.alias_of:
            _validate_alias(spec, by_name.get(spec.alias_of))
        by_name[name] = spec
    return total_bytes


def _validate_spec(spec: TensorSpec) -> None:
    # Runs in every acquire, once for each tensor.
    name, dtype, shape, stride, storage_bytes, storage_offset, memory_format, _ = spec
    if not name or len(name) > MAX_NAME_CHARACTERS:
        raise InvalidArgument("layout.tensors.name", name, f"a text of 1 to {MAX_NAME_CHARACTERS} characters")
    if not name.isascii() and any("\ud800" <= character <= "\udfff" for character in name):
        raise InvalidArgument("layout.tensors.name", name, "text that UTF-8 can carry, without lone surrogates")
    item_size = ITEM_SIZES.get(dtype)
    if item_size is None:
        raise InvalidArgument(f"layout.tensors[{name}].dtype", dtype, "one of " + ", ".join(ITEM_SIZES))
    if len(shape) > MAX_DIMENSIONS:
        raise InvalidArgument(f"layout.tensors[{name}].shape", shape, f"at most {MAX_DIMENSIONS} dimensions")
    if len(stride) != len(shape):
        raise InvalidArgument(f"layout.tensors[{name}].stride", stride, f"{len(shape)} numbers, as many as shape has")
    span, count = 1, 1
    for size, step in zip(shape, stride, strict=True):
        if size < 0:
            raise InvalidArgument(f"layout.tensors[{name}].shape", shape, "sizes of 0 or more")
        if step < 0:
            raise InvalidArgument(f"layout.tensors[{name}].stride", stride, "strides of 0 or more")
        count *= size
        span += (size - 1) * step
    if storage_offset < 0:
        raise InvalidArgument(f"layout.tensors[{name}].storage_offset", storage_offset, "0 or more")
    least = span * item_size if count else 0
    if storage_bytes > MAX_TENSOR_BYTES or least > MAX_TENSOR_BYTES:
        raise InvalidArgument(f"layout.tensors[{name}].storage_bytes", storage_bytes, "at most 64 TiB")
    if memory_format is MemoryFormat.STRIDED:
        if storage_bytes != least:
            raise InvalidArgument(
                f"layout.tensors[{name}].storage_bytes", storage_bytes, f"{least}, from shape, stride and dtype"
            )
        if count * item_size > least:
            raise InvalidArgument(
                f"layout.tensors[{name}].stride", stride, "elements that do not overlap", hint="Use .contiguous()."
            )
    elif storage_bytes < count * item_size:
        raise InvalidArgument(f"layout.tensors[{name}].storage_bytes", storage_bytes, f"at least {count * item_size}")


def _validate_alias(spec: TensorSpec, target: TensorSpec | None) -> None:
    field = f"layout.tensors[{spec.name}].alias_of"
    if target is None:
        raise InvalidArgument(field, spec.alias_of, "the name of a tensor that sorts before this one")
    if target.alias_of:
        raise InvalidArgument(field, spec.alias_of, "a tensor that is not an alias itself")
    same = ("dtype", "shape", "stride", "storage_bytes", "memory_format")
    differing = [name for name in same if getattr(spec, name) != getattr(target, name)]
    if differing:
        raise InvalidArgument(field, spec.alias_of, f"a tensor with the same {', '.join(differing)}")
