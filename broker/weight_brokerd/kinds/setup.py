"""From the settings to the kinds of memory that this broker serves."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import structlog

from weight_brokerd.attach.stage import StagingConnections
from weight_brokerd.cards.configuration import CardsConfiguration
from weight_brokerd.config.errors import StartError
from weight_brokerd.config.loading import Config
from weight_brokerd.datasystem.managed_worker import ManagedWorker
from weight_brokerd.kinds.cuda.kind import CudaKind
from weight_brokerd.kinds.cuda.settings import cuda_configuration, why_no_gpus
from weight_brokerd.kinds.host.kind import HostKind
from weight_brokerd.kinds.host.regions import RegionTable
from weight_brokerd.kinds.kind import Kind, KindEvents
from weight_brokerd.kinds.npu.kind import NpuKind
from weight_brokerd.kinds.npu.settings import cards_configuration, why_no_cards
from weight_brokerd.kinds.npu.worker import DatasystemWorker, ExternalWorker
from weight_brokerd.kinds.registry import Kinds

log = structlog.get_logger()


def state_directory(runtime: Path) -> Path:
    """Where files go that may be large: systemd's `$STATE_DIRECTORY`, else the runtime directory itself."""
    directory = os.environ.get("STATE_DIRECTORY", "").split(":")[0]
    return Path(directory) if directory else runtime


def make_kinds(
    config: Config, runtime_directory: Path, regions: RegionTable, staging: StagingConnections, events: KindEvents
) -> Kinds:
    """Host memory, and the devices that the settings allow and this host may have."""
    devices = [*_npus(config, runtime_directory, staging, events), *_gpus(config, events)]
    return Kinds([HostKind(regions), *devices], transfer_seconds=config.cards.transfer_seconds)


def _gpus(config: Config, events: KindEvents) -> Iterator[Kind]:
    why_not = why_no_gpus(config)
    if why_not:
        log.debug("no_gpus", why=why_not)
        return
    yield CudaKind(cuda_configuration(config), events, is_wanted=config.cuda.enabled == "on")


def _npus(config: Config, runtime_directory: Path, staging: StagingConnections, events: KindEvents) -> Iterator[Kind]:
    why_not = why_no_cards(config)
    if why_not and config.cards.enabled != "on":
        log.debug("no_npus", why=why_not)
        return
    files = state_directory(runtime_directory)
    worker = _worker(config, files, events)

    async def connect() -> CardsConfiguration:
        if why_not:
            raise StartError(f"{why_not}, and cards.enabled is 'on'")
        host, port = await worker.start()
        return cards_configuration(config, host, port, files)

    yield NpuKind(connect, worker, staging, events, path=config.cards.path)


def _worker(config: Config, files: Path, events: KindEvents) -> DatasystemWorker:
    if config.datasystem.managed:
        return ManagedWorker(config.datasystem, files, on_change=events.health_changed)
    return ExternalWorker(config.datasystem.worker_address)
