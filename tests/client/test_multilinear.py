"""MULTILINEAR_64: its values, pinned; the same by NumPy and by torch; and what it catches."""

from __future__ import annotations

import ctypes
import struct
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weight_broker import multilinear
from weight_broker.digest import FULL_BLOCK_BYTES, DigestAlgorithm, combine
from weight_broker.memory.device.digest import SCRATCH_BYTES, TorchDigester
from weight_broker.memory.kind import DeadlinePassed

LENGTHS = st.one_of(st.integers(1, 40), st.integers(4090, 4100), st.sampled_from([65535, 65536, FULL_BLOCK_BYTES]))
WORDS = FULL_BLOCK_BYTES // 4
PINNED_MULTIPLIERS = [0x25621963B9A94291, 0xE36090E0D1B0A009, 0xD8F442A53D62B35D]
PINNED_DIGEST = 0x72F75513BAB5C4EE


def by_the_definition(content: bytes) -> int:
    """Word by word, as the module's text says."""
    padded = content + bytes(-len(content) % 4)
    words = struct.unpack(f"<{len(padded) // 4}I", padded)
    total: int = len(content) * multilinear.multiplier(0)
    total += sum(word * multilinear.multiplier(index) for index, word in enumerate(words, 1))
    return total % 2**64


def by_torch(*contents: bytes) -> list[int]:
    buffers = [ctypes.create_string_buffer(content, max(len(content), 1)) for content in contents]
    blocks = [(ctypes.addressof(buffer), len(content)) for buffer, content in zip(buffers, contents, strict=True)]
    return TorchDigester("cpu", ctypes.memmove, lambda: None).block_digests(blocks, None)


def random_bytes(length: int, seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(length)


def test_the_values_are_those_that_other_implementations_have() -> None:
    assert [multilinear.multiplier(index) for index in range(3)] == PINNED_MULTIPLIERS
    assert multilinear.digest(b"") == 0
    assert multilinear.digest(b"\x01\0\0\0") == (4 * PINNED_MULTIPLIERS[0] + PINNED_MULTIPLIERS[1]) % 2**64
    assert multilinear.digest(b"weights") == by_the_definition(b"weights") == PINNED_DIGEST


@given(LENGTHS, st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_numpy_and_torch_compute_the_definition(length: int, seed: int) -> None:
    content = random_bytes(length, seed)
    assert multilinear.digest(content) == by_the_definition(content)
    assert by_torch(content) == [by_the_definition(content)]


def test_torch_digests_blocks_of_all_lengths_at_once_in_their_order() -> None:
    lengths = [1, FULL_BLOCK_BYTES, 4096, 4097, 65537, 3, 65536, FULL_BLOCK_BYTES - 1, *range(4000, 4010)]
    lengths += [FULL_BLOCK_BYTES] * (SCRATCH_BYTES // FULL_BLOCK_BYTES + 1)  # more than one filling of the scratch
    contents = [random_bytes(length, seed) for seed, length in enumerate(lengths)]
    assert by_torch(*contents) == [multilinear.digest(content) for content in contents]
    assert by_torch() == []


def test_torch_takes_a_block_at_an_odd_address() -> None:
    content = random_bytes(1000, 1)
    buffer = ctypes.create_string_buffer(b"x" + content, 1001)
    engine = TorchDigester("cpu", ctypes.memmove, lambda: None)
    assert engine.block_digests([(ctypes.addressof(buffer) + 1, 1000)], None) == [multilinear.digest(content)]


def test_torch_stops_at_the_deadline() -> None:
    with pytest.raises(DeadlinePassed):
        TorchDigester("cpu", ctypes.memmove, lambda: None).block_digests([(1, 1)], time.monotonic())


# ---- what it catches
@given(LENGTHS, st.data())
@settings(max_examples=50, deadline=None)
def test_a_flipped_bit_is_caught(length: int, data: st.DataObject) -> None:
    content = bytearray(random_bytes(length, length))
    digest = multilinear.digest(content)
    bit = data.draw(st.integers(0, length * 8 - 1))
    content[bit // 8] ^= 1 << bit % 8
    assert multilinear.digest(content) != digest


@given(st.lists(st.integers(0, WORDS - 1), min_size=2, max_size=2, unique=True), st.integers(0, 31), st.booleans())
@settings(deadline=None)
def test_the_same_bit_flipped_in_two_words_is_caught_the_sign_bit_too(
    places: list[int], bit: int, from_zero: bool
) -> None:
    words = np.zeros(WORDS, np.uint32) if from_zero else np.arange(WORDS, dtype=np.uint32) * np.uint32(2654435761)
    digest = multilinear.digest(words.tobytes())
    words[places] ^= np.uint32(1 << bit)
    assert multilinear.digest(words.tobytes()) != digest


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_negating_two_numbers_is_caught_for_every_pair_of_places(dtype: type[np.floating]) -> None:
    numbers = np.arange(1, 49).astype(dtype)
    digests = {multilinear.digest(numbers.tobytes())}
    for first in range(len(numbers)):
        for second in range(first):
            changed = numbers.copy()
            changed[[first, second]] *= -1
            digests.add(multilinear.digest(changed.tobytes()))
    assert len(digests) == 1 + 48 * 47 // 2


@given(st.lists(st.integers(0, WORDS - 1), min_size=2, max_size=2, unique=True))
@settings(deadline=None)
def test_exchanged_words_are_caught(places: list[int]) -> None:
    words = np.arange(1, WORDS + 1, dtype=np.uint32)
    digest = multilinear.digest(words.tobytes())
    words[places] = words[places[::-1]]
    assert multilinear.digest(words.tobytes()) != digest


@given(st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=9, unique=True), st.data())
def test_exchanged_blocks_are_caught(blocks: list[int], data: st.DataObject) -> None:
    first, second = data.draw(st.permutations(range(len(blocks))))[:2]
    exchanged = list(blocks)
    exchanged[first], exchanged[second] = blocks[second], blocks[first]
    algorithm = DigestAlgorithm.MULTILINEAR_64
    assert combine(algorithm, exchanged) != combine(algorithm, blocks)


@given(st.binary(max_size=70), st.integers(1, 8))
def test_zero_bytes_at_the_end_count(content: bytes, zeros: int) -> None:
    assert multilinear.digest(content + bytes(zeros)) != multilinear.digest(content)


@given(st.integers(1, 2000), st.integers(1, 64))
@settings(deadline=None)
def test_content_that_arrives_shifted_is_caught(length: int, shift: int) -> None:
    content = random_bytes(length, length)
    assert multilinear.digest(bytes(shift) + content) != multilinear.digest(content + bytes(shift))
