"""The client costs nothing until it is used, and almost nothing where there is no broker."""

from __future__ import annotations

import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

import weight_broker
from weight_broker import BrokerClient, BrokerUnavailable, InvalidArgument, WeightSetKey
from weight_broker.connection import attach

HEAVY = ("grpc", "google.protobuf", "torch", "numpy")
KEY = WeightSetKey("model")


def run(code: str, directory: Path) -> list[str]:
    """The modules of `HEAVY` that are imported after `code`, in a fresh interpreter."""
    program = textwrap.dedent(code) + f"\nimport sys\nprint([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program, str(directory)], capture_output=True, text=True, check=True, timeout=60
    )
    return [name for name in HEAVY if repr(name) in done.stdout]


def test_importing_the_package_and_creating_a_client_imports_nothing_heavy(tmp_path: Path) -> None:
    code = """
        import sys, threading, weight_broker
        client = weight_broker.BrokerClient(sys.argv[1], name="x")
        client.close()
        assert threading.active_count() == 1
    """
    assert run(code, tmp_path) == []


def test_noticing_that_there_is_no_broker_imports_nothing_heavy(tmp_path: Path) -> None:
    code = """
        import sys, weight_broker
        client = weight_broker.BrokerClient(sys.argv[1])
        try:
            client.attach_tensors(weight_broker.WeightSetKey("model"))
        except weight_broker.BrokerUnavailable as error:
            assert error.quiesced and not error.touched
        else:
            raise SystemExit("no error")
    """
    assert run(code, tmp_path) == []


def test_every_public_name_can_be_imported() -> None:
    for name in weight_broker.__all__:
        assert getattr(weight_broker, name).__name__ == name
    assert set(weight_broker.__all__) <= set(dir(weight_broker))
    with pytest.raises(AttributeError, match="no_such_name"):
        weight_broker.no_such_name  # noqa: B018


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Which sockets a client tries to connect to; it may not wait for one."""
    tried: list[Path] = []
    connect = attach._connect

    def note_and_connect(path: Path, deadline: float) -> socket.socket:
        tried.append(path)
        return connect(path, deadline)

    def refuse_to_wait(*_: object) -> NoReturn:
        pytest.fail("it waits")

    monkeypatch.setattr(attach, "_connect", note_and_connect)
    monkeypatch.setattr(time, "sleep", refuse_to_wait)
    return tried


def test_without_a_broker_acquire_tries_once_and_says_so_and_touches_nothing(
    tmp_path: Path, attempts: list[Path]
) -> None:
    client = BrokerClient(tmp_path / "absent")
    tensors = {"weight": np.ones(8, np.float32)}
    with pytest.raises(BrokerUnavailable, match=r"attach\.sock") as caught:
        client.acquire(KEY, tensors)
    assert attempts == [tmp_path / "absent" / "attach.sock"]
    assert (caught.value.touched, caught.value.quiesced) == (False, True)
    assert (tensors["weight"] == 1).all()


def test_without_a_broker_acquire_or_load_loads_from_disk_at_once_and_does_not_try_to_publish(
    tmp_path: Path, attempts: list[Path]
) -> None:
    client = BrokerClient(tmp_path / "absent")
    tensors = {"weight": np.zeros(8, np.float32)}
    loads: list[int] = []

    def load() -> None:
        loads.append(len(attempts))
        tensors["weight"].fill(3)

    report = client.acquire_or_load(KEY, tensors, load)
    assert len(attempts) == 1
    assert (report.source, loads, report.publication, report.publish_error) == ("disk", [1], None, None)
    assert report.acquire_error is not None
    assert "BrokerUnavailable" in report.acquire_error
    assert (tensors["weight"] == 3).all()


def test_a_socket_that_nobody_serves_is_no_broker(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left_behind:
        left_behind.bind(str(tmp_path / "attach.sock"))
    with pytest.raises(BrokerUnavailable, match="refused"):
        BrokerClient(tmp_path).acquire(KEY, {"weight": np.ones(8, np.float32)})


def test_an_unresponsive_broker_costs_no_more_than_the_connect_timeout(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.bind(str(tmp_path / "attach.sock"))
        silent.listen(1)
        client = BrokerClient(tmp_path, connect_timeout=0.2)
        with pytest.raises(BrokerUnavailable, match="does not answer"):
            client.acquire(KEY, {"weight": np.ones(8, np.float32)}, timeout=600)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "1", True, None])
def test_a_timeout_that_is_no_positive_number_is_refused(tmp_path: Path, timeout: float) -> None:
    with pytest.raises(InvalidArgument, match="timeout"):
        BrokerClient(tmp_path).acquire(KEY, {"weight": np.ones(8, np.float32)}, timeout=timeout)
    with pytest.raises(InvalidArgument, match="connect_timeout"):
        BrokerClient(tmp_path, connect_timeout=timeout)


def test_a_digest_mode_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="digest_mode"):
        BrokerClient(digest_mode="none")
