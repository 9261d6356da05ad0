"""Tells watchers what changed.

A watcher keeps only *which* things changed since it last looked, not the changes themselves: a slow one gets fewer,
larger answers. One that is too slow even for that gets the full state again, so that what is kept for it is bounded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sized
from dataclasses import dataclass, field

from weight_brokerd.core.transfers import Transfer

MAXIMUM_CHANGES = 10_000
"""Changes of one kind that are kept for a watcher."""


@dataclass(slots=True)
class Changes:
    """What changed since a watcher last looked; the order within each kind is that of the first change."""

    weight_sets: dict[str, None] = field(default_factory=dict)
    instances: dict[str, None] = field(default_factory=dict)
    transfers: dict[str, Transfer] = field(default_factory=dict)
    too_many: bool = False
    """More than were kept: only the full state says what changed."""


class Watcher:
    """One open Watch call."""

    def __init__(self) -> None:
        self._changes = Changes()
        self._wake = asyncio.Event()
        self.closed = False

    async def next(self) -> Changes:
        """Waits for changes and takes them; empty when the watcher was closed."""
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

    def mark_transfer(self, transfer: Transfer) -> None:
        self._changes.transfers[transfer.transfer_id] = transfer
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
        """A new watcher; it sees what changes from now on."""
        watcher = Watcher()
        if self._closed:
            watcher.close()
        self._watchers.add(watcher)
        return watcher

    def leave(self, watcher: Watcher) -> None:
        """The call ended."""
        self._watchers.discard(watcher)

    def close(self) -> None:
        """Ends all calls, those to come too."""
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
            watcher.mark_transfer(transfer)
