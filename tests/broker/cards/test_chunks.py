"""What the plan of a staged transfer promises, and that instances and the broker cut the content at the same places."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weight_broker.layout import Layout, TensorSpec
from weight_broker.memory.device.tensor import DeviceTensor
from weight_broker.memory.npu import stage as npu_stage
from weight_broker.memory.npu.kind import describe_device
from weight_broker.memory.npu.stage import NpuStagedTensors
from weight_brokerd.cards.plan import chunks as staging_plan
from weight_brokerd.cards.plan import pieces as plan
from weight_brokerd.cards.plan.chunks import GRANULARITY_BYTES, Chunk, DirectContent

SIZES = st.integers(1, 5 * GRANULARITY_BYTES)


@given(SIZES, st.integers(1 << 20, 64 << 20))
def test_the_chunks_are_the_content_in_turn_through_both_halves(content: int, staging: int) -> None:
    half = staging_plan.half_bytes(content, staging)
    assert half % GRANULARITY_BYTES == 0
    assert 2 * half <= max(staging, 2 * GRANULARITY_BYTES)
    found = staging_plan.chunks(content, half)
    at = 0
    for index, chunk in enumerate(found):
        assert chunk.content_offset == at
        assert chunk.buffer_offset == index % 2 * half
        assert 0 < chunk.size <= half
        at += chunk.size
    assert at == content
    for chunk in found:
        assert plan.SMALLEST_AVERAGE < chunk.blob_bytes <= half, "the engine would merge it, or it leaves its half"


def test_a_staging_buffer_is_no_larger_than_what_goes_through_it() -> None:
    assert staging_plan.half_bytes(1000, 64 << 20) == GRANULARITY_BYTES
    assert staging_plan.half_bytes(1 << 30, 64 << 20) == 32 << 20


@st.composite
def tensors(draw: st.DrawFn) -> list[TensorSpec]:
    sizes = draw(st.lists(st.integers(0, 50), min_size=1, max_size=12))
    return [TensorSpec(f"{index:03}", "uint8", (size,), (1,), size) for index, size in enumerate(sizes)]


@given(tensors(), st.integers(1, 60), st.data())
def test_both_ends_take_the_same_bytes_for_a_chunk(specs: list[TensorSpec], half: int, data: st.DataObject) -> None:
    layout = Layout(specs)
    starts = [1000 * (index + 1) for index in range(len(specs))]
    order = data.draw(st.permutations(starts))
    content = DirectContent(layout, [(0, at) for at in order])
    described = describe_device(
        {
            spec.name: DeviceTensor(at if spec.storage_bytes else 0, "uint8", spec.shape, (1,), spec.storage_bytes, 0)
            for spec, at in zip(specs, order, strict=True)
        }
    )
    mine = NpuStagedTensors(described, acl=object())  # type: ignore[arg-type]  # nothing is copied here
    seen: list[int] = []
    for chunk in staging_plan.chunks(layout.content_bytes, half):
        parts = content.parts(chunk)
        assert [(part.offset, part.size) for part in parts] == mine.spans(chunk.content_offset, chunk.size)
        assert sum(part.size for part in parts) == chunk.size
        blobs = staging_plan.like(parts, chunk)
        assert [blob.size for blob in blobs] == [part.size for part in parts]
        assert blobs[0].parts[0].offset == chunk.buffer_offset
        seen += [byte for part in parts for byte in range(part.offset, part.offset + part.size)]
    expected = [at + byte for spec, at in zip(specs, order, strict=True) for byte in range(spec.storage_bytes)]
    assert seen == expected


def test_what_is_not_within_the_bucket_or_the_content_is_not_copied() -> None:
    described = describe_device({"a": DeviceTensor(4096, "uint8", (10,), (1,), 10, 0)})
    mine = NpuStagedTensors(described, acl=object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="within the content of 10 bytes"):
        mine.copy("bucket", 0, 8, 3, to_bucket=True)
    with pytest.raises(ValueError, match="not within a bucket that is open"):
        mine.copy("bucket", 0, 8, 2, to_bucket=True)
    assert len(npu_stage.BUCKETS) == 0


def test_a_blob_that_the_engine_would_not_like_is_padded_within_its_half() -> None:
    chunk = Chunk(0, GRANULARITY_BYTES, 5)
    blob = staging_plan.buffer_blob(chunk)
    assert not blob.is_packed
    assert blob.parts[0].offset + blob.size <= 2 * GRANULARITY_BYTES
