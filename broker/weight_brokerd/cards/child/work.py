"""In a card process that has an engine: its requests."""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

from weight_broker.drivers.error import DriverError
from weight_brokerd.cards import messages
from weight_brokerd.cards.child.copying import Clock, CopyingWork
from weight_brokerd.cards.child.engine import DatasystemClient, EngineError
from weight_brokerd.cards.child.memory import CardMemory, NotPossible, Staging
from weight_brokerd.cards.child.presence import Presence
from weight_brokerd.cards.messages import Role

FORGET_AFTER_SECONDS = 0.5
"""A reader becomes a replica by an acknowledgement that arrives after its fetch has returned. Deleting sooner would
race it and leave an entry behind."""
_LAST_WAIT_MS = 200


@dataclass(slots=True)
class _Offered:
    staging: Staging
    withdrawing: threading.Lock = field(default_factory=threading.Lock)
    """A second Withdraw waits for the first, and then finds no offer."""


class Work(CopyingWork):
    """The requests of a card process that has an engine."""

    def __init__(self, role: Role, memory: CardMemory, client: DatasystemClient, use_card: Callable[[], None]) -> None:
        """`use_card` makes the card the calling thread's device."""
        super().__init__(memory)
        self._role = role
        self._client = client
        self._use_card = use_card
        self._offers: dict[str, _Offered] = {}
        self._fetched: list[tuple[float, str]] = []
        self._peers: set[str] = set()
        self._wake = threading.Condition()
        self._presence = Presence()
        if role is Role.RECEIVER:
            threading.Thread(target=self._forget_fetched, name="forget", daemon=True).start()

    def do(self, request: messages.Request) -> messages.Answer:
        """Raises DriverError, EngineError or NotPossible if nothing was done; RequestRefused says what started."""
        match request:
            case messages.MakeStagingBuffer(region_id, size):
                return messages.StagingBuffer(self._memory.make_staging_buffer(region_id, size).hex())
            case messages.Offer() if self._role is Role.SENDER:
                return self._offer(request)
            case messages.Withdraw(key, wait_ms) if self._role is Role.SENDER:
                return self._withdraw(key, wait_ms)
            case messages.Fetch() if self._role is Role.RECEIVER:
                return self._fetch(request)
            case messages.CopyWithinCard() if self._role is Role.RECEIVER:
                return super().do(request)
            case messages.Ping():
                self._check_presence()
            case messages.ImportRegion() | messages.CloseRegion() | messages.AskFigures():
                return super().do(request)
            case _:
                raise NotPossible(f"a {self._role} does not do {type(request).__name__}")
        return messages.Done()

    def unmap_all_but(self, kept: Collection[str]) -> None:
        """Unmaps the regions of instances, after the offers of them have ended."""
        for key in list(self._offers):
            self._withdraw(key, _LAST_WAIT_MS)
        super().unmap_all_but(kept)

    def close(self) -> None:
        """Unmaps and frees all that can be."""
        for key in list(self._offers):
            self._withdraw(key, _LAST_WAIT_MS)
        for _, key in self._fetched:
            self._client.withdraw(key, 0)
        super().close()
        self._client.disconnect()

    def _offer(self, request: messages.Offer) -> messages.Done:
        if request.key in self._offers:
            raise NotPossible(f"key {request.key!r} was used before")
        self._check_presence()
        clock = Clock()
        spans = self._memory.resolve(request.blobs)
        with self._memory.staging_undone_on_error() as staging:
            placed = staging.place(request.blobs.blobs, spans)
            staging.pack()
            clock.stop("pack")
            self._client.offer(request.key, placed)
        self._offers[request.key] = _Offered(staging)
        self._peers.add(request.peer)
        clock.stop("dev_mset")
        return messages.Done(clock.seconds)

    def _check_presence(self) -> None:
        if self._presence.away:
            raise EngineError(
                f"this process did not run for {self._presence.away:.1f} s: the worker may have taken it for dead"
            )

    def _withdraw(self, key: str, wait_ms: int) -> messages.Done:
        clock = Clock()
        offered = self._offers.get(key)
        if offered is None:
            return messages.Done()
        with offered.withdrawing:
            if key in self._offers:
                self._client.withdraw(key, wait_ms / 1000)
                clock.stop("dev_local_delete")
                offered.staging.free()
                del self._offers[key]
        return messages.Done(clock.seconds)

    def _fetch(self, request: messages.Fetch) -> messages.Answer:
        clock = Clock()
        spans = self._memory.resolve(request.blobs)
        with self._memory.staging_undone_on_error() as staging:
            placed = staging.place(request.blobs.blobs, spans)
        # From here on the engine may write, also after a failure: then the daemon kills this process.
        try:
            self._client.fetch(request.key, placed, request.timeout_ms)
            clock.stop("dev_mget")
            staging.unpack()
            staging.free()
        except (EngineError, DriverError) as error:
            return messages.RequestRefused(str(error), started=True)
        clock.stop("unpack")
        self._peers.add(request.peer)
        with self._wake:
            heapq.heappush(self._fetched, (time.monotonic() + FORGET_AFTER_SECONDS, request.key))
            self._wake.notify()
        return messages.Done(clock.seconds)

    def _forget_fetched(self) -> None:
        """Deletes this process's replicas of fetched keys, after a while."""
        self._use_card()
        while True:
            with self._wake:
                while not self._fetched or self._fetched[0][0] > time.monotonic():
                    self._wake.wait(max(0.01, self._fetched[0][0] - time.monotonic()) if self._fetched else None)
                _, key = heapq.heappop(self._fetched)
            try:
                self._client.withdraw(key, 5)
            except EngineError:  # no reader asks for this key again; the engine forgets it when this process ends
                continue

    def figures(self) -> messages.Figures:
        """What the process holds."""
        return replace(super().figures(), keys=len(self._offers) + len(self._fetched), peers=len(self._peers - {""}))
