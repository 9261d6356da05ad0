"""Staged transfers: an owner of memory that the broker does not map copies it, chunk by chunk, to or from a staging
buffer on the same card. A card process owns the buffer.

Between two cards the sender has the source's buffer and the receiver the destination's; the datasystem carries each
chunk under a fresh key. Within a card there is one buffer, the receiver's. While one half of a buffer is filled, the
other half is carried on or emptied.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Protocol

import structlog

from weight_broker.kinds import TRAITS
from weight_broker.layout import Layout
from weight_broker.v1 import attach_pb2 as pb
from weight_broker.v1 import weight_set_pb2
from weight_brokerd.attach.stage import StagingGone, StagingRefused, StagingSilent
from weight_brokerd.cards import messages
from weight_brokerd.cards.borrowed import BorrowedReceiver
from weight_brokerd.cards.errors import CardError, CardLost, CardRefused, CardTimeout, ImportRefused
from weight_brokerd.cards.messages import ImportRegion
from weight_brokerd.cards.offers import MAXIMUM_TIMEOUT_SECONDS
from weight_brokerd.cards.plan import chunks as staging_plan
from weight_brokerd.cards.plan.blobs import Blob, BlobList
from weight_brokerd.cards.plan.chunks import Chunk, DirectContent
from weight_brokerd.cards.plan.extents import TooScattered
from weight_brokerd.cards.receivers import Reserve
from weight_brokerd.core.model import FailureCause
from weight_brokerd.dataplane.datasystem import DatasystemPlane
from weight_brokerd.dataplane.plane import Cards, MoveFailed, PhaseSeconds, Place, PlaneName, StagedBy
from weight_brokerd.processes.tasks import Background, together, uninterrupted

log = structlog.get_logger()
CLOSE_SECONDS = 10.0
"""For an instance to finish its copies and to unmap a staging buffer."""
_HALVES = 2
_GIVE_BACK_SECONDS = 2.0
"""The longest that a transfer waits for its source's buffer to be given back; that goes on behind it."""


class Asker(Protocol):
    """Sends requests to instances (`weight_brokerd.attach.stage.StagingConnections`)."""

    def has(self, instance_id: str) -> bool:
        """Whether the instance has a stage connection."""

    def connection_of(self, instance_id: str) -> int:
        """The descriptor of the instance's stage connection; duplicate it before the next turn of the loop. Raises
        StagingGone."""
        ...

    async def ask(self, instance_id: str, request: pb.StageRequest, timeout: float) -> None:
        """Raises StagingRefused, StagingGone, StagingSilent."""
        ...

    async def let_go(self, instance_id: str) -> bool:
        """Return when an instance whose connection has ended has unmapped its staging buffers. False: the daemon ends
        first."""
        ...


