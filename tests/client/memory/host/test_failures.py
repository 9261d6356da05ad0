"""Host memory when something is wrong: refused before a byte is written, or reported with the tensors named. Never half
a success, never a writer left behind, nothing leaked."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.held_memory import held
from weight_broker.digest import FULL_BLOCK_BYTES, SAMPLE_BLOCK_BYTES
from weight_broker.errors import (
    AcquireTimeout,
    BrokerError,
    IntegrityError,
    InvalidArgument,
    TransferFailed,
)
from weight_broker.memory.host import copying
from weight_broker.memory.host import export as host
from weight_broker.memory.host.export import DigestMode, HostRegion, copy_in, export, map_tensors
from weight_broker.memory.tensors import DescribedTensors, describe

ELEMENTS = 20_000


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    before = held()
    yield
    assert held() == before


def tensors(value: int, count: int = 4) -> dict[str, torch.Tensor]:
    return {f"w{index}": torch.full((ELEMENTS,), value + index, dtype=torch.int32) for index in range(count)}


@pytest.fixture
def region() -> Iterator[HostRegion]:
    shared = export(describe(tensors(10)))
    yield shared
    shared.close()


def assert_unchanged(target: DescribedTensors, value: int) -> None:
    for index, tensor in enumerate(target.tensors):
        assert isinstance(tensor.owner, torch.Tensor)
        assert bool((tensor.owner == value + index).all())


def flip_before_sealing(monkeypatch: pytest.MonkeyPatch, offset: int) -> None:
    """The test hook at the memory level: the digests are of other bytes than the sealed ones."""
    seal = host.seal

    def flip_and_seal(fd: int) -> None:
        os.pwrite(fd, bytes([os.pread(fd, 1, offset)[0] ^ 0x10]), offset)
        seal(fd)

    monkeypatch.setattr(host, "seal", flip_and_seal)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 3), st.integers(0, ELEMENTS * 4 - 1))
def test_a_flipped_bit_anywhere_is_found_and_its_tensor_named(index: int, position: int) -> None:
    source = describe(tensors(10))
    offset = host._place(source.layout)[0][index] + position
    with pytest.MonkeyPatch.context() as monkeypatch:
        flip_before_sealing(monkeypatch, offset)
        damaged = export(source)
    with pytest.raises(IntegrityError) as caught:
        copy_in(describe(tensors(0)), [damaged.fd], damaged.placements, damaged.digests)
    damaged.close()
    assert (caught.value.touched, caught.value.quiesced) == (True, True)
    assert caught.value.metadata["tensors"] == f"w{index}"


def test_a_flipped_bit_in_a_tensor_with_gaps_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    source = {"w": torch.zeros(64, 64)[:, 1:]}
    flip_before_sealing(monkeypatch, 64 * 63 * 4 - 1)
    damaged = export(describe(source))
    with pytest.raises(IntegrityError):
        copy_in(describe({"w": torch.ones(64, 64)[:, 1:]}), [damaged.fd], damaged.placements, damaged.digests)
    damaged.close()


@pytest.mark.parametrize(("offset", "found"), [(0, True), (SAMPLE_BLOCK_BYTES, False), (ELEMENTS * 4 - 1, True)])
def test_a_sample_finds_a_flipped_bit_at_the_ends_of_a_tensor(
    monkeypatch: pytest.MonkeyPatch, offset: int, found: bool
) -> None:
    flip_before_sealing(monkeypatch, offset)
    damaged = export(describe({"w": torch.zeros(ELEMENTS, dtype=torch.int32)}), digest_mode=DigestMode.SAMPLED)
    target = describe({"w": torch.zeros(ELEMENTS, dtype=torch.int32)})
    try:
        copy_in(target, [damaged.fd], damaged.placements, damaged.digests)
    except IntegrityError:
        assert found
    else:
        assert not found
    damaged.close()


@pytest.mark.parametrize(("copy", "count"), [("_copy_locked", 10), ("_copy", ELEMENTS)])
def test_damage_done_by_the_copy_itself_is_found(monkeypatch: pytest.MonkeyPatch, copy: str, count: int) -> None:
    shared = export(describe({"w": torch.zeros(count, dtype=torch.int32)}))
    proper = getattr(copying, copy)

    def copy_badly(destination: int, source: int, size: int) -> None:
        proper(destination, source, size)
        ctypes.c_ubyte.from_address(destination + size // 2).value ^= 1

    monkeypatch.setattr(copying, copy, copy_badly)
    target = describe({"w": torch.zeros(count, dtype=torch.int32)})
    with pytest.raises(IntegrityError):
        copy_in(target, [shared.fd], shared.placements, shared.digests)
    shared.close()


@pytest.mark.parametrize("mode", list(DigestMode))
def test_exchanged_tensors_of_equal_size_are_found_and_named(region: HostRegion, mode: DigestMode) -> None:
    placements = list(region.placements)
    placements[1], placements[3] = placements[3], placements[1]
    with pytest.raises(IntegrityError) as caught:
        copy_in(describe(tensors(0)), [region.fd], placements, region.digests, digest_mode=mode)
    assert caught.value.metadata["tensors"] == "w1, w3"


def test_exchanged_blocks_within_a_tensor_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    seal = host.seal

    def exchange_and_seal(fd: int) -> None:
        first, second = (os.pread(fd, FULL_BLOCK_BYTES, index * FULL_BLOCK_BYTES) for index in (1, 2))
        assert first != second
        os.pwrite(fd, second + first, FULL_BLOCK_BYTES)
        seal(fd)

    monkeypatch.setattr(host, "seal", exchange_and_seal)
    damaged = export(describe({"w": torch.arange(FULL_BLOCK_BYTES)}))
    with pytest.raises(IntegrityError):
        copy_in(
            describe({"w": torch.zeros(FULL_BLOCK_BYTES, dtype=torch.int64)}),
            [damaged.fd],
            damaged.placements,
            damaged.digests,
        )
    damaged.close()


def test_many_wrong_tensors_are_counted_and_not_all_listed() -> None:
    shared = export(describe(tensors(10, 40)))
    wrong = [replace(digests, values=tuple(value ^ 1 for value in digests.values)) for digests in shared.digests]
    with pytest.raises(IntegrityError) as caught:
        copy_in(describe(tensors(0, 40)), [shared.fd], shared.placements, wrong)
    shared.close()
    assert caught.value.metadata["count"] == "40"
    assert caught.value.metadata["tensors"].endswith("and 24 more")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda good: good | {"placements": good["placements"][:-1]}, "3 placements for 4 tensors"),
        (lambda good: good | {"placements": [(1, 0), *good["placements"][1:]]}, "region 1 of 1"),
        (lambda good: good | {"placements": [(-1, 0), *good["placements"][1:]]}, "region -1 of 1"),
        (lambda good: good | {"placements": [*good["placements"][:-1], (0, 1 << 62)]}, "beyond its region"),
        (lambda good: good | {"placements": [*good["placements"][:-1], (0, -64)]}, "beyond its region"),
        (lambda good: good | {"placements": [*good["placements"][:-1], (0, 4096 * 80)]}, "beyond its region"),
        (lambda good: good | {"fds": []}, "region 0 of 0"),
        (lambda good: good | {"digests": []}, "offers .none."),
        (
            lambda good: good | {"digests": [replace(one, values=one.values[:-1]) for one in good["digests"]]},
            "3 digests for 4 tensors",
        ),
        (lambda good: good | {"digests": good["digests"][1:], "digest_mode": DigestMode.FULL}, "crc32 .sampled."),
        (lambda good: good | {"fds": [0]}, "not a memfd"),
        (lambda good: good | {"fds": [10**6]}, "not a memfd"),
    ],
)
def test_a_wrong_request_is_refused_before_a_byte_is_written(
    region: HostRegion, change: Callable[[dict[str, Any]], dict[str, Any]], message: str
) -> None:
    good = {"fds": [region.fd], "placements": list(region.placements), "digests": list(region.digests)}
    target = describe(tensors(70))
    with pytest.raises(TransferFailed, match=message) as caught:
        copy_in(target, **change(good))
    assert (caught.value.touched, caught.value.quiesced) == (False, True)
    assert_unchanged(target, 70)


def unsealed(size_bytes: int) -> int:
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size_bytes)
    return fd


def reserved_huge_pages(size_bytes: int) -> int:
    """Memory of huge pages, of which the machine may have none: the first byte that is read is a signal."""
    try:
        fd = os.memfd_create("huge", os.MFD_HUGETLB | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, -(-size_bytes // (2 << 20)) * (2 << 20))
    except OSError:
        pytest.skip("this kernel has no huge pages of 2 MiB")
    host.seal(fd)
    return fd


def sparse(size_bytes: int) -> int:
    """Every page but the last: reading it would take memory that nothing has paid for."""
    fd = unsealed(size_bytes)
    os.posix_fallocate(fd, 0, size_bytes - mmap.PAGESIZE)
    host.seal(fd)
    return fd


@pytest.mark.parametrize(
    ("make", "message"),
    [(unsealed, "not sealed"), (reserved_huge_pages, "MFD_HUGETLB"), (sparse, "was never written")],
)
def test_memory_that_could_still_change_or_cannot_be_read_is_refused(
    region: HostRegion, make: Callable[[int], int], message: str
) -> None:
    target = describe(tensors(70))
    fd = make(region.size_bytes)
    for use in (
        partial(copy_in, target, [fd], region.placements, region.digests),
        partial(map_tensors, target.layout, [fd], region.placements),
    ):
        with pytest.raises(TransferFailed, match=message) as caught:
            use()
        assert not caught.value.touched
    os.close(fd)
    assert_unchanged(target, 70)


def test_a_read_only_array_is_refused_before_a_byte_is_written(region: HostRegion) -> None:
    target: dict[str, Any] = {**tensors(70)}
    target["w3"] = np.zeros(ELEMENTS, "int32")
    target["w3"].flags.writeable = False
    with pytest.raises(InvalidArgument, match="read-only"):
        copy_in(describe(target), [region.fd], region.placements, region.digests)
    assert bool((target["w0"] == 70).all())


def test_a_deadline_that_has_passed_leaves_the_tensors_as_they_are(region: HostRegion) -> None:
    target = describe(tensors(70))
    with pytest.raises(AcquireTimeout) as caught:
        copy_in(target, [region.fd], region.placements, region.digests, deadline=time.monotonic() - 1)
    assert (caught.value.touched, caught.value.quiesced) == (False, True)
    assert_unchanged(target, 70)


@pytest.mark.parametrize(
    ("error", "expected"),
    [(None, AcquireTimeout), (OSError(errno.EIO, "bad page"), TransferFailed), (MemoryError(), TransferFailed)],
)
def test_a_transfer_that_ends_half_way_says_that_the_tensors_are_touched(
    region: HostRegion, monkeypatch: pytest.MonkeyPatch, error: BaseException | None, expected: type[BrokerError]
) -> None:
    copy = copying._copy
    copied: list[int] = []

    def copy_and_fail(destination: int, source: int, size: int) -> None:
        copy(destination, source, size)
        copied.append(size)
        if error is not None:
            raise error

    monkeypatch.setattr(copying, "_copy", copy_and_fail)
    now = time.monotonic
    monkeypatch.setattr(copying, "time", SimpleNamespace(monotonic=lambda: now() + 600 * len(copied)))
    monkeypatch.setattr(copying, "thread_count", lambda: 2)
    target = describe(tensors(70))
    deadline = now() + 600 if error is None else None
    with pytest.raises(expected) as caught:
        copy_in(target, [region.fd], region.placements, region.digests, deadline=deadline)
    assert (type(caught.value), caught.value.touched, caught.value.quiesced) == (expected, True, True)
    owners = [tensor.owner for tensor in target.tensors]
    assert 1 <= sum(bool((owner == 10 + index).all()) for index, owner in enumerate(owners)) < 4  # type: ignore[attr-defined]


def test_tensors_that_share_memory_only_here_are_not_filled_with_one_anothers_content() -> None:
    square = torch.randn(100, 100)
    target = torch.zeros(100, 100)
    apart = export(describe({"embed": square, "head": torch.randn(100, 100).t()}))
    tied = export(describe({"embed": square, "head": square.t()}))
    described = describe({"embed": target, "head": target.t()})
    with pytest.raises(TransferFailed, match="share memory") as caught:
        copy_in(described, [apart.fd], apart.placements, apart.digests)
    assert not isinstance(caught.value, IntegrityError)
    assert caught.value.touched
    assert "embed" in caught.value.metadata["tensors"]
    copy_in(described, [tied.fd], tied.placements, tied.digests)
    assert torch.equal(target, square)
    for region in (apart, tied):
        region.close()


def test_columns_of_one_matrix_are_filled_side_by_side() -> None:
    source, target = torch.randn(50, 30), torch.zeros(50, 30)

    def columns(matrix: torch.Tensor) -> DescribedTensors:
        return describe({"q": matrix[:, :10], "k": matrix[:, 10:20], "v": matrix[:, 20:]})

    shared = export(columns(source))
    copy_in(columns(target), [shared.fd], shared.placements, shared.digests)
    shared.close()
    assert torch.equal(target, source)


def test_a_child_forked_while_a_thread_publishes_does_not_keep_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    children: list[int] = []

    def fill_and_fork(*arguments: Any) -> Any:
        child = os.fork()
        if child == 0:
            memfds = [name for name in os.listdir("/proc/self/fd") if _is_memfd(f"/proc/self/fd/{name}")]
            os._exit(len(memfds))
        children.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        return fill(*arguments)

    fill = host._fill
    monkeypatch.setattr(host, "_fill", fill_and_fork)
    export(describe({"a": np.ones(10)})).close()
    assert children == [0]


def _is_memfd(path: str) -> bool:
    try:
        return "weight-broker" in os.readlink(path)
    except OSError:
        return False
