"""Through buckets: memory that the broker does not map is copied by its owner, chunk by chunk, between its tensors and
a bucket on the same card that a card process owns.

Between two cards the sender has the source's bucket and the receiver the destination's, and the datasystem carries
each chunk under a key of its own. Within a card there is one bucket, the receiver's. While one half of a bucket is
filled the other one is carried on or emptied.
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
from weight_brokerd.attach.stage import StageGone, StageRefused, StageSilent
from weight_brokerd.cards import messages
from weight_brokerd.cards.errors import CardError, CardLost, CardRefused, CardTimeout, ImportRefused
from weight_brokerd.cards.lent import Lent
from weight_brokerd.cards.messages import ImportRegion
from weight_brokerd.cards.offers import MAXIMUM_TIMEOUT_SECONDS
from weight_brokerd.cards.plan import chunks as stage_plan
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
"""For an instance to finish what it copies and to unmap a bucket."""
_HALVES = 2
_GIVE_BACK_SECONDS = 2.0
"""The longest that a transfer waits for its source's buffer to be given back; that goes on behind it."""


class Asker(Protocol):
    """Asks instances (`weight_brokerd.attach.stage.Stages`)."""

    def has(self, instance_id: str) -> bool:
        """Whether the instance can be asked."""

    async def ask(self, instance_id: str, request: pb.StageRequest, timeout: float) -> None:
        """Raises StageRefused, StageGone, StageSilent."""
        ...

    async def let_go(self, instance_id: str) -> None:
        """Return when an instance whose connection has ended has unmapped its buckets."""
        ...


