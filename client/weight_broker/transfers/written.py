"""What a load from disk has written: a tensor that it left alone holds an initial value, which is no checkpoint.

A tensor counts as written if it has other memory, another version (torch counts writes in place) or another content in
a sample of it. Writes through `.data`, through NumPy and by address have no version: there only
the content shows them, and a load that writes what is there already looks like none. So an unchanged constant (zeros,
ones) passes where it cannot be a tensor that was left over: see `Watch.unwritten`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from weight_broker.errors import InvalidArgument
from weight_broker.memory.kind import kind_of
from weight_broker.memory.tensors import describe

_SHOWN = 4

TensorSource = Mapping[str, object] | Callable[[], Mapping[str, object]]
"""Tensors by name, or a function that returns them: for loaders that replace tensors while they load."""


@runtime_checkable
class Owned(Protocol):
    """Tensors that know the object which they are the weights of, such as a module."""

    def current(self) -> Mapping[str, object]:
        """The object's tensors now."""

    @property
    def computed(self) -> Collection[str]:
        """Names of the tensors that are in no checkpoint: construction makes them, a load need not write them."""

    def other_state(self) -> Mapping[str, str]:
        """What the object holds besides the tensors, by name."""


class _Trace(NamedTuple):
    """What shows that a tensor was written."""

    address: int
    version: int | None
    sample: int


class Watch:
    """The tensors before a load. Keeps none of them alive."""

    def __init__(self, source: TensorSource, *, touched: bool = False) -> None:
        """`touched`: a transfer into the tensors broke off. What it left may be what the load writes, so that only
        versions count."""
        tensors = current(source)
        self._is_current = callable(source) or isinstance(source, Owned)
        traces = _traces(tensors)
        self._before = {name: trace for name, trace in traces.items() if not touched or trace.version is not None}
        self._state = _state(tensors)

    def refusal(self, tensors: Mapping[str, object]) -> str:
        """Why `tensors`, after the load, are not what the load has read; empty if they are."""
        computed = tensors.computed if isinstance(tensors, Owned) else ()
        unwritten = sorted(set(self.unwritten(tensors)) - set(computed))
        if unwritten:
            return (
                f"the load did not write {len(unwritten)} of {len(tensors)} tensors ({_some(unwritten)}); if it gives "
                "the model other tensors, pass tensors_of(module), or a function that returns the tensors"
            )
        return state_changes(self._state, _state(tensors))

    def unwritten(self, tensors: Mapping[str, object]) -> list[str]:
        """Names of the tensors that the load left alone.

        An unchanged constant passes if the load wrote other tensors and this one either has no version, or is a vector
        (a bias, a norm) of tensors that were looked up again after the load: a tensor that was replaced is not among
        those.
        """
        same = self._same(tensors)
        if len(same) == len(tensors):
            return list(same)
        return [name for name, trace in same.items() if not self._may_be_constant(trace, tensors[name])]

    def left_over(self, tensors: Mapping[str, object]) -> list[str]:
        """Names of the tensors that the load left alone and that are no constants. For loaders of engines, which write
        in their own ways, and models that declare more than they use."""
        return [name for name in self._same(tensors) if not is_constant(tensors[name])]

    def _same(self, tensors: Mapping[str, object]) -> dict[str, _Trace]:
        after = _traces({name: tensors[name] for name in self._before if name in tensors})
        return {name: trace for name, trace in after.items() if trace == self._before[name]}

    def _may_be_constant(self, trace: _Trace, tensor: Any) -> bool:
        return (trace.version is None or (self._is_current and tensor.ndim <= 1)) and is_constant(tensor)


def current(source: TensorSource) -> Mapping[str, object]:
    """The tensors of `source` as of now."""
    if isinstance(source, Owned):
        return source.current()
    return source() if callable(source) else source


def state_changes(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """Why an instance that is filled instead of loading would lack state; empty if it would not."""
    changed = [name for name, value in after.items() if before.get(name) != value]
    if not changed:
        return ""
    shown = ", ".join(f"{name}: {before.get(name, 'absent')} -> {after[name]}" for name in changed[:_SHOWN])
    return f"loading changed {len(changed)} things besides the weights ({shown})"


def is_constant(tensor: Any) -> bool:
    """Whether all elements are equal."""
    torch = sys.modules.get("torch")
    numpy = sys.modules.get("numpy")
    if torch is not None and isinstance(tensor, torch.Tensor):
        flat: Any = tensor.detach().reshape(-1).contiguous().view(torch.uint8)
        elements = flat.reshape(-1, tensor.element_size())
    elif numpy is not None and isinstance(tensor, numpy.ndarray):
        elements = numpy.ascontiguousarray(tensor).reshape(-1).view(numpy.uint8).reshape(-1, tensor.itemsize)
    else:
        return False
    return bool((elements == elements[:1]).all())


def _traces(tensors: Mapping[str, object]) -> dict[str, _Trace]:
    """Of the tensors that have memory, as far as they can be shared."""
    try:
        described = describe(tensors)
    except InvalidArgument:  # the load gives memory to them: each one that has none is left out
        shareable = {name: tensor for name, tensor in tensors.items() if _is_shareable(name, tensor)}
        if not shareable:
            return {}
        described = describe(shareable)
    sample = kind_of(described.device_kind).digests(described, sampled=True).values
    first = {tensor.spec.name: value for tensor, value in zip(described.tensors, sample, strict=True)}
    return {
        spec.name: _Trace(tensor.address, _version(tensors[spec.name]), first[spec.alias_of or spec.name])
        for tensor in described.tensors
        for spec in (tensor.spec,)
        if spec.storage_bytes
    }


def _is_shareable(name: str, tensor: object) -> bool:
    try:
        describe({name: tensor})
    except InvalidArgument:
        return False
    return True


def _version(tensor: Any) -> int | None:
    """torch's count of the writes in place; None where there is none."""
    try:
        version: int | None = tensor._version
    except (AttributeError, RuntimeError):  # no tensor of torch, or one of its inference mode
        return None
    return version


def _state(tensors: Mapping[str, object]) -> Mapping[str, str]:
    return tensors.other_state() if isinstance(tensors, Owned) else {}


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN] + ([f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []))
