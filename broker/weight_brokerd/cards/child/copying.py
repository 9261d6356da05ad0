"""In a card process: the requests of every kind of card. A process without an engine has no others."""

from __future__ import annotations

import time
from collections.abc import Collection

from weight_broker.drivers.error import DriverError
from weight_brokerd.cards import messages
from weight_brokerd.cards.child.memory import CardMemory, NotPossible
from weight_brokerd.cards.plan.blobs import BlobList


class CopyingWork:
    """Maps memory of instances and copies between what is mapped."""

    def __init__(self, memory: CardMemory) -> None:
        self._memory = memory

    def do(self, request: messages.Request) -> messages.Answer:
        """Raises DriverError or NotPossible if the request did nothing; RequestRefused says what started."""
        match request:
            case messages.ImportRegion():
                self._memory.open(request)
            case messages.CloseRegion(region_id):
                self._memory.close(region_id)
            case messages.CopyWithinCard():
                return self._copy(request)
            case messages.Ping():
                pass
            case messages.AskFigures():
                return self.figures()
            case _:
                raise NotPossible(f"this process does not do {type(request).__name__}")
        return messages.Done()

    def unmap_all_but(self, kept: Collection[str]) -> None:
        """Unmaps the regions of instances."""
        self._memory.close_all(kept)

    def close(self) -> None:
        """Unmaps and frees all that can be."""
        self._memory.close_all()

    def figures(self) -> messages.Figures:
        """What the process holds."""
        return messages.Figures(
            regions=self._memory.region_count,
            region_bytes=self._memory.region_bytes,
            imports=self._memory.import_count,
            keys=0,
            staging_bytes=self._memory.staging_bytes,
            peers=0,
        )

    def _copy(self, request: messages.CopyWithinCard) -> messages.Answer:
        clock = Clock()
        destination, source = self._spans(request.destination), self._spans(request.source)
        if [size for _, size in destination] != [size for _, size in source]:
            raise NotPossible("the parts of source and destination have other sizes")
        try:
            self._memory.copy(list(zip(destination, source, strict=True)))
        except DriverError as error:
            return messages.RequestRefused(str(error), started=True)
        clock.stop("copy")
        return messages.Done(clock.seconds)

    def _spans(self, blobs: BlobList) -> list[tuple[int, int]]:
        return [span for parts in self._memory.resolve(blobs) for span in parts]


class Clock:
    """Times the steps of a request."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._at = time.monotonic()

    def stop(self, step: str) -> None:
        """The step ends now, and the next begins."""
        now = time.monotonic()
        self.seconds[step] = now - self._at
        self._at = now
