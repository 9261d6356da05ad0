"""The check of published host memory: what it finds, and that checks take turns."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator

import pytest

from weight_broker.digest import (
    ContentDigests,
    DigestAlgorithm,
    DigestCoverage,
    block_function,
    combine,
    is_available,
    sampled_blocks,
)
from weight_broker.layout import Layout, TensorSpec
from weight_broker.v1.weight_broker_service_pb2 import Granted
from weight_broker.v1.weight_set_pb2 import TensorPlacement
from weight_broker.wire import digests_to_wire
from weight_brokerd.core.model import Finding
from weight_brokerd.kinds.host.content import LARGEST_BLOCK_BYTES, Content, ContentReader
from weight_brokerd.kinds.kind import ContentCheck

SIZE = 200_000
LAYOUT = Layout(
    [
        TensorSpec("a", "int8", (SIZE,), (1,), SIZE),
        TensorSpec("b", "int8", (0,), (1,), 0),
        TensorSpec("c", "int8", (100,), (1,), 100),
        TensorSpec("d", "int8", (SIZE,), (1,), SIZE, alias_of="a"),
    ]
)
PLACE = Granted(placements=[TensorPlacement(offset_bytes=offset) for offset in (128, 0, 0, 128)]).SerializeToString()
BYTES = bytes(range(256)) * (SIZE // 256 + 1)


@pytest.fixture
def memory() -> Iterator[int]:
    descriptor = os.memfd_create("content")
    os.write(descriptor, BYTES[:100])
    os.pwrite(descriptor, BYTES[:SIZE], 128)
    yield descriptor
    os.close(descriptor)


def blocks(size: int, coverage: DigestCoverage, block_bytes: int) -> list[tuple[int, int]]:
    if coverage is DigestCoverage.SAMPLED:
        return list(sampled_blocks(size, block_bytes))
    return [(offset, min(block_bytes, size - offset)) for offset in range(0, size, block_bytes)]


def digest_set(algorithm: DigestAlgorithm, coverage: DigestCoverage, block_bytes: int = 4096) -> ContentDigests:
    function = block_function(algorithm)
    values = [
        combine(
            algorithm,
            [function(BYTES[start : start + length]) for start, length in blocks(size, coverage, block_bytes)],
        )
        if size
        else 0
        for size in LAYOUT.content_sizes
    ]
    return ContentDigests(algorithm, coverage, block_bytes, tuple(values))


def check(descriptor: int, *sets: ContentDigests) -> ContentCheck:
    digests = Granted(digests=[digests_to_wire(one) for one in sets]).SerializeToString()
    content = Content(LAYOUT, PLACE, digests, [descriptor])
    while content.step():
        pass
    return content.result


every_algorithm = pytest.mark.parametrize("algorithm", [one for one in DigestAlgorithm if is_available(one)])


@every_algorithm
@pytest.mark.parametrize("coverage", DigestCoverage)
def test_content_that_has_its_digests_is_intact(
    memory: int, algorithm: DigestAlgorithm, coverage: DigestCoverage
) -> None:
    assert check(memory, digest_set(algorithm, coverage)).finding is Finding.INTACT


@every_algorithm
def test_a_changed_byte_is_found_and_its_tensor_named(memory: int, algorithm: DigestAlgorithm) -> None:
    os.pwrite(memory, b"\xff\xfe", 128 + SIZE // 2)
    found = check(memory, digest_set(algorithm, DigestCoverage.FULL))
    assert found.finding is Finding.DAMAGED
    assert found.detail.endswith("in tensors a")


def test_one_of_several_sets_that_differs_is_enough(memory: int) -> None:
    right = digest_set(DigestAlgorithm.CRC32, DigestCoverage.FULL)
    wrong = ContentDigests(right.algorithm, right.coverage, right.block_bytes, (1, 0, right.values[2], 0))
    assert check(memory, right, wrong).finding is Finding.DAMAGED


def test_memory_that_ends_early_is_damaged(memory: int) -> None:
    os.ftruncate(memory, 1000)
    assert check(memory, digest_set(DigestAlgorithm.CRC32, DigestCoverage.FULL)).finding is Finding.DAMAGED


def test_digests_over_blocks_that_are_too_large_for_the_broker_are_not_computed(memory: int) -> None:
    digests = digest_set(DigestAlgorithm.CRC32, DigestCoverage.FULL, 2 * LARGEST_BLOCK_BYTES)
    assert check(memory, digests).finding is Finding.UNCHECKED


def reader_of(steps: dict[str, int], seen: list[str]) -> Callable[[str], Content]:
    class Scripted(Content):
        def __init__(self, name: str) -> None:
            self.name = name

        def step(self) -> bool:
            seen.append(self.name)
            steps[self.name] -= 1
            return steps[self.name] > 0

        @property
        def result(self) -> ContentCheck:
            return ContentCheck(Finding.INTACT, self.name)

    return Scripted


def test_a_large_content_does_not_keep_a_small_one_waiting() -> None:
    seen: list[str] = []
    make = reader_of({"large": 1000, "small": 2}, seen)

    async def run() -> str:
        reader = ContentReader()
        large = asyncio.create_task(reader.check(make("large")))
        small = asyncio.create_task(reader.check(make("small")))
        done, _ = await asyncio.wait({large, small}, return_when=asyncio.FIRST_COMPLETED)
        large.cancel()
        await asyncio.wait({large})
        await reader.close()
        return done.pop().result().detail

    assert asyncio.run(run()) == "small"
    assert "small" in seen[:4], "they take turns"


def test_a_check_that_is_cancelled_reads_no_more_once_it_has_ended() -> None:
    seen: list[str] = []
    make = reader_of({"endless": 1 << 60}, seen)

    async def run() -> None:
        reader = ContentReader()
        task = asyncio.create_task(reader.check(make("endless")))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait({task})
        read = len(seen)
        await asyncio.sleep(0.02)
        assert len(seen) == read
        await reader.close()

    asyncio.run(run())
