"""What this process can do with tensors in one kind of memory. Each kind is a folder beside this file.

To add one: a row in `weight_broker.kinds.TRAITS`, a folder with a module that has a `KIND`, and a row in `MODULES`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

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
    """What the caller asked for, once for all of its memory."""

    digest_mode: DigestMode = DigestMode.AUTO
    staging: StagingPolicy = StagingPolicy.AUTO


class Prepared(Protocol):
    """Host memory that the kernel was asked for in advance."""

    def take(self) -> int | None:
        """Its descriptor, which is the caller's from here on; None if there is none."""


@dataclass(frozen=True, slots=True)
class Received:
    """Every byte of a transfer is in place."""

    size_bytes: int
    verified: DigestCoverage
    layout: Layout
    seconds: dict[str, float]
    """Seconds of the phases map, transfer and verify, as far as this process took part in them."""
    tensors: dict[str, Any] = field(default_factory=dict)
    """The mapped tensors, if the destination had none of its own."""
    touched: bool = True
    """Whether tensors of the caller's were written."""


class Shared(Protocol):
    """Memory that holds a weight set and can be published again and again, to one broker after the other."""

    @property
    def layout(self) -> Layout:
        """What is in it."""

    @property
    def placements(self) -> Sequence[tuple[int, int]]:
        """(region index, offset in bytes) of each tensor, in the layout's order."""

    @property
    def digests(self) -> tuple[ContentDigests, ...]:
        """Digests of the content, best coverage first."""

    @property
    def needs_retraction(self) -> bool:
        """Whether others read the publisher's own memory, which must not change before they are done."""

    def regions(self, batch: str) -> list[pb.Region]:
        """The regions as they are published. `batch` makes ids unique among the publications of this process."""

    @property
    def is_served(self) -> bool:
        """Whether the broker still reaches it, provided that its session is not over."""

    def stage(self, session: Session) -> pb.StagedMemory | None:
        """Serves the memory in this session and returns its name there; None if this process copies nothing."""

    def note(self, publication: resources_pb2.Publication) -> None:
        """The broker's answer: it says in which way the broker reads the memory."""

    def hand_over(self, connection: AttachConnection, region: pb.Region, index: int) -> None:
        """Gives the broker what it needs beside the message to reach a region."""

    def take_back(self, connection: AttachConnection, region: pb.Region) -> None:
        """Undoes `hand_over`. Raises `BrokerError`."""

    def close(self) -> None:
        """Ends the sharing; idempotent. Raises `RetractTimeout` while the memory is still mapped: call again."""


class Destination(Protocol):
    """Memory that one acquisition fills."""

    @property
    def layout(self) -> Layout | None:
        """The layout that a source must have; None to accept any."""

    @property
    def grace_seconds(self) -> float:
        """How long the broker may take after the deadline to end its writing; 0 where it never writes."""

    def fill_request(self, request: service_pb.AcquireRequest, session: Session) -> None:
        """Says where the bytes are to go; exports the memory if the broker writes to it. May be called again, for a new
        session. Raises `TransferFailed`."""

    def take(self, granted: service_pb.Granted, claim: ClaimRegion, deadline: float) -> Received | None:
        """Copies or maps from the source before `deadline` (monotonic seconds). None: the broker brings the bytes, and
        `verify` follows. Raises a `BrokerError` that says whether anything was touched; nothing writes then."""

    def verify(self, granted: service_pb.Granted, moved: service_pb.Moved, deadline: float) -> Received:
        """Compares what the broker brought with what was published. Raises `IntegrityError`, `TransferFailed`,
        `AcquireTimeout`."""

    def stop(self) -> bool:
        """Ends what this process itself writes to the memory. True if nothing else writes to it: `close` may follow
        although the broker does not know."""

    def keep(self) -> Shared:
        """What arrived, to be published again; its `close` is the caller's from here on."""

    def close(self) -> None:
        """Lets go of the memory: nothing writes to it any more. Idempotent. Raises a `BrokerError` with `quiesced`
        False if that is not known."""


class Kind(Protocol[Described]):
    """One kind of memory, in the process that has the tensors."""

    def describe(self, tensors: Mapping[str, object]) -> Described:
        """The tensors by name, all of them in this kind of memory. Raises `InvalidArgument` that names the tensor."""

    def share(self, tensors: Described, terms: Terms, deadline: float, prepared: Prepared | None = None) -> Shared:
        """The tensors, for others to read. Raises `PublishRefused`; nothing is shared then."""

    def prepared_bytes(self, layout: Layout) -> int:
        """How much host memory `share` takes; 0 if none."""

    def destination(self, tensors: Described, terms: Terms) -> Destination:
        """The tensors, to be filled."""

    def digests(self, tensors: Described, deadline: float | None = None) -> ContentDigests:
        """Digests of the content as it is now, of every byte where this host can, after waiting for the device. Raises
        `DeadlinePassed` and `BrokerError`, never a driver's error."""


MODULES: dict[str, str] = {
    MemoryKind.CPU: "weight_broker.memory.host.kind",
    MemoryKind.NPU: "weight_broker.memory.npu.kind",
    MemoryKind.CUDA: "weight_broker.memory.cuda.kind",
}
"""Where each kind is; imported when it is used."""


def kind_of(name: str) -> Kind[Any]:
    """The kind of this name. Raises `InvalidArgument`."""
    module = MODULES.get(name)
    if module is None:
        raise InvalidArgument("tensors.device", name, "memory of kind " + " or ".join(MODULES))
    return cast("Kind[Any]", importlib.import_module(module).KIND)
