"""Host memory that an acquisition fills: the caller's tensors, or mappings that become tensors."""

from __future__ import annotations

import contextlib
import importlib
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from weight_broker.digest import ContentDigests, DigestCoverage
from weight_broker.errors import AcquireTimeout, BrokerError, IntegrityError, InvalidArgument
from weight_broker.kinds import MemoryKind
from weight_broker.layout import Layout
from weight_broker.memory.described import DescribedTensors
from weight_broker.memory.digest_mode import DigestMode
from weight_broker.memory.host import copying
from weight_broker.memory.host.address_space import Mapping
from weight_broker.memory.host.export import SharedWeights
from weight_broker.memory.host.fill import choose_digests, copy_in
from weight_broker.memory.host.view import Framework, map_tensors
from weight_broker.memory.kind import ClaimRegion, DeadlinePassed, Received

if TYPE_CHECKING:
    from weight_broker.connection.session import Session
    from weight_broker.v1 import weight_broker_service_pb2 as pb

_NAMED_TENSORS = 16


class HostDestination(ABC):
    """Takes the bytes from the source's memory in this process, while the transfer holds the source."""

    layout: Layout | None = None
    grace_seconds = 0.0
    _source: SharedWeights | None = None

    def fill_request(self, request: pb.AcquireRequest, session: Session, deadline: float) -> None:
        """Names no memory: the broker writes to none."""
        from weight_broker.v1 import resources_pb2
        from weight_broker.wire import device_kind_to_wire

        request.device_kind, request.path = device_kind_to_wire(MemoryKind.CPU), resources_pb2.TRANSFER_PATH_COPY

    def take(self, granted: pb.Granted, claim: ClaimRegion, deadline: float) -> Received:
        """Opens the source's memory for `receive`."""
        self.close()
        begun = time.monotonic()
        try:
            self._source = open_source(granted, claim, self.layout)
            opened = time.monotonic() - begun
            received = self.receive(self._source, deadline)
        except BaseException:
            self.close()
            raise
        received.seconds["map"] = received.seconds.get("map", 0.0) + opened
        return received

    @abstractmethod
    def receive(self, source: SharedWeights, deadline: float) -> Received:
        """Takes everything from `source`. Raises a `BrokerError` that says whether anything was touched."""

    def verify(self, granted: pb.Granted, moved: pb.Moved, deadline: float) -> Received:
        """The broker moves no host memory."""
        raise BrokerError("the broker moved host memory, which the receiver copies; report its log")

    def stop(self) -> bool:
        """Nothing writes after `take` has returned or raised."""
        return True

    def keep(self) -> SharedWeights:
        """The source's memory, which is sealed: it can be published unchanged."""
        source, self._source = self._source, None
        if source is None:
            raise AssertionError("nothing arrived here")
        return source

    def close(self) -> None:
        """Close the source's memory."""
        source, self._source = self._source, None
        if source is not None:
            source.close()

    def abandon(self) -> None:
        """Only this process writes to the tensors: nothing is left."""
        self.close()


class TensorFiller(HostDestination):
    """Copies into tensors that the caller owns, and verifies."""

    def __init__(self, described: DescribedTensors, digest_mode: DigestMode) -> None:
        self._described = described
        self._digest_mode = digest_mode
        self.layout = described.layout

    def receive(self, source: SharedWeights, deadline: float) -> Received:
        try:
            copied = copy_in(
                self._described,
                source.descriptors,
                source.placements,
                source.digests,
                digest_mode=self._digest_mode,
                deadline=deadline,
            )
        except BrokerError:
            raise
        except Exception as error:  # the caller must learn that the tensors may be half written
            raise BrokerError(f"taking the bytes from the source failed: {error}", touched=True) from error
        return Received(copied.size_bytes, copied.verified, source.layout, dict(copied.seconds))


