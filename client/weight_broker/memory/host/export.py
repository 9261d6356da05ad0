"""Sharing tensors through host memory: a sealed memfd.

Publishing copies the tensors once into a memfd and seals it: from then on no process, its creator included, can
change a byte. Receivers copy out of it (`copy_in`) or map it copy-on-write (`map_tensors`).
"""

from __future__ import annotations

import errno
import fcntl
import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from weight_broker.digest import (
    FULL_BLOCK_BYTES,
    SAMPLE_BLOCK_BYTES,
    ContentDigests,
    DigestAlgorithm,
    DigestCoverage,
)
from weight_broker.drivers.available_memory import available_bytes
from weight_broker.errors import PublishRefused
from weight_broker.layout import Layout
from weight_broker.memory.described import DescribedTensors
from weight_broker.memory.digest_mode import DigestMode
from weight_broker.memory.host import copying, strided
from weight_broker.memory.host.address_space import PAGE_BYTES, Mapping
from weight_broker.memory.host.fill import CopyResult, copy_in
from weight_broker.memory.host.memfd import allocate, being_filled, create
from weight_broker.memory.host.touchable import require_readable
from weight_broker.memory.host.view import map_tensors
from weight_broker.memory.kind import DeadlinePassed, Prepared

if TYPE_CHECKING:
    from weight_broker.connection.attach import AttachConnection
    from weight_broker.connection.session import Session
    from weight_broker.v1 import resources_pb2
    from weight_broker.v1 import weight_set_pb2 as pb

__all__ = ["CopyResult", "DigestMode", "HostRegion", "SEALS", "copy_in", "export", "map_tensors", "seal"]

SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
ALIGNMENT_BYTES = 64
LARGE_TENSOR_BYTES = 64 << 10
"""From this size on a tensor begins at a page."""


