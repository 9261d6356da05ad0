"""The configuration of card processes, and their deadlines."""

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
    """Of the datasystem worker; empty for GPUs, which need no worker."""
    worker_port: int
    kind: str = MemoryKind.NPU
    """Kind of the cards' memory; names the module of `weight_brokerd.cards.child` that opens the cards."""
    credentials: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Arguments of the engine's client: token, client_public_key, client_private_key, server_public_key, access_key,
    secret_key, tenant_id."""
    library_path: str = ""
    """LD_LIBRARY_PATH of the card processes; empty: the daemon's."""
    preload: str = ""
    """LD_PRELOAD of the card processes; they never inherit the daemon's."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """More variables of the card processes."""
    log_directory: Path | None = None
    """Where the datasystem's client logs; None: its default."""
    start_seconds: float = 60.0
    """For a process to open its card, connect and warm up."""
    import_seconds: float = 30.0
    request_seconds: float = 30.0
    """For a request that moves no weights. While the engine sets a communicator up, all requests wait."""
    stop_seconds: float = 3.0
    """For an orderly end; then the process is killed."""
    exit_seconds: float = 20.0
    """For a killed process to end. If the driver holds it for longer, the process may still write."""
    withdraw_seconds: float = 10.0
    """For the engine to free a delivered key's source; includes the wait for a communicator."""
    receivers_per_card: int = 2
    """Fetches at a time into one card, each in its own process: to kill one stops no other."""
    receiver_idle_seconds: float = 300.0
    sender_idle_seconds: float = 60.0
    """How long idle processes stay."""
    transfer_seconds: float = 600.0
    """The longest that one transfer may take."""

    staging_bytes: int = 64 << 20
    """Size of one staging buffer."""
    restart_seconds: tuple[float, float] = (0.5, 30.0)
    """Wait before a sender that ended is started again: the first and the longest."""

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
