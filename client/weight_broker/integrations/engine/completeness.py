"""May these weights be published? Decided by looking at them before and after the engine has post-processed them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from weight_broker.memory.kind import kind_of
from weight_broker.memory.tensors import describe

_SHOWN = 4

Place = tuple[int, str, tuple[int, ...], tuple[int, ...]]
"""Address, type, shape, stride."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Where tensors were and what they held."""

    places: dict[str, Place]
    sizes: dict[str, int]
    """Bytes of each; of tied ones of the first."""
    contents: dict[str, int] | None
    """A digest of each; None if only the places are compared."""


def snapshot(tensors: Mapping[str, torch.Tensor], *, contents: bool) -> Snapshot:
    """The tensors as they are now. Waits for their device; raises `InvalidArgument` for what cannot be shared."""
    places = {
        name: (tensor.data_ptr(), str(tensor.dtype), tuple(tensor.shape), tuple(tensor.stride()))
        for name, tensor in tensors.items()
    }
    first = {place: name for name, place in reversed(places.items())}  # tied tensors count once
    sizes = {name: tensors[name].numel() * tensors[name].element_size() for name in first.values()}
    return Snapshot(places, sizes, content_digests(tensors) if contents else None)


def moved_and_vanished(before: Snapshot, after: Snapshot) -> tuple[list[str], int]:
    """Names of the tensors that are not where they were, and how many bytes are in no tensor any more."""
    moved = [name for name, place in before.places.items() if after.places.get(name) != place]
    return moved, sum(before.sizes.values()) - sum(after.sizes.values())


def refusal(before: Snapshot, after: Snapshot) -> str:
    """Why what was there before post-processing cannot stand for what is there after it; empty if it can."""
    moved, gone = moved_and_vanished(before, after)
    if moved:
        text = f"post-processing moved or replaced {len(moved)} of {len(before.places)} tensors ({_some(moved)})"
        if gone > 0:
            text += f", and {gone} of {sum(before.sizes.values())} bytes are in no tensor any more"
        return text
    # What post-processing has added is no matter: a receiver's own post-processing adds it there too.
    if before.contents is not None and after.contents is not None:
        changed = [name for name, digest in before.contents.items() if after.contents[name] != digest]
        if changed:
            return f"post-processing rewrote {len(changed)} tensors where they are ({_some(changed)})"
    return ""


def state_refusal(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """Why a receiver, which fills the weight set instead of loading, would lack something; empty if it would not."""
    changed = [name for name, value in after.items() if before.get(name, value) != value or name not in before]
    if not changed:
        return ""
    shown = ", ".join(f"{name}: {before.get(name, 'absent')} -> {after[name]}" for name in changed[:_SHOWN])
    return f"loading changed {len(changed)} things besides the weights ({shown})"


def content_digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """A digest of each tensor's content: every byte, or a sample in host memory if xxhash is not installed. Raises
    `BrokerError`."""
    described = describe(tensors)
    digests = kind_of(described.device_kind).digests(described)
    return {tensor.spec.name: value for tensor, value in zip(described.tensors, digests.values, strict=True)}


def _some(names: list[str]) -> str:
    shown = names[:_SHOWN] + ([f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else [])
    return ", ".join(shown)
