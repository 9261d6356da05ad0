"""The datasystem worker that moves bytes between NPUs, run by the broker or by the operator."""

from __future__ import annotations

from typing import Protocol

from weight_brokerd.config.rules import split_address


class DatasystemWorker(Protocol):
    """The worker, as the NPUs use it."""

    @property
    def is_managed(self) -> bool:
        """Whether the broker started it and owns it."""

    @property
    def problem(self) -> str:
        """Why the worker does not serve, if known; empty otherwise."""

    async def start(self) -> tuple[str, int]:
        """Host and port. Raises OSError, RuntimeError."""
        ...

    async def close(self) -> None:
        """End the worker if it is managed."""


class ExternalWorker:
    """A datasystem worker that the operator runs."""

    is_managed = False
    problem = ""

    def __init__(self, address: str) -> None:
        self._address = address

    async def start(self) -> tuple[str, int]:
        """Host and port of the running worker."""
        return split_address(self._address)

    async def close(self) -> None:
        """Nothing to do: the operator owns the worker."""
