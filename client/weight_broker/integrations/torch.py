"""Fills a plain `torch.nn.Module` through the broker.

Which tensors make a module's weight set: all its parameters and all its buffers, under every name that they have, so
that ties are seen. Buffers that are not in the state dict count too: they are small, some cannot be computed again from
the configuration (calibrated scales), and a module built on the meta device has none of them. Tensors kept as plain
attributes are not seen; `assign_tensors` refuses a module that is left with such a tensor on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from weight_broker.errors import InvalidArgument, LayoutMismatch
from weight_broker.memory.host.copying import Piece, copy

if TYPE_CHECKING:
    from weight_broker.client import BrokerClient
    from weight_broker.key import WeightSetKey
    from weight_broker.transfers.report import AcquireReport, LoadReport

_SHOWN_DIFFERENCES = 8


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """The module's weight set: every parameter and buffer by name; tied ones appear under all their names."""
    tensors: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
    tensors.update(module.named_buffers(remove_duplicate=False))
    return tensors


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
    """
    return client.acquire_or_load(key, lambda: tensors_of(module), load, timeout=timeout, publish=publish)


def attach_module(
    module: nn.Module, key: WeightSetKey, client: BrokerClient, *, timeout: float = 300.0, wait: bool = True
) -> AcquireReport:
    """Assigns the resident weights to a module that was built on the meta device, without copying.

    The weights are copy-on-write views of memory that all instances of the host share: reading costs nothing, writing
    copies the page. They do not require gradients. Raises like `BrokerClient.attach_tensors`, and `LayoutMismatch`,
    then with the module unchanged, if the resident weights are not the module's.
    """
    attached = client.attach_tensors(key, framework="torch", timeout=timeout, wait=wait)
    assign_tensors(module, attached)
    return attached.report


def materialise_empty(module: nn.Module) -> None:
    """Gives every parameter and buffer on the meta device uninitialised host memory; ties stay ties."""
    empty_of: dict[int, torch.Tensor] = {}
    tensors = tensors_of(module)
    for tensor in tensors.values():
        if tensor.is_meta and id(tensor) not in empty_of:
            # Pages exist only after the first write: a large tensor costs neither time nor memory yet.
            empty_of[id(tensor)] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    assign_tensors(module, {name: empty_of.get(id(tensor), tensor) for name, tensor in tensors.items()})


def copy_tensors(target: Mapping[str, torch.Tensor], source: Mapping[str, torch.Tensor]) -> None:
    """Copies every tensor of `source` into the tensor of the same name, in parallel. Shapes and types must be equal."""
    pieces: list[Piece] = []
    done: set[int] = set()
    with torch.no_grad():
        for name, tensor in target.items():
            if id(tensor) in done:
                continue
            done.add(id(tensor))
            other = source[name]
            if tensor.is_contiguous() and other.is_contiguous():
                pieces.append((tensor.data_ptr(), other.data_ptr(), tensor.nbytes))
            else:
                tensor.copy_(other)
        copy(pieces)


def assign_tensors(module: nn.Module, tensors: Mapping[str, object]) -> None:
    """Makes `tensors` the module's parameters and buffers, without copying.

    Every name, type and shape has to fit (`LayoutMismatch`, module unchanged). Names whose tensors are the same memory
    become one parameter, as tied weights are; other names stop being tied. Parameters do not require gradients.
    """
    wanted = tensors_of(module)
    by_name = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}
    _check_fit(wanted, by_name)
    refused = [name for name, tensor in wanted.items() if type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer)]
    if refused:
        raise InvalidArgument(
            f"module.{refused[0]}", type(wanted[refused[0]]).__name__, "plain parameters and buffers",
            hint="Load this module into its own memory.",
        )  # fmt: skip
    shared: dict[tuple[object, ...], torch.Tensor] = {}
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for leaf, old in [*owner._parameters.items(), *owner._buffers.items()]:
            if old is None:
                continue
            new = by_name[f"{prefix}.{leaf}" if prefix else leaf]
            if isinstance(old, nn.Parameter):
                new = shared.setdefault(_identity(new), nn.Parameter(new.detach(), requires_grad=False))
                vars(new).update(vars(old))
            # setattr would lose that a buffer is not persistent.
            (owner._parameters if leaf in owner._parameters else owner._buffers)[leaf] = new
    remaining = list(_meta_attributes(module))
    if remaining:
        raise InvalidArgument(
            f"module.{remaining[0]}", "a tensor on the meta device", "tensors that are parameters or buffers",
            hint="Load this module into its own memory.",
        )  # fmt: skip


def _identity(tensor: torch.Tensor) -> tuple[object, ...]:
    where = tensor.data_ptr() if tensor.numel() else id(tensor)
    return where, tensor.dtype, tensor.shape, tensor.stride()


def _check_fit(wanted: Mapping[str, torch.Tensor], by_name: Mapping[str, torch.Tensor]) -> None:
    found = [f"{name}: not among the tensors" for name in wanted if name not in by_name]
    found += [f"{name}: not in the module" for name in by_name if name not in wanted]
    for name, tensor in wanted.items():
        other = by_name.get(name)
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


def _meta_attributes(module: nn.Module) -> Iterator[str]:
    for prefix, owner in module.named_modules():
        for name, value in vars(owner).items():
            if isinstance(value, torch.Tensor) and value.is_meta:
                yield f"{prefix}.{name}" if prefix else name
