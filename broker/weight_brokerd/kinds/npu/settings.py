"""Builds the configuration of the NPU processes from the settings, or says why there are none."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import structlog

from weight_broker.drivers.acl import LIBRARY
from weight_brokerd.cards.configuration import CardsConfiguration
from weight_brokerd.config.loading import Config
from weight_brokerd.config.settings import CardSettings
from weight_brokerd.datasystem.credentials import credentials

log = structlog.get_logger()
_HCCL_PORTS = ("HCCL_NPU_SOCKET_PORT_RANGE", "HCCL_HOST_SOCKET_PORT_RANGE")
PEER_COPY_ROW = "P6.peer"
"""The row of the proof in which a process imports memory of another card and copies it."""
_PROVED = ["as_source"], ["as the source"]
_LDCONFIG_SECONDS = 10
_SYSTEM_BINARIES = "/sbin:/usr/sbin:/bin:/usr/bin"


def client_logs(config: Config, state_directory: Path) -> Path:
    """The log directory of all datasystem clients in this broker."""
    return Path(config.cards.log_directory) if config.cards.log_directory else state_directory / "datasystem-clients"


def hccl_variables() -> dict[str, str]:
    """The ports of HCCL in a process on a card, unless the operator has chosen. HCCL listens once for each process and
    card, by default always on the same ports: a second process on the card would fail, and that may be the engine's."""
    return {name: os.environ.get(name, "auto") for name in _HCCL_PORTS}


def cards_configuration(
    config: Config, worker_host: str, worker_port: int, state_directory: Path
) -> CardsConfiguration:
    """The configuration of card processes that use this worker. Reads the secrets; raises StartError if it cannot."""
    cards = config.cards
    return CardsConfiguration(
        worker_host,
        worker_port,
        credentials=credentials(config.datasystem),
        library_path=cards.library_path,
        preload=cards.preload,
        environment=hccl_variables(),
        log_directory=client_logs(config, state_directory),
        start_seconds=cards.start_seconds,
        import_seconds=cards.import_seconds,
        request_seconds=cards.request_seconds,
        exit_seconds=cards.exit_seconds,
        receivers_per_card=cards.receivers_per_card,
        receiver_idle_seconds=cards.receiver_idle_seconds,
        sender_idle_seconds=cards.sender_idle_seconds,
        transfer_seconds=cards.transfer_seconds,
        staging_bytes=cards.staging_bytes,
    )


def offers_peer_copy(cards: CardSettings) -> bool:
    """Whether a card may map memory of another one. Not before a run on this hardware has shown it, unless the operator
    says so."""
    if cards.peer_copy == "auto":
        return bool(cards.proof) and _is_proved(Path(cards.proof))
    return cards.peer_copy == "on"


def _is_proved(proof: Path) -> bool:
    try:
        rows = json.loads(proof.read_text())["rows"]
        verdicts = [row["verdict"] for row in rows if row["id"] == PEER_COPY_ROW]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        log.warning("proof_unreadable", path=str(proof), error=str(error))
        return False
    return verdicts in _PROVED


def why_no_cards(config: Config) -> str:
    """Why the broker uses no Ascend card on this host, for people; empty if it does."""
    if config.cards.enabled == "off":
        return "cards.enabled is 'off'"
    if not config.datasystem.is_configured:
        return "there is no datasystem worker: neither datasystem.worker_address nor datasystem.managed is set"
    if config.cards.enabled == "auto" and find_runtime(config.cards.library_path) is None:
        return f"Ascend's runtime, {LIBRARY}, is neither in cards.library_path nor where the loader looks"
    return ""


def find_runtime(library_path: str) -> Path | None:
    """Ascend's runtime library, as a card process would find it. The daemon does not load it."""
    search = library_path or os.environ.get("LD_LIBRARY_PATH", "")
    for directory in filter(None, search.split(":")):
        if (found := Path(directory, LIBRARY)).exists():
            return found
    return _in_loader_cache()


def _in_loader_cache() -> Path | None:
    ldconfig = shutil.which("ldconfig", path=_SYSTEM_BINARIES)
    if ldconfig is None:
        return None
    try:
        listed = subprocess.run(
            [ldconfig, "-p"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_LDCONFIG_SECONDS,
            check=False,
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    for line in listed.splitlines():
        name, arrow, path = line.strip().partition(" => ")
        if arrow and name.split(" ")[0] == LIBRARY:
            return Path(path)
    return None
