"""What receives a weight set in this process: tensors that are filled, or mappings that become tensors."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from weight_broker.digest import ContentDigests, DigestCoverage
from weight_broker.errors import AcquireTimeout, IntegrityError, TransferFailed
from weight_broker.layout import Layout
from weight_broker.memory.digest_mode import DigestMode
from weight_broker.memory.host import copying
from weight_broker.memory.host.address_space import Mapping
from weight_broker.memory.host.fill import copy_in
from weight_broker.memory.host.view import Framework, map_tensors
from weight_broker.memory.shared import SharedWeights
from weight_broker.memory.tensors import DescribedTensors

_NAMED_TENSORS = 16


@dataclass(frozen=True, slots=True)
class Received:
    """Every byte of a transfer is in place."""

    size_bytes: int
    verified: DigestCoverage
    seconds: dict[str, float]
    """Seconds of the phases map, transfer and verify."""
    tensors: dict[str, Any] = field(default_factory=dict)
    """The mapped tensors, if the receiver had none of its own."""


class Receiver(Protocol):
    """The receiving side of an acquisition."""

    @property
    def zero_copy(self) -> bool:
        """True if the resident memory is mapped instead of copied."""

    @property
    def layout(self) -> Layout | None:
        """The layout that a source must have; None to accept any."""

    def receive(self, source: SharedWeights, deadline: float) -> Received:
        """Takes everything from `source` before `deadline` (monotonic seconds), or raises a `BrokerError` that says
        whether anything was touched. Nothing writes to the tensors any more when it returns or raises."""


class TensorFiller:
    """Copies into tensors that the caller owns, and verifies."""

    zero_copy = False

    def __init__(self, described: DescribedTensors, digest_mode: DigestMode) -> None:
        self._described = described
        self._digest_mode = digest_mode
        self.layout: Layout | None = described.layout

    def receive(self, source: SharedWeights, deadline: float) -> Received:
        """Fills the tensors."""
        copied = copy_in(
            self._described,
            source.descriptors,
            source.placements,
            source.digests,
            digest_mode=self._digest_mode,
            deadline=deadline,
        )
        return Received(copied.size_bytes, copied.verified, copied.seconds)


class TensorMapper:
    """Maps the resident memory copy-on-write, and verifies a sample: reading every byte is what this path avoids, and
    the memory is sealed since its digests were computed. Digest mode "full" reads every byte all the same."""

    zero_copy = True
    layout: Layout | None = None

    def __init__(self, framework: Framework, digest_mode: DigestMode) -> None:
        self._framework = framework
        self._digest_mode = DigestMode.FULL if digest_mode is DigestMode.FULL else DigestMode.SAMPLED

    def receive(self, source: SharedWeights, deadline: float) -> Received:
        """Maps the tensors."""
        begun = time.monotonic()
        tensors = map_tensors(source.layout, source.descriptors, source.placements, framework=self._framework)
        mapped = time.monotonic()
        verified = self._verify(source, deadline)
        seconds = {"map": mapped - begun, "verify": time.monotonic() - mapped}
        return Received(source.layout.content_bytes, verified, seconds, tensors)

    def _verify(self, source: SharedWeights, deadline: float) -> DigestCoverage:
        expected = self._digest_mode.choose(source.digests)
        if expected is None:
            raise TransferFailed(f"the source has no digests that digest mode {self._digest_mode} can verify with here")
        with ExitStack() as mappings:
            addresses = [
                mappings.enter_context(Mapping(descriptor, size_bytes)).address
                for descriptor, size_bytes in source.memfds
            ]
            contents = [
                (addresses[region] + offset, spec.content_bytes) if spec.content_bytes else (0, 0)
                for spec, (region, offset) in zip(source.layout.tensors, source.placements, strict=True)
            ]
            found = _digests_of(contents, expected, deadline)
        wrong = [
            spec.name
            for spec, mine, theirs in zip(source.layout.tensors, found, expected.values, strict=True)
            if mine != theirs
        ]
        if wrong:
            names = ", ".join(wrong[:_NAMED_TENSORS])
            raise IntegrityError(
                f"{len(wrong)} resident tensors are not what was published: {names}", metadata={"tensors": names}
            )
        return expected.coverage


def _digests_of(contents: Sequence[tuple[int, int]], like: ContentDigests, deadline: float) -> list[int]:
    try:
        if like.coverage is DigestCoverage.SAMPLED:
            return copying.digest_samples(contents, like.algorithm, like.block_bytes, deadline=deadline)
        found = [0] * len(contents)

        def digest(index: int) -> None:
            found[index] = copying.digest_full(*contents[index], like.algorithm, like.block_bytes)

        copying.run([partial(digest, index) for index in range(len(contents))], deadline=deadline)
        return found
    except copying.DeadlinePassed as error:
        raise AcquireTimeout("the deadline passed while the mapped tensors were being verified") from error
