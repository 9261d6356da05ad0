"""Which memory is exported for which tensors, and what is left of it when a call of the driver's fails."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.torch_npu_double import TorchNpu, on_npu
from weight_broker.drivers.acl import Acl, AclError, MemcpyKind
from weight_broker.errors import PublishRefused, RetractTimeout
from weight_broker.memory.npu.kind import (
    DeviceTensor,
    ExportedSegments,
    Segment,
    SegmentKind,
    describe_device,
    export_segments,
)
from weight_broker.memory.npu.registry import EXPORTS

CHUNK = 2 << 20
PAGE = 4096


class CountingAcl(Acl):
    """Keeps count of what is exported and retained. A call whose number is `fails_at` fails."""

    def __init__(self, *, fails_at: int = -1, handles_shared_once: bool = True) -> None:
        self.fails_at = fails_at
        self.calls = 0
        self.keys: set[bytes] = set()
        self.admitted: dict[bytes | int, list[int]] = {}
        self.retained: Counter[int] = Counter()
        self.exported_chunks: set[int] = set()
        EXPORTS._ended_chunks.clear()  # a fresh driver has exported nothing

    def _count(self, name: str) -> None:
        self.calls += 1
        if self.calls - 1 == self.fails_at:
            raise AclError(name, 507899, "no")

    @contextmanager
    def on_device(self, device: int) -> Iterator[None]:
        yield

    def synchronize_device(self) -> None:
        self._count("aclrtSynchronizeDevice")

    def physical_device(self, device: int) -> int:
        self._count("aclrtGetPhyDevIdByLogicDevId")
        return device + 4

    def bare_tgid(self) -> int:
        return 1

    def ipc_export_key(self, address: int, size: int, flags: int = 0) -> bytes:
        self._count("aclrtIpcMemGetExportKey")
        key = b"%x+%x" % (address, size)
        assert key not in self.keys
        self.keys.add(key)
        return key

    def ipc_set_import_pids(self, key: bytes, pids: list[int]) -> None:  # type: ignore[override]  # narrower: a list
        self._count("aclrtIpcMemSetImportPid")
        self.admitted[key] = list(pids)

    def ipc_close(self, key: bytes) -> None:
        self.keys.remove(key)

    def retain_allocation_handle(self, address: int) -> int:
        self._count("aclrtMemRetainAllocationHandle")
        self.retained[address] += 1
        return address

    def chunk_bytes(self, address: int, end: int) -> int:
        return CHUNK

    def logical_device(self, device: int) -> int:
        return device

    def free_physical(self, handle: int) -> None:
        self.retained[handle] -= 1
        assert self.retained[handle] >= 0

    def export_shareable_handle(self, handle: int, flags: int = 0) -> int:
        self._count("aclrtMemExportToShareableHandle")
        if handle in self.exported_chunks:
            raise AclError("aclrtMemExportToShareableHandle", 107000, "has one")
        self.exported_chunks.add(handle)
        return handle + 1

    def set_pids_to_shareable_handle(self, shareable: int, pids: list[int]) -> None:  # type: ignore[override]
        self._count("aclrtMemSetPidToShareableHandle")
        if shareable - 1 not in self.exported_chunks:
            raise AclError("aclrtMemSetPidToShareableHandle", 107000, "no such handle")
        self.admitted[shareable] = list(pids)

    def memcpy(self, destination: int, destination_size: int, source: int, size: int, kind: MemcpyKind) -> None:
        raise NotImplementedError

    @property
    def holds_nothing(self) -> bool:
        """Whether everything was given back."""
        return not self.keys and not +self.retained


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    assert len(EXPORTS) == 0


def tensor(address: int, size: int) -> DeviceTensor:
    return DeviceTensor(address, "uint8", (size,), (1,), size, 0)


def export(
    acl: Acl, tensors: dict[str, DeviceTensor], *segments: Segment, pids: tuple[int, ...] = ()
) -> ExportedSegments:
    return export_segments(describe_device(tensors), segments, pids, acl=acl, driver_version="25.5.0")


@st.composite
def memories(draw: st.DrawFn) -> tuple[list[Segment], dict[str, DeviceTensor]]:
    segments: list[Segment] = []
    tensors: dict[str, DeviceTensor] = {}
    base = 1 << 40
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            segments.append(Segment(base, PAGE * draw(st.integers(1, 600))))
        else:
            segments.append(Segment(base, CHUNK * draw(st.integers(1, 6)), SegmentKind.VMM, CHUNK))
        segment = segments[-1]
        for _ in range(draw(st.integers(0, 6))):
            offset = draw(st.integers(0, segment.size - 1))
            size = draw(st.integers(1, segment.size - offset))
            tensors[f"t{draw(st.integers(0, 999)):03}-{len(tensors)}"] = tensor(base + offset, size)
        base = segment.end + draw(st.sampled_from([0, CHUNK]))  # neighbours may touch
    tensors["none"] = tensor(0, 0)
    return draw(st.permutations(segments)), tensors


@given(memories())
def test_every_tensor_lies_in_its_region_and_no_memory_is_in_two(
    memory: tuple[list[Segment], dict[str, DeviceTensor]],
) -> None:
    segments, tensors = memory
    acl = CountingAcl()
    exported = export(acl, tensors, *segments)
    begins = []
    for region in exported.regions:
        if region.npu_allocation.export_key:
            begin = int(region.npu_allocation.export_key.split(b"+")[0], 16)
        else:
            begin = region.npu_segment.shareable_handles[0] - 1
            count = len(region.npu_segment.shareable_handles)
            assert list(region.npu_segment.shareable_handles) == [begin + 1 + CHUNK * index for index in range(count)]
            assert region.size_bytes == count * region.npu_segment.chunk_bytes
        begins.append(begin)
    for name, (region_index, offset) in zip(sorted(tensors), exported.placements, strict=True):
        if tensors[name].storage_bytes:
            assert begins[region_index] + offset == tensors[name].address
            assert offset + tensors[name].storage_bytes <= exported.regions[region_index].size_bytes
    assert len({region.region_id for region in exported.regions}) == len(exported.regions)
    assert all(region.device_id == "npu:4" for region in exported.regions)
    ends = [begin + region.size_bytes for begin, region in zip(begins, exported.regions, strict=True)]
    assert all(end <= begin for end, begin in zip(ends, begins[1:], strict=False))
    exported.close()
    assert acl.holds_nothing


PLAIN = Segment(1 << 30, CHUNK)
CHUNKED = Segment(1 << 31, 3 * CHUNK, SegmentKind.VMM, CHUNK)
TENSORS = {"a": tensor(PLAIN.base, 64), "b": tensor(CHUNKED.base, 3 * CHUNK)}


def test_whichever_call_fails_nothing_stays_exported_and_the_reason_is_told() -> None:
    probe = CountingAcl()
    export(probe, TENSORS, PLAIN, CHUNKED, pids=(7,)).close()
    assert probe.calls > 10
    for number in range(probe.calls):
        acl = CountingAcl(fails_at=number)
        with pytest.raises(PublishRefused, match=r"the driver does not .* failed with 507899: no") as caught:
            export(acl, TENSORS, PLAIN, CHUNKED, pids=(7,))
        assert caught.value.metadata["code"] == "507899"
        assert acl.holds_nothing
        assert len(EXPORTS) == 0


def test_whichever_call_of_a_second_publication_fails_the_first_one_keeps_what_it_has() -> None:
    probe = CountingAcl()
    with export(probe, TENSORS, PLAIN, CHUNKED):
        before = probe.calls
        export(probe, TENSORS, PLAIN, CHUNKED, pids=(7,)).close()
        extra = probe.calls - before
    assert probe.holds_nothing
    for number in range(extra):
        acl = CountingAcl()
        with export(acl, TENSORS, PLAIN, CHUNKED) as first:
            acl.fails_at = acl.calls + number
            with pytest.raises(PublishRefused):
                export(acl, TENSORS, PLAIN, CHUNKED, pids=(7,))
            assert len(EXPORTS) == 4
            assert acl.keys == {region.npu_allocation.export_key for region in first.regions[:1]}
        assert acl.holds_nothing


def test_every_admitted_process_stays_admitted() -> None:
    acl = CountingAcl()
    with export(acl, TENSORS, PLAIN, CHUNKED, pids=(7, 8)) as exported:
        exported.admit([8, 9])
        assert len(acl.admitted) == 4
        assert set(map(tuple, acl.admitted.values())) == {(7, 8, 9)}
        calls = acl.calls
        exported.admit([9])
        assert acl.calls == calls


def test_a_chunk_whose_export_ended_is_shared_again_by_the_handle_it_has() -> None:
    acl = CountingAcl()
    with export(acl, TENSORS, PLAIN, CHUNKED, pids=(7,)) as before:
        pass
    with export(acl, TENSORS, PLAIN, CHUNKED, pids=(7,)) as after:
        assert after.regions == before.regions
    acl.exported_chunks.clear()  # the chunks were freed; the handles are others' now
    with export(acl, TENSORS, PLAIN, CHUNKED, pids=(7,)):
        assert len(acl.exported_chunks) == 3


def test_memory_that_was_freed_and_allocated_anew_before_its_publication_ended_is_refused() -> None:
    acl = CountingAcl()
    with export(acl, TENSORS, PLAIN, CHUNKED):
        larger = Segment(PLAIN.base, 2 * CHUNK)
        with pytest.raises(PublishRefused, match="was freed before its publication"):
            export(acl, TENSORS, larger, CHUNKED)


def test_an_export_that_the_driver_does_not_end_can_be_ended_later(monkeypatch: pytest.MonkeyPatch) -> None:
    acl = CountingAcl()
    exported = export(acl, TENSORS, PLAIN, CHUNKED)

    def refuse(key: bytes) -> None:
        raise AclError("aclrtIpcMemClose", 107000, "imported")

    with monkeypatch.context() as patch:
        patch.setattr(acl, "ipc_close", refuse)
        for _ in range(2):
            with pytest.raises(RetractTimeout, match=r"0x40000000 is still shared: .*imported"):
                exported.close()
    assert acl.keys
    exported.close()
    assert acl.holds_nothing


def test_in_a_forked_child_closing_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    acl = CountingAcl()
    with export(acl, TENSORS, PLAIN, CHUNKED) as exported:
        with monkeypatch.context() as patch:
            patch.setattr("os.getpid", lambda: -1)
            exported.close()
        assert not acl.holds_nothing
    assert acl.holds_nothing


def test_what_torch_npu_has_in_its_queue_is_done_first_and_its_segments_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    acl, weights = CountingAcl(), torch.zeros(1000)
    base = weights.data_ptr() // PAGE * PAGE
    row = {"device": 2, "address": base, "total_size": 2 * PAGE, "segment_type": "small"}
    calls_before: list[tuple[int, int]] = []
    double = TorchNpu([row])
    monkeypatch.setattr(double, "synchronized", SimpleNamespace(append=lambda it: calls_before.append((it, acl.calls))))
    monkeypatch.setitem(sys.modules, "torch_npu", double.module)
    described = describe_device({"weights": on_npu(weights, index=2)})
    with export_segments(described, acl=acl, driver_version="25.5.0") as exported:
        assert calls_before == [(2, 0)]
        assert exported.regions[0].npu_allocation.export_key == b"%x+%x" % (base, 2 * PAGE)
        assert exported.regions[0].device_id == "npu:6"
        assert exported.placements == ((0, weights.data_ptr() - base),)


def test_without_a_library_publishing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weight_broker.drivers.acl.LIBRARY", "libnosuch.so")
    with pytest.raises(PublishRefused, match="device memory cannot be shared: libascendcl"):
        export_segments(describe_device(TENSORS), [PLAIN, CHUNKED])
