"""Builds the configuration of the GPU processes from the settings, or says why there are none."""

from __future__ import annotations

import ctypes
from pathlib import Path

from weight_broker.drivers.cuda import LIBRARY
from weight_brokerd.cards.configuration import CardsConfiguration
from weight_brokerd.config.loading import Config


def cuda_configuration(config: Config) -> CardsConfiguration:
    cards = config.cards
    return CardsConfiguration(
        "",
        0,
        kind="cuda",
        library_path=config.cuda.library_path,
        start_seconds=cards.start_seconds,
        import_seconds=cards.import_seconds,
        request_seconds=cards.request_seconds,
        exit_seconds=cards.exit_seconds,
        receivers_per_card=cards.receivers_per_card,
        receiver_idle_seconds=cards.receiver_idle_seconds,
        transfer_seconds=cards.transfer_seconds,
    )


def why_no_gpus(config: Config) -> str:
    """Why the broker does not look for GPUs on this host, for people; empty if it does."""
    if config.cuda.enabled == "off":
        return "cuda.enabled is 'off'"
    if config.cuda.enabled == "auto" and not has_driver(config.cuda.library_path):
        return f"NVIDIA's driver, {LIBRARY}, is neither in cuda.library_path nor where the loader looks"
    return ""


def has_driver(library_path: str) -> bool:
    """Whether a GPU process would find NVIDIA's driver. The daemon does not initialise the library."""
    if library_path:
        return any(Path(directory, LIBRARY).exists() for directory in library_path.split(":"))
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        return False
    return True
