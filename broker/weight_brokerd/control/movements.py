"""The transfers whose bytes the broker moves, one at a time for each acquisition.

An acquisition may lose its source and be granted another one while the bytes of the first are still being written. The
second movement begins when the first has ended; until then no answer lets the receiver use its memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from weight_brokerd.core import model
from weight_brokerd.core.model import FailureCause
from weight_brokerd.core.publications import Publication
from weight_brokerd.core.transfers import Transfer
from weight_brokerd.dataplane.plane import DataPlane, MoveFailed, PhaseSeconds, Place, shown_as

log = structlog.get_logger()


class MovementEvents(Protocol):
    """How movements end. Not called for a movement that was stopped."""

    def moved(self, transfer: Transfer, seconds: Mapping[str, float]) -> None:
        """Every byte has arrived."""

    def not_moved(self, transfer: Transfer, failure: MoveFailed) -> None:
        """The movement has failed; `failure` says how far it got."""

    def routed(self, transfer: Transfer, data_plane: model.DataPlane) -> None:
        """This data plane begins to move the bytes."""

    def staged(self, transfer: Transfer) -> None:
        """The card does not map the receiver's memory: its owner copies it, in this and all later transfers."""


@dataclass(slots=True)
class _Acquisition:
    """The movements into the memory of one acquisition."""

    tasks: dict[asyncio.Task[None], Transfer] = field(default_factory=dict)
    """Movements that have not ended, in the order of their grants."""
    transfer: Transfer | None = None
    """The transfer that moves now and was not stopped."""
    touched: bool = False
    quiesced: bool = True


