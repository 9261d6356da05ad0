"""From the configuration to the devices that this broker serves: finds or starts the datasystem worker first."""

from __future__ import annotations

from pathlib import Path

import structlog

from weight_brokerd.cards.configuration import CardsConfiguration
from weight_brokerd.cards.settings import cards_configuration, why_no_cards
from weight_brokerd.config import Config
from weight_brokerd.config_rules import split_address
from weight_brokerd.datasystem.managed_worker import ManagedWorker
from weight_brokerd.devices import Devices
from weight_brokerd.runtime import StartError, state_directory

log = structlog.get_logger()


class ExternalWorker:
    """A datasystem worker that somebody else runs."""

    is_managed = False
    problem = ""

    def __init__(self, address: str) -> None:
        self._address = address

    async def start(self) -> tuple[str, int]:
        """Host and port."""
        return split_address(self._address)

    async def close(self) -> None:
        """It is not ours."""


def make_devices(config: Config, runtime_directory: Path) -> Devices | None:
    """The devices; None if this broker serves host memory only."""
    why_not = why_no_cards(config)
    if why_not and config.cards.enabled != "on":
        log.debug("host_memory_only", why=why_not)
        return None
    files = state_directory(runtime_directory)
    managed = ManagedWorker(config.datasystem, files) if config.datasystem.managed else None
    worker = managed or ExternalWorker(config.datasystem.worker_address)

    async def connect() -> CardsConfiguration:
        if why_not:
            raise StartError(f"{why_not}, and cards.enabled is 'on'")
        host, port = await worker.start()
        return cards_configuration(config, host, port, files)

    devices = Devices(connect, worker, transfer_seconds=config.cards.transfer_seconds)

    def tell() -> None:
        devices.on_health_change()  # as it is then: the application sets it later

    if managed is not None:
        managed.on_change = tell
    return devices
