"""The weight set of a module: tensors that move, and state that is only compared.

What moves: parameters and buffers under every name, tensors and NumPy arrays that are kept as plain attributes (in
containers and other objects too), and the inner tensors of tensor subclasses. Memory that is part of another tensor
that moves is not moved twice. State that cannot be filled in place becomes an empty tensor whose name has its digest:
layouts with other state differ, so no instance is filled from one with other state, and the error names it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from weight_broker.integrations.modules.digests import digest, is_empty
from weight_broker.integrations.modules.walk import PLAIN, Walk, is_array, join, registered_tensors
from weight_broker.layout import ITEM_SIZES

_PLAIN_TENSORS = (torch.Tensor, nn.Parameter, nn.Buffer)
_OWN = "torch."


class Alias(NamedTuple):
    """An attribute that is another view of memory that moves."""

    name: str
    tensor: torch.Tensor
    base: torch.Tensor


class ModuleTensors(dict[str, Any]):
    """The tensors by name; see the module's text. Raises `InvalidArgument` for state that it cannot see into."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.aliases: list[Alias] = []
        """Views that the module keeps of the tensors."""
        self.compared: list[str] = []
        """Names of the empty tensors that stand for state."""
        self._computed: set[str] = set()
        self._plain: dict[str, str] = {}
        self._by_storage: dict[int, list[torch.Tensor]] = {}
        self._collect_registered()
        self._collect_others()

    def current(self) -> ModuleTensors:
        """The module's tensors now."""
        return ModuleTensors(self.module)

    @property
    def computed(self) -> set[str]:
        """Names of what is in no checkpoint: buffers that are not persistent, plain attributes, compared state."""
        return self._computed

    def other_state(self) -> dict[str, str]:
        """Numbers, flags and texts that the module's objects hold, and digests of state in no tensor, by name."""
        return self._plain

    def is_moved(self, tensor: torch.Tensor) -> bool:
        """Whether all memory of the tensor is part of one that moves."""
        return self._base_of(tensor) is not None

    # Registered tensors

    def _collect_registered(self) -> None:
        for prefix, owner in self.module.named_modules(remove_duplicate=False):
            for name, tensor in registered_tensors(owner):
                path = join(prefix, name)
                self._add(path, tensor)
                if name in owner._non_persistent_buffers_set:
                    self._computed.add(path)

    def _add(self, name: str, tensor: torch.Tensor) -> None:
        if not is_traceable_wrapper_subclass(tensor):
            self[name] = tensor
            storage = storage_of(tensor)
            if storage is not None:
                self._by_storage.setdefault(storage, []).append(tensor)
            return
        parts, context = tensor.__tensor_flatten__()
        for part in parts:
            value = getattr(tensor, part)
            if isinstance(value, torch.Tensor):
                self._add(join(name, part), value)
            else:  # how a distributed tensor is spread
                self._compare(join(name, part), value)
        if context is not None:
            self._compare(join(name, type(tensor).__name__), context)

    # Everything else

    def _collect_others(self) -> None:
        kinds = {tensor.device.type for tensor in self.values()}
        subclass_attributes = _attribute_prefixes(self)
        numbers: dict[str, dict[str, Any]] = {}
        watched = _with_load_hooks(self.module)
        for owner, name, value in Walk(self.module).leaves():
            if isinstance(value, torch.Tensor):
                self._add_attribute(name, value, kinds)
            elif is_array(value):
                self._add_array(name, value, kinds)
            elif isinstance(value, torch.ScriptObject):
                self._compare(name, value)
            elif isinstance(value, PLAIN):
                self._plain[name] = repr(value)
                if (
                    subclass_attributes
                    and name.startswith(subclass_attributes)
                    and not name.rpartition(".")[2].startswith("_")
                ):
                    self._compare(name, value)
                elif owner in watched and not isinstance(value, str | torch.device):
                    numbers.setdefault(watched[owner], {})[name] = value
        for prefix, values in numbers.items():
            self._compare(join(prefix, "numbers"), sorted(values.items()))
        self._compare_state_dict()

    def _add_attribute(self, name: str, tensor: torch.Tensor, kinds: set[str]) -> None:
        if is_lazy(tensor) or not tensor.numel():
            return
        if is_traceable_wrapper_subclass(tensor):
            before = set(self)
            self._add(name, tensor)
            self._computed |= set(self) - before
            return
        base = self._base_of(tensor)
        if any(other is tensor for other in self._by_storage.get(storage_of(tensor) or 0, ())):
            return
        if base is not None:
            self.aliases.append(Alias(name, tensor, base))
        elif _can_move(tensor, kinds):
            self._add(self._free(name), tensor)
            self._computed.add(name)
        else:
            self._compare(name, tensor)

    def _add_array(self, name: str, array: Any, kinds: set[str]) -> None:
        if not array.size:
            return
        if array.flags.writeable and kinds <= {"cpu"} and array.dtype.name in ITEM_SIZES and array.dtype.isnative:
            self[self._free(name)] = array
            self._computed.add(name)
        else:
            self._compare(name, array)

    def _compare_state_dict(self) -> None:
        """Entries of the state dict that are in no tensor that moves."""
        if not any(_writes_state(module) for module in self.module.modules()):
            return
        for name, value in self.module.state_dict(keep_vars=True).items():
            if isinstance(value, torch.Tensor) and (name in self or self.is_moved(value)):
                continue
            if _named(name) in self._plain:
                continue
            if not is_empty(value) and not is_traceable_wrapper_subclass(value):
                self._compare(name, value)

    def _compare(self, name: str, value: Any) -> None:
        found = digest(name, value, self.is_moved)
        self._plain[_named(name)] = found
        name = self._free(f"{name} (in no tensor, digest {found})")
        device = next((tensor.device for tensor in self.values() if isinstance(tensor, torch.Tensor)), "cpu")
        self[name] = torch.empty(0, dtype=torch.uint8, device=device)
        self.compared.append(name)
        self._computed.add(name)

    def _free(self, name: str) -> str:
        while name in self:
            name += "'"
        return name

    def _base_of(self, tensor: torch.Tensor) -> torch.Tensor | None:
        storage = storage_of(tensor)
        if storage is None:
            return None
        begin, end = extent(tensor)
        for other in self._by_storage.get(storage, ()):
            first, last = extent(other)
            is_dense = last - first == other.numel() * other.element_size()
            if (is_dense and first <= begin and end <= last) or _geometry(other) == _geometry(tensor):
                return other
        return None


