"""What this process can do with tensors in one kind of memory. Each kind is a folder beside this file.

To add one: a row in `weight_broker.kinds.TRAITS`, a folder with a module that has a `KIND`, and a row in `MODULES`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from weight_broker.connection import room
from weight_broker.digest import ContentDigests, DigestCoverage
from weight_broker.errors import InvalidArgument
from weight_broker.kinds import MemoryKind
from weight_broker.layout import Layout
from weight_broker.memory.described import DescribedTensors
from weight_broker.memory.digest_mode import DigestMode
from weight_broker.memory.policy import StagingPolicy

if TYPE_CHECKING:
    from weight_broker.connection.attach import AttachConnection
    from weight_broker.connection.session import Session
    from weight_broker.v1 import resources_pb2
    from weight_broker.v1 import weight_broker_service_pb2 as service_pb
    from weight_broker.v1 import weight_set_pb2 as pb

ClaimRegion = Callable[[int], int]
"""Opens a region of the granted source, by its index; the descriptor is the caller's. Raises `BrokerError`."""
Described = TypeVar("Described", bound=DescribedTensors)


class DeadlinePassed(Exception):
    """The deadline came before all of the content was read."""


@dataclass(frozen=True, slots=True)
class Terms:
    """The caller's options, the same for all of its memory."""

    digest_mode: DigestMode = DigestMode.AUTO
    staging: StagingPolicy = StagingPolicy.AUTO


class Prepared(Protocol):
    """Host memory that is allocated in advance."""

    def take(self) -> int | None:
        """Its descriptor, which the caller then owns; None if there is none."""


@dataclass(frozen=True, slots=True)
class Received:
    """Every byte of a transfer is in place."""

    size_bytes: int
    verified: DigestCoverage
    layout: Layout
    seconds: dict[str, float]
    """Seconds of the phases map, transfer and verify, as far as this process took part in them."""
    tensors: dict[str, Any] = field(default_factory=dict)
    """The mapped tensors; empty if the destination filled the caller's."""
    touched: bool = True
    """Whether the caller's tensors were written."""


class Shared(Protocol):
    """Memory that holds a weight set and can be published again and again, to one broker after the other."""

    @property
    def layout(self) -> Layout:
        """The layout of the content."""

    @property
    def placements(self) -> Sequence[tuple[int, int]]:
        """(region index, offset in bytes) of each tensor, in the layout's order."""

    @property
    def digests(self) -> tuple[ContentDigests, ...]:
        """Digests of the content, best coverage first."""

    @property
    def needs_retraction(self) -> bool:
        """Whether others read the publisher's own memory, which must not change before they have finished."""

    def regions(self, batch: str) -> list[pb.Region]:
        """The published regions. `batch` makes ids unique among the publications of this process."""

    @property
    def is_served(self) -> bool:
        """Whether the broker still reaches the memory, provided that the session is not over."""

    def stage(self, session: Session, timeout: float) -> pb.StagedMemory | None:
        """Serve staged copies in this session and return the memory's name there; None if this process copies
        nothing. The broker's answers take `timeout` seconds at most, here and below."""

    def note(self, publication: resources_pb2.Publication) -> None:
        """Take the broker's answer, which says whether the broker maps the memory or has it staged."""

    def hand_over(self, connection: AttachConnection, region: pb.Region, index: int, timeout: float) -> None:
        """Give the broker what it needs to reach a region besides the message."""

    def take_back(self, connection: AttachConnection, region: pb.Region, timeout: float) -> None:
        """Undo `hand_over`. Raises `BrokerError`."""

    def close(self) -> None:
        """Idempotent. Raises `RetractTimeout` while the memory is still mapped: call again."""


Piece = tuple[int, int, int]
"""Host address, device address, size in bytes."""


class HostCopies(Protocol):
    """Copies between device memory and host memory by this process. They return when every byte is there. Raise
    `DriverError`, `DeadlinePassed`."""

    def to_host(self, pieces: Sequence[Piece], deadline: float | None) -> None:
        """Waits for the caller's work on the device first."""

    def to_device(self, pieces: Sequence[Piece], deadline: float | None) -> None:
        """As `to_host`, into the device."""