class StagedPlane:
    """Moves weight sets that are staged on one side or both."""

    name = PlaneName.STAGED

    def __init__(
        self,
        cards: Cards,
        datasystem: DatasystemPlane,
        instances: Asker,
        *,
        staging_bytes: int,
        answer_seconds: float,
    ) -> None:
        """`staging_bytes` is the size of a staging buffer. An instance that does not answer within `answer_seconds` is
        not asked again."""
        self._cards = cards
        self._datasystem = datasystem
        self._instances = instances
        self._staging_bytes = staging_bytes
        self._answer_seconds = answer_seconds
        self._background = Background()

    async def move(
        self, layout: Layout, source: Place, destination: Place, *, timeout: float, peer: str
    ) -> PhaseSeconds:
        """As `weight_brokerd.dataplane.plane.DataPlane`."""
        if not layout.content_bytes:
            return {}
        half = staging_plan.half_bytes(layout.content_bytes, self._staging_bytes)
        chunks = staging_plan.chunks(layout.content_bytes, half)
        try:
            source_content = await asyncio.to_thread(_direct, layout, source)
            destination_content = await asyncio.to_thread(_direct, layout, destination)
        except TooScattered as error:
            raise MoveFailed(str(error), cause=FailureCause.RECEIVER, touched=False) from error
        making: asyncio.Task[ImportRegion] | None = None
        if source.is_staged and source.device_id != destination.device_id:  # both cards may have to start a process
            making = asyncio.create_task(self._cards.make_staging_buffer(source.device_id, half * _HALVES))
        job = _Job(self, chunks, source, destination, source_content, destination_content, making, peer)
        try:
            return await self._lend(job, half * _HALVES, timeout)
        finally:
            if making is not None:
                making.cancel()
                giving = self._background.spawn(self._give_back(source.device_id, making, job.letting_go))
                # One that the source keeps, because it hangs, costs nothing but its memory.
                await uninterrupted(_wait(giving, _GIVE_BACK_SECONDS))

    async def _give_back(
        self, card: str, making: asyncio.Task[ImportRegion], letting_go: asyncio.Task[bool] | None
    ) -> None:
        await asyncio.wait({making, *([letting_go] if letting_go is not None else [])})
        if letting_go is not None and not letting_go.result():
            return  # the buffer stays with its owner, which outlives this process
        if not making.cancelled() and making.exception() is None:
            await self._cards.close_staging_buffer(card, making.result().region_id)

    async def _lend(self, job: _Job, buffer_bytes: int, timeout: float) -> PhaseSeconds:
        """Gives the job a receiver. The error says how far the job got."""
        destination = job.destination
        try:
            await self._cards.lend(
                destination.device_id,
                job.run,
                job.regions,
                buffer_bytes=buffer_bytes if job.needs_buffer else 0,
                timeout=timeout,
            )
        except MoveFailed as error:
            error.touched, error.quiesced = error.touched or job.is_touched, error.quiesced and job.is_quiesced
            raise
        except CardError as error:
            raise job.failed(error) from error
        except asyncio.CancelledError as error:
            if not job.is_quiesced:
                raise MoveFailed(
                    "the receiver may still be copying", cause=FailureCause.RECEIVER, touched=True, quiesced=False
                ) from error
            raise
        return job.seconds

    async def round(
        self, card: str, offered: BlobList, receiver: BorrowedReceiver, wanted: BlobList, *, peer: str
    ) -> None:
        """One chunk from card to card."""

        async def fetch(key: str, *, reserve: Reserve) -> messages.Done:
            await reserve()
            request = messages.Fetch(key, wanted, MAXIMUM_TIMEOUT_SECONDS * 1000, peer)
            try:
                return await receiver.ask(request, MAXIMUM_TIMEOUT_SECONDS)
            except CardRefused as error:
                if receiver.is_busy:  # the engine has begun
                    raise CardLost(str(error), touched=True) from error
                raise

        await self._datasystem.round(card, offered, fetch, peer=peer)

    async def lend(self, staged: StagedBy, card: str, buffer: ImportRegion, receiver: BorrowedReceiver) -> None:
        """Before the instance maps a buffer, the buffer's owner gets the instance's stage connection: it outlives this
        process until the instance has let go. Raises StagingGone, CardError, TimeoutError."""
        connection = self._instances.connection_of(staged.instance_id)
        if buffer is receiver.buffer:
            await receiver.lend_staging_buffer(connection)
        else:
            await self._cards.lend_staging_buffer(card, buffer.region_id, connection)

    async def ask(self, staged: StagedBy, request: pb.StageRequest) -> None:
        """Raises StagingRefused, StagingGone, StagingSilent."""
        await self._instances.ask(staged.instance_id, request, self._answer_seconds)

    async def close(self, staged: StagedBy, buffer_id: str) -> bool:
        """Return when the instance has unmapped a staging buffer: it answered, or its connection ended and it has let
        go. The driver does not refuse to free a buffer that an instance uses; the instance's context would break.
        False: the daemon ends first."""
        request = pb.StageRequest(close_bucket=pb.CloseBucket(bucket_id=buffer_id))
        try:
            await self._instances.ask(staged.instance_id, request, CLOSE_SECONDS)
        except StagingRefused as error:  # it does not use it any more
            log.warning("staging_buffer_not_closed", instance_id=staged.instance_id, error=str(error))
        except StagingGone:
            return await self._instances.let_go(staged.instance_id)
        return True


@dataclass(slots=True)
class _StagedSide:
    """A side whose owner copies."""

    by: StagedBy
    buffer: ImportRegion
    cause: FailureCause
    """The cause of the failure if this side fails."""


