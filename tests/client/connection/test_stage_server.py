"""The staging server serves, or has left nothing behind."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn, cast

import pytest

from support.scripted_broker import ScriptedBroker
from support.waiting import eventually
from weight_broker.connection.stage_server import StagedTensors, StagingServer
from weight_broker.errors import BrokerUnavailable


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StagingServer]:
    broker = ScriptedBroker(tmp_path).start()
    created = StagingServer(tmp_path / "attach.sock", b"token")
    yield created
    created.close()
    broker.stop()


def test_a_thread_that_could_not_start_is_not_believed_to_run(
    server: StagingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = cast(StagedTensors, SimpleNamespace())
    with monkeypatch.context() as patched:
        patched.setattr("weight_broker.connection.room.start", refuse)
        with pytest.raises(BrokerUnavailable):
            server.add("stage", tensors)
    assert not server.serves("stage")
    server.add("stage", tensors)
    assert server.serves("stage")


def refuse(thread: threading.Thread) -> NoReturn:
    raise BrokerUnavailable("no thread")


def test_without_a_descriptor_for_the_thread_the_broker_is_not_asked(
    server: StagingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_descriptor(*arguments: object) -> NoReturn:
        raise OSError(24, "Too many open files")

    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patched:
        patched.setattr(os, "eventfd", no_descriptor)
        with pytest.raises(BrokerUnavailable, match="LimitNOFILE"):
            server.add("stage", cast(StagedTensors, SimpleNamespace()))
    eventually(lambda: len(os.listdir("/proc/self/fd")) == before)