class Sharing(Protocol):
    """Memory that others may have mapped."""

    def close(self) -> None:
        """End the sharing. Idempotent. Raises `RetractTimeout` while the driver does not: call again."""


class Destination(Protocol):
    """Memory that one acquisition fills."""

    @property
    def layout(self) -> Layout | None:
        """The layout that a source must have; None to accept any."""

    @property
    def grace_seconds(self) -> float:
        """How long the broker may take after the deadline to end its writing; 0 where it never writes."""

    def fill_request(self, request: service_pb.AcquireRequest, session: Session, deadline: float) -> None:
        """Add where the bytes go before `deadline` (monotonic seconds); export the memory if the broker writes to it.
        Called again for a new session. Raises `TransferFailed`."""

    def take(self, granted: service_pb.Granted, claim: ClaimRegion, deadline: float) -> Received | None:
        """Copy or map from the source before `deadline` (monotonic seconds). None: the broker brings the bytes, and
        `verify` follows. Raises a `BrokerError` with `touched`; nothing writes then."""

    def verify(self, granted: service_pb.Granted, moved: service_pb.Moved, deadline: float) -> Received:
        """Compare the bytes that the broker brought with the published digests. Raises `IntegrityError`,
        `TransferFailed`, `AcquireTimeout`."""

    def stop(self) -> bool:
        """End this process's own writing to the memory. True if nothing else writes to it: then `close` may follow
        although the broker does not know."""

    def keep(self) -> Shared:
        """The memory that arrived, for publishing. The caller closes it."""

    def close(self) -> None:
        """Nothing writes to the memory after this returns. Idempotent. Raises a `BrokerError` with `quiesced` False if
        that is not known."""

    def abandon(self) -> Sharing | None:
        """Instead of `close`, while something may still write to the memory: what is left to end later, which keeps no
        tensor alive; None if nothing is."""


class Kind(Protocol[Described]):
    """One kind of memory, in the process that has the tensors."""

    def describe(self, tensors: Mapping[str, object]) -> Described:
        """All tensors must be in this kind of memory. Raises `InvalidArgument` that names the tensor."""

    def share(self, tensors: Described, terms: Terms, deadline: float, prepared: Prepared | None = None) -> Shared:
        """Make the tensors readable for others. Raises `PublishRefused`; nothing is shared then."""

    def prepared_bytes(self, layout: Layout) -> int:
        """Host memory that `share` takes; 0 if none."""

    def destination(self, tensors: Described, terms: Terms) -> Destination:
        """The tensors as the destination of one acquisition. Raises `InvalidArgument` for a tensor that cannot be
        written."""

    def host_copies(self, tensors: Described) -> HostCopies | None:
        """Copies between the tensors and host memory; None for tensors in host memory. Raises `DriverError`."""

    def digests(self, tensors: Described, deadline: float | None = None, *, sampled: bool = False) -> ContentDigests:
        """Digests of the present content, after waiting for the device: of every byte if this host can, or `sampled`,
        of a few bytes of each tensor, which costs next to nothing. Raises `DeadlinePassed` and `BrokerError`, never a
        driver's error."""


MODULES: dict[str, str] = {
    MemoryKind.CPU: "weight_broker.memory.host.kind",
    MemoryKind.NPU: "weight_broker.memory.npu.kind",
    MemoryKind.CUDA: "weight_broker.memory.cuda.kind",
}
"""The module of each kind; imported on use."""


def kind_of(name: str) -> Kind[Any]:
    """Raises `InvalidArgument`, and `BrokerUnavailable` where this process cannot import the kind."""
    module = MODULES.get(name)
    if module is None:
        raise InvalidArgument("tensors.device", name, "memory of kind " + " or ".join(MODULES))
    with room.importing():
        return cast("Kind[Any]", importlib.import_module(module).KIND)
