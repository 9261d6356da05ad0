"""Which bytes a sample covers."""

from __future__ import annotations

import itertools

import pytest

from weight_broker.integrations.checkpoint.sample import (
    BLOCK_BYTES,
    STRIDE_BYTES,
    WHOLE_BYTES,
    sampled_ranges,
    table_lengths,
)

MATRIX = 64 << 20


def test_a_small_tensor_and_a_table_of_tokens_are_covered_whole() -> None:
    assert sampled_ranges("norm", (WHOLE_BYTES,), WHOLE_BYTES, ()) == [(0, WHOLE_BYTES)]
    assert sampled_ranges("embed_tokens.weight", (MATRIX >> 10, 1024), MATRIX, ()) == [(0, MATRIX)]
    assert sampled_ranges("weight", (MATRIX >> 10, 1024), MATRIX, {MATRIX >> 10}) == [(0, MATRIX)]


def test_no_stretch_of_a_matrix_as_long_as_the_stride_is_left_out() -> None:
    ranges = sampled_ranges("up_proj", (MATRIX >> 10, 1024), MATRIX, ())
    assert ranges[0] == (0, BLOCK_BYTES)
    assert ranges[-1] == (MATRIX - BLOCK_BYTES, BLOCK_BYTES)
    assert all(later - earlier <= STRIDE_BYTES for (earlier, _), (later, _) in itertools.pairwise(ranges))
    assert sum(length for _, length in ranges) * 200 < MATRIX


@pytest.mark.parametrize("shape", [(64, 1024, 1024), (16, 4, 1024, 1024), (1 << 14, 2, 2048)])
def test_a_block_of_each_matrix_of_a_stack_is_covered(shape: tuple[int, ...]) -> None:
    size = shape[-1] * shape[-2]
    ranges = sampled_ranges("experts", shape, MATRIX, ())
    for begin in range(0, MATRIX, size):
        assert any(begin <= offset < begin + size or offset <= begin < offset + length for offset, length in ranges)


def test_every_length_of_a_table_is_found_in_a_configuration() -> None:
    configuration = {"vocab_size": 7, "text_config": {"vocab_size": 9}, "parts": [{"padded_vocab_size": 11}], "size": 5}
    assert table_lengths(configuration) == {7, 9, 11}
