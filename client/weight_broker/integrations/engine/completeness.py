"""Decides whether weights may be published, by comparing them before and after the engine's post-processing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from weight_broker.integrations.engine.engine import Engine
from weight_broker.integrations.engine.stage import processed_refusal
from weight_broker.kinds import TRAITS
from weight_broker.memory.kind import kind_of
from weight_broker.memory.tensors import describe
from weight_broker.transfers.load import SURVIVABLE

_SHOWN = 4

Place = tuple[int, str, tuple[int, ...], tuple[int, ...]]
"""Address, type, shape, stride."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Places of tensors and, for comparisons of content, their digests."""

    places: dict[str, Place]
    sizes: dict[str, int]
    """Bytes of each tensor; tied tensors count under the first name."""
    contents: dict[str, int] | None
    """A digest of each; None if only the places are compared."""


def snapshot(tensors: Mapping[str, torch.Tensor], *, contents: bool) -> Snapshot:
    """The present state of the tensors. Waits for their device. Raises `InvalidArgument` for unshareable tensors."""
    places = {
        name: (tensor.data_ptr(), str(tensor.dtype), tuple(tensor.shape), tuple(tensor.stride()))
        for name, tensor in tensors.items()
    }
    first = {place: name for name, place in reversed(places.items())}  # tied tensors count once
    sizes = {name: tensors[name].numel() * tensors[name].element_size() for name in first.values()}
    return Snapshot(places, sizes, content_digests(tensors) if contents else None)


def is_copied_to_publish(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether the tensors may change once they are published. False too for tensors that cannot be published."""
    try:
        return TRAITS[describe(tensors).device_kind].is_copied_to_publish
    except SURVIVABLE:
        return False


class Comparison:
    """One model's weights before and after post-processing."""

    def __init__(self) -> None:
        self.refused = ""
        """Why the weights cannot be published, once that is known."""
        self._before: Snapshot | None = None

    def note_before(self, tensors: Mapping[str, torch.Tensor], *, contents: bool) -> None:
        """Take the snapshot before post-processing. A failure refuses publishing."""
        self._before = None
        try:
            self._before = snapshot(tensors, contents=contents)
        except SURVIVABLE as error:
            self.refused = self.refused or str(error)

    def noted(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors that the first snapshot has."""
        assert self._before is not None
        return {name: tensors[name] for name in self._before.places}

    def missing(self) -> str:
        """Why there is nothing to compare with; empty if there is."""
        return "" if self._before is not None else "the weights were not seen before post-processing"

    def refusal(self, tensors: Mapping[str, torch.Tensor]) -> str:
        """Why weights in the stage `loaded` cannot be published; empty if they can."""
        if self._before is None:
            return self.missing()
        kept = {name: tensor for name, tensor in tensors.items() if name in self._before.places}
        return refusal(self._before, snapshot(kept, contents=self._before.contents is not None))

    def processed_refusal(self, model: nn.Module, engine: Engine, tensors: Mapping[str, torch.Tensor]) -> str:
        """Why weights in the stage `runtime` cannot be published; empty if they can."""
        if self._before is None:
            return self.missing()
        moved, vanished = moved_and_vanished(self._before, snapshot(tensors, contents=False))
        return processed_refusal(model, engine, moved, vanished)


def moved_and_vanished(before: Snapshot, after: Snapshot) -> tuple[list[str], int]:
    """Names of the tensors that moved, and the bytes that are in no tensor any more."""
    moved = [name for name, place in before.places.items() if after.places.get(name) != place]
    return moved, sum(before.sizes.values()) - sum(after.sizes.values())


def refusal(before: Snapshot, after: Snapshot) -> str:
    """Why the weights before post-processing do not equal those after it; empty if they do."""
    moved, gone = moved_and_vanished(before, after)
    if moved:
        text = f"post-processing moved or replaced {len(moved)} of {len(before.places)} tensors ({_some(moved)})"
        if gone > 0:
            text += f", and {gone} of {sum(before.sizes.values())} bytes are in no tensor any more"
        return text
    # Tensors that post-processing added do not count: a receiver's own post-processing adds them too.
    if before.contents is not None and after.contents is not None:
        changed = [name for name, digest in before.contents.items() if after.contents[name] != digest]
        if changed:
            return f"post-processing rewrote {len(changed)} tensors where they are ({_some(changed)})"
    return ""


def state_refusal(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """Why a receiver, which fills the weight set instead of loading, would lack state; empty if it would not."""
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
