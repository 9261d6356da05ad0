"""The datasystem worker that moves bytes between NPUs, whoever runs it."""

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
        """Why it is not there, where that is known; empty otherwise."""

    async def start(self) -> tuple[str, int]:
        """Host and port. Raises OSError, RuntimeError."""
        ...

    async def close(self) -> None:
        """End it if it is managed."""


class ExternalWorker:
    """A datasystem worker that the operator runs."""

    is_managed = False
    problem = ""

    def __init__(self, address: str) -> None:
        self._address = address

    async def start(self) -> tuple[str, int]:
        """Host and port; it runs already."""
        return split_address(self._address)

    async def close(self) -> None:
        """It is the operator's."""
