"""What the card processes need to know, and how long they may take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from weight_broker.kinds import MemoryKind
from weight_brokerd.processes.environment import inherited


@dataclass(frozen=True, slots=True)
class CardsConfiguration:
    """Times are in seconds."""

    worker_host: str
    """Of the datasystem worker; GPUs need none."""
    worker_port: int
    kind: str = MemoryKind.NPU
    """Of the memory of the cards; names the module of `weight_brokerd.cards.child` that opens them."""
    credentials: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Arguments of the engine's client: token, client_public_key, client_private_key, server_public_key, access_key,
    secret_key, tenant_id."""
    library_path: str = ""
    """LD_LIBRARY_PATH of the card processes; empty: the daemon's own."""
    preload: str = ""
    """LD_PRELOAD of the card processes; the daemon's own is never handed down."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """More variables of the card processes."""
    log_directory: Path | None = None
    """Where the engine's client logs; None: where it does by itself."""
    start_seconds: float = 60.0
    """For a process to open its card, to connect and to warm up."""
    import_seconds: float = 30.0
    request_seconds: float = 30.0
    """For anything that moves no weights. The engine makes everybody wait while it sets a communicator up."""
    stop_seconds: float = 3.0
    """For an orderly end; then it is killed."""
    exit_seconds: float = 20.0
    """For a killed process to be gone. The driver may hold it; then nobody can say that it writes no more."""
    withdraw_seconds: float = 10.0
    """For a delivered key's source to be free of its reader; also behind a communicator that is set up."""
    receivers_per_card: int = 2
    """Fetches at a time into one card. Each has a process of its own, so that killing it costs no other."""
    receiver_idle_seconds: float = 300.0
    sender_idle_seconds: float = 60.0
    """How long processes stay when there is nothing for them."""
    transfer_seconds: float = 600.0
    """The longest that one transfer may take."""

    staging_bytes: int = 64 << 20
    """Size of one staging buffer."""
    restart_seconds: tuple[float, float] = (0.5, 30.0)
    """Wait before starting a sender that ended again: the first time, and the most."""

    def child_environment(self) -> dict[str, str]:
        """All variables of a card process."""
        variables = inherited()
        if self.library_path:
            variables["LD_LIBRARY_PATH"] = self.library_path
        if self.preload:
            variables["LD_PRELOAD"] = self.preload
        if self.log_directory is not None:
            variables["DATASYSTEM_CLIENT_LOG_DIR"] = str(self.log_directory)
        return {**variables, **self.environment}
