"""The sending side of a card: one process that has the memory of every publication on the card mapped.

A reader that was killed can leave the sender's engine waiting in the driver for half an hour. Such a sender takes no
new offers: a fresh one imports the same memory, and the old one is ended when the last of its other readers is done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass, field

import structlog

from weight_brokerd.cards import messages
from weight_brokerd.cards.configuration import CardsConfiguration
from weight_brokerd.cards.errors import (
    CardError,
    CardLost,
    CardRefused,
    CardTimeout,
    CardUnavailable,
    EngineRefused,
)
from weight_brokerd.cards.events import Hooks
from weight_brokerd.cards.messages import ImportRegion, Role
from weight_brokerd.cards.offers import OfferEnd
from weight_brokerd.cards.plan.blobs import BlobList
from weight_brokerd.cards.plan.chunks import new_buffer_id
from weight_brokerd.cards.probe import Device
from weight_brokerd.cards.process import CardProcess
from weight_brokerd.cards.worker_watch import WorkerWatch
from weight_brokerd.processes.tasks import Background, uninterrupted

log = structlog.get_logger()
_SHORT_WAIT_MS = 100


@dataclass(slots=True)
class _Sender:
    child: CardProcess
    imported: set[str] = field(default_factory=set)
    offers: dict[str, frozenset[str]] = field(default_factory=dict)
    """The regions of each key."""
    buffers: set[str] = field(default_factory=set)
    """Ids of its staging buffers, which a successor does not have."""
    buffers_returned: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the last of the buffers is back, or the process has ended."""
    is_ending: bool = False
    """Nothing more is offered: the process is killed once its buffers are back."""
    is_stuck: bool = False
    """The engine waits for a reader that is gone: the process would not end by itself."""
    importing: asyncio.Lock = field(default_factory=asyncio.Lock)