class _Job:
    def __init__(
        self,
        plane: StagedPlane,
        chunks: list[Chunk],
        source: Place,
        destination: Place,
        source_content: DirectContent | None,
        destination_content: DirectContent | None,
        making: asyncio.Task[ImportRegion] | None,
        peer: str,
    ) -> None:
        self.destination = destination
        self.is_touched = False
        """Whether memory of the receiver may have been written."""
        self.is_quiesced = True
        self.seconds: dict[str, float] = {}
        self._plane = plane
        self._chunks = chunks
        self._source = source
        self._source_content, self._destination_content = source_content, destination_content
        self._making = making
        self._buffer: ImportRegion | None = None
        """The source's staging buffer if the source is on another card."""
        self._peer = peer
        self.letting_go: asyncio.Task[bool] | None = None
        """The source unmaps its staging buffer."""
        self._is_local = source.device_id == destination.device_id

    @property
    def regions(self) -> tuple[ImportRegion, ...]:
        """The regions that the receiver maps."""
        return (*(self._source.regions if self._is_local else ()), *self.destination.regions)

    @property
    def needs_buffer(self) -> bool:
        """Whether the receiver needs a staging buffer."""
        return self._is_local or self.destination.is_staged

    def failed(self, error: CardError) -> MoveFailed:
        """The failure of the transfer after an error of the receiver's card."""
        refused = error.region_id if isinstance(error, ImportRefused) else ""
        refused_destination = refused in {region.region_id for region in self.destination.regions}
        is_receivers = refused_destination or not (refused or isinstance(error, CardLost | CardTimeout))
        return MoveFailed(
            str(error),
            cause=FailureCause.RECEIVER if is_receivers else FailureCause.SOURCE_UNREACHABLE,
            touched=self.is_touched,
            quiesced=error.quiesced and self.is_quiesced,
            needs_staging=refused_destination,
        )

    async def run(self, receiver: BorrowedReceiver) -> None:
        """Moves everything. Raises MoveFailed, CardError. Afterwards no instance copies or has the receiver's staging
        buffer mapped, however long that takes; `letting_go` says so of the source's."""
        begun = time.monotonic()
        if self._making is not None:
            try:
                self._buffer = await self._making
            except CardError as error:
                raise MoveFailed(
                    f"the source's card: {error}", cause=FailureCause.SOURCE_UNREACHABLE, touched=False
                ) from error
        source = self._side(self._source, self._buffer or receiver.buffer, FailureCause.SOURCE_UNREACHABLE)
        destination = self._side(self.destination, receiver.buffer, FailureCause.RECEIVER)
        sides = [side for side in (source, destination) if side is not None]
        try:
            await together(*(self._open(side, receiver) for side in sides))
            self.seconds["map"] = time.monotonic() - begun
            await self._move(receiver, source, destination)
        finally:
            await uninterrupted(self._close(source, destination, receiver))
        self.seconds["transfer"] = time.monotonic() - begun - self.seconds["map"]

    async def _move(
        self, receiver: BorrowedReceiver, source: _StagedSide | None, destination: _StagedSide | None
    ) -> None:
        """Three steps for each chunk, all at work on different chunks: fill, carry, empty."""
        is_shared = self._is_local and source is not None and destination is not None
        source_free, destination_free = asyncio.Semaphore(_HALVES), asyncio.Semaphore(_HALVES)
        filled: asyncio.Queue[Chunk] = asyncio.Queue()
        carried: asyncio.Queue[Chunk] = asyncio.Queue()

        async def fill() -> None:
            for chunk in self._chunks:
                await source_free.acquire()
                if source is not None:
                    await self._copy(source, chunk, pb.CopyChunk.DIRECTION_TO_BUCKET)
                filled.put_nowait(chunk)

        async def carry() -> None:
            for _ in self._chunks:
                chunk = await filled.get()
                await destination_free.acquire()
                if not is_shared:
                    await self._carry(receiver, chunk)
                    source_free.release()
                carried.put_nowait(chunk)

        async def empty() -> None:
            for _ in self._chunks:
                chunk = await carried.get()
                if destination is not None:
                    self.is_touched = True
                    await self._copy(destination, chunk, pb.CopyChunk.DIRECTION_FROM_BUCKET)
                destination_free.release()
                if is_shared:
                    source_free.release()

        await together(fill(), carry(), empty())

    async def _carry(self, receiver: BorrowedReceiver, chunk: Chunk) -> None:
        if not self.destination.is_staged:
            self.is_touched = True
        if self._is_local:
            await self._copy_within_card(receiver, chunk)
            return
        buffer, source, destination = self._buffer, self._source_content, self._destination_content
        if source is None:
            assert buffer is not None
            offered = BlobList((buffer.region_id,), (staging_plan.buffer_blob(chunk),))
        else:
            offered = BlobList(_ids(self._source), (staging_plan.direct_blob(chunk, source.parts(chunk)),))
        if destination is None:
            assert receiver.buffer is not None
            wanted = BlobList((receiver.buffer.region_id,), (staging_plan.buffer_blob(chunk),))
        else:
            wanted = BlobList(_ids(self.destination), (staging_plan.direct_blob(chunk, destination.parts(chunk)),))
        try:
            await self._plane.round(self._source.device_id, offered, receiver, wanted, peer=self._peer)
        except MoveFailed as error:  # the first bytes may have gone to a staging buffer only
            error.touched = self.is_touched
            raise

    async def _copy_within_card(self, receiver: BorrowedReceiver, chunk: Chunk) -> None:
        """Between the staging buffer and the side that is not staged."""
        assert receiver.buffer is not None
        if self._source_content is not None:
            content, place = self._source_content, self._source
        else:
            assert self._destination_content is not None
            content, place = self._destination_content, self.destination
        parts = content.parts(chunk)
        direct = BlobList(_ids(place), tuple(Blob(part.size, (part,)) for part in parts))
        staged = BlobList((receiver.buffer.region_id,), staging_plan.like(parts, chunk))
        pair = (direct, staged) if self._source_content is not None else (staged, direct)
        await receiver.ask(messages.CopyWithinCard(*pair), MAXIMUM_TIMEOUT_SECONDS)

    def _side(self, place: Place, buffer: ImportRegion | None, cause: FailureCause) -> _StagedSide | None:
        if not place.is_staged:
            return None
        assert buffer is not None
        assert place.stage is not None
        return _StagedSide(place.stage, buffer, cause)

    async def _open(self, side: _StagedSide, receiver: BorrowedReceiver) -> None:
        device_id = self.destination.device_id if side.cause is FailureCause.RECEIVER else self._source.device_id
        await self._lend(side, device_id, receiver)
        region = weight_set_pb2.Region(
            region_id=side.buffer.region_id,
            device_kind=weight_set_pb2.DeviceKind.ValueType(TRAITS[self.destination.kind].wire_number),
            size_bytes=side.buffer.size_bytes,
            device_id=device_id,
            npu_allocation=weight_set_pb2.NpuAllocation(export_key=bytes.fromhex(side.buffer.export_key)),
        )
        await self._ask(side, pb.StageRequest(open_bucket=pb.OpenBucket(bucket=region, stage_id=side.by.stage_id)))

    async def _copy(self, side: _StagedSide, chunk: Chunk, direction: pb.CopyChunk.Direction.ValueType) -> None:
        request = pb.CopyChunk(
            bucket_id=side.buffer.region_id,
            stage_id=side.by.stage_id,
            direction=direction,
            content_offset=chunk.content_offset,
            bucket_offset=chunk.buffer_offset,
            size_bytes=chunk.size,
        )
        await self._ask(side, pb.StageRequest(copy_chunk=request))

    async def _lend(self, side: _StagedSide, device_id: str, receiver: BorrowedReceiver) -> None:
        try:
            await self._plane.lend(side.by, device_id, side.buffer, receiver)
        except StagingGone as error:
            raise self._gone(side, error) from error
        except CardError as error:
            if side.buffer is receiver.buffer:
                raise
            raise MoveFailed(f"the source's card: {error}", cause=side.cause, touched=False) from error

    async def _ask(self, side: _StagedSide, request: pb.StageRequest) -> None:
        try:
            await self._plane.ask(side.by, request)
        except (StagingRefused, StagingGone) as error:
            if side.cause is FailureCause.RECEIVER and isinstance(error, StagingSilent):
                self.is_quiesced = False
            raise self._gone(side, error) from error

    def _gone(self, side: _StagedSide, error: StagingRefused | StagingGone) -> MoveFailed:
        is_receivers = side.cause is FailureCause.RECEIVER
        return MoveFailed(
            f"the {'receiver' if is_receivers else 'source'}, {side.by.instance_id}: {error}",
            cause=side.cause,
            touched=self.is_touched,
            lacks_stage=is_receivers and isinstance(error, StagingGone),
        )

    async def _close(
        self, source: _StagedSide | None, destination: _StagedSide | None, receiver: BorrowedReceiver
    ) -> None:
        if source is not None and self._buffer is not None:  # the source's card gives it back, not the receiver
            self.letting_go = asyncio.create_task(self._plane.close(source.by, source.buffer.region_id))
            source = None
        sides = [side for side in (source, destination) if side is not None]
        closing = (self._plane.close(side.by, side.buffer.region_id) for side in sides)
        receiver.keeps_buffer = not all(await asyncio.gather(*closing))
        self.is_quiesced = not receiver.keeps_buffer


async def _wait(task: asyncio.Task[object], seconds: float) -> None:
    await asyncio.wait({task}, timeout=seconds)


def _direct(layout: Layout, place: Place) -> DirectContent | None:
    return None if place.is_staged else DirectContent(layout, place.placements)


def _ids(place: Place) -> tuple[str, ...]:
    return tuple(region.region_id for region in place.regions)
