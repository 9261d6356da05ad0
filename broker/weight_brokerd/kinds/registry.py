"""The devices of this host, of all kinds of memory that this broker serves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from weight_brokerd.attach.stage import Stages
from weight_brokerd.cards.health import CardHealth
from weight_brokerd.cards.regions import DeviceMemory
from weight_brokerd.core.model import DataPlane
from weight_brokerd.dataplane.protocol import BulkPlane, Way
from weight_brokerd.kinds.npu.kind import NpuDevices


class DeviceKind(Protocol):
    """The devices of one kind: their processes, the memory that is published on them, what moves it."""

    on_region_lost: Callable[[str, str], None]
    """(region, why): a publication's memory cannot be reached any more."""
    on_health_change: Callable[[], None]

    @property
    def kind(self) -> str:
        """The name of the kind of memory."""

    @property
    def problem(self) -> str:
        """Why no device can be served, if none can."""

    @property
    def is_absent(self) -> bool:
        """Whether it turned out that this host has no such device, and nobody said that it has."""

    @property
    def memory(self) -> DeviceMemory | None:
        """What is published; None before `ready`."""

    @property
    def planes(self) -> Mapping[DataPlane, BulkPlane]:
        """What moves it; filled once the devices are known."""

    @property
    def health(self) -> Sequence[CardHealth]:
        """Every device that was found."""

    def start(self) -> None:
        """Begins to look for devices; `ready` waits for that. The daemon serves host memory meanwhile."""

    async def ready(self) -> None:
        """Returns when the devices are known. Raises `BrokerUnavailable` if there are none to be served."""

    async def close(self) -> None:
        """Ends all processes; nothing may move any more."""


class DeviceKinds:
    """All kinds together."""

    def __init__(
        self,
        kinds: Iterable[DeviceKind],
        *,
        transfer_seconds: float,
        npus: NpuDevices | None = None,
        npu_path: str = "auto",
        stages: Stages | None = None,
    ) -> None:
        """`npus`: the one among them that has a datasystem worker, and whose memory may be staged; `npu_path`:
        `direct`, `staged` or `auto`; `stages`: the instances that copy by themselves."""
        self.stages = stages or Stages()
        self._npu_path = npu_path
        self.transfer_seconds = transfer_seconds
        """The longest that one transfer may take."""
        self.npus = npus
        self._kinds = {one.kind: one for one in kinds}

    def listen(self, *, on_region_lost: Callable[[str, str], None]) -> None:
        """Who hears that memory is lost."""
        for one in self._kinds.values():
            one.on_region_lost = on_region_lost

    def listen_to_health(self, on_health_change: Callable[[], None]) -> None:
        """Who hears that something in `health` is different."""
        for one in self._kinds.values():
            one.on_health_change = on_health_change

    def start(self) -> None:
        """Begins to look for devices of all kinds."""
        for one in self._kinds.values():
            one.start()

    async def ready(self, kind: str) -> None:
        """Returns when the devices of a kind are known; at once for a kind that is not served. Raises
        `BrokerUnavailable` if there are none to be served."""
        if kind in self._kinds:
            await self._kinds[kind].ready()

    async def close(self) -> None:
        """Ends all processes; nothing may move any more."""
        self.stages.close()
        await asyncio.gather(*(one.close() for one in self._kinds.values()))

    @property
    def served(self) -> frozenset[str]:
        """The kinds of memory that are served, as far as is known."""
        return frozenset(one.kind for one in self._kinds.values() if not one.is_absent)

    def identities(self, kind: str) -> frozenset[str]:
        """The devices of a kind."""
        return frozenset(card.identity for card in self._kinds[kind].health) if kind in self._kinds else frozenset()

    @property
    def health(self) -> list[tuple[str, CardHealth]]:
        """Kind and health of every device that was found."""
        return [(one.kind, card) for one in self._kinds.values() for card in one.health]

    @property
    def problem(self) -> str:
        """Why kinds have no device that can be served, if some have none."""
        return "; ".join(one.problem for one in self._kinds.values() if one.problem)

    def memory_of(self, kind: str) -> DeviceMemory:
        """What is published in a kind of memory; after `ready`."""
        memory = self._kinds[kind].memory
        assert memory is not None
        return memory

    def path_of(self, kind: str) -> str:
        """`direct`, `staged` or `auto`: how a kind of memory is read and filled."""
        return self._npu_path if self.npus is not None and kind == self.npus.kind else "direct"

    def plane_of(self, kind: str, way: Way) -> BulkPlane:
        """What moves a kind of memory; after `ready`."""
        if isinstance(way, DataPlane):
            return self._kinds[kind].planes[way]
        staged = self.npus.staged if self.npus is not None and kind == self.npus.kind else None
        assert staged is not None, f"{kind} memory is never staged"
        return staged

    def holders_of(self, region_id: str) -> list[str]:
        """The publications that lie in a region."""
        return [holder for memory in self._memories() for holder in memory.holders_of(region_id)]

    @property
    def region_count(self) -> int:
        """Regions of device memory that are published."""
        return sum(memory.region_count for memory in self._memories())

    @property
    def region_bytes(self) -> int:
        """Bytes of them."""
        return sum(memory.region_bytes for memory in self._memories())

    def _memories(self) -> list[DeviceMemory]:
        return [one.memory for one in self._kinds.values() if one.memory is not None]
