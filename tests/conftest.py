"""Fixtures: a broker, instances, both real processes."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import settings

from support.broker_process import BrokerProcess
from support.instance_process import InstanceProcess

settings.register_profile("any machine", deadline=None)  # no verdict depends on how fast this one is
settings.load_profile("any machine")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # what runs in a shell's background ignores it, and so would
    signal.signal(signal.SIGINT, signal.default_int_handler)  # every process that a test starts and interrupts


@pytest.fixture
def start_broker(tmp_path: Path) -> Iterator[Callable[..., BrokerProcess]]:
    """Starts brokers; ends them after the test."""
    with ExitStack() as stack:

        def start(name: str = "run", **environment: str) -> BrokerProcess:
            broker = BrokerProcess(tmp_path / name, **environment)
            stack.callback(broker.close)
            return broker.start()

        yield start


@pytest.fixture
def broker(start_broker: Callable[..., BrokerProcess]) -> BrokerProcess:
    """A broker that runs."""
    return start_broker()


@pytest.fixture
def start_instance(tmp_path: Path) -> Iterator[Callable[..., InstanceProcess]]:
    """Starts instances of the broker in `run`; ends them after the test."""
    with ExitStack() as stack:

        def start(name: str = "", runtime_directory: Path | None = None) -> InstanceProcess:
            instance = InstanceProcess(runtime_directory or tmp_path / "run", name)
            stack.callback(instance.close)
            return instance

        yield start
