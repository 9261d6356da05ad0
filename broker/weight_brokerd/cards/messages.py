"""The messages between the daemon and a card process: typed, JSON on the wire.

Every request is answered once, with the answer that it names or with `RequestRefused`. Answers carry the number of
their request and may come in any order.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field

from weight_brokerd.cards.plan.blobs import BlobList
from weight_brokerd.processes.codec import Codec

NOT_SAID = -1


class Role(enum.StrEnum):
    """The role of a card process. The engine cannot be on both ends of a transfer in one process."""

    SENDER = "sender"
    RECEIVER = "receiver"


@dataclass(frozen=True, slots=True)
class Start:
    """The first request: open the card and connect to the worker. Answer: Ready."""

    worker_host: str
    worker_port: int
    connect_timeout_ms: int
    credentials: dict[str, str] = field(default_factory=dict, repr=False)
    """Arguments of the client's constructor. Sent over the socket, because other users can read command lines."""


@dataclass(frozen=True, slots=True)
class Ready:
    bare_tgid: int
    """The pid that exporters put on their whitelist."""
    identity: str
    """The card's physical identity."""
    soc: str
    seconds: dict[str, float]
    """Of each step of the start."""


@dataclass(frozen=True, slots=True)
class ImportRegion:
    """Map a region of an instance: an allocation by its key or handle, or chunks by their handles. Answer: Done."""

    region_id: str
    size_bytes: int
    export_key: str = ""
    """Of an NPU's allocation; hexadecimal."""
    shareable_handles: tuple[int, ...] = ()
    chunk_bytes: int = 0
    ipc_handle: str = ""
    """Of a GPU's allocation; hexadecimal."""
    device_id: str = ""
    """The GPU of the region; not always the GPU of the process."""
    container_device: int = NOT_SAID
    """The number of the card in the container of the chunks' exporter."""
    exporter_pid: int = 0
    """Of a GPU's allocation: the instance, in the broker's pid namespace; 0 if it cannot be seen from there."""
    exporter_uid: int = -1
    """-1: unknown."""


@dataclass(frozen=True, slots=True)
class CloseRegion:
    """Unmap a region. Answer: Done."""

    region_id: str


@dataclass(frozen=True, slots=True)
class MakeStagingBuffer:
    """Allocate device memory that instances of this host can import; a region of this process until CloseRegion.
    Answer: StagingBuffer."""

    region_id: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class LendStagingBuffer:
    """An instance may map the buffer from now on, until CloseRegion. Comes with a descriptor of the instance's stage
    connection: if the daemon ends, this process tells the instance and lives until it has let go. Answer: Done."""

    region_id: str


@dataclass(frozen=True, slots=True)
class Offer:
    """To a sender: let one reader fetch the blobs under a fresh key. Answer: Done."""

    key: str
    blobs: BlobList
    peer: str = ""
    """Name of the reading process, for statistics only."""


@dataclass(frozen=True, slots=True)
class Withdraw:
    """To a sender: end an offer. Answer: Done, once no process reads any more."""

    key: str
    wait_ms: int


@dataclass(frozen=True, slots=True)
class Fetch:
    """To a receiver: fill the blobs from a key. Answer: Done, when all bytes are in place."""

    key: str
    blobs: BlobList
    timeout_ms: int
    peer: str = ""
    """Name of the process at the source, for statistics only."""


@dataclass(frozen=True, slots=True)
class CopyWithinCard:
    """To a receiver: copy between mapped regions, part by part. Answer: Done."""

    source: BlobList
    destination: BlobList


@dataclass(frozen=True, slots=True)
class Ping:
    """Answer: Done, or RequestRefused `by_engine` if the process should be replaced."""


@dataclass(frozen=True, slots=True)
class AskFigures:
    """Answer: Figures."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Unmap and free everything, and end. Answer: Done."""


@dataclass(frozen=True, slots=True)
class Done:
    seconds: dict[str, float] = field(default_factory=dict)
    """Of each step."""


@dataclass(frozen=True, slots=True)
class StagingBuffer:
    """Answer to MakeStagingBuffer."""

    export_key: str
    """Hexadecimal. Every process that knows the key may import the buffer."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What the process holds."""

    regions: int
    region_bytes: int
    imports: int
    """Mapped allocations; regions that are the same memory count once."""
    keys: int
    """Keys that the engine knows through this process."""
    staging_bytes: int
    """Of packs and staging buffers."""
    peers: int
    """Named processes that exchanged bytes with this process: the number of its communicators."""


@dataclass(frozen=True, slots=True)
class RequestRefused:
    """The request failed; `words` are the driver's or the engine's."""

    words: str
    started: bool = False
    """The engine has begun: bytes may have been written, and writing may go on."""
    by_engine: bool = False
    """The engine refused, or is unreliable: a fresh process may succeed."""


Request = (
    Start
    | ImportRegion
    | CloseRegion
    | MakeStagingBuffer
    | LendStagingBuffer
    | Offer
    | Withdraw
    | Fetch
    | CopyWithinCard
    | Ping
    | AskFigures
    | Stop
)
Answer = Ready | Done | StagingBuffer | Figures | RequestRefused
Message = Request | Answer


_KINDS: tuple[Callable[..., Message], ...] = (
    Start,
    Ready,
    ImportRegion,
    CloseRegion,
    MakeStagingBuffer,
    LendStagingBuffer,
    Offer,
    Withdraw,
    Fetch,
    CopyWithinCard,
    Ping,
    AskFigures,
    Stop,
    Done,
    StagingBuffer,
    Figures,
    RequestRefused,
)
CODEC: Codec[Message] = Codec(_KINDS, {BlobList: BlobList.from_json})
