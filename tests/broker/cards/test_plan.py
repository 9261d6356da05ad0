"""What the plan of a transfer promises for any layout and any placement on both sides."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weight_broker.layout import ITEM_SIZES, Layout, TensorSpec
from weight_brokerd.cards.plan import pieces as plan
from weight_brokerd.cards.plan.blobs import Blob
from weight_brokerd.cards.plan.extents import MAXIMUM_EXTENTS, TooScattered, extents

KIB, MIB = 1 << 10, 1 << 20


def dense(name: str, size: int, **options: str) -> TensorSpec:
    return TensorSpec(name, "uint8", (size,), (1,), size, **options)  # type: ignore[arg-type]


def bytes_of(spec: TensorSpec) -> set[int]:
    """The offsets of a tensor's bytes, element by element."""
    offsets = [0]
    for size, step in zip(spec.shape, spec.stride, strict=True):
        offsets = [offset + index * step for index in range(size) for offset in offsets]
    item = ITEM_SIZES[spec.dtype]
    return {offset * item + byte for offset in offsets for byte in range(item)}


@st.composite
def gapped(draw: st.DrawFn) -> TensorSpec:
    """A tensor whose dimensions are in any order and have gaps between them."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    steps, step = [], 1
    for size in sizes:
        step *= draw(st.sampled_from([1, 1, 1, 2, 3]))
        steps.append(step)
        step *= size
    order = draw(st.permutations(range(len(sizes))))
    dtype = draw(st.sampled_from(["uint8", "bfloat16", "float32"]))
    span = 1 + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
    return TensorSpec(
        "t", dtype, tuple(sizes[i] for i in order), tuple(steps[i] for i in order), span * ITEM_SIZES[dtype]
    )


@given(gapped())
def test_the_extents_of_a_tensor_are_its_elements_and_no_byte_of_the_gaps(spec: TensorSpec) -> None:
    found = extents(spec)
    assert {byte for offset, size in found for byte in range(offset, offset + size)} == bytes_of(spec)
    assert found == sorted(found)
    assert sum(size for _, size in found) == spec.content_bytes


def test_aliases_and_tensors_without_elements_have_no_extents() -> None:
    assert extents(TensorSpec("e", "float32", (0, 4), (4, 1), 0)) == []
    assert extents(dense("b", 8, alias_of="a")) == []


def test_a_tensor_of_too_many_pieces_is_refused_by_name() -> None:
    rows = MAXIMUM_EXTENTS + 1
    with pytest.raises(TooScattered, match=r"'scattered'.*contiguous"):
        extents(TensorSpec("scattered", "uint8", (rows, 1), (2, 1), 2 * rows - 1))


Side = list[tuple[int, int]]


def placed(sizes: list[int], gaps: list[int], regions: int, order: list[int]) -> tuple[Side, list[int]]:
    """Placements one after the other in some order, with gaps; and the sizes of the regions."""
    ends = [0] * regions
    placements = [(0, 0)] * len(sizes)
    for turn, index in enumerate(order):
        region = turn * regions // len(order)
        ends[region] += gaps[index]
        placements[index] = (region, ends[region])
        ends[region] += sizes[index]
    return placements, ends


@st.composite
def two_sides(draw: st.DrawFn) -> tuple[Layout, Side, Side, list[int], list[int]]:
    number = draw(st.integers(1, 12))
    largest = draw(st.sampled_from([40, 3 * KIB, 70 * KIB, 300 * KIB, 1200 * KIB]))
    sizes = [draw(st.integers(1, largest)) for _ in range(number)]
    sides = []
    for _ in range(2):
        gaps = [draw(st.sampled_from([0, 0, 0, 512])) for _ in range(number)]
        order = draw(st.one_of(st.just(list(range(number))), st.permutations(range(number))))
        sides.append(placed(sizes, gaps, draw(st.integers(1, 3)), order))
    layout = Layout(dense(f"{index:03}", size) for index, size in enumerate(sizes))
    (source, source_ends), (destination, destination_ends) = sides
    return layout, source, destination, source_ends, destination_ends


def carry_out(rounds: list[plan.Round], source: list[bytearray], destination: list[bytearray]) -> None:
    """What the engine and the card processes do."""
    for sent, taken in rounds:
        for blob, other in zip(sent, taken, strict=True):
            assert blob.size == other.size
            buffer = b"".join(bytes(source[region][at : at + size]) for region, at, size in blob.parts)
            buffer += b"\xee" * (blob.size - len(buffer))
            at = 0
            for region, offset, size in other.parts:
                destination[region][offset : offset + size] = buffer[at : at + size]
                at += size


@settings(max_examples=60, deadline=None)
@given(two_sides())
def test_every_tensor_arrives_and_nothing_else_is_written(
    sides: tuple[Layout, Side, Side, list[int], list[int]],
) -> None:
    layout, source_at, destination_at, source_ends, destination_ends = sides
    generator = random.Random(5)
    source = [bytearray(generator.randbytes(end)) for end in source_ends]
    destination = [bytearray(b"\xaa" * end) for end in destination_ends]
    expected = [bytearray(region) for region in destination]
    for spec, (region, at), (to, to_at) in zip(layout, source_at, destination_at, strict=True):
        expected[to][to_at : to_at + spec.storage_bytes] = source[region][at : at + spec.storage_bytes]
    moved = plan.pieces(layout, source_at, destination_at)
    carry_out(plan.rounds(moved), source, destination)
    assert destination == expected
    assert sum(piece.size for piece in moved) == layout.content_bytes


def sizes_of_pieces(sizes: list[int]) -> list[plan.Piece]:
    """Pieces that touch nowhere."""
    found, at = [], 0
    for size in sizes:
        found.append(plan.Piece(0, at, 0, at, size))
        at += size + 512
    return found


def check_rounds(rounds: list[plan.Round], total: int) -> None:
    for sent, taken in rounds:
        assert [blob.size for blob in sent] == [blob.size for blob in taken]
        assert len(sent) <= plan.BLOBS_PER_ROUND + 1
        assert sum(blob.size for blob in sent) > plan.SMALLEST_AVERAGE * len(sent)
        packs = [blob for blob in sent if blob.is_packed]
        assert len(packs) <= 1, "more than one buffer at a time"
        assert all(plan.PADDED_BYTES <= pack.size <= plan.PACK_BYTES for pack in packs)
    assert sum(part.size for sent, _ in rounds for blob in sent for part in blob.parts) == total


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(st.integers(1, 200), st.integers(1, 200 * KIB), st.integers(1, 4 * MIB)), min_size=1, max_size=3000
    )
)
def test_the_blobs_of_a_round_are_more_than_a_mebibyte_on_average(sizes: list[int]) -> None:
    check_rounds(plan.rounds(sizes_of_pieces(sizes)), sum(sizes))


@pytest.mark.parametrize("sizes", [[7] * 5000, [900 * KIB] * 3000, [70 * KIB] * 5000 + [200 * MIB], [1] * 20_000])
def test_very_many_small_pieces_take_several_rounds_of_bounded_buffers(sizes: list[int]) -> None:
    check_rounds(plan.rounds(sizes_of_pieces(sizes)), sum(sizes))


def test_tensors_of_ordinary_sizes_are_moved_where_they_lie() -> None:
    (only,) = plan.rounds(sizes_of_pieces([600 * KIB, 3 * MIB, 5 * MIB] * 100))
    assert not any(blob.is_packed for blob in only.source)


def test_neighbours_on_both_sides_become_one_blob_and_tied_tensors_move_once() -> None:
    layout = Layout([dense("a", 2 * MIB), dense("b", 2 * MIB), dense("c", 2 * MIB, alias_of="a")])
    together = [(0, 0), (0, 2 * MIB), (0, 0)]
    assert plan.pieces(layout, together, together) == [plan.Piece(0, 0, 0, 0, 4 * MIB)]
    apart = [(0, 0), (1, 0), (0, 0)]
    assert [piece.size for piece in plan.pieces(layout, together, apart)] == [2 * MIB, 2 * MIB]


def test_views_of_one_memory_move_it_once() -> None:
    layout = Layout([dense("qkv", 3 * MIB), dense("q", MIB), dense("k", MIB)])
    side = [(0, MIB), (0, 0), (0, 0)]  # k, q, qkv
    assert plan.pieces(layout, side, side) == [plan.Piece(0, 0, 0, 0, 3 * MIB)]


def test_a_blob_that_is_not_its_only_part_goes_through_a_buffer() -> None:
    (only,) = plan.rounds(sizes_of_pieces([100]))
    (blob,) = only.source
    assert blob == Blob(plan.PADDED_BYTES, ((0, 0, 100),))  # type: ignore[arg-type]
    assert blob.is_packed
