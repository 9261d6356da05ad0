"""Publishing when the host or the process has not got what it takes: refused with what to do, never a signal, never a
half-built memfd left behind."""

from __future__ import annotations

import errno
import os
import resource
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from support.held_memory import held
from weight_broker.errors import PublishRefused
from weight_broker.memory.host import export as host
from weight_broker.memory.host import memfd
from weight_broker.memory.host.address_space import Mapping
from weight_broker.memory.host.export import export
from weight_broker.memory.tensors import describe

TENSORS = {f"w{index}": torch.full((20_000,), index, dtype=torch.int32) for index in range(4)}


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    before = held()
    yield
    assert held() == before


def test_publishing_more_than_there_is_memory_is_refused_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "available_bytes", lambda: 100_000)
    with pytest.raises(PublishRefused, match="free host memory") as caught:
        export(describe(TENSORS))
    assert int(caught.value.metadata["needed_bytes"]) > 4 * TENSORS["w0"].nbytes
    assert caught.value.metadata["available_bytes"] == "100000"


@pytest.mark.parametrize("shortage", [errno.ENOSPC, errno.ENOMEM])
def test_memory_that_runs_out_while_publishing_is_an_error_and_not_a_signal(
    monkeypatch: pytest.MonkeyPatch, shortage: int
) -> None:
    allocate = os.posix_fallocate

    def run_out(fd: int, offset: int, size: int) -> None:
        if offset:
            raise OSError(shortage, os.strerror(shortage))
        allocate(fd, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", run_out)
    with pytest.raises(PublishRefused, match="free host memory") as caught:
        export(describe({"w": torch.zeros(40 << 20, dtype=torch.uint8)}))
    assert caught.value.metadata["error"] == errno.errorcode[shortage]


@pytest.mark.parametrize("huge_pages", [True, False])
def test_all_memory_is_there_before_the_first_byte_is_copied(monkeypatch: pytest.MonkeyPatch, huge_pages: bool) -> None:
    monkeypatch.setattr(Mapping, "populate", lambda *_: None)
    if not huge_pages:
        monkeypatch.setattr(Mapping, "back_with_huge_pages", lambda *_: False)
    allocate, allocated = memfd.allocate, []

    def allocate_and_look(fd: int, *arguments: Any) -> None:
        allocate(fd, *arguments)
        allocated.append(os.fstat(fd).st_blocks * 512)

    monkeypatch.setattr(host, "allocate", allocate_and_look)
    shared = export(describe({"w": torch.zeros((35 << 20) + 1, dtype=torch.uint8)}))
    assert allocated == [shared.size_bytes]
    shared.close()


@pytest.mark.parametrize(
    ("limit", "value", "advice"),
    [(resource.RLIMIT_FSIZE, 1000, "file size limit"), (resource.RLIMIT_NOFILE, 3, "limit of open files")],
)
def test_a_limit_of_the_process_is_named(limit: int, value: int, advice: str) -> None:
    described = describe(TENSORS)
    before = resource.getrlimit(limit)
    resource.setrlimit(limit, (value, before[1]))
    try:
        with pytest.raises(PublishRefused) as caught:
            export(described)
    finally:
        resource.setrlimit(limit, before)
    assert advice in str(caught.value)


def test_a_memfd_that_cannot_be_sealed_is_not_published(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.EBUSY, "busy")

    monkeypatch.setattr(host, "seal", refuse)
    with pytest.raises(PublishRefused, match="fork"):
        export(describe(TENSORS))


def test_publishing_stops_at_its_deadline() -> None:
    with pytest.raises(PublishRefused, match="deadline"):
        export(describe(TENSORS), deadline=time.monotonic())


def test_whatever_goes_wrong_while_publishing_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(host, "seal", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(describe(TENSORS))


def test_a_child_forked_while_publishing_does_not_keep_the_memory_from_being_sealed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fill, children = host._fill, []

    def fork_and_fill(*arguments: Any) -> Any:
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        children.append(child)
        return fill(*arguments)

    monkeypatch.setattr(host, "_fill", fork_and_fill)
    try:
        export(describe(TENSORS)).close()
    finally:
        for child in children:
            os.kill(child, 9)
            os.waitpid(child, 0)
    assert children
