"""Filling the caller's tensors from regions of host memory, verified."""

from __future__ import annotations

import ctypes
import fcntl
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from weight_broker.digest import ContentDigests, DigestCoverage, is_available
from weight_broker.errors import AcquireTimeout, BrokerError, IntegrityError, TransferFailed
from weight_broker.layout import Layout
from weight_broker.memory.described import DescribedTensor, DescribedTensors
from weight_broker.memory.digest_mode import DigestMode
from weight_broker.memory.host import copying, strided
from weight_broker.memory.host.address_space import PAGE_BYTES, Mapping, address_of, equal_bytes
from weight_broker.memory.kind import DeadlinePassed

_REQUIRED_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE
_NAMED_TENSORS = 16


@dataclass(frozen=True, slots=True)
class CopyResult:
    """What `copy_in` did."""

    size_bytes: int
    """Bytes of content, aliases counted once."""
    verified: DigestCoverage
    """How much of each tensor was verified."""
    seconds: dict[str, float]
    """"map", "transfer" and "verify"; full verification is interleaved with the transfer and counted there."""


def copy_in(
    described: DescribedTensors,
    fds: Sequence[int],
    placements: Sequence[tuple[int, int]],
    digests: Sequence[ContentDigests],
    *,
    digest_mode: DigestMode = DigestMode.AUTO,
    deadline: float | None = None,
) -> CopyResult:
    """Fill the tensors from sealed memfds and verify what arrived. The file descriptors stay the caller's.

    `placements` has (index of the memfd, offset in bytes) of each tensor in the layout's order. `deadline` is a time of
    `time.monotonic`.

    Returns with every byte written and verified, or raises with no writer left: `InvalidArgument` (a tensor
    cannot be written) or `TransferFailed` with `touched` False if anything about the request is wrong;
    `AcquireTimeout`, `IntegrityError` (the content is not what was published) or `TransferFailed` with `touched` True
    once copying has begun.
    """
    begin = time.monotonic()
    described.require_writable()
    mode = DigestMode(digest_mode)
    expected = choose_digests(digests, mode, len(described.tensors))
    described.require_host_memory()
    check_regions(described.layout, fds, placements)
    with ExitStack() as mappings:
        addresses = _map_all(mappings, fds)
        sources = [addresses[region] + offset for region, offset in placements]
        mapped = time.monotonic()
        if deadline is not None and mapped >= deadline:
            raise AcquireTimeout("the deadline passed before the first byte was copied")
        transferred, verified = _transfer(described, sources, expected, deadline)
    return CopyResult(
        described.layout.content_bytes,
        expected.coverage,
        {"map": mapped - begin, "transfer": transferred - mapped, "verify": verified - transferred},
    )


def check_regions(layout: Layout, fds: Sequence[int], placements: Sequence[tuple[int, int]]) -> None:
    """Raise `TransferFailed` unless every placement lies within a memfd that can neither shrink nor change."""
    sizes = [_sealed_bytes(index, fd) for index, fd in enumerate(fds)]
    if len(placements) != len(layout):
        raise TransferFailed(f"the source has {len(placements)} placements for {len(layout)} tensors")
    for spec, content_bytes, (region, offset) in zip(layout.tensors, layout.content_sizes, placements, strict=True):
        if not 0 <= region < len(sizes):
            raise TransferFailed(f"tensor {spec.name!r} is placed in region {region} of {len(sizes)}")
        if not 0 <= offset <= sizes[region] - content_bytes:
            raise TransferFailed(
                f"tensor {spec.name!r} ({content_bytes} bytes at {offset}) reaches beyond its region of "
                f"{sizes[region]} bytes"
            )


