"""The receiving side of a card: processes that fill memory of this host's instances, one transfer at a time each.

They start on demand and stay warm for a while. Memory is mapped for one transfer. A receiver whose transfer is overdue
or has failed in the engine is killed, and its end is awaited: then nothing writes any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import structlog

from weight_brokerd.cards import messages
from weight_brokerd.cards.borrowed import BorrowedReceiver
from weight_brokerd.cards.configuration import CardsConfiguration
from weight_brokerd.cards.errors import CardLost, CardRefused, CardTimeout, CardUnavailable, ImportRefused
from weight_brokerd.cards.events import Hooks
from weight_brokerd.cards.messages import ImportRegion, Role
from weight_brokerd.cards.probe import Device
from weight_brokerd.cards.process import CardProcess, EngineFailed
from weight_brokerd.cards.worker_watch import Worker
from weight_brokerd.processes.tasks import Background, uninterrupted

log = structlog.get_logger()
TransferRequest = messages.Fetch | messages.CopyWithinCard | messages.Ping
"""The request once the memory is mapped. Ping only checks that it can be mapped."""
T = TypeVar("T")
Reserve = Callable[[], Coroutine[Any, Any, object]]
"""Has the key of a fetch offered at its source. Cancelled if the memory cannot be mapped."""

PING_SECONDS = 2.0
"""For an idle receiver to answer a Ping."""
FRESH_SECONDS = 1.0
"""A receiver that has answered so lately is not asked again."""
_HELD = "the driver does not let go of the memory"


class ReceiverSide:
    """The receivers of one card."""

    def __init__(self, device: Device, configuration: CardsConfiguration, worker: Worker, hooks: Hooks) -> None:
        self.problem = ""
        """Why the last start of a receiver failed, in the driver's or the engine's words."""
        self.busy: set[CardProcess] = set()
        self._device = device
        self._configuration = configuration
        self._worker = worker
        self._hooks = hooks
        self._slots = asyncio.Semaphore(configuration.receivers_per_card)
        self._idle: dict[CardProcess, asyncio.TimerHandle] = {}
        self._outdated: set[CardProcess] = set()
        self._background = Background()

    @property
    def idle(self) -> list[CardProcess]:
        """Processes that wait for a transfer."""
        return list(self._idle)

    async def run(
        self,
        request: TransferRequest,
        regions: Sequence[ImportRegion],
        timeout: float,
        reserve: Reserve | None = None,
    ) -> messages.Done:
        """Maps the regions, fills them and unmaps them, within `timeout` seconds; `reserve` runs meanwhile. Raises
        CardTimeout, CardRefused, CardLost, CardUnavailable, with `touched` and `quiesced`; also the error of `reserve`,
        with nothing touched and nothing mapped."""
        if isinstance(request, messages.Fetch) and not self._worker.is_there:
            raise CardUnavailable(f"no datasystem worker answers at {self._worker.address}")
        deadline = asyncio.get_running_loop().time() + timeout
        return await self._with_child(
            lambda child: self._transfer(child, request, regions, deadline, reserve), deadline, timeout
        )

    async def lend(
        self,
        job: Callable[[BorrowedReceiver], Awaitable[T]],
        regions: Sequence[ImportRegion],
        buffer_bytes: int,
        timeout: float,
    ) -> T:
        """Runs `job` within `timeout` seconds with a reserved receiver that has the regions mapped and, if
        `buffer_bytes`, a staging buffer of that size. Raises as `run`, and what the job raises, unless the receiver has
        to be killed for it and does not end (CardLost, not `quiesced`). Only the job knows what was touched."""
        deadline = asyncio.get_running_loop().time() + timeout
        return await self._with_child(
            lambda child: self._lend(child, job, regions, buffer_bytes, deadline), deadline, timeout
        )

    async def warm_up(self) -> None:
        """Starts a receiver if none waits. Raises CardUnavailable."""
        if not self._idle and not self.busy:
            self._put_back(await self._start())

    def replace(self) -> None:
        """Ends the receivers: idle ones at once, busy ones after their transfer."""
        self._outdated.update(self.busy)
        for child in list(self._idle):
            self._end(child)

    async def close(self) -> None:
        """Ends all processes. Cancel running transfers first."""
        children = [*self._idle, *self.busy]
        for timer in self._idle.values():
            timer.cancel()
        self._idle.clear()
        await self._background.close()
        await asyncio.gather(*(child.stop() for child in children))

    async def _with_child(
        self, work: Callable[[CardProcess], Coroutine[Any, Any, T]], deadline: float, timeout: float
    ) -> T:
        try:
            async with asyncio.timeout_at(deadline):
                await self._slots.acquire()
        except TimeoutError:
            raise CardTimeout(f"all receivers of card {self._device.identity} were busy for {timeout:g} s") from None
        try:
            try:
                async with asyncio.timeout_at(deadline):
                    child = await self._take()
            except TimeoutError:
                raise CardTimeout(f"no receiver of card {self._device.identity} started in {timeout:g} s") from None
            self.busy.add(child)
            try:
                return await work(child)
            finally:
                self.busy.discard(child)
                self._put_back(child)
        finally:
            self._slots.release()

    async def _take(self) -> CardProcess:
        while self._idle:
            child, timer = self._idle.popitem()  # the last used receiver
            timer.cancel()
            if not (child.is_killed or child.has_ended) and await self._is_well(child):
                return child
        return await self._start()

    async def _is_well(self, child: CardProcess) -> bool:
        """Whether an idle receiver still serves; kills it if not."""
        if asyncio.get_running_loop().time() - child.answered_at < FRESH_SECONDS:
            return True
        try:
            await child.ask(messages.Ping(), PING_SECONDS)
        except BaseException as error:
            self._background.spawn(child.kill())
            if not isinstance(error, (TimeoutError, CardRefused, CardLost)):
                raise
            log.info("receiver_replaced", device=self._device.identity, pid=child.pid, error=str(error))
            return False
        return True

    async def _start(self) -> CardProcess:
        try:
            if not self._worker.is_there:
                raise CardUnavailable(f"no datasystem worker answers at {self._worker.address}")
            child = await CardProcess.start(Role.RECEIVER, self._device.index, self._configuration)
        except CardUnavailable as error:
            self._set_problem(str(error))
            raise
        self._set_problem("")
        return child

    def _put_back(self, child: CardProcess) -> None:
        if child.is_killed or child.has_ended:  # a killed process may live until the driver lets go
            self._outdated.discard(child)
            return
        loop = asyncio.get_running_loop()
        self._idle[child] = loop.call_later(self._configuration.receiver_idle_seconds, self._end, child)
        if child in self._outdated:
            self._outdated.discard(child)
            self._end(child)

    def _end(self, child: CardProcess) -> None:
        timer = self._idle.pop(child, None)
        if timer is not None:
            timer.cancel()
            self._background.spawn(child.stop())

    async def _transfer(
        self,
        child: CardProcess,
        request: TransferRequest,
        regions: Sequence[ImportRegion],
        deadline: float,
        reserve: Reserve | None,
    ) -> messages.Done:
        await self._prepare(child, regions, deadline, reserve)
        try:
            async with asyncio.timeout_at(deadline):
                done = await child.ask(request, max(0.0, deadline - asyncio.get_running_loop().time()))
        except TimeoutError:
            quiesced = await uninterrupted(child.kill())
            raise CardTimeout(self._overdue(), touched=True, quiesced=quiesced) from None
        except (EngineFailed, CardLost) as error:
            quiesced = await uninterrupted(child.kill())
            raise CardLost(str(error), touched=True, quiesced=quiesced) from error
        except CardRefused as error:  # the request has not begun, so the receiver can be used again
            quiesced = await uninterrupted(self._unmap(child, regions))
            raise CardRefused(str(error), quiesced=quiesced) from error
        except BaseException as error:
            if not await uninterrupted(child.kill()):
                raise CardLost(_HELD, touched=True, quiesced=False) from error
            raise
        if not await uninterrupted(self._unmap(child, regions)):
            raise CardLost(_HELD, touched=True, quiesced=False)
        return done

    async def _lend(
        self,
        child: CardProcess,
        job: Callable[[BorrowedReceiver], Awaitable[T]],
        regions: Sequence[ImportRegion],
        buffer_bytes: int,
        deadline: float,
    ) -> T:
        await self._prepare(child, regions, deadline, None)
        receiver = BorrowedReceiver(child, self._configuration)

        async def unmap() -> bool:
            if receiver.keeps_buffer:
                return False  # the process does it when the daemon has ended
            if receiver.buffer is None:
                return await self._unmap(child, regions)
            child.returned(receiver.buffer.region_id)
            return await self._unmap(child, [*regions, receiver.buffer])

        async def kill() -> bool:
            return not receiver.keeps_buffer and await child.kill()

        try:
            async with asyncio.timeout_at(deadline):
                if buffer_bytes:
                    await receiver.make_staging_buffer(buffer_bytes)
                done = await job(receiver)
        except TimeoutError:
            quiesced = await uninterrupted(kill())
            raise CardTimeout(self._overdue(), quiesced=quiesced) from None
        except (EngineFailed, CardLost) as error:
            quiesced = await uninterrupted(kill())
            raise CardLost(str(error), quiesced=quiesced) from error
        except CardRefused as error:  # the receiver can be used again
            error.quiesced = await uninterrupted(unmap())
            raise
        except BaseException as error:
            is_clean = not receiver.is_busy and await uninterrupted(unmap())
            if not is_clean and not await uninterrupted(kill()):
                raise CardLost(_HELD, touched=True, quiesced=False) from error
            raise
        if not await uninterrupted(unmap()):
            raise CardLost(_HELD, touched=True, quiesced=False)
        return done

    async def _prepare(
        self, child: CardProcess, regions: Sequence[ImportRegion], deadline: float, reserve: Reserve | None
    ) -> None:
        """Maps the regions while the key is reserved. If it raises, nothing is mapped and nothing is being reserved."""
        reserving = asyncio.create_task(_nothing() if reserve is None else reserve())
        try:
            await self._map(child, regions, deadline)
            try:
                async with asyncio.timeout_at(deadline):
                    await reserving
            except BaseException as error:  # the receiver can be used again
                quiesced = await uninterrupted(self._unmap(child, regions))
                if isinstance(error, TimeoutError):
                    raise CardTimeout("the source did not offer its memory in time", quiesced=quiesced) from None
                if not quiesced:
                    raise CardLost(_HELD, quiesced=False) from error
                raise
        finally:
            reserving.cancel()
            await uninterrupted(_ended(reserving))

    async def _map(self, child: CardProcess, regions: Sequence[ImportRegion], deadline: float) -> None:
        try:
            async with asyncio.timeout_at(deadline):
                seconds = self._configuration.import_seconds
                importing = (child.ask(region, seconds) for region in regions)
                outcomes = await asyncio.gather(*importing, return_exceptions=True)
            for region, outcome in zip(regions, outcomes, strict=True):
                if isinstance(outcome, CardRefused) and not isinstance(outcome, EngineFailed):
                    raise ImportRefused(str(outcome), region.region_id) from outcome
                if isinstance(outcome, BaseException):
                    raise outcome
        except TimeoutError:
            quiesced = await uninterrupted(child.kill())
            raise CardTimeout(self._overdue(), quiesced=quiesced) from None
        except CardLost as error:
            quiesced = await uninterrupted(child.kill())
            raise CardLost(str(error), quiesced=quiesced) from error
        except CardRefused as error:
            error.quiesced = await uninterrupted(self._unmap(child, regions))
            raise
        except BaseException as error:
            if not await uninterrupted(child.kill()):
                raise CardLost(_HELD, quiesced=False) from error
            raise

    async def _unmap(self, child: CardProcess, regions: Sequence[ImportRegion]) -> bool:
        """Unmap the regions, or kill the process if it does not; False if the driver keeps the killed process."""
        seconds = self._configuration.import_seconds
        closing = (child.ask(messages.CloseRegion(region.region_id), seconds) for region in regions)
        for outcome in await asyncio.gather(*closing, return_exceptions=True):
            if isinstance(outcome, (TimeoutError, CardRefused, CardLost)):
                log.info("region_held_by_receiver", device=self._device.identity, error=str(outcome))
                return await child.kill()
            if isinstance(outcome, BaseException):
                raise outcome
        return True

    def _overdue(self) -> str:
        return f"card {self._device.identity} was not done in time; its receiver was killed"

    def _set_problem(self, problem: str) -> None:
        changed = problem != self.problem
        self.problem = problem
        if changed:
            self._hooks.on_health_change()


async def _nothing() -> None:
    """For a key that is on offer already."""


async def _ended(task: asyncio.Task[object]) -> None:
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # mark as retrieved: this error, or a more important one, was raised already
