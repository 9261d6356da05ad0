"""All cards of this host."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import structlog

from weight_broker.drivers import ascend_requirements
from weight_brokerd.cards import messages, process
from weight_brokerd.cards.borrowed import BorrowedReceiver
from weight_brokerd.cards.configuration import CardsConfiguration
from weight_brokerd.cards.errors import CardUnavailable
from weight_brokerd.cards.events import Hooks
from weight_brokerd.cards.health import CardHealth, CardState
from weight_brokerd.cards.messages import ImportRegion
from weight_brokerd.cards.offers import MAXIMUM_TIMEOUT_SECONDS, OfferEnd
from weight_brokerd.cards.plan.blobs import BlobList
from weight_brokerd.cards.probe import Device, find_devices
from weight_brokerd.cards.receivers import ReceiverSide, Reserve
from weight_brokerd.cards.worker_watch import WorkerWatch
from weight_brokerd.kinds.npu.senders import SenderSide
from weight_brokerd.processes import left_behind

log = structlog.get_logger()
T = TypeVar("T")
_KEY = re.compile(r"[A-Za-z0-9_-]{1,255}")


@dataclass(slots=True)
class _Card:
    device: Device
    senders: SenderSide
    receivers: ReceiverSide


class CardSupervisor:
    """Starts, uses and replaces the card processes. Cards are named by their physical identity."""

    def __init__(self, configuration: CardsConfiguration, hooks: Hooks | None = None) -> None:
        self._configuration = configuration
        self._hooks = hooks or Hooks()
        self._cards: dict[str, _Card] = {}
        self._worker = WorkerWatch(
            configuration.worker_host,
            configuration.worker_port,
            self._worker_changed,
            serves=self._hooks.worker_serves,
        )
        self.problem = ""
        """The driver's words if it could not be asked for its cards."""

    async def start(self) -> None:
        """Finds the cards and the worker. Failures show in `health`; nothing is raised for them."""
        if self._configuration.log_directory is not None:
            self._configuration.log_directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if pids := await asyncio.to_thread(left_behind.find, process.MODULE):
            # An instance that hangs has a staging buffer of an earlier broker mapped. Its memory stays on the card.
            log.warning("card_processes_left_behind", pids=pids)
        (devices, self.problem), _ = await asyncio.gather(find_devices(self._configuration), self._worker.start())
        for device in map(_judged, devices):
            parts = device, self._configuration, self._worker, self._hooks
            self._cards[device.identity] = _Card(device, SenderSide(*parts), ReceiverSide(*parts))
        log.info("cards_found", cards=list(self._cards), problem=self.problem)

    async def close(self) -> None:
        """Ends all processes. Cancel running fetches first."""
        await self._worker.close()
        sides = [side for card in self._cards.values() for side in (card.senders, card.receivers)]
        await asyncio.gather(*(side.close() for side in sides))

    # Sources

    async def register(self, card: str, region: ImportRegion) -> None:
        """Maps a region of a publication in the card's sender, and again in every later one. Idempotent.
        Raises CardRefused, CardUnavailable, CardTimeout; then the region is not registered."""
        await self._card(card).senders.register(region)

    async def unregister(self, card: str, region_id: str) -> None:
        """Unmaps a region: its memory may be freed when this returns. Drain its readers first; others are cut off.
        Idempotent. Raises CardError with `quiesced` False if the driver does not let go."""
        await self._card(card).senders.unregister(region_id)

    async def offer(self, card: str, key: str, blobs: BlobList, *, peer: str = "") -> messages.Done:
        """Lets one reader fetch registered memory under a fresh key. Raises CardError."""
        return await self._card(card).senders.offer(_checked(key), blobs, peer)

    async def withdraw(self, card: str, key: str, end: OfferEnd) -> messages.Done:
        """Ends an offer whose reader has ended as `end` says. Idempotent; never fails. The answer has no times if there
        was no offer or the sender failed."""
        return await self._card(card).senders.withdraw(key, end)

    async def make_staging_buffer(self, card: str, size: int) -> ImportRegion:
        """Memory of the card's sender that an instance can import and fill, to be offered. Raises CardError."""
        return await self._card(card).senders.make_staging_buffer(size)

    async def lend_staging_buffer(self, card: str, region_id: str, connection: int) -> None:
        """Lets an instance map a staging buffer; `connection` is the descriptor of its stage connection. Raises
        CardError."""
        await self._card(card).senders.lend_staging_buffer(region_id, connection)

    async def close_staging_buffer(self, card: str, region_id: str) -> None:
        """Frees a staging buffer that no instance has imported any more. Idempotent; never fails."""
        await self._card(card).senders.close_staging_buffer(region_id)

    # Destinations

    async def fetch(
        self,
        card: str,
        key: str,
        blobs: BlobList,
        regions: Sequence[ImportRegion],
        *,
        timeout: float,
        peer: str = "",
        reserve: Reserve | None = None,
    ) -> messages.Done:
        """Fills `blobs`, which lie in `regions`, from an offer of another card. Nothing writes to the regions after
        this returns or raises, unless the error has `quiesced` False. A cancellation costs the receiver. `reserve` has
        the key offered; it runs once a receiver is free, while the regions are mapped, so that neither waits for the
        other. Raises CardError, and the error of `reserve`. Withdraw the key in any case."""
        milliseconds = int(min(timeout, MAXIMUM_TIMEOUT_SECONDS) * 1000)
        request = messages.Fetch(_checked(key), blobs, milliseconds, peer)
        return await self._card(card).receivers.run(request, regions, timeout, reserve)

    async def copy(
        self,
        card: str,
        source: BlobList,
        destination: BlobList,
        regions: Sequence[ImportRegion],
        *,
        timeout: float,
    ) -> messages.Done:
        """`fetch` for a source on the same card, which the engine does not do. The regions are those of both sides."""
        request = messages.CopyWithinCard(source, destination)
        return await self._card(card).receivers.run(request, regions, timeout)

    async def lend(
        self,
        card: str,
        job: Callable[[BorrowedReceiver], Awaitable[T]],
        regions: Sequence[ImportRegion],
        *,
        buffer_bytes: int = 0,
        timeout: float,
    ) -> T:
        """Runs a job of several steps with a receiver of the card. It has the regions mapped meanwhile, and a staging
        buffer if `buffer_bytes` is not 0. Raises CardError, and what the job raises; else as `fetch`."""
        return await self._card(card).receivers.lend(job, regions, buffer_bytes, timeout)

    async def warm_up(self, card: str) -> None:
        """Has a receiver ready before it is needed. Raises CardUnavailable."""
        await self._card(card).receivers.warm_up()

    # Health

    @property
    def worker_is_there(self) -> bool:
        """Whether the datasystem worker answers."""
        return self._worker.is_there

    async def worker_found(self, seconds: float) -> None:
        """Returns when the datasystem worker answers, or after so many seconds."""
        await self._worker.found(seconds)

    @property
    def health(self) -> list[CardHealth]:
        """Every card."""
        return [self._health(card) for card in self._cards.values()]

    async def figures(self, card: str) -> Mapping[int, messages.Figures]:
        """What each process of the card has, by pid. For people: it asks the processes."""
        sides = self._card(card)
        children = [*sides.senders.retiring, *sides.receivers.idle, *sides.receivers.busy]
        if sides.senders.current is not None:
            children.append(sides.senders.current)
        limit = self._configuration.request_seconds
        return {
            child.pid: await child.request(messages.AskFigures(), messages.Figures, limit)
            for child in children
            if not child.has_ended
        }

    def _health(self, card: _Card) -> CardHealth:
        device, senders, receivers = card.device, card.senders, card.receivers
        problem = device.problem or senders.problem or receivers.problem
        if not problem and not self._worker.is_there:
            problem = f"no datasystem worker answers at {self._worker.address}"
        state = CardState.FAILED if device.problem else CardState.DEGRADED if problem else CardState.READY
        return CardHealth(
            identity=device.identity,
            device_index=device.index,
            soc=device.soc,
            state=state,
            problem=problem,
            sender_pid=senders.current.pid if senders.current is not None else 0,
            retiring_pids=tuple(child.pid for child in senders.retiring),
            receiver_pids=tuple(child.pid for child in [*receivers.idle, *receivers.busy]),
            regions=len(senders.regions),
            offers=senders.offers,
            fetches=len(receivers.busy),
        )

    def _card(self, identity: str) -> _Card:
        card = self._cards.get(identity)
        if card is None:
            known = ", ".join(self._cards) or self.problem or "none"
            raise CardUnavailable(f"this host has no card {identity!r}; it has: {known}")
        if card.device.problem:
            raise CardUnavailable(f"card {identity} does not open: {card.device.problem}")
        return card

    def _worker_changed(self, is_there: bool) -> None:
        """A restarted worker does not know the clients of its predecessor: they would wait for a minute."""
        if is_there:
            for card in self._cards.values():
                card.senders.replace()
                card.receivers.replace()
            self._hooks.on_worker_found()
        self._hooks.on_health_change()


def _judged(device: Device) -> Device:
    """With the reason, if no card of its kind can share memory."""
    problem = ascend_requirements.virtual_problem(device.identity) or ascend_requirements.chip_problem(device.soc)
    return replace(device, problem=device.problem or problem)


def _checked(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise ValueError(f"{key!r} is not a key: letters, digits, - and _, at most 255")
    return key
