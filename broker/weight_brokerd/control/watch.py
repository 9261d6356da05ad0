"""Watch calls: which things changed.

A watcher keeps only *which* things changed since its last answer, not the changes themselves: a slow watcher gets
fewer, larger answers. A watcher that is too slow even for that gets the full state again, so its memory is bounded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sized
from dataclasses import dataclass, field

from weight_brokerd.core.transfers import Transfer, TransferRecord

MAXIMUM_CHANGES = 10_000
"""The most changes of one sort that are kept for a watcher."""


@dataclass(slots=True)
class Changes:
    """Changed things since a watcher's last answer, each sort in the order of its first change."""

    weight_sets: dict[str, None] = field(default_factory=dict)
    instances: dict[str, None] = field(default_factory=dict)
    transfers: dict[str, TransferRecord] = field(default_factory=dict)
    too_many: bool = False
    """More things changed than are kept: the watcher needs the full state."""


class Watcher:
    """One open Watch call."""

    def __init__(self) -> None:
        self._changes = Changes()
        self._wake = asyncio.Event()
        self.closed = False

    async def next(self) -> Changes:
        """Wait for changes and return them; empty after `close`."""
        await self._wake.wait()
        self._wake.clear()
        changes, self._changes = self._changes, Changes()
        return changes

    def close(self) -> None:
        self.closed = True
        self._wake.set()

    def mark_weight_set(self, weight_set_id: str) -> None:
        self._changes.weight_sets[weight_set_id] = None
        self._changed(self._changes.weight_sets)

    def mark_instance(self, instance_id: str) -> None:
        self._changes.instances[instance_id] = None
        self._changed(self._changes.instances)

    def mark_transfer(self, record: TransferRecord) -> None:
        self._changes.transfers[record.transfer_id] = record
        self._changed(self._changes.transfers)

    def _changed(self, kind: Sized) -> None:
        if self._changes.too_many or len(kind) > MAXIMUM_CHANGES:
            self._changes = Changes(too_many=True)
        self._wake.set()


class WatchHub:
    """All open Watch calls."""

    def __init__(self) -> None:
        self._watchers: set[Watcher] = set()
        self._closed = False

    def open(self) -> Watcher:
        """A new watcher; it sees all changes from now on."""
        watcher = Watcher()
        if self._closed:
            watcher.close()
        self._watchers.add(watcher)
        return watcher

    def leave(self, watcher: Watcher) -> None:
        """The call ended."""
        self._watchers.discard(watcher)

    def close(self) -> None:
        """End all calls, also later ones."""
        self._closed = True
        for watcher in self._watchers:
            watcher.close()

    def mark_weight_set(self, weight_set_id: str) -> None:
        for watcher in self._watchers:
            watcher.mark_weight_set(weight_set_id)

    def mark_instance(self, instance_id: str) -> None:
        for watcher in self._watchers:
            watcher.mark_instance(instance_id)

    def mark_transfer(self, transfer: Transfer) -> None:
        for watcher in self._watchers:
            watcher.mark_transfer(transfer.record)
