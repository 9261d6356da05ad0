"""How large a demo the memory that is available can take."""

from __future__ import annotations

from dataclasses import dataclass

PROCESS_BYTES = 450 << 20
"""What a process with torch and transformers needs besides weights."""
SMALLER_SIZES = (512 << 20, 256 << 20, 128 << 20, 64 << 20, 16 << 20)


@dataclass(frozen=True)
class Plan:
    """How many instances copy and how many map. Instance 1 keeps its weights twice (its own and the published copy), an
    instance that copies once, an instance that maps not at all. The load from the warm disk ends before the others
    start."""

    copying: int
    mapping: int

    def needed_bytes(self, size_bytes: int) -> int:
        """Memory for a model of `size_bytes`."""
        weights = 2 + max(self.copying, 1)
        return weights * size_bytes + (1 + max(self.copying + self.mapping, 1)) * PROCESS_BYTES


def fitting_size(wanted_bytes: int, plan: Plan, available: int | None) -> int:
    """The largest size up to `wanted_bytes` that fits; the smallest of `SMALLER_SIZES` if none fits."""
    if available is None:
        return wanted_bytes
    sizes = [wanted_bytes, *(size for size in SMALLER_SIZES if size < wanted_bytes)]
    return next((size for size in sizes if plan.needed_bytes(size) <= available), sizes[-1])
