"""Walks over what a module's objects hold besides registered parameters and buffers.

Attributes, also in slots, and what is in them: lists, tuples, dicts, closures, partial functions, weak references,
modules that are not registered, other objects, attributes of tensors.
"""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

MAX_DEPTH = 5
PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)
_PLAIN_TYPES = frozenset(PLAIN)
_EVERY_MODULE = frozenset(vars(nn.Module())) | {"_compiled_call_impl"}
"""Attributes of nn.Module itself: registries, hooks and the mode."""
_MACHINERY = (
    "asyncio",
    "concurrent",
    "logging",
    "threading",
    "torch._",
    "torch.distributed",
    "torch.fx",
    "torch.optim",
    "weight_broker",
)
"""Packages whose objects hold no weights, but references to everything."""
_LEAVES = (type, types.ModuleType, types.BuiltinFunctionType, str, bytes, torch.Generator, torch.dtype, torch.device)

Leaf = tuple[str, Any]
"""Name and value: a tensor, an array of NumPy, an object of TorchScript, or plain."""


class Walk:
    """One walk over a module. Every object is found once, under its first name."""

    def __init__(self, module: nn.Module, *, passes_over: Callable[[object], bool] = lambda _: False) -> None:
        """`passes_over`: objects, besides modules, that are not looked into."""
        self._module = module
        self._passes_over = passes_over
        self._seen: dict[int, object] = {}  # an id is good only while its object lives

    def leaves(self) -> Iterator[tuple[nn.Module, str, Any]]:
        """(owner, name, value) of everything that the modules hold besides their registries."""
        registered = dict(self._module.named_modules())
        self._seen = {id(module): module for module in registered.values()}
        for prefix, module in registered.items():
            for name, value in self._of_module(prefix, module):
                yield module, name, value

    def _of_module(self, prefix: str, module: nn.Module) -> Iterator[Leaf]:
        for name, tensor in registered_tensors(module):
            self._seen[id(tensor)] = tensor
            if vars(tensor) or type(tensor) is not nn.Parameter:
                yield from self._attributes(join(prefix, name), tensor, 1)
        is_script = isinstance(module, torch.jit.ScriptModule)
        for name, value in _script_attributes(module) if is_script else attributes_of(module):
            if name in _EVERY_MODULE or is_remembered(module, name, value):
                continue
            if type(value) in _PLAIN_TYPES:  # nearly all are: that is the short way
                yield f"{prefix}.{name}" if prefix else name, value
            else:
                yield from self._inside(join(prefix, name), value, 0)

    def _inside(self, name: str, value: Any, depth: int) -> Iterator[Leaf]:
        if type(value) in _PLAIN_TYPES:
            yield name, value
            return
        if id(value) in self._seen:
            return
        if isinstance(value, torch.Tensor):
            self._seen[id(value)] = value
            yield name, value
            yield from self._attributes(name, value, depth + 1)
        elif is_array(value) or isinstance(value, torch.ScriptObject):
            self._seen[id(value)] = value
            yield name, value
        elif depth < MAX_DEPTH and not isinstance(value, _LEAVES):
            self._seen[id(value)] = value
            yield from self._parts(name, value, depth + 1)

    def _parts(self, name: str, value: Any, depth: int) -> Iterator[Leaf]:
        if isinstance(value, nn.Module):
            yield from self._unregistered(name, value)
        elif isinstance(value, list | tuple | deque):
            for index, item in enumerate(value):
                yield from self._inside(f"{name}.{index}", item, depth)
        elif isinstance(value, dict | types.MappingProxyType):  # others may read from disk when they are asked
            for index, (key, item) in enumerate(list(value.items())):
                shown = key if isinstance(key, PLAIN) else index  # the text of an object may have its address
                yield from self._inside(f"{name}.{shown}", item, depth)
        elif isinstance(value, weakref.ref):
            yield from self._inside(name, value(), depth)
        elif isinstance(value, functools.partial):
            yield from self._inside(name, (value.func, value.args, value.keywords), depth)
        elif isinstance(value, types.MethodType):
            yield from self._inside(name, value.__self__, depth)
            yield from self._inside(name, value.__func__, depth)
        elif isinstance(value, types.FunctionType):
            yield from self._inside(name, _bound(value), depth)
        elif not type(value).__module__.startswith(_MACHINERY) and not self._passes_over(value):
            yield from self._attributes(name, value, depth)

    def _attributes(self, name: str, value: Any, depth: int) -> Iterator[Leaf]:
        for attribute, item in attributes_of(value):
            yield from self._inside(f"{name}.{attribute}", item, depth)

    def _unregistered(self, prefix: str, module: nn.Module) -> Iterator[Leaf]:
        for path, part in module.named_modules():
            if part is not module and id(part) in self._seen:
                continue
            self._seen[id(part)] = part
            for name, tensor in registered_tensors(part):
                if id(tensor) not in self._seen:
                    self._seen[id(tensor)] = tensor
                    yield join(join(prefix, path), name), tensor
            yield from self._of_module(join(prefix, path), part)


def registered_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The module's own parameters and buffers."""
    found = [*module._parameters.items(), *module._buffers.items()]
    return [(name, tensor) for name, tensor in found if tensor is not None]


def attributes_of(value: Any) -> Iterator[Leaf]:
    """What the object holds, in its dictionary and in slots."""
    held = getattr(value, "__dict__", None)
    if isinstance(held, dict):
        yield from list(held.items())
    kind: Any = type(value)
    for name in _slots(kind):
        try:
            yield name, object.__getattribute__(value, name)
        except AttributeError:  # the slot is empty
            continue


def _script_attributes(module: nn.Module) -> Iterator[Leaf]:
    """What an object of TorchScript holds for the module."""
    kind: Any = vars(module).get("_concrete_type")
    for name in sorted(kind.get_attributes()) if kind is not None else ():
        if name not in module._parameters and name not in module._buffers:
            yield name, getattr(module, name)


def is_remembered(owner: object, name: str, value: Any) -> bool:
    """Whether a property has computed the value from others, and would compute it again."""
    kind: Any = type(owner)
    return name in _remembering(kind) and isinstance(value, PLAIN)


def is_array(value: Any) -> bool:
    """Whether it is an array of NumPy."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name


@functools.lru_cache(maxsize=4096)
def _remembering(kind: Any) -> frozenset[str]:
    """Names of its properties that remember their values."""
    return frozenset(
        name
        for owner in kind.__mro__
        for name, value in vars(owner).items()
        if isinstance(value, functools.cached_property)
    )


@functools.lru_cache(maxsize=4096)
def _slots(kind: Any) -> tuple[str, ...]:
    found: list[str] = []
    for owner in kind.__mro__:
        slots = vars(owner).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            is_private = name.startswith("__") and not name.endswith("__")
            found.append(f"_{owner.__name__.lstrip('_')}{name}" if is_private else name)
    return tuple(name for name in found if name not in ("__dict__", "__weakref__"))


def _bound(function: types.FunctionType) -> dict[str, Any]:
    """The values that a function carries with it."""
    found: dict[str, Any] = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # the cell is empty
            continue
    found["defaults"] = (function.__defaults__, function.__kwdefaults__)
    return found
