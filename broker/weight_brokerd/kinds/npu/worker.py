"""The datasystem worker that moves bytes between NPUs, run by the broker or by the operator."""

from __future__ import annotations

import asyncio
from typing import Protocol

import structlog

from weight_broker.drivers import datasystem_worker
from weight_broker.drivers.ascend_requirements import worker_problem
from weight_brokerd.config.rules import split_address

log = structlog.get_logger()


class DatasystemWorker(Protocol):
    """The worker, as the NPUs use it."""

    @property
    def is_managed(self) -> bool:
        """Whether the broker started it and owns it."""

    @property
    def problem(self) -> str:
        """Why the worker does not serve, if known; empty otherwise."""

    @property
    def is_ready(self) -> bool:
        """False while it is known that the worker does not serve."""

    async def start(self) -> tuple[str, int]:
        """Host and port. Raises OSError, RuntimeError."""
        ...

    async def settled(self) -> None:
        """Returns when the worker serves, or is not expected to serve soon."""

    async def look(self) -> None:
        """A worker has begun to answer: set `problem` if it is too old."""

    async def close(self) -> None:
        """End the worker if it is managed."""


class ExternalWorker:
    """A datasystem worker that the operator runs."""

    is_managed = False
    is_ready = True

    def __init__(self, address: str) -> None:
        self.problem = ""
        self._address = address

    async def start(self) -> tuple[str, int]:
        """Host and port of the running worker."""
        return split_address(self._address)

    async def settled(self) -> None:
        """At once: the broker does not start it."""

    async def look(self) -> None:
        """By the worker's process: the worker itself does not say its version. A worker that is too old is used all the
        same, because it may work."""
        found = await asyncio.to_thread(datasystem_worker.find, self._address)
        version = found.version if found is not None else ""
        self.problem = worker_problem(self._address, found.pid, version) if found is not None else ""
        if self.problem:
            log.warning("datasystem_worker_too_old", address=self._address, problem=self.problem)
        else:
            log.info("datasystem_worker_found", address=self._address, version=version or "not seen from here")

    async def close(self) -> None:
        """Nothing to do: the operator owns the worker."""
