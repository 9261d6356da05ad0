"""Where a campaign takes place: a real broker, and the environment of its instances."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from campaign.plan import OPERATIONS
from support.broker_process import BrokerProcess
from support.rpc_errors import DEFECTS

LEASE_SECONDS = 4
"""A lease that its holder forgets ends by itself within the campaign."""
SETTINGS = {
    "WEIGHT_BROKER_LIMITS_COLD_LOAD_LEASE_SECONDS": str(LEASE_SECONDS),
    "WEIGHT_BROKER_LIMITS_DRAIN_SECONDS": "2",
}


@dataclass
class Scene:
    """One broker and what its instances need."""

    broker: BrokerProcess
    memory: str
    environment: Mapping[str, str]
    operations: Mapping[str, int]
    """How often an instance does what."""
    misuses: Callable[[], Sequence[str]] = tuple
    """What the driver of an emulated card saw that its rules forbid."""


@contextmanager
def host_scene(directory: Path) -> Iterator[Scene]:
    """Over host memory."""
    with ExitStack() as stack:
        broker = BrokerProcess(directory / "run", **SETTINGS)
        stack.callback(broker.close)
        broker.start()
        yield Scene(broker, "host", _environment(broker), OPERATIONS)


@contextmanager
def card_scene(directory: Path) -> Iterator[Scene]:
    """Over cards of the CANN double, with a real datasystem worker."""
    from doubles.cann.control import CannHost
    from support.datasystem_worker import DatasystemWorker
    from support.device_host import DeviceHost

    with CannHost() as cann, ExitStack() as stack:
        worker = DatasystemWorker()
        stack.callback(worker.close)
        host = DeviceHost(cann, directory, worker.start())
        stack.callback(host.close)
        logs = {"WEIGHT_BROKER_CARDS_LOG_DIRECTORY": str(directory / "clients")}
        broker = host.start_broker(settings={**SETTINGS, **logs})
        operations = {name: weight for name, weight in OPERATIONS.items() if name != "attach"}
        environment = {**cann.environment(), **_environment(broker)}

        def misuses() -> list[str]:
            return [f"pid {pid}: {text}" for pid in cann.processes() for text in cann.violations(pid)]

        yield Scene(broker, "npu", environment, operations, misuses)


def remains(broker: BrokerProcess) -> dict[str, int]:
    """What the broker still has, by name."""
    host = broker.host()
    return {
        "publications": host.publication_count,
        "regions": host.region_count,
        "running transfers": host.running_transfer_count,
        "waiting acquisitions": host.waiting_acquisition_count,
        "cold-load leases": host.cold_load_lease_count,
        "instances": host.instance_count,
        "memory files of the broker": broker.memfds(),
        "regions on cards": sum(card.region_count for card in host.cards),
        "transfers on cards": sum(card.offer_count + card.fetch_count for card in host.cards),
    }


def processes_of(runtime_directory: Path) -> list[int]:
    """Every process on this host whose environment names the runtime directory."""
    sought = f"WEIGHT_BROKER_RUNTIME_DIRECTORY={runtime_directory}".encode()
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdecimal():
            continue
        try:
            variables = Path(f"/proc/{entry}/environ").read_bytes().split(b"\0")
        except OSError:
            continue  # it ended, or belongs to another user
        if sought in variables:
            found.append(int(entry))
    return found


def defects_in(log: str) -> list[str]:
    """The lines of the broker's log that show a defect."""
    return [line[:2000] for line in log.splitlines() if any(sign in line for sign in DEFECTS)]


def _environment(broker: BrokerProcess) -> dict[str, str]:
    return {"WEIGHT_BROKER_RUNTIME_DIRECTORY": str(broker.runtime_directory)}