class Movements:
    """All movements, by acquisition."""

    def __init__(self, route: Callable[[Place, Place], DataPlane]) -> None:
        """`route` chooses the data plane for two places."""
        self._route = route
        self._acquisitions: dict[str, _Acquisition] = {}

    def start(
        self, transfer: Transfer, source: Place, destination: Place, timeout: float, events: MovementEvents
    ) -> None:
        """Move the bytes, after earlier movements into the same memory have ended."""
        entry = self._acquisitions.setdefault(transfer.acquisition_id, _Acquisition())
        entry.transfer = transfer
        work = self._move(entry, list(entry.tasks), transfer, source, destination, timeout, events)
        task = asyncio.get_running_loop().create_task(work)
        entry.tasks[task] = transfer
        task.add_done_callback(lambda ended: entry.tasks.pop(ended, None))

    def stop(self, transfer: Transfer) -> None:
        """Stop a movement; `settled` returns when it has ended. Idempotent."""
        entry = self._acquisitions.get(transfer.acquisition_id)
        if entry is None or entry.transfer is not transfer:
            return
        entry.transfer = None
        for task, moved in entry.tasks.items():
            if moved is transfer and task is not asyncio.current_task():
                task.cancel()

    def is_moving(self, acquisition_id: str) -> bool:
        """Whether a movement may write to the acquisition's memory now."""
        return bool(self._others(acquisition_id))

    async def settled(self, acquisition_id: str) -> None:
        """Wait until all movements into the acquisition's memory have ended; `outcome` says whether writing ended."""
        while tasks := self._others(acquisition_id):
            await asyncio.wait(tasks)

    async def readers_gone(self, publication: Publication) -> None:
        """Wait until nothing moves out of the publication's memory any more."""
        while tasks := {
            task
            for entry in self._acquisitions.values()
            for task, moved in entry.tasks.items()
            if moved.publication is publication and not task.done()
        }:
            await asyncio.wait(tasks)

    def outcome(self, acquisition_id: str) -> tuple[bool, bool]:
        """(touched, quiesced) of the acquisition's memory, once it is settled."""
        entry = self._acquisitions.get(acquisition_id)
        return (False, True) if entry is None else (entry.touched, entry.quiesced)

    async def forget(self, acquisition_id: str) -> None:
        """The acquisition is over: stop and forget its movements."""
        entry = self._acquisitions.get(acquisition_id)
        if entry is None:
            return
        if entry.transfer is not None:
            self.stop(entry.transfer)
        await self.settled(acquisition_id)
        self._acquisitions.pop(acquisition_id, None)

    async def close(self) -> None:
        """Stop and forget all movements."""
        await asyncio.gather(*(self.forget(acquisition_id) for acquisition_id in list(self._acquisitions)))

    def _others(self, acquisition_id: str) -> set[asyncio.Task[None]]:
        """The movements into the acquisition's memory, without the calling task's own."""
        entry = self._acquisitions.get(acquisition_id)
        tasks = entry.tasks if entry is not None else {}
        return {task for task in tasks if not task.done() and task is not asyncio.current_task()}

    async def _move(
        self,
        entry: _Acquisition,
        before: Sequence[asyncio.Task[None]],
        transfer: Transfer,
        source: Place,
        destination: Place,
        timeout: float,
        events: MovementEvents,
    ) -> None:
        begun = asyncio.get_running_loop().time()
        failure: MoveFailed | None = None
        seconds: Mapping[str, float] = {}
        try:
            if before:
                await asyncio.wait(before)
            if not entry.quiesced:
                raise MoveFailed(
                    "the previous transfer into these tensors is still running; discard the tensors",
                    cause=FailureCause.RECEIVER,
                    touched=True,
                    quiesced=False,
                )
            seconds = await self._bring(entry, transfer, source, destination, begun + timeout, events)
            entry.touched = True
        except asyncio.CancelledError:
            entry.touched = True
            return
        except MoveFailed as error:
            entry.touched = entry.touched or error.touched
            entry.quiesced = entry.quiesced and error.quiesced
            failure = error
        except Exception as error:  # of any kind: the acquisition must not wait for ever
            log.exception("internal_error", transfer_id=transfer.transfer_id)
            entry.touched = True
            failure = MoveFailed(
                f"the broker failed: {type(error).__name__}", cause=FailureCause.SOURCE_UNREACHABLE, touched=True
            )
        if entry.transfer is not transfer:  # stopped just now
            return
        entry.transfer = None
        if failure is None:
            events.moved(transfer, seconds)
        else:
            events.not_moved(transfer, failure)

    async def _bring(
        self,
        entry: _Acquisition,
        transfer: Transfer,
        source: Place,
        destination: Place,
        deadline: float,
        events: MovementEvents,
    ) -> PhaseSeconds:
        """Move the bytes. Memory that the card refuses to map is staged if the receiver offered that."""
        try:
            return await self._move_by_route(entry, transfer, source, destination, deadline, events)
        except MoveFailed as error:
            may_stage = error.needs_staging and error.quiesced and destination.stage is not None
            if not may_stage or entry.transfer is not transfer:
                raise
            entry.touched = entry.touched or error.touched
            log.info("transfer_staged", transfer_id=transfer.transfer_id, why=str(error))
        events.staged(transfer)
        return await self._move_by_route(entry, transfer, source, destination.as_staged, deadline, events)

    async def _move_by_route(
        self,
        entry: _Acquisition,
        transfer: Transfer,
        source: Place,
        destination: Place,
        deadline: float,
        events: MovementEvents,
    ) -> PhaseSeconds:
        """Move the bytes by the plane that the kind chooses, or by the one that this plane names instead."""
        plane = self._route(source, destination)
        try:
            return await _move_by(plane, transfer, source, destination, deadline, events)
        except MoveFailed as error:
            if error.instead is None or entry.transfer is not transfer:
                raise
            plane = error.instead
            log.info("transfer_rerouted", transfer_id=transfer.transfer_id, plane=plane.name, why=str(error))
        return await _move_by(plane, transfer, source, destination, deadline, events)


async def _move_by(
    plane: DataPlane,
    transfer: Transfer,
    source: Place,
    destination: Place,
    deadline: float,
    events: MovementEvents,
) -> PhaseSeconds:
    events.routed(transfer, shown_as(plane.name, source, destination))
    remaining = max(deadline - asyncio.get_running_loop().time(), 0.0)
    return await plane.move(
        transfer.publication.layout, source, destination, timeout=remaining, peer=transfer.transfer_id
    )
