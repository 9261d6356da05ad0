"""Reports of finished calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from weight_broker.digest import DigestCoverage
from weight_broker.layout import Layout

if TYPE_CHECKING:
    from weight_broker.transfers.publication import Publication


@dataclass(frozen=True, slots=True)
class AcquireReport:
    """A finished acquisition: every byte is in place."""

    weight_set_id: str
    """Id of the weight set."""
    transfer_id: str
    """The transfer, as in logs and listings."""
    source_instance: str
    """Id of the instance that the weights came from."""
    source_instance_name: str
    """The instance's name."""
    source_publication_id: str
    """The publication that was read."""
    source_generation: int
    """Its generation."""
    size_bytes: int
    """Bytes moved, or mapped."""
    tensor_count: int
    """Tensors filled, aliases included."""
    phases: Mapping[str, float]
    """Seconds by phase: attach, describe, wait, reserve, map, transfer, verify, confirm. Digests that are computed
    while the bytes are copied are part of transfer."""
    seconds: float
    """Duration of the whole call."""
    verified: DigestCoverage
    """How much of the content was compared with the published digests."""
    data_plane: str
    """What moved the bytes: "local" or "datasystem"."""
    path: str
    """How: "copy", "zero_copy" or "staged"."""

    @property
    def bandwidth(self) -> float:
        """Bytes per second while they moved, verification included; 0 if none did."""
        moving = self.phases.get("transfer", 0.0) + self.phases.get("verify", 0.0)
        return self.size_bytes / moving if moving > 0 else 0.0


@dataclass(frozen=True, slots=True)
class LoadReport:
    """A finished `acquire_or_load`: the weights are loaded, from a peer or from disk."""

    source: Literal["peer", "disk"]
    """Where the weights came from."""
    seconds: float
    """Duration of the whole call."""
    acquire_seconds: float
    """Of that, asking the broker, waiting for others and the transfer."""
    load_seconds: float = 0.0
    """Of that, loading from disk."""
    publish_seconds: float = 0.0
    """Of that, becoming a source."""
    report: AcquireReport | None = None
    """The acquisition, if the weights came from a peer."""
    publication: Publication | None = field(default=None, repr=False)
    """The publication, if this process is a source now, or will be: `id` is empty until the files that were read have
    been compared with what was downloaded. It outlives this report, until it is retracted or the client is closed."""
    acquire_error: str | None = None
    """Why the weights did not come from a peer although there was one, or although the broker was asked: the last
    attempt that failed. None if they did, and if no peer had them."""
    publish_error: str | None = None
    """Why this process did not become a source, if the caller wanted that."""


class AttachedTensors(Mapping[str, Any]):
    """Tensors by name whose memory is the resident weight set's, copy-on-write: writes stay in this process. The
    memory lives as long as any of the tensors, also after the publication has ended."""

    def __init__(self, tensors: Mapping[str, Any], layout: Layout, report: AcquireReport) -> None:
        self._tensors = dict(tensors)
        self.layout = layout
        self.report = report

    def __getitem__(self, name: str) -> Any:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"AttachedTensors({len(self)} tensors, {self.report.size_bytes} bytes)"
