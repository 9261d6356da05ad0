"""What the service manager is told."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from weight_brokerd.daemon.notify import Notifier


class Sink:
    """The service manager's end."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.socket.setblocking(False)

    def received(self) -> list[str]:
        messages = []
        while True:
            try:
                messages.append(self.socket.recv(4096).decode())
            except BlockingIOError:
                return messages


@pytest.fixture(params=["path", "abstract"])
def sink_and_address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Sink, str]]:
    name = str(tmp_path / "notify")
    sink = Sink(name if request.param == "path" else "\0" + name)
    yield sink, name if request.param == "path" else "@" + name
    sink.socket.close()


def test_ready_status_watchdog_and_stopping_arrive_in_order(sink_and_address: tuple[Sink, str]) -> None:
    sink, address = sink_and_address
    notifier = Notifier({"NOTIFY_SOCKET": address})
    assert notifier.active
    notifier.ready("serving")
    notifier.watchdog()
    notifier.status("2 instances")
    notifier.stopping("draining")
    assert sink.received() == [
        f"READY=1\nSTATUS=serving\nMAINPID={os.getpid()}",
        "WATCHDOG=1",
        "STATUS=2 instances",
        "STOPPING=1\nSTATUS=draining",
    ]


def test_a_status_that_did_not_change_is_not_sent_again(sink_and_address: tuple[Sink, str]) -> None:
    sink, address = sink_and_address
    notifier = Notifier({"NOTIFY_SOCKET": address})
    notifier.ready("serving")
    sink.received()
    notifier.status("serving")
    assert sink.received() == []


def test_a_status_cannot_smuggle_a_command_in(sink_and_address: tuple[Sink, str]) -> None:
    sink, address = sink_and_address
    Notifier({"NOTIFY_SOCKET": address}).status("one\nMAINPID=1")
    assert sink.received() == ["STATUS=one MAINPID=1"]


def test_without_a_service_manager_nothing_happens() -> None:
    notifier = Notifier({"WATCHDOG_USEC": "1000000"})
    assert not notifier.active
    assert notifier.watchdog_seconds is None
    notifier.ready("serving")


def test_a_service_manager_that_is_gone_does_no_harm(tmp_path: Path) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")})
    notifier.ready("serving")
    notifier.stopping("draining")


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({"WATCHDOG_USEC": "2500000"}, 2.5),
        ({"WATCHDOG_USEC": "2500000", "WATCHDOG_PID": str(os.getpid())}, 2.5),
        ({"WATCHDOG_USEC": "2500000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_is_ours_only_if_it_names_us_or_nobody(environment: dict[str, str], seconds: float | None) -> None:
    assert Notifier({"NOTIFY_SOCKET": "/nowhere", **environment}).watchdog_seconds == seconds