class SenderSide:
    """The senders of one card."""

    def __init__(self, device: Device, configuration: CardsConfiguration, worker: WorkerWatch, hooks: Hooks) -> None:
        self.problem = ""
        """Why there is no sender although there is memory to send; in the driver's or the engine's words."""
        self.regions: dict[str, ImportRegion] = {}
        self._device = device
        self._configuration = configuration
        self._worker = worker
        self._hooks = hooks
        self._current: _Sender | None = None
        self._retiring: list[_Sender] = []
        self._starting: asyncio.Task[_Sender] | None = None
        self._restarting: asyncio.Task[object] | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._background = Background()
        self._is_closed = False

    @property
    def current(self) -> CardProcess | None:
        """The process that takes new offers."""
        return None if self._current is None else self._current.child

    @property
    def retiring(self) -> list[CardProcess]:
        """Processes that end when their readers are done."""
        return [sender.child for sender in self._retiring]

    @property
    def offers(self) -> int:
        """Keys on offer."""
        return sum(len(sender.offers) for sender in self._all())

    async def register(self, region: ImportRegion) -> None:
        """Maps a region in the sender, and in every later one, until `unregister`. Again changes nothing.
        Raises CardRefused, CardUnavailable, CardTimeout."""
        known = self.regions.get(region.region_id)
        if known is not None and known != region:
            raise CardRefused(f"region {region.region_id!r} is other memory on this card")
        self.regions[region.region_id] = region
        if self._idle is not None:
            self._idle.cancel()
        try:
            sender = await self._ready()
            await self._import(sender, region)
            if region.region_id not in sender.imported:
                raise CardRefused(f"region {region.region_id!r} was lost while its sender was replaced")
        except BaseException:
            if known is None:
                await uninterrupted(self.unregister(region.region_id))
            raise

    async def unregister(self, region_id: str) -> None:
        """Unmaps a region in all senders and ends its offers; the memory may be freed when this returns. A sender that
        does not unmap is killed, once no instance has a staging buffer of it mapped. Idempotent. Raises CardError with
        `quiesced` False if the driver keeps the process."""
        self.regions.pop(region_id, None)
        if self._starting is not None:  # it may be importing the region right now
            await asyncio.wait({self._starting})
        for sender in self._all():
            await self._unmap(sender, region_id)
        self._end_when_idle()

    async def make_staging_buffer(self, size: int) -> ImportRegion:
        """Memory of the sender's own that instances can import, to be offered and in the end closed.
        Raises CardRefused, CardUnavailable, CardLost, CardTimeout."""
        if self._idle is not None:
            self._idle.cancel()
        sender = await self._ready()
        region_id = new_buffer_id()
        sender.buffers.add(region_id)
        try:
            request = messages.MakeStagingBuffer(region_id, size)
            answer = await uninterrupted(
                sender.child.request(request, messages.StagingBuffer, self._configuration.import_seconds)
            )
        except TimeoutError:
            self._forget_buffer(sender, region_id)
            self._retire(sender)
            raise CardTimeout(f"card {self._device.identity} makes no staging buffer; its sender is replaced") from None
        except CardError:
            self._forget_buffer(sender, region_id)
            self._end_if_done(sender)
            self._end_when_idle()
            raise
        except BaseException:
            self._background.spawn(self.close_staging_buffer(region_id))
            raise
        return ImportRegion(region_id, size, answer.export_key)

    async def lend_staging_buffer(self, region_id: str, connection: int) -> None:
        """Lets an instance map a staging buffer; `connection` is the descriptor of its stage connection. Raises
        CardRefused, CardLost, CardTimeout."""
        sender = self._owner([region_id])
        if sender is None:
            raise CardLost(f"staging buffer {region_id!r} has ended with its sender")
        try:
            await sender.child.lend(region_id, connection)
        except TimeoutError:
            self._retire(sender)
            raise CardTimeout(f"the sender of card {self._device.identity} does not answer; it is replaced") from None

    async def close_staging_buffer(self, region_id: str) -> None:
        """Frees a staging buffer that no instance has imported any more. Never fails: a sender that does not free it is
        replaced and ends when its readers are done. The buffer of a sender that is being replaced ends with the sender.
        Idempotent."""
        sender = self._owner([region_id])
        if sender is None:
            return
        sender.child.returned(region_id)
        try:
            if sender is self._current:
                await sender.child.ask(messages.CloseRegion(region_id), self._configuration.import_seconds)
        except (TimeoutError, CardRefused) as error:
            log.warning("staging_buffer_not_freed", device=self._device.identity, buffer=region_id, error=str(error))
            self._retire(sender)
        except CardLost:
            pass
        self._forget_buffer(sender, region_id)
        self._end_if_done(sender)
        self._end_when_idle()

    async def offer(self, key: str, blobs: BlobList, peer: str) -> messages.Done:
        """Lets one reader fetch the blobs. Raises CardRefused, CardUnavailable, CardLost, CardTimeout."""
        try:
            return await self._offer(key, blobs, peer)
        except EngineRefused as error:  # no reader has asked for the key yet
            log.warning("offer_refused_by_engine", device=self._device.identity, key=key, error=str(error))
            return await self._offer(key, blobs, peer)

    async def _offer(self, key: str, blobs: BlobList, peer: str) -> messages.Done:
        if not self._worker.is_there:
            raise CardUnavailable(f"no datasystem worker answers at {self._worker.address}")
        sender = self._owner(blobs.region_ids)
        if sender is None:
            sender = await self._ready()
        elif sender.is_ending:
            raise CardLost(f"the sender of card {self._device.identity} is being ended")
        missing = set(blobs.region_ids) - sender.imported - sender.buffers
        if missing:
            raise CardRefused(f"no such regions on card {self._device.identity}: {', '.join(sorted(missing))}")
        sender.offers[key] = frozenset(blobs.region_ids)
        try:
            return await sender.child.ask(messages.Offer(key, blobs, peer))
        except TimeoutError:
            self._forget(sender, key)
            self._retire(sender)
            raise CardTimeout(f"the sender of card {self._device.identity} does not answer; it is replaced") from None
        except EngineRefused:
            self._forget(sender, key)
            self._retire(sender)
            raise
        except (CardRefused, CardLost):
            self._forget(sender, key)
            raise
        except BaseException:
            self._background.spawn(self.withdraw(key, OfferEnd.UNREAD))
            raise

    async def withdraw(self, key: str, end: OfferEnd) -> messages.Done:
        """Ends an offer. Never fails: a sender that cannot do it is replaced. Idempotent."""
        sender = next((sender for sender in self._all() if key in sender.offers), None)
        if sender is None:
            return messages.Done()
        if end is OfferEnd.ABANDONED:
            sender.is_stuck = True
            self._retire(sender)
        wait = self._configuration.withdraw_seconds if end is OfferEnd.DELIVERED else _SHORT_WAIT_MS / 1000
        try:
            return await sender.child.ask(messages.Withdraw(key, int(wait * 1000)), wait + 1)
        except (TimeoutError, CardRefused) as error:
            log.info("offer_not_withdrawn", device=self._device.identity, key=key, end=end.value, error=str(error))
            self._retire(sender)
        except CardLost:
            pass
        finally:
            self._forget(sender, key)
        return messages.Done()

    def replace(self) -> None:
        """Starts a fresh sender for new offers; the old one ends when its readers are done."""
        if self._current is not None:
            self._retire(self._current)

    async def close(self) -> None:
        """Ends all processes."""
        self._is_closed = True
        if self._idle is not None:
            self._idle.cancel()
        for task in (self._starting, self._restarting):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        await self._background.close()
        senders = self._all()
        self._current = None
        self._retiring.clear()
        await asyncio.gather(*(sender.child.stop() for sender in senders))

    # Starting

    async def _ready(self) -> _Sender:
        while self._current is None:
            if self._is_closed:
                raise CardUnavailable("the daemon ends")
            if self._starting is None:
                self._starting = asyncio.create_task(self._start())
            await asyncio.shield(self._starting)
        return self._current

    async def _start(self) -> _Sender:
        """Starts a sender and imports all regions. A region that cannot be imported again is lost, not the others."""
        try:
            if not self._worker.is_there:
                raise CardUnavailable(f"no datasystem worker answers at {self._worker.address}")
            sender = _Sender(await CardProcess.start(Role.SENDER, self._device.index, self._configuration))
            try:
                await self._import_all(sender)
            except BaseException:
                await uninterrupted(sender.child.kill())
                raise
        except CardError as error:
            self._set_problem(str(error))
            raise
        finally:
            self._starting = None
        sender.child.on_end = lambda: self._ended(sender)
        if sender.child.has_ended:
            raise CardUnavailable(f"the sender of card {self._device.identity} ended at once")
        self._current = sender
        self._set_problem("")
        return sender

    async def _import_all(self, sender: _Sender) -> None:
        for region in list(self.regions.values()):
            try:
                await self._import(sender, region)
            except CardRefused as error:
                if self._restarting is not None:  # otherwise `register` raises the error
                    self.regions.pop(region.region_id, None)
                    self._hooks.on_region_lost(region.region_id, str(error))
            except (CardLost, CardTimeout) as error:
                raise CardUnavailable(str(error)) from error

    async def _import(self, sender: _Sender, region: ImportRegion) -> None:
        async with sender.importing:
            if region.region_id in sender.imported or self.regions.get(region.region_id) != region:
                return
            sender.imported.add(region.region_id)  # first: the region must be closed however the import ends
            try:
                await sender.child.ask(region, self._configuration.import_seconds)
            except TimeoutError:
                self._retire(sender)
                raise CardTimeout(f"card {self._device.identity} does not import memory; it is replaced") from None
            except CardRefused:
                sender.imported.discard(region.region_id)
                raise

    def _restart(self) -> None:
        if self._restarting is None and not self._is_closed:
            self._restarting = self._background.spawn(self._restart_until_ready())

    async def _restart_until_ready(self) -> None:
        wait, most = self._configuration.restart_seconds
        try:
            while self.regions and not self._is_closed:
                try:
                    await self._ready()
                except CardError:
                    await asyncio.sleep(wait if self._worker.is_there else 0.1)  # a worker is back soon or never
                    wait = min(2 * wait, most)
                else:
                    return
        finally:
            self._restarting = None

    # Ending

    def _all(self) -> list[_Sender]:
        return [*([self._current] if self._current is not None else []), *self._retiring]

    def _ended(self, sender: _Sender) -> None:
        """The process has ended for any reason."""
        if sender in self._retiring:
            self._retiring.remove(sender)
        was_current = sender is self._current
        if was_current:
            self._current = None
        sender.buffers_returned.set()
        if sender.offers:
            lost = list(sender.offers)
            sender.offers.clear()
            self._hooks.on_offers_lost(lost, f"the sender of card {self._device.identity} has ended")
        if was_current and self.regions:
            self._set_problem("its process has ended; another one is starting")
            self._restart()

    def _retire(self, sender: _Sender) -> None:
        if sender is not self._current:
            self._end_if_done(sender)
            return
        self._current = None
        self._retiring.append(sender)
        log.info("sender_replaced", device=self._device.identity, pid=sender.child.pid, offers=len(sender.offers))
        self._end_if_done(sender)
        if self.regions:
            self._restart()

    def _forget(self, sender: _Sender, key: str) -> None:
        sender.offers.pop(key, None)
        self._end_if_done(sender)

    def _owner(self, buffers: Collection[str]) -> _Sender | None:
        """The sender that has one of the staging buffers."""
        return next((sender for sender in self._all() if sender.buffers.intersection(buffers)), None)

    def _forget_buffer(self, sender: _Sender, region_id: str) -> None:
        sender.buffers.discard(region_id)
        if not sender.buffers:
            sender.buffers_returned.set()

    async def _await_buffers(self, sender: _Sender) -> None:
        """Cuts the readers of the sender's buffers off, and returns when no instance has one mapped: an instance that
        has could use its card no more if the sender ended."""
        sender.is_ending = True
        self._retire(sender)
        self._hooks.on_offers_lost(list(sender.offers), f"the sender of card {self._device.identity} is being ended")
        sender.buffers_returned.clear()
        await sender.buffers_returned.wait()

    def _end_if_done(self, sender: _Sender) -> None:
        if sender in self._retiring and not sender.offers and not sender.buffers and not self._is_closed:
            self._background.spawn(sender.child.kill() if sender.is_stuck else sender.child.stop())

    def _end_when_idle(self) -> None:
        """If nothing needs the sender now, it ends after a while."""
        if self.regions or self._current is None or self._current.buffers or self._is_closed:
            return
        if self._idle is not None:
            self._idle.cancel()
        self._idle = asyncio.get_running_loop().call_later(self._configuration.sender_idle_seconds, self._end_if_idle)

    def _end_if_idle(self) -> None:
        if not self.regions and self._current is not None and not self._current.buffers:
            self._retire(self._current)

    async def _unmap(self, sender: _Sender, region_id: str) -> None:
        async with sender.importing:
            if region_id not in sender.imported or sender.child.has_ended:
                return
            try:
                for key in [key for key, regions in sender.offers.items() if region_id in regions]:
                    await sender.child.ask(messages.Withdraw(key, _SHORT_WAIT_MS))
                    self._forget(sender, key)
                await sender.child.ask(messages.CloseRegion(region_id), self._configuration.import_seconds)
            except (TimeoutError, CardRefused, CardLost) as error:
                log.info("region_held_by_sender", device=self._device.identity, region=region_id, error=str(error))
                if sender.buffers and not sender.child.has_ended:
                    await self._await_buffers(sender)
                if not await uninterrupted(sender.child.kill()):
                    raise CardTimeout(f"the driver does not let go of region {region_id!r}", quiesced=False) from error
            sender.imported.discard(region_id)

    def _set_problem(self, problem: str) -> None:
        changed = problem != self.problem
        self.problem = problem
        if changed:
            self._hooks.on_health_change()
