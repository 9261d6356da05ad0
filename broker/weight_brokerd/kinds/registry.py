"""The kinds of memory that this broker serves. Host memory is always among them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from weight_broker.errors import PublishRefused
from weight_brokerd.cards.health import CardHealth
from weight_brokerd.dataplane.plane import DataPlane, Place
from weight_brokerd.kinds.kind import Kind, WorkerHealth
from weight_brokerd.kinds.place_request import listed

DEFAULT_TRANSFER_SECONDS = 600.0


class KindNotServed(PublishRefused):
    """This broker does not serve the kind of memory."""

    def __init__(self, kind: str, served: Iterable[str], field: str) -> None:
        self.served = frozenset(served)
        super().__init__(
            f"{field or 'it'} is in {kind} memory; this broker serves: {listed(self.served)}",
            metadata={"field": f"{field}.device_kind".lstrip("."), "value": kind},
        )


class Kinds:
    """All kinds together."""

    def __init__(self, kinds: Iterable[Kind], *, transfer_seconds: float = DEFAULT_TRANSFER_SECONDS) -> None:
        self.transfer_seconds = transfer_seconds
        """The longest that one transfer of the broker's may take."""
        self._kinds = {kind.name: kind for kind in kinds}

    def of(self, name: str, field: str = "") -> Kind:
        """The kind; `field` is the request's field that names it. Raises `KindNotServed`."""
        kind = self._kinds.get(name)
        if kind is None or not kind.is_served:
            raise KindNotServed(name, self.served, field)
        return kind

    async def ready(self, name: str, field: str = "") -> Kind:
        """The kind, once its devices are known. Raises `KindNotServed`; `BrokerUnavailable` if none can be served."""
        await self.of(name, field).ready()
        return self.of(name, field)

    def route(self, source: Place, destination: Place) -> DataPlane:
        """The data plane for two places."""
        return self.of(destination.kind).route(source, destination)

    def start(self) -> None:
        """Begin to look for devices of all kinds. Returns at once."""
        for kind in self._kinds.values():
            kind.start()

    async def close(self) -> None:
        """End all processes; nothing may move any more."""
        await asyncio.gather(*(kind.close() for kind in self._kinds.values()))

    @property
    def served(self) -> frozenset[str]:
        """Names of the kinds that are served, or may be once their devices are known."""
        return frozenset(name for name, kind in self._kinds.items() if kind.is_served)

    @property
    def health(self) -> list[tuple[str, CardHealth]]:
        """Kind and health of every device that was found."""
        return [(name, device) for name, kind in self._kinds.items() for device in kind.health.devices]

    @property
    def workers(self) -> list[WorkerHealth]:
        """The datasystem workers that the kinds depend on."""
        return [worker for kind in self._kinds.values() for worker in kind.health.workers]

    @property
    def problem(self) -> str:
        """Why kinds have no device that serves; empty if all is well."""
        problems = [kind.health.problem for kind in self._kinds.values()]
        return "; ".join(problem for problem in problems if problem)

    @property
    def region_count(self) -> int:
        """Regions that are open or mapped."""
        return sum(kind.health.region_count for kind in self._kinds.values())

    @property
    def region_bytes(self) -> int:
        """Bytes of these regions."""
        return sum(kind.health.region_bytes for kind in self._kinds.values())
