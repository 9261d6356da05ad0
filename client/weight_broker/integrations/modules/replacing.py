"""Gives the tensor objects of a module other memory.

The objects stay the same: lists, closures and weak references that hold them see the new memory too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from weight_broker.errors import InvalidArgument
from weight_broker.integrations.modules.tensors import Alias, ModuleTensors, storage_of
from weight_broker.integrations.modules.walk import join, registered_tensors

_c: Any = torch._C
_HINT = "Load this module into its own memory."


class Replacement:
    """A context manager: an exception undoes everything."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            for undo in reversed(self._undo):
                with contextlib.suppress(Exception):  # as much as possible is undone
                    undo()

    def give_memory(self, name: str, old: torch.Tensor, new: torch.Tensor) -> None:
        """Let the object `old` be a tensor over the memory of `new`, which requires gradients if it did. Raises
        `InvalidArgument`."""
        new = new.detach().requires_grad_(old.requires_grad and old.is_leaf)
        if _use_count(old) == 1:
            _c._swap_tensor_impl(old, new)
            self._undo.append(lambda: _c._swap_tensor_impl(old, new))
        elif old.device.type == new.device.type:
            kept = old.data
            old.data = new
            self._undo.append(lambda: setattr(old, "data", kept))
        else:
            raise InvalidArgument(
                f"module.{name}", "a tensor that something else than the module holds", "a tensor of the module's own",
                hint=_HINT,
            )  # fmt: skip

    def give_view(self, alias: Alias, view: torch.Tensor) -> None:
        """Like `give_memory`, for a view. The old one is let go of, as it may hold the tensor that it is a view of; it
        would be made again. The new one carries no gradients to that tensor."""
        old, size, stride, offset = (
            alias.tensor,
            alias.tensor.shape,
            alias.tensor.stride(),
            alias.tensor.storage_offset(),
        )
        if _use_count(old) > 1:
            self.give_memory(alias.name, old, view)
            return
        base = alias.base if old.requires_grad else alias.base.detach()
        _c._swap_tensor_impl(old, view)
        self._undo.append(lambda: _c._swap_tensor_impl(old, torch.as_strided(base, size, stride, offset)))

    def assign(self, owner: nn.Module, leaf: str, name: str, new: torch.Tensor) -> None:
        """Set an attribute the way that modules see it. Raises `InvalidArgument`."""
        old = getattr(owner, leaf)
        try:
            setattr(owner, leaf, new)
        except Exception as error:  # the module's own code decides
            text = f"a parameter that cannot be assigned ({type(error).__name__}: {error})"
            raise InvalidArgument(
                f"module.{name}", text, "a module whose tensors can be replaced", hint=_HINT
            ) from error
        if old is not new:
            self._undo.append(lambda: setattr(owner, leaf, old))


def replace_all(replacement: Replacement, tensors: ModuleTensors, new: Mapping[str, torch.Tensor]) -> None:
    """Give every tensor the memory of the new one of its name. Raises `InvalidArgument`."""
    memory: dict[int, torch.Tensor] = {}
    parameters: dict[tuple[object, ...], torch.Tensor] = {}
    for name, old in tensors.items():
        if isinstance(old, torch.Tensor) and name not in tensors.compared:
            memory.setdefault(id(old), new[name])
            if isinstance(old, nn.Parameter):
                parameters.setdefault(_identity(memory[id(old)]), old)
    _replace_aliases(replacement, tensors, memory)
    for name, old in tensors.items():
        if id(old) in memory and new[name] is memory[id(old)] and new[name] is not old:
            replacement.give_memory(name, old, new[name])
    _assign_all(replacement, tensors, new, memory, parameters)
    for name, old in tensors.items():
        if not isinstance(old, torch.Tensor):
            old[...] = new[name].numpy()


def _replace_aliases(
    replacement: Replacement, tensors: ModuleTensors, memory: Mapping[int, torch.Tensor]
) -> None:  # before the tensors: a view may hold its tensor
    for alias in tensors.aliases:
        new = memory[id(alias.base)]
        if new is alias.base:
            continue
        view = view_of(alias, new)
        if view is None:
            raise InvalidArgument(
                f"module.{alias.name}", "a view whose tensor has another layout now", "the layout it was made for",
                hint=_HINT,
            )  # fmt: skip
        replacement.give_view(alias, view)


def _assign_all(
    replacement: Replacement,
    tensors: ModuleTensors,
    new: Mapping[str, torch.Tensor],
    memory: Mapping[int, torch.Tensor],
    parameters: dict[tuple[object, ...], torch.Tensor],
) -> None:
    """Through `setattr`: modules with second lists of their parameters keep them up to date there."""
    for prefix, owner in tensors.module.named_modules(remove_duplicate=False):
        for leaf, old in registered_tensors(owner):
            name = join(prefix, leaf)
            wanted = _identity(new[name])
            if isinstance(old, nn.Parameter):
                if wanted not in parameters:
                    parameters[wanted] = nn.Parameter(new[name].detach(), old.requires_grad)
                    vars(parameters[wanted]).update(vars(old))
                target = parameters[wanted]
            else:
                has_it = id(old) not in memory or _identity(memory[id(old)]) == wanted
                target = old if has_it else new[name].detach()
            replacement.assign(owner, leaf, name, target)


def _identity(tensor: torch.Tensor) -> tuple[object, ...]:
    where = tensor.data_ptr() if tensor.numel() and not tensor.is_meta else id(tensor)
    return where, tensor.dtype, tensor.shape, tensor.stride()


def _use_count(tensor: Any) -> int:
    """Holders of the tensor below Python; one is its Python object."""
    count: int = tensor._use_count()
    return count


def view_of(alias: Alias, new: torch.Tensor) -> torch.Tensor | None:
    """The same view of the new memory; None if that lies otherwise."""
    old, base = alias.tensor, alias.base
    if old.dtype != base.dtype or new.dtype != base.dtype or new.stride() != base.stride():
        return None
    offset = int(old.storage_offset()) - int(base.storage_offset()) + int(new.storage_offset())
    with torch.no_grad():
        return torch.as_strided(new.detach(), old.shape, old.stride(), offset)


def viewed_elsewhere(tensors: Mapping[str, Any], aliases: Sequence[Alias] = ()) -> str:
    """Name of a tensor whose memory something uses that is neither a tensor nor an alias here; empty if there is
    none."""
    known: dict[int, set[int]] = {}
    names: dict[int, str] = {}
    objects: list[Any] = []
    for name, tensor in _with_bases([*tensors.items(), *((alias.name, alias.tensor) for alias in aliases)]):
        storage = storage_of(tensor)
        if storage is not None:
            known.setdefault(storage, set()).add(id(tensor))
            names.setdefault(storage, name)
            objects.append(tensor)  # an id is only good while its object lives
    users = getattr(_c, "_storage_Use_Count", None)
    if users is None:
        return ""
    for tensor in objects:
        storage = tensor.untyped_storage()
        if storage.nbytes() and users(storage._cdata) > len(known[storage._cdata]) + 1:  # one is `storage`
            return names[storage._cdata]
    return ""


def _with_bases(tensors: Iterable[tuple[str, Any]]) -> Iterable[tuple[str, torch.Tensor]]:
    for name, tensor in tensors:
        if isinstance(tensor, torch.Tensor):
            yield name, tensor
            if tensor._base is not None:
                yield name, tensor._base
