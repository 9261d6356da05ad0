"""The compiled copy: every byte and no other, the digests that xxhash computes, and nothing lost without it."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.compiled_copy import compiled_copy
from weight_broker.digest import DigestAlgorithm, block_function
from weight_broker.memory.host import copying, streaming
from weight_broker.memory.host.address_space import address_of
from weight_broker.memory.host.streaming import streaming_copy

GUARD = 200
UNIT = 16 << 10

SIZES = st.one_of(st.integers(0, 300), st.integers(UNIT - 70, UNIT + 70), st.integers(0, 5 * UNIT))
OFFSETS = st.integers(0, 130)
"""From an address that is a multiple of 16."""


@pytest.fixture
def fresh() -> Iterator[None]:
    """Looks for the library anew, during the test and after it."""
    streaming_copy.cache_clear()
    yield
    streaming_copy.cache_clear()


class Memory:
    """Random bytes, and a place for them between guards, both at any alignment."""

    def __init__(self, size: int, source_offset: int, destination_offset: int) -> None:
        self.content = random.Random(size).randbytes(size)
        self._source = bytearray(b"\x11" * source_offset + self.content + b"\x11" * GUARD)
        self._destination = bytearray(b"\xaa" * (GUARD + destination_offset + size + GUARD))
        self.source = address_of(self._source) + source_offset
        self._begin = GUARD + destination_offset
        self.destination = address_of(self._destination) + self._begin

    def is_copied_exactly(self) -> bool:
        end = self._begin + len(self.content)
        guards = self._destination[: self._begin] + self._destination[end:]
        return self._destination[self._begin : end] == self.content and set(guards) == {0xAA}


@settings(max_examples=300, deadline=None)
@given(SIZES, OFFSETS, OFFSETS)
def test_it_copies_every_byte_and_writes_no_other_at_any_alignment(size: int, source: int, destination: int) -> None:
    memory = Memory(size, source, destination)
    compiled_copy().copy(memory.destination, memory.source, size)
    assert memory.is_copied_exactly()


@settings(max_examples=300, deadline=None)
@given(SIZES.filter(bool), OFFSETS, OFFSETS, st.sampled_from([512, 1000, UNIT, UNIT + 64, 3 * UNIT + 1, 1 << 20]))
def test_its_digests_are_those_of_xxhash(size: int, source: int, destination: int, block_bytes: int) -> None:
    copy_and_digest = compiled_copy().copy_and_digest
    assert copy_and_digest is not None
    memory = Memory(size, source, destination)
    digests = copy_and_digest(memory.destination, memory.source, size, block_bytes)
    assert memory.is_copied_exactly()
    function = block_function(DigestAlgorithm.XXH3_64)
    assert digests == [function(memory.content[at : at + block_bytes]) for at in range(0, size, block_bytes)]


def test_large_transfers_use_it_and_small_ones_stay_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, used = compiled_copy(), list[int]()

    def copy(destination: int, source: int, size: int) -> None:
        used.append(size)
        compiled.copy(destination, source, size)

    monkeypatch.setattr(copying, "streaming_copy", lambda: SimpleNamespace(copy=copy, copy_and_digest=None))
    for size in (copying.STREAMING_BYTES - 1, copying.STREAMING_BYTES):
        source, destination = bytearray(b"x" * size), bytearray(size)
        copying.copy([(address_of(destination), address_of(source), size)])
        assert destination == source
    assert sum(used) == copying.STREAMING_BYTES


@pytest.mark.usefixtures("fresh")
def test_an_installation_without_the_library_does_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(streaming, "_LIBRARY", tmp_path / "streaming_copy.so.1")
    assert streaming_copy() is None


@pytest.mark.usefixtures("fresh")
def test_a_file_that_is_no_library_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(streaming, "_LIBRARY", tmp_path / "streaming_copy.so.1")
    (tmp_path / "streaming_copy.so.1").write_bytes(b"built for another processor")
    assert streaming_copy() is None


@pytest.mark.usefixtures("fresh")
def test_a_library_of_another_version_is_not_used_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiled_copy()
    streaming_copy.cache_clear()
    monkeypatch.setattr(streaming, "_INTERFACE", 999)
    with caplog.at_level(logging.WARNING):
        assert streaming_copy() is None
    assert "install the client again" in caplog.text


@pytest.mark.usefixtures("fresh")
def test_functions_of_libxxhash_that_compute_something_else_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "block_function", lambda _algorithm: lambda _content: 1)
    assert compiled_copy().copy_and_digest is None
