"""From what operators set to what the process for host objects is told."""

from __future__ import annotations

from pathlib import Path

from weight_brokerd.config import Config
from weight_brokerd.datasystem.credentials import credentials
from weight_brokerd.datasystem.objects import ObjectsConfiguration


def client_logs(config: Config, state_directory: Path) -> Path:
    """Where all clients of the datasystem in this broker log."""
    return Path(config.cards.log_directory) if config.cards.log_directory else state_directory / "datasystem-clients"


def objects_configuration(
    config: Config, worker_host: str, worker_port: int, state_directory: Path
) -> ObjectsConfiguration:
    """For host objects of this worker. Reads the secrets; raises StartError if they cannot be read."""
    return ObjectsConfiguration(
        worker_host,
        worker_port,
        credentials=credentials(config.datasystem),
        log_directory=client_logs(config, state_directory),
    )
