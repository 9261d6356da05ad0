"""The requests of a process, one after the other: who sends many waits for itself, and others do not wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

from weight_brokerd.core.model import Process

PACED_BYTES = 1 << 20
"""Larger requests take their time."""
BYTES_PER_SECOND = 32 << 20
"""Of one process. gRPC copies a message on the event loop, 0.9 ms for each MB, in which nothing else runs; to check a
layout takes longer than this anyway."""


class Sender:
    """One process."""

    def __init__(self) -> None:
        self.refused = asyncio.Lock()
        """The queue of its requests that are refused because they are too large."""
        self.small = asyncio.Lock()
        """The queue of its requests without a layout."""
        self.layouts = asyncio.Lock()
        """The queue of its requests that may have a layout: each is read once the one before it is parsed."""


class Senders:
    """All processes that send something now."""

    def __init__(self) -> None:
        self._senders: WeakValueDictionary[Process, Sender] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._senders)

    def of(self, process: Process) -> Sender:
        """The same one for as long as a request of the process has it."""
        return self._senders.setdefault(process, Sender())


@asynccontextmanager
async def paced(size_bytes: int) -> AsyncIterator[None]:
    """The block, which handles a request of this size, takes as long as the request may take, also if it fails: a
    process whose large requests are refused at once sends no more of them than one whose are right."""
    clock = asyncio.get_running_loop().time
    end = clock() + size_bytes / BYTES_PER_SECOND
    try:
        yield
    finally:
        if size_bytes > PACED_BYTES:
            await asyncio.sleep(max(end - clock(), 0.0))
