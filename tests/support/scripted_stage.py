"""A scripted broker with something to grant, and a client that asks for it."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from support.scripted_broker import Context, ScriptedBroker, fail, granted
from weight_broker import BrokerClient, Reason, WeightSetKey
from weight_broker.memory import HostRegion, describe, export
from weight_broker.memory.host import export as host
from weight_broker.v1 import weight_broker_service_pb2 as pb

KEY = WeightSetKey("model")
Arrays = dict[str, npt.NDArray[Any]]


def arrays(fill: int) -> Arrays:
    return {f"layers.{index}": np.full(1 << 16, fill, np.float32) for index in range(3)}


def holds(tensors: Arrays, fill: int) -> bool:
    return all(bool((array == fill).all()) for array in tensors.values())


def open_memfds() -> int:
    links = []
    for entry in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{entry}"))
        except FileNotFoundError:
            continue
    return sum(link.startswith("/memfd:weight-broker") for link in links)


def assert_set(event: threading.Event) -> None:
    assert event.wait(60)


class Stage:
    """A scripted broker with two resident copies, a sound one and a damaged one, and a client."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.broker = ScriptedBroker(directory).start()
        self.client = BrokerClient(directory)
        self.described = describe(arrays(5))
        self.sound = export(self.described)
        with monkeypatch.context() as patched:
            patched.setattr(host, "seal", _flip_and_seal(host.seal))
            self.damaged = export(self.described)
        self.baseline = open_memfds()

    def grant(self, transfer_id: str, region: HostRegion) -> pb.AcquireResponse:
        self.broker.regions[transfer_id, 0] = region.fd
        return granted(transfer_id, self.described, region)

    def script(self, *steps: pb.AcquireResponse | Reason | Callable[[], None]) -> None:
        """What the broker does on Acquire: after a grant it waits for the report."""

        def play(request: pb.AcquireRequest, context: Context) -> Iterator[pb.AcquireResponse]:
            for step in steps:
                if isinstance(step, Reason):
                    fail(context, step, sources="all")
                elif isinstance(step, pb.AcquireResponse):
                    yield step
                    if step.WhichOneof("event") == "granted":
                        self._wait_for_the_report(context)
                else:
                    step()

        self.reports: list[pb.ReportTransferRequest] = []
        self.broker.on_acquire = play

    def _wait_for_the_report(self, context: Context) -> None:
        is_over = False
        while not is_over:  # a call that was given up may have none
            is_over = not context.is_active()
            with contextlib.suppress(queue.Empty):
                self.reports.append(self.broker.transfer_reports.get(timeout=0.05))
                return

    def close(self) -> None:
        self.client.close()
        self.broker.stop()
        self.sound.close()
        self.damaged.close()


def _flip_and_seal(seal: Callable[[int], None]) -> Callable[[int], None]:
    def flip(fd: int) -> None:
        byte = os.pread(fd, 1, 100)
        os.pwrite(fd, bytes([byte[0] ^ 1]), 100)
        seal(fd)

    return flip