class TensorMapper(HostDestination):
    """Maps the resident memory copy-on-write, and verifies a sample: this path avoids reading every byte, and the
    memory is sealed since its digests were computed. Digest mode "full" reads every byte nevertheless."""

    def __init__(self, framework: Framework, digest_mode: DigestMode) -> None:
        self._framework = framework
        self._digest_mode = DigestMode.FULL if digest_mode is DigestMode.FULL else DigestMode.SAMPLED

    def fill_request(self, request: pb.AcquireRequest, session: Session, deadline: float) -> None:
        """The source's memory becomes this process's tensors. Raises `InvalidArgument` without their framework, before
        the broker is asked for anything."""
        from weight_broker.v1 import resources_pb2

        _import(self._framework)
        super().fill_request(request, session, deadline)
        request.path = resources_pb2.TRANSFER_PATH_ZERO_COPY

    def receive(self, source: SharedWeights, deadline: float) -> Received:
        begun = time.monotonic()
        try:
            tensors = map_tensors(source.layout, source.descriptors, source.placements, framework=self._framework)
            mapped = time.monotonic()
            verified = self._verify(source, deadline)
        except BrokerError:
            raise
        except Exception as error:
            raise BrokerError(f"taking the bytes from the source failed: {error}") from error
        seconds = {"map": mapped - begun, "verify": time.monotonic() - mapped}
        return Received(source.layout.content_bytes, verified, source.layout, seconds, tensors, touched=False)

    def _verify(self, source: SharedWeights, deadline: float) -> DigestCoverage:
        with mapped_contents(source) as contents:
            return verify_contents(source, contents, self._digest_mode, deadline)


def _import(framework: Framework) -> None:
    try:
        importlib.import_module(framework)
    except ImportError as error:
        other = "numpy" if framework == "torch" else "torch"
        expected = f"the name of an installed package ({error})"
        raise InvalidArgument("framework", framework, expected, hint=f"Install {framework}, or use {other}.") from error


@contextlib.contextmanager
def mapped_contents(source: SharedWeights) -> Iterator[list[copying.Content]]:
    """The content of each tensor, mapped for the length of a block."""
    with ExitStack() as mappings:
        addresses = [
            mappings.enter_context(Mapping(descriptor, size_bytes)).address for descriptor, size_bytes in source.memfds
        ]
        yield [
            (addresses[region] + offset, spec.content_bytes) if spec.content_bytes else (0, 0)
            for spec, (region, offset) in zip(source.layout.tensors, source.placements, strict=True)
        ]


def verify_contents(
    source: SharedWeights, contents: Sequence[copying.Content], digest_mode: DigestMode, deadline: float
) -> DigestCoverage:
    """Compare mapped contents with what was published. Raises `IntegrityError`, `TransferFailed`, `AcquireTimeout`."""
    expected = choose_digests(source.digests, digest_mode, len(source.layout))
    found = _digests_of(contents, expected, deadline)
    _compare(source.layout, found, expected)
    return expected.coverage


def open_source(granted: pb.Granted, claim: ClaimRegion, layout: Layout | None) -> SharedWeights:
    """The source's memory. Touches nothing."""
    from weight_broker.wire import digests_from_wire, layout_from_wire

    for region in granted.regions:
        if region.WhichOneof("handle") != "host_memory":
            raise BrokerError(f"region {region.region_id!r} is not host memory; this client maps host memory only")
    if layout is None:
        layout = layout_from_wire(granted.layout)
    digests = digests_from_wire(granted.digests, len(layout), pass_over_unknown=True)
    placements = tuple((placement.region_index, placement.offset_bytes) for placement in granted.placements)
    with contextlib.ExitStack() as undo:
        source = SharedWeights(layout, [], placements, digests)
        undo.callback(source.close)
        for index, region in enumerate(granted.regions):
            source.memfds.append((claim(index), region.size_bytes))
        undo.pop_all()
    return source


def _compare(layout: Layout, found: Sequence[int], expected: ContentDigests) -> None:
    wrong = [
        spec.name
        for spec, digest, published in zip(layout.tensors, found, expected.values, strict=True)
        if digest != published
    ]
    if wrong:
        names = ", ".join(wrong[:_NAMED_TENSORS])
        raise IntegrityError(
            f"{len(wrong)} resident tensors are not what was published: {names}", metadata={"tensors": names}
        )


def _digests_of(contents: Sequence[tuple[int, int]], like: ContentDigests, deadline: float) -> list[int]:
    try:
        if like.coverage is DigestCoverage.SAMPLED:
            return copying.digest_samples(contents, like.algorithm, like.block_bytes, deadline=deadline)
        return copying.digest_all(contents, like.algorithm, like.block_bytes, deadline=deadline)
    except DeadlinePassed as error:
        raise AcquireTimeout("the deadline passed while the mapped tensors were being verified") from error
