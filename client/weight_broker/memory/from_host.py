"""Device memory that an acquisition fills from a source in device memory, or in host memory if no other serves."""

from __future__ import annotations

import ctypes
import itertools
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from weight_broker.digest import FULL_BLOCK_BYTES, GLANCE_BLOCK_BYTES, sampled_blocks
from weight_broker.drivers.error import DriverError
from weight_broker.errors import AcquireTimeout, BrokerError, IntegrityError, TransferFailed
from weight_broker.layout import Layout
from weight_broker.memory.described import DescribedTensors
from weight_broker.memory.digest_mode import DigestMode
from weight_broker.memory.host.address_space import equal_bytes
from weight_broker.memory.kind import (
    ClaimRegion,
    DeadlinePassed,
    Destination,
    HostCopies,
    Piece,
    Received,
    Shared,
    Sharing,
    Terms,
    kind_of,
)
from weight_broker.memory.to_host import with_gaps

if TYPE_CHECKING:
    from weight_broker.connection.session import Session
    from weight_broker.memory.host.export import SharedWeights
    from weight_broker.v1 import weight_broker_service_pb2 as pb

_NAMED_TENSORS = 16
_SCRATCH_BYTES = 16 << 20
_Block = tuple[str, Piece]
"""The name of a tensor and a part of its content."""


def destination(tensors: DescribedTensors, terms: Terms) -> Destination:
    """The tensors as the destination of one acquisition. Raises `InvalidArgument` for a tensor that cannot be
    written."""
    kind = kind_of(tensors.device_kind)
    own = kind.destination(tensors, terms)
    try:
        copies = kind.host_copies(tensors)
    except DriverError:  # what needs the driver says so
        return own
    if copies is None or with_gaps(tensors) is not None:
        return own
    return FilledFromHost(own, tensors, copies, terms)


