"""The settings: one class for each table of the configuration, with defaults and rules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from weight_broker.runtime_directory import ENVIRONMENT_VARIABLE
from weight_brokerd.config import rules


def _setting(default: Any, rule: rules.Rule, *, also: str = "") -> Any:
    return field(default=default, metadata={"rule": rule, "also": also})


@dataclass(frozen=True, slots=True)
class BrokerSettings:
    """[broker]"""

    runtime_directory: str = _setting("", rules.runtime_directory, also=ENVIRONMENT_VARIABLE)
    """Where the sockets and the lock file are; the rule of `weight_broker.runtime_directory` if empty."""
    host_id: str = _setting("", rules.identifier)
    """Identity of this host; derived from the machine id if empty."""
    admin_group: str = _setting("", rules.group)
    """Members of this group may administer the broker, as root and the broker's own user may."""
    socket_group: str = _setting("", rules.group)
    """Group of the runtime directory and the sockets; the broker's own if empty."""
    socket_mode: str = _setting("0660", rules.socket_mode)
    """Permissions of the sockets."""

    @property
    def socket_permissions(self) -> int:
        """`socket_mode` as a number."""
        return int(self.socket_mode, 8)


@dataclass(frozen=True, slots=True)
class LimitSettings:
    """[limits]"""

    readers_per_publication: int = _setting(16, rules.whole_number(1, 4096))
    """Transfers that may read one publication at the same time."""
    publications: int = _setting(20_000, rules.whole_number(1, 1_000_000))
    """Publications in total."""
    regions_per_instance: int = _setting(1024, rules.whole_number(1, 65_536))
    """Regions that one instance may offer at the same time."""
    regions_per_process: int = _setting(4096, rules.whole_number(1, 65_536))
    """Regions of all instances of one process."""
    instances: int = _setting(4096, rules.whole_number(1, 65_536))
    """Instances in total."""
    instances_per_process: int = _setting(64, rules.whole_number(1, 65_536))
    """Instances that one process may attach."""
    layout_tensors: int = _setting(8_000_000, rules.whole_number(1, 1_000_000_000))
    """Tensors in the layouts of all publications and running acquisitions."""
    layout_tensors_per_process: int = _setting(2_000_000, rules.whole_number(1, 1_000_000_000))
    """Tensors in the layouts of the publications and running acquisitions of one process."""
    connections_per_process: int = _setting(128, rules.whole_number(1, 65_536))
    """gRPC connections that one process may keep open."""
    acquires: int = _setting(8192, rules.whole_number(1, 1_000_000))
    """Acquire calls that may be open in total."""
    acquires_per_process: int = _setting(256, rules.whole_number(1, 65_536))
    """Acquire calls that one process may have open."""
    watches: int = _setting(256, rules.whole_number(1, 65_536))
    """Watch calls that may be open in total."""
    watches_per_process: int = _setting(16, rules.whole_number(1, 65_536))
    """Watch calls that one process may have open."""
    calls_per_second: int = _setting(500, rules.whole_number(1, 1_000_000))
    """Calls of one process that begin in a second; further ones wait."""
    cold_load_lease_seconds: float = _setting(1800.0, rules.number(1, 86_400))
    """How long a cold load may take unless its holder extends the lease."""
    maximum_wait_seconds: float = _setting(3600.0, rules.number(1, 86_400))
    """How long an acquisition may wait."""
    drain_seconds: float = _setting(30.0, rules.number(0, 3600))
    """How long running transfers may go on once the broker stops."""


@dataclass(frozen=True, slots=True)
class MetricsSettings:
    """[metrics]"""

    listen: str = _setting("", rules.listen_address)
    """HOST:PORT of the Prometheus endpoint; off if empty."""


@dataclass(frozen=True, slots=True)
class LogSettings:
    """[log]"""

    level: str = _setting("info", rules.one_of("debug", "info", "warning", "error"))
    """The lowest level that is logged."""
    format: str = _setting("json", rules.one_of("json", "console"))
    """JSON for machines, console for people."""


