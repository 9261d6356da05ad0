"""From the configuration to the devices that this broker serves: finds or starts the datasystem worker first."""

from __future__ import annotations

import os
from pathlib import Path

import structlog

from weight_brokerd.attach.stage import Stages
from weight_brokerd.cards.configuration import CardsConfiguration
from weight_brokerd.config.errors import StartError
from weight_brokerd.config.loading import Config
from weight_brokerd.config.rules import split_address
from weight_brokerd.datasystem.managed_worker import ManagedWorker
from weight_brokerd.kinds.cuda.kind import CudaDevices
from weight_brokerd.kinds.cuda.settings import cuda_configuration, why_no_gpus
from weight_brokerd.kinds.npu.kind import NpuDevices
from weight_brokerd.kinds.npu.settings import cards_configuration, why_no_cards
from weight_brokerd.kinds.registry import DeviceKinds

log = structlog.get_logger()


def state_directory(runtime: Path) -> Path:
    """Where files go that may be large: systemd's `$STATE_DIRECTORY`, else the runtime directory itself."""
    given = os.environ.get("STATE_DIRECTORY", "").split(":")[0]
    return Path(given) if given else runtime


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


def make_devices(config: Config, runtime_directory: Path) -> DeviceKinds | None:
    """The devices of all kinds; None if this broker serves host memory only."""
    stages = Stages()
    npus, gpus = make_npus(config, runtime_directory, stages), make_gpus(config)
    if npus is None and gpus is None:
        return None
    kinds = [one for one in (npus, gpus) if one is not None]
    return DeviceKinds(
        kinds, transfer_seconds=config.cards.transfer_seconds, npus=npus, npu_path=config.cards.path, stages=stages
    )


def make_gpus(config: Config) -> CudaDevices | None:
    """The GPUs; None if this broker does not use them."""
    why_not = why_no_gpus(config)
    if why_not:
        log.debug("no_gpus", why=why_not)
        return None
    return CudaDevices(cuda_configuration(config), is_wanted=config.cuda.enabled == "on")


def make_npus(config: Config, runtime_directory: Path, stages: Stages) -> NpuDevices | None:
    """The NPUs; None if this broker does not use them."""
    why_not = why_no_cards(config)
    if why_not and config.cards.enabled != "on":
        log.debug("no_npus", why=why_not)
        return None
    files = state_directory(runtime_directory)
    managed = ManagedWorker(config.datasystem, files) if config.datasystem.managed else None
    worker = managed or ExternalWorker(config.datasystem.worker_address)

    async def connect() -> CardsConfiguration:
        if why_not:
            raise StartError(f"{why_not}, and cards.enabled is 'on'")
        host, port = await worker.start()
        return cards_configuration(config, host, port, files)

    devices = NpuDevices(connect, worker, stages)

    def tell() -> None:
        devices.on_health_change()  # as it is then: the application sets it later

    if managed is not None:
        managed.on_change = tell
    return devices
