"""What the demo asks of its instances and what they answer, in host memory and on cards."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Order:
    name: str
    model_dir: str
    runtime_directory: str | None
    """None: load from disk, without a broker."""
    zero_copy: bool
    timeout_seconds: float

    def to_argument(self) -> str:
        """The order as one argument of a command line."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Result:
    name: str
    source: str
    """"disk", or the name of the instance that the weights came from."""
    path: str
    """"read", "copy" or "zero_copy"."""
    size_bytes: int
    ready_seconds: float
    """From "begin" until every weight is in place."""
    disk_seconds: float
    """Of that, reading the checkpoint."""
    phases: dict[str, float]
    """Of that, seconds of the acquisition by phase."""
    publish_seconds: float
    """After that, becoming a source for others."""
    forward_seconds: float
    """After that, the first forward pass."""
    disk_bytes: int | None
    """Bytes read from the disk for this process until then; None if the kernel does not say."""
    logits_digest: str
    verified: str
    problems: list[str] = field(default_factory=list)
    """What went wrong; empty if nothing did."""


@dataclass(frozen=True)
class CardOrder:
    name: str
    device_id: str
    """The physical card: its index depends on the instance's container and visible devices."""
    model_dir: str
    runtime_directory: str | None
    """None: load from disk, without a broker."""
    framework: str
    """One of `weight_broker.demo.npu.memory.FRAMEWORKS`."""
    timeout_seconds: float

    def to_argument(self) -> str:
        """The order as one argument of a command line."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class CardResult:
    name: str
    device_id: str
    """The physical card."""
    source: str
    """"disk", or the name of the instance that the weights came from."""
    data_plane: str
    """"datasystem", "local", or empty: from disk."""
    path: str
    """"read", "copy" or "staged"."""
    size_bytes: int
    tensor_count: int
    open_seconds: float
    """Before anything: opening the card."""
    allocate_seconds: float
    """Before anything: allocating the tensors."""
    ready_seconds: float
    """From "begin" until every weight is in place and verified."""
    disk_seconds: float
    """Of that, reading the checkpoint from disk into the card."""
    phases: dict[str, float]
    """Of that, seconds of the acquisition by phase."""
    publish_seconds: float
    """After that, becoming a source for others."""
    disk_bytes: int | None
    """Bytes read from the disk for this process; None if the kernel does not say."""
    verified: str
    problems: list[str] = field(default_factory=list)
    """What went wrong; empty if nothing did."""
