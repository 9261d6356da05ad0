"""A control plane over host memory, in this process: no sockets, no daemon."""

from __future__ import annotations

from collections.abc import Iterable

from weight_broker.key import WeightSetKey
from weight_broker.layout import Layout, TensorSpec
from weight_brokerd.attach.peer import PeerCredentials
from weight_brokerd.attach.stage import StagingConnections
from weight_brokerd.control.control import Control
from weight_brokerd.core.coordinator import Coordinator
from weight_brokerd.core.model import Acquisition, IfAbsent, Limits, TransferPath
from weight_brokerd.core.publications import Offer
from weight_brokerd.dataplane.plane import Place
from weight_brokerd.directory.memory import MemoryDirectory
from weight_brokerd.directory.protocol import Directory
from weight_brokerd.kinds.host.kind import HostKind
from weight_brokerd.kinds.host.regions import RegionTable
from weight_brokerd.kinds.published import PublishedMemory
from weight_brokerd.kinds.registry import Kinds

KEY = WeightSetKey("model")
LAYOUT = Layout([TensorSpec("weight", "int8", (8,), (1,), 8)])
EMPTY = Layout([TensorSpec("empty", "int8", (0,), (1,), 0)])
NOWHERE = PublishedMemory(Place("cpu", ""), b"")
"""The memory of a weight set without content."""


class Regions(RegionTable):
    """One that fails every holder in `broken`, in a way that nothing foresees."""

    def __init__(self) -> None:
        super().__init__(regions_per_instance=8)
        self.broken: set[str] = set()

    def hold(self, holder: str, instance_id: str, region_ids: Iterable[str]) -> None:
        if holder in self.broken:
            raise RuntimeError(f"no {holder}")
        super().hold(holder, instance_id, region_ids)

    def release(self, holder: str) -> None:
        super().release(holder)
        if holder in self.broken:
            raise RuntimeError(f"no {holder}")


class ControlRoom:
    """The control plane, and what its callers bring."""

    def __init__(self, *, directory: Directory | None = None, readers: int = 16) -> None:
        self.regions = Regions()
        self.control = Control(
            coordinator=Coordinator(host_id="host", limits=Limits(readers_per_publication=readers)),
            kinds=Kinds([HostKind(self.regions)]),
            directory=directory or MemoryDirectory(lease_seconds=60, first_token=1),
            regions=self.regions,
            staging=StagingConnections(lambda _instance_id, _why: None),
        )

    def attach(self, name: str) -> str:
        return self.control.sessions.attach(PeerCredentials(1, 0, 0, frozenset()), name, "").instance_id

    def acquisition(self, name: str, key: WeightSetKey = KEY) -> Acquisition:
        now = self.control.loop.now()
        return Acquisition(
            name,
            key,
            None,
            self.attach(name),
            IfAbsent.LOAD,
            "cpu",
            "",
            TransferPath.ZERO_COPY,
            begun_at=now,
            deadline=now + 60,
        )

    def offer(self, name: str, layout: Layout = EMPTY) -> Offer:
        return Offer(KEY, layout, self.attach(name), "cpu", "", 0, f"request of {name}")
