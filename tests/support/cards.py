"""The daemon's card processes on an emulated host, and instances whose memory they map."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from doubles.cann.build import build
from doubles.cann.control import CannHost, card_name
from support import acl, card_actions, datasystem_actions
from support.card_process import CardProcess
from support.datasystem_worker import DatasystemWorker
from weight_brokerd.cards.configuration import CardsConfiguration
from weight_brokerd.cards.errors import CardError
from weight_brokerd.cards.events import Hooks
from weight_brokerd.cards.messages import ImportRegion
from weight_brokerd.cards.offers import OfferEnd, fresh_key
from weight_brokerd.cards.plan.blobs import Blob, BlobList, Part
from weight_brokerd.kinds.npu.settings import hccl_variables
from weight_brokerd.kinds.npu.supervisor import CardSupervisor

_numbers = itertools.count()


def configuration(host: CannHost, worker: DatasystemWorker, **changes: Any) -> CardsConfiguration:
    """For card processes on the host that use the worker."""
    environment = hccl_variables() | host.environment()
    del environment["LD_LIBRARY_PATH"]
    preload = environment.pop("LD_PRELOAD")
    return replace(
        CardsConfiguration(
            "127.0.0.1",
            worker.port,
            library_path=str(build().libraries),
            preload=preload,
            environment=environment,
            log_directory=worker.directory / "clients",
            start_seconds=20.0,
            stop_seconds=0.3,  # the engine takes a second to end a client; killing it is as good
        ),
        **changes,
    )


@asynccontextmanager
async def supervised(configured: CardsConfiguration, hooks: Hooks | None = None) -> AsyncIterator[CardSupervisor]:
    """A supervisor that runs."""
    supervisor = CardSupervisor(configured, hooks)
    await supervisor.start()
    try:
        yield supervisor
    finally:
        await supervisor.close()


@dataclass(frozen=True)
class Owned:
    """Device memory of an instance, exported as one region."""

    process: CardProcess
    device: int
    address: int
    region: ImportRegion

    @property
    def card(self) -> str:
        """The card's name on the wire."""
        return card_name(self.device)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.region.size_bytes

    def fill(self, seed: int | None) -> None:
        """Writes the bytes of `seed` or zeros."""
        self.process.call(acl.set_device, self.device)
        self.process.call(datasystem_actions.fill, [(self.address, self.size)], seed)

    def read(self, offset: int = 0, size: int | None = None) -> bytes:
        """What is there."""
        self.process.call(acl.set_device, self.device)
        return self.process.call(acl.read, self.address + offset, self.size - offset if size is None else size)

    def digest(self) -> str:
        """Of all of it."""
        self.process.call(acl.set_device, self.device)
        return self.process.call(datasystem_actions.digest, [(self.address, self.size)])

    def blobs(self, *spans: tuple[int, int]) -> BlobList:
        """(offset, size) of each; none: all of it as one blob."""
        parts = [Part(0, offset, size) for offset, size in spans or [(0, self.size)]]
        return BlobList((self.region.region_id,), tuple(Blob(part.size, (part,)) for part in parts))


def own(
    process: CardProcess,
    card: int,
    size: int,
    *,
    seed: int | None = None,
    any_process: bool = True,
    chunks: bool = False,
) -> Owned:
    """Allocates and exports memory in the process."""
    process.call(acl.set_device, card)
    name = f"region-{next(_numbers)}"
    if chunks:
        address, handles = process.call(card_actions.map_chunks, size // acl.CHUNK, card)
        shareables = tuple(process.call(acl.export_chunk, handle) for handle in handles)
        region = ImportRegion(name, size, shareable_handles=shareables, chunk_bytes=acl.CHUNK)
    else:
        address = process.call(acl.malloc, size)
        process.call(datasystem_actions.fill, [(address, size)], seed)
        key = process.call(acl.export, address, size, any_process=any_process)
        return Owned(process, card, address, ImportRegion(name, size, export_key=key.hex()))
    owned = Owned(process, card, address, region)
    owned.fill(seed)
    return owned


class CardScene:
    """An emulated host, a worker and instances: what a test of the card processes takes place on."""

    def __init__(self, host: CannHost, worker: DatasystemWorker, start_process: Callable[..., CardProcess]) -> None:
        self.host, self.worker, self.start_process = host, worker, start_process

    def own(self, card: int, size: int, **how: Any) -> Owned:
        """Memory of an instance of its own, as `own` makes it."""
        return own(self.start_process(), card, size, **how)

    def pair(self, size: int, **how: Any) -> tuple[Owned, Owned]:
        """A source with content on card 0, and a destination on card 1; of two instances."""
        return self.own(0, size, seed=3, **how), self.own(1, size, **how)

    async def until_moving(self, cards: CardSupervisor, card: int = 1) -> None:
        """Returns when a receiver of the card has begun to receive."""
        await until(lambda: any("pending_tasks" in self.host.live(pid) for pid in cards.health[card].receiver_pids))

    def run(
        self,
        scenario: Callable[[CardSupervisor], Coroutine[Any, Any, object]],
        *registered: Owned,
        hooks: Hooks | None = None,
        check_driver: bool = True,
        **changes: Any,
    ) -> None:
        """The scenario with a supervisor, in which the memory is registered already. `changes`: of the configuration.
        Fails if the driver was not used as it is to be, unless `check_driver` is False."""

        async def whole() -> None:
            async with supervised(configuration(self.host, self.worker, **changes), hooks) as cards:
                for owned in registered:
                    await cards.register(owned.card, owned.region)
                await scenario(cards)

        asyncio.run(whole())
        violations = self.host.violations()
        assert not (check_driver and violations), violations


async def move(
    cards: CardSupervisor,
    source: Owned,
    destination: Owned,
    sides: Sequence[tuple[BlobList, BlobList]] | None = None,
    *,
    timeout: float = 60.0,
    receiving: CardSupervisor | None = None,
) -> Mapping[str, float]:
    """One whole transfer of registered memory, as the data plane does it: a key for each round. `receiving`: the
    destination's supervisor, if it is another host's."""
    seconds: dict[str, float] = {}
    for given, taken in sides or [(source.blobs(), destination.blobs())]:
        key = fresh_key()
        reserve = partial(cards.offer, source.card, key, given)
        end = OfferEnd.ABANDONED
        try:
            done = await (receiving or cards).fetch(
                destination.card, key, taken, [destination.region], timeout=timeout, reserve=reserve
            )
            end = OfferEnd.DELIVERED
        except CardError as error:
            end = OfferEnd.ABANDONED if error.touched else OfferEnd.UNREAD
            raise
        finally:
            await cards.withdraw(source.card, key, end)
        seconds.update(done.seconds)
    return seconds


async def until(condition: Callable[[], bool], seconds: float = 40.0) -> None:
    """Waits for something that comes by itself: for as long as a busy machine may take, and for less than the minute
    that the engine's own time-out is."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come"
        await asyncio.sleep(0.02)