def _named(name: str) -> str:
    return f"{name} (in no tensor)"


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First and last byte of its elements in its storage."""
    size = tensor.element_size()
    begin = int(tensor.storage_offset()) * size
    if not tensor.numel():
        return begin, begin
    reach = sum((length - 1) * step for length, step in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (reach + 1) * size


def storage_of(tensor: torch.Tensor) -> int | None:
    """Which storage the tensor's memory is in; None if it is in no single one."""
    if is_lazy(tensor):
        return None
    try:
        if tensor.layout is not torch.strided:
            return None
        identity: int = tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return None
    return identity


def _geometry(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()


def _can_move(tensor: torch.Tensor, kinds: set[str]) -> bool:
    """Whether it can be filled in place, together with the others."""
    if tensor.layout is not torch.strided or tensor.is_quantized or str(tensor.dtype)[6:] not in ITEM_SIZES:
        return False
    begin, end = extent(tensor)
    if end - begin < tensor.numel() * tensor.element_size() or tensor.is_neg() or tensor.is_conj():
        return False
    return tensor.is_meta or tensor.device.type in kinds or kinds <= {"meta"}


def _attribute_prefixes(tensors: Mapping[str, Any]) -> tuple[str, ...]:
    """Beginnings of the names of attributes of tensor subclasses: quantization state."""
    return tuple(f"{name}." for name, tensor in tensors.items() if type(tensor) not in _PLAIN_TENSORS)


def _with_load_hooks(module: nn.Module) -> dict[nn.Module, str]:
    """Modules whose numbers may come from a checkpoint, if they or a module above have load hooks, by name."""
    found: dict[nn.Module, str] = {}
    for prefix, owner in module.named_modules():
        if _has_load_hooks(owner):
            for path, part in owner.named_modules():
                found.setdefault(part, join(prefix, path))
    return found


def _has_load_hooks(module: nn.Module) -> bool:
    kind: Any = type(module)
    if _overrides_loading(kind):
        return True
    hooks = [*module._load_state_dict_pre_hooks.values(), *module._load_state_dict_post_hooks.values()]
    return any(not _is_own(getattr(hook, "hook", hook)) for hook in hooks)


def _writes_state(module: nn.Module) -> bool:
    """Whether the module's state dict may have more than its parameters and buffers."""
    kind: Any = type(module)
    return bool(module._state_dict_hooks) or _overrides_saving(kind)


@functools.lru_cache(maxsize=4096)
def _overrides_loading(kind: Any) -> bool:
    names = ("_load_from_state_dict", "load_state_dict", "set_extra_state")
    return any(not _is_own(getattr(kind, name, None)) for name in names)


@functools.lru_cache(maxsize=4096)
def _overrides_saving(kind: Any) -> bool:
    names = ("_save_to_state_dict", "state_dict", "get_extra_state")
    return any(getattr(kind, name, None) is not getattr(nn.Module, name, None) for name in names)


def _is_own(function: Any) -> bool:
    """Whether the function is torch's own. None is."""
    function = getattr(function, "func", function)
    owner = getattr(function, "__module__", None) or type(function).__module__
    return function is None or f"{owner}.".startswith(_OWN)


def subclass_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers that are no plain tensors: their memory cannot be exchanged."""
    for prefix, owner in module.named_modules():
        for name, tensor in registered_tensors(owner):
            if type(tensor) not in _PLAIN_TENSORS:
                yield join(prefix, name), tensor
