"""In a card process: what it does when asked."""

from __future__ import annotations

import heapq
import threading
import time
from dataclasses import dataclass, field

from weight_broker.acl import Acl, AclError
from weight_brokerd.cards import messages
from weight_brokerd.cards.blobs import BlobList
from weight_brokerd.cards.child_engine import Engine, EngineError
from weight_brokerd.cards.child_memory import CardMemory, NotPossible, Staging
from weight_brokerd.cards.messages import Role

FORGET_AFTER_SECONDS = 0.5
"""A reader becomes a replica by an acknowledgement that arrives after its fetch has returned. Deleting sooner would
race it and leave an entry behind."""


@dataclass(slots=True)
class _Offered:
    staging: Staging
    withdrawing: threading.Lock = field(default_factory=threading.Lock)
    """Whoever asks a second time waits for the first, and finds nothing left to do."""


class Work:
    """The requests of a card process; called from several threads, each with the card as its current device."""

    def __init__(self, role: Role, device: int, acl: Acl, engine: Engine) -> None:
        self._role = role
        self._acl = acl
        self._device = device
        self._engine = engine
        self._memory = CardMemory(acl, device)
        self._offers: dict[str, _Offered] = {}
        self._fetched: list[tuple[float, str]] = []
        self._peers: set[str] = set()
        self._wake = threading.Condition()
        if role is Role.RECEIVER:
            threading.Thread(target=self._forget_fetched, name="forget", daemon=True).start()

    def do(self, request: messages.Request) -> messages.Answer:
        """Raises AclError, EngineError or NotPossible if the request did nothing; Refusal says what started."""
        match request:
            case messages.ImportRegion():
                self._memory.open(request)
            case messages.CloseRegion(region_id):
                self._memory.close(region_id)
            case messages.Offer() if self._role is Role.SENDER:
                return self._offer(request)
            case messages.Withdraw(key, wait_ms) if self._role is Role.SENDER:
                return self._withdraw(key, wait_ms)
            case messages.Fetch() if self._role is Role.RECEIVER:
                return self._fetch(request)
            case messages.CopyWithinCard() if self._role is Role.RECEIVER:
                return self._copy(request)
            case messages.Ping():
                pass
            case messages.AskFigures():
                return self._figures()
            case _:
                raise NotPossible(f"a {self._role} does not do {type(request).__name__}")
        return messages.Done()

    def close(self) -> None:
        """Gives back what can be given back."""
        for key in list(self._offers):
            self._withdraw(key, 200)
        for _, key in self._fetched:
            self._engine.withdraw(key, 0)
        self._memory.close_all()
        self._engine.disconnect()

    def _offer(self, request: messages.Offer) -> messages.Done:
        if request.key in self._offers:
            raise NotPossible(f"key {request.key!r} was used before")
        clock = _Clock()
        spans = self._memory.resolve(request.blobs)
        with self._memory.staging_undone_on_error() as staging:
            placed = staging.place(request.blobs.blobs, spans)
            staging.pack()
            clock.stop("pack")
            self._engine.offer(request.key, placed)
        self._offers[request.key] = _Offered(staging)
        self._peers.add(request.peer)
        clock.stop("dev_mset")
        return messages.Done(clock.seconds)

    def _withdraw(self, key: str, wait_ms: int) -> messages.Done:
        clock = _Clock()
        offered = self._offers.get(key)
        if offered is None:
            return messages.Done()
        with offered.withdrawing:
            if key in self._offers:
                self._engine.withdraw(key, wait_ms / 1000)
                clock.stop("dev_local_delete")
                offered.staging.free()
                del self._offers[key]
        return messages.Done(clock.seconds)

    def _fetch(self, request: messages.Fetch) -> messages.Answer:
        clock = _Clock()
        spans = self._memory.resolve(request.blobs)
        with self._memory.staging_undone_on_error() as staging:
            placed = staging.place(request.blobs.blobs, spans)
        # From here on the engine may write, also when it has failed: then this process is to be ended.
        try:
            self._engine.fetch(request.key, placed, request.timeout_ms)
            clock.stop("dev_mget")
            staging.unpack()
            staging.free()
        except (EngineError, AclError) as error:
            return messages.Refusal(str(error), started=True)
        clock.stop("unpack")
        self._peers.add(request.peer)
        with self._wake:
            heapq.heappush(self._fetched, (time.monotonic() + FORGET_AFTER_SECONDS, request.key))
            self._wake.notify()
        return messages.Done(clock.seconds)

    def _copy(self, request: messages.CopyWithinCard) -> messages.Answer:
        clock = _Clock()
        destination, source = self._spans(request.destination), self._spans(request.source)
        if [size for _, size in destination] != [size for _, size in source]:
            raise NotPossible("the parts of source and destination have other sizes")
        try:
            self._memory.copy(list(zip(destination, source, strict=True)))
        except AclError as error:
            return messages.Refusal(str(error), started=True)
        clock.stop("copy")
        return messages.Done(clock.seconds)

    def _spans(self, blobs: BlobList) -> list[tuple[int, int]]:
        return [span for parts in self._memory.resolve(blobs) for span in parts]

    def _forget_fetched(self) -> None:
        """Takes this process's replica of what it has fetched back, after a while."""
        self._acl.set_device(self._device)
        while True:
            with self._wake:
                while not self._fetched or self._fetched[0][0] > time.monotonic():
                    self._wake.wait(max(0.01, self._fetched[0][0] - time.monotonic()) if self._fetched else None)
                _, key = heapq.heappop(self._fetched)
            try:
                self._engine.withdraw(key, 5)
            except EngineError:  # nobody will ever ask for this key; the engine forgets it when this process ends
                continue

    def _figures(self) -> messages.Figures:
        return messages.Figures(
            regions=self._memory.region_count,
            region_bytes=self._memory.region_bytes,
            imports=self._memory.import_count,
            keys=len(self._offers) + len(self._fetched),
            staging_bytes=self._memory.staging_bytes,
            peers=len(self._peers - {""}),
        )


class _Clock:
    """Times the steps of a request."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._at = time.monotonic()

    def stop(self, step: str) -> None:
        """The step ends now, and the next begins."""
        now = time.monotonic()
        self.seconds[step] = now - self._at
        self._at = now
