"""Memory that is asked for while weights are being loaded: used or given back, and never in the way."""

from __future__ import annotations

import gc
import os
import queue
import threading
from collections.abc import Iterator
from typing import cast

import pytest
import torch

from support.held_memory import held
from support.waiting import eventually
from weight_broker import ColdLoadLease, PublishRefused
from weight_broker.key import WeightSetKey
from weight_broker.memory.host import export as host
from weight_broker.memory.host import memfd
from weight_broker.memory.host.address_space import Mapping
from weight_broker.memory.host.export import copy_in, export, region_bytes
from weight_broker.memory.host.memfd import PreparedMemory, prepare
from weight_broker.memory.tensors import describe
from weight_broker.transfers.exchange import Exchange
from weight_broker.transfers.load import Load

SIZE_BYTES = 80 << 20


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    gc.collect()
    before = held()
    yield
    gc.collect()
    eventually(lambda: "weight-broker-memory" not in {thread.name for thread in threading.enumerate()})
    assert held() == before


def weights(size_bytes: int = SIZE_BYTES) -> dict[str, torch.Tensor]:
    return {"w": torch.randint(0, 255, (size_bytes,), dtype=torch.uint8)}


def pages_of(memory: PreparedMemory) -> int:
    assert memory._fd is not None
    return os.fstat(memory._fd).st_blocks * 512


def until_it_is_there(memory: PreparedMemory) -> None:
    assert memory._ended.wait(60)


@pytest.mark.parametrize("prepared_bytes", [SIZE_BYTES, SIZE_BYTES // 2, 2 * SIZE_BYTES], ids=["same", "less", "more"])
@pytest.mark.parametrize("waits", [True, False])
def test_what_is_published_is_right_whatever_was_prepared_and_however_far_that_is(
    prepared_bytes: int, waits: bool
) -> None:
    memory, tensors = PreparedMemory(prepared_bytes), weights()
    if waits:
        until_it_is_there(memory)
        assert pages_of(memory) == prepared_bytes
    described = describe(tensors)
    region = export(described, prepared=memory)
    assert region.size_bytes == os.fstat(region.fd).st_size == region_bytes(described.layout)
    assert os.fstat(region.fd).st_blocks * 512 == region.size_bytes
    target = {"w": torch.zeros_like(tensors["w"])}
    copy_in(describe(target), [region.fd], region.placements, region.digests)
    assert torch.equal(target["w"], tensors["w"])
    region.close()


def test_memory_that_nobody_takes_is_given_back() -> None:
    memory = PreparedMemory(SIZE_BYTES)
    memory.close()
    memory.close()
    assert memory.take() is None
    dropped = PreparedMemory(1 << 40)
    del dropped


def test_it_can_be_used_once_and_publishing_again_asks_for_new_memory() -> None:
    memory, described = PreparedMemory(SIZE_BYTES), describe(weights())
    one, other = export(described, prepared=memory), export(described, prepared=memory)
    assert one.fd != other.fd
    one.close()
    other.close()


def test_publishing_that_is_refused_gives_it_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, described = PreparedMemory(SIZE_BYTES // 2), describe(weights())
    until_it_is_there(memory)
    monkeypatch.setattr(host, "available_bytes", lambda: 0)
    with pytest.raises(PublishRefused, match=str(region_bytes(described.layout) - SIZE_BYTES // 2)):
        export(described, prepared=memory)


def test_memory_that_was_asked_for_but_is_not_there_yet_is_checked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memfd, "allocate_range", lambda *_: None)
    memory, described = PreparedMemory(SIZE_BYTES), describe(weights())
    monkeypatch.setattr(host, "available_bytes", lambda: SIZE_BYTES - 1)
    with pytest.raises(PublishRefused, match=str(region_bytes(described.layout))):
        export(described, prepared=memory)


def test_what_cannot_be_shared_is_not_prepared_for_and_stops_no_loader() -> None:
    class Lease:
        def prepare_memory(self, size_bytes: int) -> None:
            raise AssertionError(size_bytes)

    load = Load(cast(Exchange, None), WeightSetKey("model"), timeout=1, publish=True)
    load._lease = cast(ColdLoadLease, Lease())
    load._prepare_for({"w": torch.zeros(1, device="meta")})
    load._prepare_for({"w": object()})


def test_nothing_is_prepared_where_memory_is_not_plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memfd, "available_bytes", lambda: 3 * SIZE_BYTES - 1)
    assert prepare(SIZE_BYTES) is None
    monkeypatch.setattr(memfd, "available_bytes", lambda: 3 * SIZE_BYTES)
    memory = prepare(SIZE_BYTES)
    assert memory is not None
    memory.close()


def test_little_memory_is_not_prepared_and_a_limit_of_the_process_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert prepare(1 << 20) is None

    def refuse(size_bytes: int) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(memfd, "create", refuse)
    assert prepare(SIZE_BYTES) is None


def test_memory_that_runs_out_on_the_way_is_left_to_publishing_to_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(memfd, "allocate_range", refuse)
    memory, described = PreparedMemory(SIZE_BYTES), describe(weights())
    until_it_is_there(memory)
    monkeypatch.undo()
    export(described, prepared=memory).close()


def test_a_forked_child_has_neither_the_memory_nor_any_use_for_it() -> None:
    memory = PreparedMemory(SIZE_BYTES)
    fd = memory._fd
    assert fd is not None
    child = os.fork()
    if child == 0:
        status = 0
        try:
            os.fstat(fd)
            status = 1
        except OSError:
            pass
        status |= 2 * (memory.take() is not None)
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    memory.close()


def test_taking_it_does_not_wait_for_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ranges: list[int] = []
    begun = threading.Event()
    made: queue.Queue[PreparedMemory] = queue.Queue()

    def allocate(fd: int, region: Mapping, start: int) -> None:
        ranges.append(start)
        begun.set()
        made.get(timeout=60)._stop.wait(60)  # the next one would come after it was taken

    monkeypatch.setattr(memfd, "allocate_range", allocate)
    memory = PreparedMemory(1 << 40)
    made.put(memory)
    assert begun.wait(60)
    memory.close()
    assert ranges == [0]
