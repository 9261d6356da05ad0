"""Limits that an instance meets, as containers and services set them."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

from support import actions
from weight_broker import WeightSetKey

FAR_USER = 3_000_000_000
"""Root has no limit of threads; no process of a test machine has this uid."""


def limit_threads() -> None:
    """No more threads than there are."""
    if os.getuid() == 0:
        os.setresuid(FAR_USER, FAR_USER, FAR_USER)
    resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))


def limit_descriptors() -> None:
    """Room for three more."""
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 3, lowest + 3))


def limit_address_space() -> None:
    """Room for 64 MiB more."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize")]
    most = (int(line.split()[1]) << 10) + (64 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


LIMITS = {"threads": limit_threads, "descriptors": limit_descriptors, "address space": limit_address_space}


def acquire_or_load_at_the_limit(state: actions.State, /, limit: str, model: str, seed: int) -> dict[str, Any]:
    """Attaches, meets the limit, and then needs gRPC for the first time."""
    import weight_broker.transfers.imports  # noqa: F401 - what cannot be imported is another story

    state.client._attachment.session()
    LIMITS[limit]()

    def load() -> None:
        fresh = actions.content(seed, len(state.arrays), next(iter(state.arrays.values())).nbytes)
        for name, array in state.arrays.items():
            array[:] = fresh[name]

    report = state.client.acquire_or_load(WeightSetKey(model), state.arrays, load, timeout=60)
    return {"source": report.source, "error": report.acquire_error, "checksum": actions.current(state)}
