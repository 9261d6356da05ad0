"""An emulated Ascend host with a real broker, a real datasystem worker, and instances on its cards."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from doubles.cann.build import build
from doubles.cann.control import CannHost, Fault
from support.broker_process import BrokerProcess
from support.card_process import CardProcess
from support.datasystem_worker import DatasystemWorker
from support.waiting import eventually
from weight_broker.v1 import resources_pb2


class DeviceHost:
    """Starts what a test needs; ends it after the test."""

    def __init__(self, cann: CannHost, directory: Path, worker: DatasystemWorker | None) -> None:
        self.cann = cann
        self.directory = directory
        self.worker = worker
        self._stack = ExitStack()

    def start_broker(
        self,
        *,
        worker_port: int | None = None,
        faults: dict[Fault, float] | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> BrokerProcess:
        """A broker that serves the host's cards. `settings`: more variables."""
        double = self.cann.environment(faults=faults)
        preload = double.pop("LD_PRELOAD")
        del double["LD_LIBRARY_PATH"]
        port = worker_port or (self.worker.port if self.worker is not None else 1)
        broker = BrokerProcess(
            self.directory / "run",
            **{
                **double,
                "WEIGHT_BROKER_CARDS_ENABLED": "on",
                "WEIGHT_BROKER_CARDS_LIBRARY_PATH": str(build().libraries),
                "WEIGHT_BROKER_CARDS_PRELOAD": preload,
                "WEIGHT_BROKER_CARDS_START_SECONDS": "20",
                "WEIGHT_BROKER_DATASYSTEM_WORKER_ADDRESS": f"127.0.0.1:{port}",
                **(settings or {}),
            },
        )
        self._stack.callback(broker.close)
        return broker.start()

    def start_instance(self, name: str, *, faults: dict[Fault, float] | None = None, **environment: str) -> CardProcess:
        """A process that calls functions of `support.device_instance`."""
        process = CardProcess(
            self.cann,
            faults=faults,
            environment={
                "WEIGHT_BROKER_RUNTIME_DIRECTORY": str(self.directory / "run"),
                "INSTANCE_NAME": name,
                **environment,
            },
        )
        self._stack.callback(process.close)
        return process

    def close(self) -> None:
        """Ends all of it."""
        self._stack.close()


def cards(broker: BrokerProcess) -> dict[str, resources_pb2.Card]:
    """The broker's cards by their identity."""
    return {card.device_id: card for card in broker.host().cards}


def is_idle(broker: BrokerProcess) -> bool:
    """Whether nothing of any transfer or publication is left at the broker."""
    host = broker.host()
    counts = (host.publication_count, host.region_count, host.running_transfer_count, host.waiting_acquisition_count)
    return not any(counts) and not any(card.region_count or card.offer_count or card.fetch_count for card in host.cards)


def wait_until_idle(broker: BrokerProcess, within: float = 60.0) -> None:
    """Nothing may stay."""
    eventually(lambda: is_idle(broker), within=within)


def published_on(broker: BrokerProcess) -> list[tuple[str, str]]:
    """(instance, card) of every publication."""
    return sorted((one.instance_name, one.device_id) for one in broker.publications())
