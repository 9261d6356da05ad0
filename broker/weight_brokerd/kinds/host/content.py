"""Checks published host memory against its digests.

The memory is read with pread(2) and never mapped, so that no memfd can end the broker by a signal. One thread reads, a
bounded part at a time: checks that run together take turns, and the event loop goes on.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from weight_broker.digest import ContentDigests, DigestCoverage, block_function, combine, is_available, sampled_blocks
from weight_broker.layout import Layout
from weight_broker.v1.weight_broker_service_pb2 import Granted
from weight_broker.wire import digests_from_wire
from weight_brokerd.core.model import Finding
from weight_brokerd.kinds.kind import ContentCheck

STEP_BYTES = 64 << 20
"""As much is read before another check has its turn."""
LARGEST_BLOCK_BYTES = 16 << 20
"""A digest over larger blocks would take too much of the broker's memory."""
_NAMED_TENSORS = 16


class Content:
    """One published content: where each tensor lies, and its digests."""

    def __init__(self, layout: Layout, place: bytes, digests: bytes, descriptors: Sequence[int]) -> None:
        """`place` and `digests` are serialized Granted. The descriptors stay the caller's."""
        granted = Granted.FromString(place + digests)
        self._tensors = [
            (spec.name, descriptors[placement.region_index] if size else -1, placement.offset_bytes, size)
            for spec, size, placement in zip(layout.tensors, layout.content_sizes, granted.placements, strict=True)
        ]
        offered = digests_from_wire(granted.digests, len(layout))
        self._sets = [digests for digests in offered if _is_computable(digests)]
        self._differing: dict[str, None] = {}
        self._steps = self._run()

    def step(self) -> bool:
        """Reads a bounded part; False once everything was read. Called in a thread."""
        return next(self._steps, None) is not None

    @property
    def result(self) -> ContentCheck:
        """What the steps have found."""
        if not self._sets:
            return ContentCheck(Finding.UNCHECKED, "the broker can compute none of the digests: install xxhash for it")
        if not self._differing:
            return ContentCheck(Finding.INTACT, "the content has its digests")
        names = list(self._differing)
        more = f" and {len(names) - _NAMED_TENSORS} more" if len(names) > _NAMED_TENSORS else ""
        shown = ", ".join(names[:_NAMED_TENSORS]) + more
        return ContentCheck(Finding.DAMAGED, f"the content differs from its digests in tensors {shown}")

    def _run(self) -> Iterator[int]:
        for digests in self._sets:
            unyielded = 0
            for (name, descriptor, offset, size), expected in zip(self._tensors, digests.values, strict=True):
                blocks: list[int] = []
                for digest, length in _digests_of_blocks(digests, descriptor, offset, size):
                    blocks.append(digest)
                    unyielded += length
                    if unyielded >= STEP_BYTES:
                        unyielded = 0
                        yield 1
                if size and combine(digests.algorithm, blocks) != expected:
                    self._differing[name] = None


class ContentReader:
    """Reads one content after the other, in steps."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="check-content")

    async def check(self, content: Content) -> ContentCheck:
        """Reads everything. No step runs any more when this returns or raises."""
        loop = asyncio.get_running_loop()
        while True:
            step = loop.run_in_executor(self._thread, content.step)
            try:
                if not await asyncio.shield(step):
                    return content.result
            except asyncio.CancelledError:
                step.cancel()
                await asyncio.wait({step})
                raise

    async def close(self) -> None:
        """Waits for the step that runs."""
        await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)


def _is_computable(digests: ContentDigests) -> bool:
    return is_available(digests.algorithm) and digests.block_bytes <= LARGEST_BLOCK_BYTES


def _digests_of_blocks(digests: ContentDigests, descriptor: int, start: int, size: int) -> Iterator[tuple[int, int]]:
    """The digest and the length of each covered block of a tensor; short where the memory ends."""
    function = block_function(digests.algorithm)
    for offset, length in _covered(digests, size):
        content = os.pread(descriptor, length, start + offset)
        yield function(content), length
        time.sleep(0)  # small blocks keep the interpreter lock: let the event loop have it


def _covered(digests: ContentDigests, size: int) -> Iterator[tuple[int, int]]:
    if digests.coverage is DigestCoverage.SAMPLED:
        return sampled_blocks(size, digests.block_bytes)
    step = digests.block_bytes
    return ((offset, min(step, size - offset)) for offset in range(0, size, step))
