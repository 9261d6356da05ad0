"""Digests: their values, pinned, and what a sample covers."""

from __future__ import annotations

import itertools
import struct
import zlib

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from weight_broker import digest, multilinear
from weight_broker.digest import SAMPLE_BLOCKS, DigestAlgorithm, block_function, combine, is_available, sampled_blocks


def test_a_digest_is_the_function_over_the_block_digests_as_little_endian_64_bit_numbers() -> None:
    packed = struct.pack("<2Q", 1, 2)
    assert combine(DigestAlgorithm.XXH3_64, [1, 2]) == xxhash.xxh3_64_intdigest(packed) == 0x7EE86C281446BEF
    assert combine(DigestAlgorithm.CRC32, [1, 2]) == zlib.crc32(packed) == 0xF6DDB9


@pytest.mark.parametrize("algorithm", list(DigestAlgorithm))
@given(st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=6, unique=True), st.data())
def test_exchanged_blocks_change_the_digest(algorithm: DigestAlgorithm, blocks: list[int], data: st.DataObject) -> None:
    first, second = data.draw(st.lists(st.sampled_from(range(len(blocks))), min_size=2, max_size=2, unique=True))
    exchanged = list(blocks)
    exchanged[first], exchanged[second] = blocks[second], blocks[first]
    assert combine(algorithm, exchanged) != combine(algorithm, blocks)


@pytest.mark.parametrize("algorithm", list(DigestAlgorithm))
@given(st.binary(min_size=1, max_size=64), st.data())
def test_a_flipped_bit_changes_a_block_digest(algorithm: DigestAlgorithm, content: bytes, data: st.DataObject) -> None:
    bit = data.draw(st.integers(0, len(content) * 8 - 1))
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    function = block_function(algorithm)
    assert function(flipped) != function(content)


@given(st.integers(0, 200_000), st.sampled_from([512, 4096]))
def test_a_sample_has_the_first_and_the_last_byte_and_stays_within(content_bytes: int, block_bytes: int) -> None:
    blocks = list(sampled_blocks(content_bytes, block_bytes))
    assert blocks == sorted(set(blocks))
    assert len(blocks) == min(SAMPLE_BLOCKS, -(-content_bytes // block_bytes))
    assert all(offset % block_bytes == 0 and 0 < length <= block_bytes for offset, length in blocks)
    if content_bytes:
        assert blocks[0][0] == 0
        assert sum(blocks[-1]) == content_bytes


@given(st.integers(0, SAMPLE_BLOCKS * 512))
def test_a_sample_of_a_small_tensor_is_all_of_it(content_bytes: int) -> None:
    assert sum(length for _, length in sampled_blocks(content_bytes, 512)) == content_bytes


def test_the_blocks_of_a_sample_are_evenly_spaced() -> None:
    offsets = [offset for offset, _ in sampled_blocks(1 << 30, 4096)]
    steps = [later - earlier for earlier, later in itertools.pairwise(offsets)]
    assert max(steps) - min(steps) <= 4096


def test_with_the_standard_library_only_crc32_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "_xxh3_64", None)
    monkeypatch.setattr(multilinear, "is_available", lambda: False)
    assert [algorithm for algorithm in DigestAlgorithm if is_available(algorithm)] == [DigestAlgorithm.CRC32]
    with pytest.raises(RuntimeError, match="xxhash"):
        block_function(DigestAlgorithm.XXH3_64)
    with pytest.raises(RuntimeError, match="NumPy"):
        block_function(DigestAlgorithm.MULTILINEAR_64)