@dataclass(frozen=True, slots=True)
class CardSettings:
    """[cards]"""

    enabled: str = _setting("auto", rules.one_of("auto", "on", "off"))
    """Whether Ascend cards are used. `auto`: if Ascend's runtime library is found and there is a datasystem worker."""
    library_path: str = _setting("", rules.absolute_paths)
    """LD_LIBRARY_PATH of the card processes; the broker's own if empty."""
    preload: str = _setting("", rules.absolute_paths)
    """LD_PRELOAD of the card processes; none if empty."""
    path: str = _setting("auto", rules.one_of("auto", "direct", "staged"))
    """How device memory is read and filled: in place, through a staging buffer of the broker, or either way."""
    peer_copy: str = _setting("off", rules.one_of("off", "on", "auto"))
    """Whether a card may map memory of another one and copy it, instead of the datasystem. `auto`: as `proof` says."""
    proof: str = _setting("", rules.absolute_path)
    """The `proof.json` that was made on this host, for `peer_copy`."""
    staging_bytes: int = _setting(64 << 20, rules.whole_number(1 << 20, 16 << 30))
    """Device memory of one staging buffer."""
    receivers_per_card: int = _setting(2, rules.whole_number(1, 64))
    """Transfers into one card at the same time, each with its own process."""
    transfer_seconds: float = _setting(600.0, rules.number(1, 1800))
    """How long one transfer may take; then its receiver is killed."""
    start_seconds: float = _setting(60.0, rules.number(1, 3600))
    """How long a card process may take to open its card, to connect and to warm up."""
    request_seconds: float = _setting(30.0, rules.number(1, 3600))
    """How long a card process may take for a request that moves no weights."""
    import_seconds: float = _setting(30.0, rules.number(1, 3600))
    """How long a card process may take to map or unmap one region."""
    exit_seconds: float = _setting(20.0, rules.number(1, 3600))
    """How long the driver may hold a killed card process; after that, its memory counts as still being written."""
    receiver_idle_seconds: float = _setting(300.0, rules.number(0, 86_400))
    """How long an idle receiver stays."""
    sender_idle_seconds: float = _setting(60.0, rules.number(0, 86_400))
    """How long a sender stays once nothing is published on its card."""
    log_directory: str = _setting("", rules.absolute_path)
    """Where the datasystem's clients log; below the state directory if empty."""


@dataclass(frozen=True, slots=True)
class CudaSettings:
    """[cuda]; the processes that own GPUs take as long as [cards] says."""

    enabled: str = _setting("auto", rules.one_of("auto", "on", "off"))
    """Whether NVIDIA GPUs are used. `auto`: if NVIDIA's driver is found and has a GPU."""
    library_path: str = _setting("", rules.absolute_paths)
    """LD_LIBRARY_PATH of the processes that own GPUs; the broker's own if empty."""


@dataclass(frozen=True, slots=True)
class DatasystemSettings:
    """[datasystem]"""

    worker_address: str = _setting("", rules.worker_address, also="DS_WORKER_ADDR")
    """HOST:PORT of this host's datasystem worker, if the operator runs it."""
    managed: bool = _setting(False, rules.flag)
    """Whether the broker runs the worker, for this host alone."""
    managed_port: int = _setting(0, rules.whole_number(0, 65_535))
    """The managed worker's port on 127.0.0.1; 0: a free one."""
    metastore_port: int = _setting(0, rules.whole_number(0, 65_535))
    """The port of the managed worker's metastore on 127.0.0.1; 0: a free one."""
    shared_memory_mb: int = _setting(1024, rules.whole_number(64, 64 << 20))
    """The most memory, in MiB, that the managed worker takes for host objects."""
    directory: str = _setting("", rules.absolute_path)
    """The managed worker's files and logs; below the state directory if empty."""
    extra_arguments: tuple[str, ...] = _setting((), rules.worker_arguments)
    """More flags of the managed worker, each as `--name=value`."""
    client_public_key_file: str = _setting("", rules.secret_file)
    client_private_key_file: str = _setting("", rules.secret_file)
    server_public_key_file: str = _setting("", rules.secret_file)
    """Curve keys of the connection to the worker: all three or none."""
    access_key_file: str = _setting("", rules.secret_file)
    secret_key_file: str = _setting("", rules.secret_file)
    """Access key and secret key: both or none."""
    token_file: str = _setting("", rules.secret_file)
    """A token with which clients authenticate to the worker."""
    tenant_id: str = _setting("", rules.identifier)
    """The tenant that the broker's objects belong to."""

    @property
    def is_configured(self) -> bool:
        """Whether there is a worker, managed or not."""
        return self.managed or bool(self.worker_address)


CREDENTIAL_FILES_TOGETHER = (
    ("client_public_key_file", "client_private_key_file", "server_public_key_file"),
    ("access_key_file", "secret_key_file"),
)
"""Settings of [datasystem] that must be set together."""