class StagedPlane:
    """Moves what is staged on one side or both."""

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
        """`staging_bytes` is the size of a bucket; an instance that does not answer within `answer_seconds` is not
        asked again."""
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
        half = stage_plan.half_bytes(layout.content_bytes, self._staging_bytes)
        chunks = stage_plan.chunks(layout.content_bytes, half)
        try:
            given = _direct(layout, source)
            taken = _direct(layout, destination)
        except TooScattered as error:
            raise MoveFailed(str(error), cause=FailureCause.RECEIVER, touched=False) from error
        making: asyncio.Task[ImportRegion] | None = None
        if source.is_staged and source.device_id != destination.device_id:  # both cards may have to start a process
            making = asyncio.create_task(self._cards.make_bucket(source.device_id, half * _HALVES))
        job = _Job(self, chunks, source, destination, given, taken, making, peer)
        try:
            return await self._lend(job, half * _HALVES, timeout)
        finally:
            if making is not None:
                making.cancel()
                giving = self._background.spawn(self._give_back(source.device_id, making, job.letting_go))
                # One that the source keeps, because it hangs, costs nothing but its memory.
                await uninterrupted(_wait(giving, _GIVE_BACK_SECONDS))

    async def _give_back(
        self, card: str, making: asyncio.Task[ImportRegion], letting_go: asyncio.Task[object] | None
    ) -> None:
        await asyncio.wait({making, *([letting_go] if letting_go is not None else [])})
        if not making.cancelled() and making.exception() is None:
            await self._cards.close_bucket(card, making.result().region_id)

    async def _lend(self, job: _Job, bucket_bytes: int, timeout: float) -> PhaseSeconds:
        """Gives the job a receiver. What it raises says how far the job got."""
        destination = job.destination
        try:
            await self._cards.lend(
                destination.device_id,
                job.run,
                job.regions,
                bucket_bytes=bucket_bytes if job.needs_bucket else 0,
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

    async def round(self, card: str, given: BlobList, lent: Lent, taken: BlobList, *, peer: str) -> None:
        """One chunk from card to card."""

        async def fetch(key: str, *, reserve: Reserve) -> messages.Done:
            await reserve()
            request = messages.Fetch(key, taken, MAXIMUM_TIMEOUT_SECONDS * 1000, peer)
            try:
                return await lent.ask(request, MAXIMUM_TIMEOUT_SECONDS)
            except CardRefused as error:
                if lent.is_busy:  # the engine has begun
                    raise CardLost(str(error), touched=True) from error
                raise

        await self._datasystem.round(card, given, fetch, peer=peer)

    async def ask(self, staged: StagedBy, request: pb.StageRequest) -> None:
        """Raises StageRefused, StageGone, StageSilent."""
        await self._instances.ask(staged.instance_id, request, self._answer_seconds)

    async def close(self, staged: StagedBy, bucket_id: str) -> None:
        """Return when the instance has the bucket unmapped: it answered, or its connection ended and it has let go. The
        driver does not refuse to free a bucket that an instance uses; the instance's context would break."""
        request = pb.StageRequest(close_bucket=pb.CloseBucket(bucket_id=bucket_id))
        try:
            await self._instances.ask(staged.instance_id, request, CLOSE_SECONDS)
        except StageRefused as error:  # it does not use it any more
            log.warning("bucket_not_closed", instance_id=staged.instance_id, error=str(error))
        except StageGone:
            await self._instances.let_go(staged.instance_id)


@dataclass(slots=True)
class _StagedSide:
    """A side whose owner copies."""

    by: StagedBy
    bucket: ImportRegion
    cause: FailureCause
    """What it is if this side fails."""


class _Job:
    """One movement."""

    def __init__(
        self,
        plane: StagedPlane,
        chunks: list[Chunk],
        source: Place,
        destination: Place,
        given: DirectContent | None,
        taken: DirectContent | None,
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
        self._given, self._taken = given, taken
        self._making = making
        self._bucket: ImportRegion | None = None
        """The source's, on a card of its own."""
        self._peer = peer
        self.letting_go: asyncio.Task[object] | None = None
        """The source unmaps its own bucket."""
        self._is_local = source.device_id == destination.device_id

    @property
    def regions(self) -> tuple[ImportRegion, ...]:
        """What the receiver needs to have mapped."""
        return (*(self._source.regions if self._is_local else ()), *self.destination.regions)

    @property
    def needs_bucket(self) -> bool:
        """Whether the receiver needs a bucket."""
        return self._is_local or self.destination.is_staged

    def failed(self, error: CardError) -> MoveFailed:
        """The receiver's card did not do its part."""
        refused = error.region_id if isinstance(error, ImportRefused) else ""
        is_mine = refused in {region.region_id for region in self.destination.regions}
        is_receivers = is_mine or not (refused or isinstance(error, CardLost | CardTimeout))
        return MoveFailed(
            str(error),
            cause=FailureCause.RECEIVER if is_receivers else FailureCause.SOURCE_UNREACHABLE,
            touched=self.is_touched,
            quiesced=error.quiesced and self.is_quiesced,
            needs_staging=is_mine,
        )

    async def run(self, lent: Lent) -> None:
        """Moves everything. Raises MoveFailed, CardError. When it ends no instance has the receiver's bucket mapped or
        copies, however long that takes; `letting_go` says so of the source's."""
        begun = time.monotonic()
        if self._making is not None:
            try:
                self._bucket = await self._making
            except CardError as error:
                raise MoveFailed(
                    f"the source's card: {error}", cause=FailureCause.SOURCE_UNREACHABLE, touched=False
                ) from error
        source = self._side(self._source, self._bucket or lent.bucket, FailureCause.SOURCE_UNREACHABLE)
        destination = self._side(self.destination, lent.bucket, FailureCause.RECEIVER)
        sides = [side for side in (source, destination) if side is not None]
        try:
            await together(*(self._open(side) for side in sides))
            self.seconds["map"] = time.monotonic() - begun
            await self._move(lent, source, destination)
        finally:
            await uninterrupted(self._close(source, destination))
        self.seconds["transfer"] = time.monotonic() - begun - self.seconds["map"]

    async def _move(self, lent: Lent, source: _StagedSide | None, destination: _StagedSide | None) -> None:
        """Three steps for each chunk, each busy with another one: fill, carry, empty."""
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
                    await self._carry(lent, chunk)
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

    async def _carry(self, lent: Lent, chunk: Chunk) -> None:
        if not self.destination.is_staged:
            self.is_touched = True
        if self._is_local:
            await self._copy_within_card(lent, chunk)
            return
        bucket, given, taken = self._bucket, self._given, self._taken
        if given is None:
            assert bucket is not None
            offered = BlobList((bucket.region_id,), (stage_plan.bucket_blob(chunk),))
        else:
            offered = BlobList(_ids(self._source), (stage_plan.direct_blob(chunk, given.parts(chunk)),))
        if taken is None:
            assert lent.bucket is not None
            wanted = BlobList((lent.bucket.region_id,), (stage_plan.bucket_blob(chunk),))
        else:
            wanted = BlobList(_ids(self.destination), (stage_plan.direct_blob(chunk, taken.parts(chunk)),))
        try:
            await self._plane.round(self._source.device_id, offered, lent, wanted, peer=self._peer)
        except MoveFailed as error:  # what is written first may be a bucket
            error.touched = self.is_touched
            raise

    async def _copy_within_card(self, lent: Lent, chunk: Chunk) -> None:
        """Between the bucket and the side that is not staged."""
        assert lent.bucket is not None
        content, place = (self._given, self._source) if self._given is not None else (self._taken, self.destination)
        assert content is not None
        parts = content.parts(chunk)
        direct = BlobList(_ids(place), tuple(Blob(part.size, (part,)) for part in parts))
        staged = BlobList((lent.bucket.region_id,), stage_plan.like(parts, chunk))
        pair = (direct, staged) if self._given is not None else (staged, direct)
        await lent.ask(messages.CopyWithinCard(*pair), MAXIMUM_TIMEOUT_SECONDS)

    def _side(self, place: Place, bucket: ImportRegion | None, cause: FailureCause) -> _StagedSide | None:
        if not place.is_staged:
            return None
        assert bucket is not None
        assert place.stage is not None
        return _StagedSide(place.stage, bucket, cause)

    async def _open(self, side: _StagedSide) -> None:
        region = weight_set_pb2.Region(
            region_id=side.bucket.region_id,
            device_kind=weight_set_pb2.DeviceKind.ValueType(TRAITS[self.destination.kind].wire_number),
            size_bytes=side.bucket.size_bytes,
            device_id=self.destination.device_id if side.cause is FailureCause.RECEIVER else self._source.device_id,
            npu_allocation=weight_set_pb2.NpuAllocation(export_key=bytes.fromhex(side.bucket.export_key)),
        )
        await self._ask(side, pb.StageRequest(open_bucket=pb.OpenBucket(bucket=region, stage_id=side.by.stage_id)))

    async def _copy(self, side: _StagedSide, chunk: Chunk, direction: pb.CopyChunk.Direction.ValueType) -> None:
        request = pb.CopyChunk(
            bucket_id=side.bucket.region_id,
            stage_id=side.by.stage_id,
            direction=direction,
            content_offset=chunk.content_offset,
            bucket_offset=chunk.bucket_offset,
            size_bytes=chunk.size,
        )
        await self._ask(side, pb.StageRequest(copy_chunk=request))

    async def _ask(self, side: _StagedSide, request: pb.StageRequest) -> None:
        try:
            await self._plane.ask(side.by, request)
        except (StageRefused, StageGone) as error:
            is_receiver = side.cause is FailureCause.RECEIVER
            if is_receiver and isinstance(error, StageSilent):
                self.is_quiesced = False
            raise MoveFailed(
                f"the {'receiver' if is_receiver else 'source'}, {side.by.instance_id}: {error}",
                cause=side.cause,
                touched=self.is_touched,
            ) from error

    async def _close(self, source: _StagedSide | None, destination: _StagedSide | None) -> None:
        if source is not None and self._bucket is not None:  # the source's card gives it back, not the receiver
            self.letting_go = asyncio.create_task(self._plane.close(source.by, source.bucket.region_id))
            source = None
        sides = [side for side in (source, destination) if side is not None]
        await asyncio.gather(*(self._plane.close(side.by, side.bucket.region_id) for side in sides))
        self.is_quiesced = True


async def _wait(task: asyncio.Task[object], seconds: float) -> None:
    await asyncio.wait({task}, timeout=seconds)


def _direct(layout: Layout, place: Place) -> DirectContent | None:
    return None if place.is_staged else DirectContent(layout, place.placements)


def _ids(place: Place) -> tuple[str, ...]:
    return tuple(region.region_id for region in place.regions)
