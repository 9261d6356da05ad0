"""What became of one load."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True)
class EngineLoad:
    """One model of this process, as it was loaded. Times in seconds."""

    model: str
    source: str = "disk"
    """Where the weights came from: "peer" or "disk"."""
    weight_set_id: str = ""
    """Empty if no key could be made."""
    source_publication_id: str = ""
    """What was read, if they came from a peer."""
    source_generation: int = 0
    """Its generation."""
    size_bytes: int = 0
    """Bytes of the weight set."""
    tensor_count: int = 0
    """Tensors of the weight set."""
    verified: str = ""
    """How much was verified on arrival."""
    acquire_error: str = ""
    """Why the broker did not serve, if it was asked and did not."""
    publication_id: str = ""
    """What this process offers, if it does."""
    not_published: str = ""
    """Why it does not."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By step: key, acquire, load, check, publish."""

    def as_dict(self) -> dict[str, Any]:
        """For logs and other processes."""
        return asdict(self)
