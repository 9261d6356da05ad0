"""Fills a plain `torch.nn.Module` through the broker.

A module's weight set is all its parameters and buffers, under every name that they have, so that ties are seen. Buffers
that are not in the state dict count too: they are small, some cannot be computed again from the configuration
(calibrated scales), and a module built on the meta device has none of them. So do tensors and NumPy arrays that are
kept as plain attributes. State that is in none of these (packed parameters, extra state, attributes of tensor
subclasses, numbers where load hooks may set them) is compared: its digest is in the name of an empty tensor, and where
it differs the layouts do (`LayoutMismatch` names it). `weight_broker.integrations.modules.tensors` has the rules.

Memory is filled or exchanged within the module's tensor objects: lists and closures that hold them see the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import weight_broker.transfers.imports  # noqa: F401
from weight_broker.errors import InvalidArgument, LayoutMismatch
from weight_broker.integrations.modules.replacing import Replacement, replace_all, viewed_elsewhere
from weight_broker.integrations.modules.tensors import ModuleTensors, subclass_tensors
from weight_broker.integrations.modules.walk import is_array
from weight_broker.memory.host.copying import Piece, copy

if TYPE_CHECKING:
    from weight_broker.client import BrokerClient
    from weight_broker.key import WeightSetKey
    from weight_broker.transfers.report import AcquireReport, LoadReport

_SHOWN_DIFFERENCES = 8
_HOST = torch.device("cpu")
_HINT = "Load this module into its own memory."


def tensors_of(module: nn.Module) -> ModuleTensors:
    """The module's weight set by name; tied tensors appear under all their names.

    Raises `InvalidArgument` that names state which can be neither moved nor compared."""
    return ModuleTensors(module)


def load_module(
    module: nn.Module,
    key: WeightSetKey,
    load: Callable[[], None],
    client: BrokerClient,
    *,
    timeout: float = 300.0,
    publish: bool = True,
) -> LoadReport:
    """Fills the module's own memory: from a resident copy, else with `load`, which is then published.

    `load` fills the module in place or gives it new tensors, as `load_state_dict` does with `assign=False` and
    `assign=True`. Its exceptions pass through, and another process gets the lease. Without a broker only `load` runs.
    Not published, with the name in `publish_error`: weights of the state dict that `load` did not write, and modules of
    which `load` changed more than tensors.
    """
    return client.acquire_or_load(key, lambda: tensors_of(module), load, timeout=timeout, publish=publish)


def attach_module(
    module: nn.Module, key: WeightSetKey, client: BrokerClient, *, timeout: float = 300.0, wait: bool = True
) -> AcquireReport:
    """Assigns the resident weights to a module that was built on the meta device, without copying.

    The weights are copy-on-write views of memory that all instances of the host share: reading costs nothing, writing
    copies the page. A module that has memory already, and lets something else view it, is filled instead, as its own
    memory is then needed.

    Raises like `BrokerClient.attach_tensors`; with the module unchanged, `LayoutMismatch` if the resident weights are
    not the module's, and `InvalidArgument` that names a tensor whose memory cannot be exchanged.
    """
    attached = client.attach_tensors(key, framework="torch", timeout=timeout, wait=wait)
    assign_tensors(module, attached)
    return attached.report


@torch.inference_mode(False)  # its tensors would be of no use outside of that mode
def materialise_empty(module: nn.Module) -> None:
    """Gives every tensor on the meta device uninitialised host memory; ties stay ties."""
    empty_of: dict[int, torch.Tensor] = {}
    tensors = tensors_of(module)
    for tensor in tensors.values():
        if isinstance(tensor, torch.Tensor) and tensor.is_meta and id(tensor) not in empty_of:
            # Pages exist only after the first write: a large tensor costs neither time nor memory yet.
            empty_of[id(tensor)] = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_HOST
            )  # fmt: skip
    assign_tensors(module, {name: empty_of.get(id(tensor), tensor) for name, tensor in tensors.items()})


def copy_tensors(target: Mapping[str, Any], source: Mapping[str, Any]) -> None:
    """Copies every tensor of `source` into the tensor of the same name, in parallel. Shapes and types must be equal."""
    pieces: list[Piece] = []
    done: set[int] = set()
    with torch.no_grad():
        for name, found in target.items():
            if id(found) in done:
                continue
            done.add(id(found))
            tensor, other = _as_tensor(found), _as_tensor(source[name])
            if tensor.is_contiguous() and other.is_contiguous():
                pieces.append((tensor.data_ptr(), other.data_ptr(), tensor.nbytes))
            else:
                tensor.copy_(other)
        copy(pieces)


@torch.inference_mode(False)
def assign_tensors(module: nn.Module, tensors: Mapping[str, object]) -> None:
    """Makes `tensors` the memory of the module's tensors, without copying.

    Every name, type and shape has to fit (`LayoutMismatch`, module unchanged). Names whose tensors are the same memory
    become one parameter, as tied weights are; other names stop being tied. Parameters require gradients if they did.
    Views that the module keeps become views of the new memory; where something else has a view, the memory that the
    module has is filled, or `InvalidArgument` names the tensor if there is none.
    """
    wanted = tensors_of(module)
    by_name = {
        name: _as_tensor(tensor)
        for name, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor) or is_array(tensor)
    }
    _check_fit(wanted, by_name)
    subclass = next(iter(subclass_tensors(module)), None)
    if subclass is not None:
        raise InvalidArgument(
            f"module.{subclass[0]}", type(subclass[1]).__name__, "plain parameters and buffers", hint=_HINT
        )
    viewed = viewed_elsewhere(wanted, wanted.aliases)
    replaced = [tensor for name, tensor in wanted.items() if by_name[name] is not tensor]
    if viewed and not any(isinstance(tensor, torch.Tensor) and tensor.is_meta for tensor in replaced):
        copy_tensors(wanted, by_name)
        return
    if viewed:
        raise InvalidArgument(
            f"module.{viewed}", "memory that a tensor outside of the module's attributes views",
            "a tensor that nothing else is a view of",
            hint=_HINT,
        )  # fmt: skip
    with Replacement() as replacement:
        replace_all(replacement, wanted, by_name)


def _check_fit(wanted: Mapping[str, Any], by_name: Mapping[str, torch.Tensor]) -> None:
    found = [f"{name}: not among the tensors" for name in wanted if name not in by_name]
    found += [f"{name}: not in the module" for name in by_name if name not in wanted]
    for name, value in wanted.items():
        tensor, other = _as_tensor(value), by_name.get(name)
        if other is None:
            continue
        if tensor.dtype != other.dtype:
            found.append(f"{name}.dtype: has {other.dtype}, wanted {tensor.dtype}")
        if tensor.shape != other.shape:
            found.append(f"{name}.shape: has {tuple(other.shape)}, wanted {tuple(tensor.shape)}")
    if found:
        shown = found[:_SHOWN_DIFFERENCES]
        if len(found) > len(shown):
            shown.append(f"and {len(found) - len(shown)} more")
        text = "; ".join(shown)
        raise LayoutMismatch(f"the tensors do not fit the module: {text}", metadata={"differences": text})


def _as_tensor(value: Any) -> torch.Tensor:
    """A tensor over the same memory."""
    return torch.from_numpy(value) if is_array(value) else value