class FilledFromHost:
    """A `weight_broker.memory.kind.Destination`. This process copies from host memory; for a source in device memory
    `own` is the destination."""

    def __init__(self, own: Destination, tensors: DescribedTensors, copies: HostCopies, terms: Terms) -> None:
        self.layout: Layout = tensors.layout
        self.grace_seconds = own.grace_seconds
        self._own = own
        self._tensors = tensors
        self._copies = copies
        self._digest_mode = terms.digest_mode
        self._source: SharedWeights | None = None
        """The host memory that was granted last; None if the last source is in device memory."""

    def fill_request(self, request: pb.AcquireRequest, session: Session, deadline: float) -> None:
        """As `own`, and host memory serves too."""
        self._own.fill_request(request, session, deadline)
        request.takes_host_memory = True

    def take(self, granted: pb.Granted, claim: ClaimRegion, deadline: float) -> Received | None:
        """Copies from host memory; None if the broker brings the bytes."""
        from weight_broker.memory.host.destination import open_source

        self._let_go()
        if not granted.regions:  # device memory is granted to the broker's own processes only
            return self._own.take(granted, claim, deadline)
        begun = time.monotonic()
        try:
            self._source = open_source(granted, claim, self.layout)
            opened = time.monotonic() - begun
            received = self._receive(self._source, deadline)
        except BaseException:
            self._let_go()
            raise
        received.seconds["map"] += opened
        return received

    def verify(self, granted: pb.Granted, moved: pb.Moved, deadline: float) -> Received:
        """The broker has brought the bytes."""
        return self._own.verify(granted, moved, deadline)

    def stop(self) -> bool:
        """Nothing writes from host memory after `take` has returned or raised."""
        is_only_writer = self._own.stop()
        return is_only_writer or self._source is not None

    def keep(self) -> Shared:
        """What arrived from host memory is shared there: the tensors may change."""
        source, self._source = self._source, None
        return source if source is not None else self._own.keep()

    def close(self) -> None:
        """As `own`."""
        self._let_go()
        self._own.close()

    def abandon(self) -> Sharing | None:
        """As `own`."""
        self._let_go()
        return self._own.abandon()

    def _let_go(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            source.close()

    def _receive(self, source: SharedWeights, deadline: float) -> Received:
        from weight_broker.memory.host.destination import mapped_contents, verify_contents
        from weight_broker.memory.host.fill import check_regions

        begun = time.monotonic()
        check_regions(source.layout, source.descriptors, source.placements)
        with mapped_contents(source) as contents:
            mapped = time.monotonic()
            verified = verify_contents(source, contents, self._digest_mode, deadline)
            checked = time.monotonic()
            pieces = [
                (address, tensor.address, size)
                for (address, size), tensor in zip(contents, self._tensors.tensors, strict=True)
            ]
            self._copy(pieces, deadline)
            copied = time.monotonic()
            self._compare(pieces, deadline)
        seconds = {
            "map": mapped - begun,
            "transfer": copied - checked,
            "verify": time.monotonic() - copied + checked - mapped,
        }
        return Received(source.layout.content_bytes, verified, source.layout, seconds)

    def _copy(self, pieces: list[Piece], deadline: float) -> None:
        try:
            self._copies.to_device(pieces, deadline)
        except DeadlinePassed as error:
            raise AcquireTimeout("the deadline passed while the tensors were being filled", touched=True) from error
        except Exception as error:  # the caller must learn that the tensors may be half written
            raise TransferFailed(f"copying from host memory failed: {error}", touched=True) from error

    def _compare(self, pieces: list[Piece], deadline: float) -> None:
        """Reads back what arrived: a sample of each tensor, in digest mode full everything. Raises `IntegrityError`."""
        wrong: dict[str, None] = {}
        try:
            for batch in _batches(self._blocks(pieces)):
                wrong |= dict.fromkeys(self._differing(batch, deadline))
        except DeadlinePassed as error:
            raise AcquireTimeout("the deadline passed while the tensors were being verified", touched=True) from error
        except Exception as error:  # the caller must learn that the tensors were written
            raise BrokerError(f"the tensors cannot be verified: {error}", touched=True) from error
        if wrong:
            names = ", ".join(list(wrong)[:_NAMED_TENSORS])
            raise IntegrityError(
                f"{len(wrong)} tensors arrived with wrong content: {names}", touched=True, metadata={"tensors": names}
            )

    def _blocks(self, pieces: list[Piece]) -> Iterator[_Block]:
        for tensor, (host, device, size) in zip(self._tensors.tensors, pieces, strict=True):
            for offset, length in self._compared(size):
                yield tensor.spec.name, (host + offset, device + offset, length)

    def _compared(self, size: int) -> Iterator[tuple[int, int]]:
        """(offset, length) of the blocks of a content."""
        if self._digest_mode is DigestMode.FULL:
            return ((offset, min(FULL_BLOCK_BYTES, size - offset)) for offset in range(0, size, FULL_BLOCK_BYTES))
        return sampled_blocks(size, GLANCE_BLOCK_BYTES)

    def _differing(self, batch: list[_Block], deadline: float) -> Iterator[str]:
        """Names of the tensors that differ in these blocks."""
        scratch = ctypes.create_string_buffer(sum(length for _, (_, _, length) in batch))
        begin = ctypes.addressof(scratch)
        starts = itertools.accumulate((length for _, (_, _, length) in batch), initial=begin)
        placed = list(zip(starts, batch, strict=False))
        self._copies.to_host([(start, device, length) for start, (_, (_, device, length)) in placed], deadline)
        for start, (name, (host, _, length)) in placed:
            if not equal_bytes(start, host, length):
                yield name


def _batches(blocks: Iterator[_Block]) -> Iterator[list[_Block]]:
    """Blocks that are read together."""
    batch: list[_Block] = []
    size = 0
    for block in blocks:
        batch.append(block)
        size += block[1][2]
        if size >= _SCRATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