def _sealed_bytes(index: int, fd: int) -> int:
    """Size of a memfd all of whose pages are there: touching a page that the kernel cannot supply is a signal."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        found = os.fstat(fd)
        page_bytes = os.fstatvfs(fd).f_bsize
    except OSError as error:
        raise TransferFailed(f"region {index} of the source is not a memfd ({error.strerror})") from error
    if seals & _REQUIRED_SEALS != _REQUIRED_SEALS:
        raise TransferFailed(f"region {index} of the source is not sealed: its content could change or vanish")
    if page_bytes != PAGE_BYTES:
        raise TransferFailed(
            f"region {index} of the source is made of reserved huge pages of {page_bytes} bytes (MFD_HUGETLB), of "
            "which there may be none left"
        )
    allocated = found.st_blocks * 512  # the unit of st_blocks on every file system
    if allocated < found.st_size:
        raise TransferFailed(
            f"region {index} of the source has memory for {allocated} of its {found.st_size} bytes: the rest was never "
            "written"
        )
    return found.st_size


def choose_digests(offered: Sequence[ContentDigests], mode: DigestMode, tensor_count: int) -> ContentDigests:
    """The digests to verify against. Raises `TransferFailed` that says on which side something is missing."""
    expected = mode.choose(offered)
    if expected is None:
        kinds = ", ".join(f"{digests.algorithm} ({digests.coverage})" for digests in offered) or "none"
        if any(not is_available(digests.algorithm) for digests in offered):
            advice = "install xxhash on this side"
        else:
            advice = "install xxhash on the source's side, or publish with digest mode full there"
        instead = ", or use digest mode auto" if mode is DigestMode.FULL else ""
        raise TransferFailed(
            f"digest mode {mode} cannot verify with what the source offers ({kinds}): {advice}{instead}"
        )
    if len(expected.values) != tensor_count:
        raise TransferFailed(f"the source has {len(expected.values)} digests for {tensor_count} tensors")
    return expected


def _map_all(mappings: ExitStack, fds: Sequence[int]) -> list[int]:
    try:
        return [mappings.enter_context(Mapping(fd, os.fstat(fd).st_size)).address for fd in fds]
    except OSError as error:
        raise TransferFailed(f"cannot map the source's memory: {error.strerror}") from error


def _transfer(
    described: DescribedTensors,
    sources: Sequence[int],
    expected: ContentDigests,
    deadline: float | None,
) -> tuple[float, float]:
    """Copy and verify; returns the times at which either was done. After any exception the tensors may be touched."""
    tensors = described.tensors
    # Where tensors share memory in part, the order of writing decides what is left; where they have gaps, memmove will
    # not do. These are written one after the other, digested where they come from and compared when all is written.
    careful = _overlapping(tensors)
    careful += [index for index, tensor in enumerate(tensors) if not tensor.spec.is_dense and not tensor.spec.alias_of]
    careful = sorted(set(careful))
    try:
        transferred = _copy_and_verify(described, sources, careful, expected, deadline)
        _compare(tensors, sources, careful, deadline)
    except DeadlinePassed as error:
        raise AcquireTimeout("the deadline passed while the tensors were being filled", touched=True) from error
    except BrokerError:
        raise
    except Exception as error:  # the caller must learn that the tensors are touched
        raise TransferFailed(f"copying failed: {type(error).__name__}: {error}", touched=True) from error
    return transferred, time.monotonic()


def _copy_and_verify(
    described: DescribedTensors,
    sources: Sequence[int],
    careful: Sequence[int],
    expected: ContentDigests,
    deadline: float | None,
) -> float:
    """Copy everything and compare digests; returns the time at which the last byte was copied."""
    tensors, sizes = described.tensors, described.layout.content_sizes
    pieces = [(tensor.address, source, size) for tensor, source, size in zip(tensors, sources, sizes, strict=True)]
    for index in careful:
        pieces[index] = (0, 0, 0)
    own_tasks = [partial(_write, tensors[index], sources[index]) for index in careful]
    found: list[int] = []
    if expected.coverage is DigestCoverage.FULL:
        algorithm, block_bytes = expected.algorithm, expected.block_bytes
        found = copying.copy_and_digest(pieces, algorithm, block_bytes, own_tasks=own_tasks, deadline=deadline)
        for index in careful:
            found[index] = copying.digest_full(sources[index], sizes[index], algorithm, block_bytes)
    else:
        copying.copy(pieces, own_tasks=own_tasks, deadline=deadline)
    transferred = time.monotonic()
    if expected.coverage is DigestCoverage.SAMPLED:
        contents = [(destination, size) for destination, _, size in pieces]
        for index in careful:
            contents[index] = (sources[index], sizes[index])
        found = copying.digest_samples(contents, expected.algorithm, expected.block_bytes, deadline=deadline)
    digests = zip(tensors, found, expected.values, strict=True)
    wrong = [tensor.spec.name for tensor, arrived, published in digests if arrived != published]
    if wrong:
        raise IntegrityError(
            f"{len(wrong)} of {len(tensors)} tensors arrived with other bytes than were published: {_list(wrong)}",
            touched=True,
            metadata={"tensors": _list(wrong), "count": str(len(wrong))},
        )
    return transferred


def _write(tensor: DescribedTensor, source: int) -> None:
    spec = tensor.spec
    if spec.is_dense:
        ctypes.memmove(tensor.address, source, spec.content_bytes)
    else:
        strided.unpack(spec, source, tensor.address, tensor.framework)


def _compare(
    tensors: Sequence[DescribedTensor], sources: Sequence[int], indices: Sequence[int], deadline: float | None
) -> None:
    """Raise `TransferFailed` unless these tensors hold what their source holds, now that everything is written."""
    clobbered: list[str] = []
    for index in indices:
        if deadline is not None and time.monotonic() >= deadline:
            raise DeadlinePassed
        tensor, source = tensors[index], sources[index]
        spec = tensor.spec
        if spec.is_dense:
            equal = equal_bytes(tensor.address, source, spec.content_bytes)
        else:
            packed = bytearray(spec.content_bytes)
            strided.pack(spec, tensor.address, address_of(packed), tensor.framework)
            equal = equal_bytes(address_of(packed), source, spec.content_bytes)
        if not equal:
            clobbered.append(spec.name)
    if clobbered:
        raise TransferFailed(
            f"these tensors share memory here but have different content at the source: {_list(clobbered)}. "
            "Load from disk; tensors that share memory must do so on both sides",
            touched=True,
            metadata={"tensors": _list(clobbered)},
        )


def _overlapping(tensors: Sequence[DescribedTensor]) -> list[int]:
    """Indices of the tensors, exact aliases aside, whose memory from first to last byte meets that of another."""
    found: list[int] = []
    end, last = 0, -1
    ranges = [
        (tensor.address, tensor.address + tensor.spec.storage_bytes, index)
        for index, tensor in enumerate(tensors)
        if tensor.address and not tensor.spec.alias_of
    ]
    for begin, stop, index in sorted(ranges):
        if begin < end:
            found += [last, index]
        if stop > end:
            end, last = stop, index
    return found


def _list(names: Sequence[str]) -> str:
    more = len(names) - _NAMED_TENSORS
    return ", ".join(names[:_NAMED_TENSORS]) + (f" and {more} more" if more > 0 else "")