@dataclass(slots=True)
class HostRegion:
    """A sealed memfd that holds the content of a set of tensors."""

    fd: int
    size_bytes: int
    """Size of the memfd."""
    placements: tuple[tuple[int, int], ...]
    """(index of the region, always 0; offset in bytes) of each tensor in the layout's order; an alias has its
    target's."""
    digests: tuple[ContentDigests, ...]
    """Digests of the content, best first."""

    def close(self) -> None:
        """Close the file descriptor; the memory lives on where others have it. May be called again."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def export(
    described: DescribedTensors,
    *,
    digest_mode: DigestMode = DigestMode.AUTO,
    deadline: float | None = None,
    prepared: Prepared | None = None,
) -> HostRegion:
    """Copy the tensors into a new sealed memfd and digest them. The tensors must not change meanwhile. `prepared` is
    memory that was allocated before, of any size.

    `deadline` is a time of `time.monotonic`. Raises `PublishRefused` if there is not enough memory, a limit of this
    process is reached or the deadline passes, `InvalidArgument` for a tensor that cannot be read; nothing is left
    behind then.
    """
    described.require_host_memory()
    mode = DigestMode(digest_mode)

    def fill(address: int, offsets: Sequence[int]) -> tuple[ContentDigests, ...]:
        return _fill(described, address, offsets, mode, deadline)

    return _export(described.layout, fill, deadline, prepared, lambda: require_readable(described, deadline))


def export_copy(
    layout: Layout,
    copy: Callable[[Sequence[int]], None],
    *,
    digest_mode: DigestMode = DigestMode.AUTO,
    deadline: float | None = None,
) -> HostRegion:
    """As `export`, of content that `copy` brings: it gets the address of each tensor's content in the layout's order.
    Raises what `copy` raises too."""
    mode = DigestMode(digest_mode)

    def fill(address: int, offsets: Sequence[int]) -> tuple[ContentDigests, ...]:
        copy([address + offset for offset in offsets])
        return _digest(_contents(layout, address, offsets), mode, deadline)

    return _export(layout, fill, deadline)


def _export(
    layout: Layout,
    fill: Callable[[int, Sequence[int]], tuple[ContentDigests, ...]],
    deadline: float | None,
    prepared: Prepared | None = None,
    check: Callable[[], None] = lambda: None,
) -> HostRegion:
    placements, size_bytes = _place(layout)
    fd = prepared.take() if prepared is not None else None
    try:
        check()
        if fd is None:
            _require_memory(size_bytes)
            fd = create(size_bytes)
        else:
            _resize(fd, size_bytes)
        with Mapping(fd, size_bytes, shared=True, writable=True) as region:
            allocate(fd, region, deadline)
            digests = fill(region.address, placements)
        seal(fd)
    except BaseException as error:
        if fd is not None:
            being_filled.discard(fd)
            os.close(fd)
        if isinstance(error, OSError):
            raise _shortage(size_bytes, error) from error
        if isinstance(error, DeadlinePassed):
            raise PublishRefused(
                f"the deadline passed while {size_bytes} bytes were copied; allow more time for publishing"
            ) from error
        raise
    being_filled.discard(fd)
    return HostRegion(fd, size_bytes, tuple((0, offset) for offset in placements), digests)


def region_bytes(layout: Layout) -> int:
    """Size of the memfd that holds tensors of this layout."""
    return _place(layout)[1]


def _resize(fd: int, size_bytes: int) -> None:
    """Give prepared memory the size of the copy. Raises `PublishRefused` if the rest is not available."""
    os.ftruncate(fd, size_bytes)
    missing = size_bytes - os.fstat(fd).st_blocks * 512  # the unit of st_blocks on every file system
    if missing > 0:
        _require_memory(missing)


def seal(fd: int) -> None:
    """Make a memfd unchangeable for every process, for ever."""
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)


def _place(layout: Layout) -> tuple[list[int], int]:
    """Offset of each tensor in the region and the region's size, in bytes."""
    offsets: list[int] = []
    by_name: dict[str, int] = {}
    end = 0
    for spec in layout.tensors:
        size = spec.content_bytes
        if spec.alias_of:
            offset = by_name[spec.alias_of]
        elif size == 0:
            offset = 0
        else:
            alignment = PAGE_BYTES if size >= LARGE_TENSOR_BYTES else ALIGNMENT_BYTES
            offset = -(-end // alignment) * alignment
            end = offset + size
        offsets.append(offset)
        by_name[spec.name] = offset
    return offsets, max(PAGE_BYTES, -(-end // PAGE_BYTES) * PAGE_BYTES)


def _fill(
    described: DescribedTensors,
    region_address: int,
    offsets: Sequence[int],
    mode: DigestMode,
    deadline: float | None,
) -> tuple[ContentDigests, ...]:
    """Copy the tensors into the region and return the digests of their content."""
    pieces: list[copying.Piece] = []
    packing: list[copying.Task] = []
    with_gaps: list[int] = []
    for index, (tensor, offset) in enumerate(zip(described.tensors, offsets, strict=True)):
        spec, destination = tensor.spec, region_address + offset
        if spec.is_dense:
            pieces.append((destination, tensor.address, spec.content_bytes))
            continue
        pieces.append((destination, tensor.address, 0))
        if not spec.alias_of:
            with_gaps.append(index)
            packing.append(partial(strided.pack, spec, tensor.address, destination, tensor.framework))
    contents = _contents(described.layout, region_address, offsets)
    digests: list[ContentDigests] = []
    full = mode.exported_full_algorithm()
    if full is None:
        copying.copy(pieces, own_tasks=packing, deadline=deadline)
    else:
        values = copying.copy_and_digest(pieces, full, FULL_BLOCK_BYTES, own_tasks=packing, deadline=deadline)
        for index in with_gaps:
            values[index] = copying.digest_full(*contents[index], full, FULL_BLOCK_BYTES)
        digests.append(ContentDigests(full, DigestCoverage.FULL, FULL_BLOCK_BYTES, tuple(values)))
    return (*digests, _sampled(contents, deadline))


def _contents(layout: Layout, address: int, offsets: Sequence[int]) -> list[copying.Content]:
    """Address and size of each tensor's content."""
    return [(address + offset, size) for offset, size in zip(offsets, layout.content_sizes, strict=True)]


def _digest(
    contents: Sequence[copying.Content], mode: DigestMode, deadline: float | None
) -> tuple[ContentDigests, ...]:
    """Digests of content that is there, best first."""
    full = mode.exported_full_algorithm()
    if full is None:
        return (_sampled(contents, deadline),)
    values = copying.digest_all(contents, full, FULL_BLOCK_BYTES, deadline=deadline)
    return ContentDigests(full, DigestCoverage.FULL, FULL_BLOCK_BYTES, tuple(values)), _sampled(contents, deadline)


def _sampled(contents: Sequence[copying.Content], deadline: float | None) -> ContentDigests:
    values = copying.digest_samples(contents, DigestAlgorithm.CRC32, SAMPLE_BLOCK_BYTES, deadline=deadline)
    return ContentDigests(DigestAlgorithm.CRC32, DigestCoverage.SAMPLED, SAMPLE_BLOCK_BYTES, tuple(values))


def _require_memory(size_bytes: int) -> None:
    available = available_bytes()
    if available is not None and size_bytes > available:
        raise PublishRefused(
            f"publishing needs {size_bytes} bytes of host memory and {available} are available; free host memory, "
            "raise the memory limit of the service or container, or go on without publishing",
            metadata={"needed_bytes": str(size_bytes), "available_bytes": str(available)},
        )


def _shortage(size_bytes: int, error: OSError) -> PublishRefused:
    advice = {
        errno.EMFILE: "raise this process's limit of open files (LimitNOFILE)",
        errno.ENFILE: "raise the system's limit of open files (fs.file-max)",
        errno.EFBIG: "raise this process's file size limit (LimitFSIZE): a memfd counts as a file",
        errno.EPERM: "allow memfd_create and file seals in the sandbox this process runs in",
        errno.EACCES: "allow memfd_create in the sandbox this process runs in",
        errno.EBUSY: "do not fork a process from another thread while publishing",
    }.get(error.errno or 0, "free host memory or raise the memory limit of the service or container")
    return PublishRefused(
        f"the kernel refused {size_bytes} bytes of shared memory ({error.strerror}): {advice}, or go on without "
        "publishing",
        metadata={"needed_bytes": str(size_bytes), "error": errno.errorcode.get(error.errno or 0, "unknown")},
    )


@dataclass(slots=True, weakref_slot=True, eq=False)
class SharedWeights:
    """Sealed memfds and the tensors' places in them, exported here or granted by a source. Sealed memory never changes:
    once verified, it can be published again without another look."""

    layout: Layout
    memfds: list[tuple[int, int]]
    """(descriptor, size in bytes) of each region; owned by this object."""
    placements: tuple[tuple[int, int], ...]
    """(region index, offset in bytes) of each tensor, in the layout's order."""
    digests: tuple[ContentDigests, ...]
    """Digests of the content, best coverage first."""

    def __post_init__(self) -> None:
        _open_weights.add(self)

    @property
    def descriptors(self) -> tuple[int, ...]:
        return tuple(descriptor for descriptor, _ in self.memfds)

    @property
    def needs_retraction(self) -> bool:
        """Readers hold the sealed memory themselves."""
        return False

    def regions(self, batch: str) -> list[pb.Region]:
        from weight_broker.v1 import weight_set_pb2 as pb

        return [
            pb.Region(
                region_id=f"{batch}-{index}",
                device_kind=pb.DEVICE_KIND_CPU,
                size_bytes=size_bytes,
                host_memory=pb.HostMemory(),
            )
            for index, (_, size_bytes) in enumerate(self.memfds)
        ]

    @property
    def is_served(self) -> bool:
        """The broker holds the memory itself."""
        return True

    def stage(self, session: Session, timeout: float) -> pb.StagedMemory | None:
        """The broker holds the memory itself."""
        return None

    def note(self, publication: resources_pb2.Publication) -> None:
        """The broker has one way to read host memory."""

    def hand_over(self, connection: AttachConnection, region: pb.Region, index: int, timeout: float) -> None:
        """The memfd goes over the attach socket."""
        connection.offer_region(region.region_id, *self.memfds[index], timeout=timeout)

    def take_back(self, connection: AttachConnection, region: pb.Region, timeout: float) -> None:
        """The broker closes it if nothing else needs it."""
        connection.withdraw_region(region.region_id, timeout=timeout)

    def close(self) -> None:
        """Idempotent."""
        while self.memfds:
            descriptor, _ = self.memfds.pop()
            os.close(descriptor)

    def __del__(self) -> None:
        # A second Ctrl-C may have interrupted the owner's `close`: the memory must not stay for ever.
        self.close()


_open_weights: weakref.WeakSet[SharedWeights] = weakref.WeakSet()


def _close_inherited() -> None:
    """For a forked child, whose copies of the descriptors would keep the memory as long as it lives."""
    for weights in list(_open_weights):
        weights.close()


os.register_at_fork(after_in_child=_close_inherited)
